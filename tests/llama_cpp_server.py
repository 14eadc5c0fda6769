"""llama.cpp's own HTTP server on a free port of 127.0.0.1, from the PyPI package xllamacpp.

    python tests/llama_cpp_server.py MODEL.gguf NUM_SLOTS

It prints its address as soon as it serves. It ends when its standard input ends, so also when its parent is killed.
"""

from __future__ import annotations

import sys

import xllamacpp


def main(model: str, num_slots: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"smollm2"}
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel, params.n_ctx = num_slots, 1024 * num_slots
    # With two threads, one waits for the other, which is slow on a busy machine.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers, params.ui, params.warmup, params.verbosity = 0, False, False, 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

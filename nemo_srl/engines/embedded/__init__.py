"""The embedded engine: batched Llama decoding on the CPU, in process.

    batching.py   which sequences run together, and which tokens their prompts share
    llama.py      the model: weights, prefill of a prefix tree, one decoding step
    kv_cache.py   keys and values of the sequences of a batch
    sampling.py   temperature, top-p and the randomness of each sample
    engine.py     the loop, and `GenerationEngine` around it

One process, one model, torch's own number of threads. No server is needed and nothing is sent anywhere.
"""

from nemo_srl.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]

"""Record the names of TensorRT-LLM that this package uses: run it inside TensorRT-LLM's container.

    python containers/record_trtllm_contract.py > tests/contracts/trtllm-<version>.json

Then let `CONTRACT` in tests/trtllm_contract.py name the new file. The tests tell which of the names that we use the new
version does not know. No GPU is needed if `import tensorrt_llm` works without one. If something has moved, this fails
with an ImportError or AttributeError that names it. Follow it here and in nemo_srl/engines/trtllm/.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from typing import Any


def fields(model: Any) -> list[str]:
    """Public fields of a pydantic model or of a dataclass that its constructor takes."""
    if dataclasses.is_dataclass(model):
        return [f.name for f in dataclasses.fields(model) if f.init and not f.name.startswith("_")]
    return list(model.model_fields)


def record() -> dict[str, Any]:
    import tensorrt_llm
    from tensorrt_llm.commands.serve import serve
    from tensorrt_llm.llmapi import llm_args
    from tensorrt_llm.serve import openai_protocol

    options = {p.name: p for p in serve.params}
    return {
        "version": tensorrt_llm.__version__,
        "recorded": "by containers/record_trtllm_contract.py, from the installed package",
        "sources": {},
        "serve_flags": [flag for p in serve.params for flag in p.opts if flag.startswith("--")],
        "serve_backends": list(options["backend"].type.choices),
        "completion_request": fields(openai_protocol.CompletionRequest),
        "completion_choice": fields(openai_protocol.CompletionResponseChoice),
        "llm_args": fields(llm_args.TorchLlmArgs),
        "kv_cache_config": fields(llm_args.KvCacheConfig),
        "scheduler_config": fields(llm_args.SchedulerConfig),
        "capacity_scheduler_policy": [p.name for p in llm_args.CapacitySchedulerPolicy],
        "cuda_graph_config": fields(llm_args.CudaGraphConfig),
        "sampling_params": fields(tensorrt_llm.SamplingParams),
        "generate_async": [p for p in inspect.signature(tensorrt_llm.LLM.generate_async).parameters if p != "self"],
    }


if __name__ == "__main__":
    json.dump(record(), sys.stdout, indent=1)
    print()

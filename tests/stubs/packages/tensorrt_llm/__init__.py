"""A stand-in for the package that has the recorded names of TensorRT-LLM, and nothing behind them.

containers/record_trtllm_contract.py reads names only, so it records from this what was recorded before.
NEMO_SRL_STUB_WITHOUT names a section of the record that this stand-in then lacks.
"""

import enum
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

_recorded = json.loads((Path(__file__).resolve().parents[3] / "contracts" / "trtllm-1.2.json").read_text())
_recorded.pop(os.environ.get("NEMO_SRL_STUB_WITHOUT", ""), None)
__version__ = "1.2.1"


def _model(section):
    return SimpleNamespace(model_fields=dict.fromkeys(_recorded[section])) if section in _recorded else None


def _module(name, **members):
    module = ModuleType(f"tensorrt_llm.{name}")
    for key, value in members.items():
        if value is not None:
            setattr(module, key, value)
    sys.modules[module.__name__] = module
    parent, _, child = module.__name__.rpartition(".")
    setattr(sys.modules[parent], child, module)


def _option(flag):
    choices = _recorded["serve_backends"] if flag == "--backend" else []
    return SimpleNamespace(name=flag.lstrip("-"), opts=[flag], type=SimpleNamespace(choices=choices))


SamplingParams = _model("sampling_params")
LLM = type("LLM", (), {})
exec(f"def _generate_async(self, {', '.join(f'{name}=None' for name in _recorded['generate_async'])}): ...")
LLM.generate_async = globals()["_generate_async"]

_module("commands")
_module("commands.serve", serve=SimpleNamespace(params=[_option(flag) for flag in _recorded["serve_flags"]]))
_module("llmapi")
_module(
    "llmapi.llm_args",
    TorchLlmArgs=_model("llm_args"),
    KvCacheConfig=_model("kv_cache_config"),
    SchedulerConfig=_model("scheduler_config"),
    CudaGraphConfig=_model("cuda_graph_config"),
    CapacitySchedulerPolicy=enum.Enum("CapacitySchedulerPolicy", _recorded["capacity_scheduler_policy"]),
)
_module("serve")
_module(
    "serve.openai_protocol",
    CompletionRequest=_model("completion_request"),
    CompletionResponseChoice=_model("completion_choice"),
)

"""The candidates for the engine that runs in process on a CPU. Each is used in its fastest way.

    HF generate    static batches; every prompt is prefilled once per sample, as the peers do it
    embedded       our engine
    CTranslate2    all samples of one prompt in one batch (`num_hypotheses`), with the judge's rubric as static prompt
    llama.cpp      its server in this process, with parallel slots and cached prompts, asked by our `openai` engine
    vLLM           `vllm serve` as `engine=vllm` starts and asks it, with compiled kernels (not eager)

All of them sample at temperature 0.7, then from the top 0.9 of the whole vocabulary. CTranslate2 and llama.cpp are
optional (`pip install -e '.[benchmarks]'`). They get the weights of the same model, converted into a scratch directory.
vLLM is optional as well. `python -m tools.install_vllm build/vllm` installs it.
Each candidate is a context manager. It yields a function that runs a workload and returns the number of useful tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import hf_generate
import torch
from generation_workloads import Workload
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_srl import engines
from nemo_srl.engines import open_engine
from nemo_srl.engines.checks import length_check
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.engines.openai.dialects import CompletionsDialect
from nemo_srl.engines.openai.engine import OpenAIEngine, ServerSettings
from nemo_srl.engines.openai.settings import ClientSettings
from nemo_srl.engines.served import open_served
from nemo_srl.engines.vllm import SERVICE_PREFIX
from nemo_srl.engines.vllm.requests import VllmDialect
from nemo_srl.engines.vllm.settings import VllmSettings
from nemo_srl.launchers.services import running
from nemo_srl.models import smollm2
from nemo_srl.models.tokenizer import load_tokenizer
from nemo_srl.protocols import GenerationEngine, SamplingParams

TEMPERATURE, TOP_P = 0.7, 0.9
VLLM = Path(__file__).parents[1] / "build" / "vllm" / "bin" / "vllm"

Run = Callable[[Workload], int]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all candidates get."""

    model_dir: Path
    end_tokens: tuple[int, ...]
    """If empty, every sample goes on to `max_tokens`, and the model in `model_dir` has no end token."""
    batch_size: int
    threads: int
    max_length: int
    """Tokens of the longest prompt together with its sample."""
    scratch: Path
    """Converted models are kept here."""
    gguf: Path | None
    """The published weights of the model. None if they were not published as GGUF."""


@dataclass(frozen=True)
class Candidate:
    """`module` must be installed for it. `served`: its program is one that all stages which ask one model share."""

    name: str
    open: Callable[[Setting], contextlib.AbstractContextManager[Run]]
    module: str = "torch"
    served: bool = False

    def missing(self, setting: Setting) -> str:
        """Why it cannot be measured here. Empty if it can."""
        if self.served and not VLLM.exists():
            return f"{VLLM} does not exist: python -m tools.install_vllm build/vllm"
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed: pip install -e '.[benchmarks]'"
        if self.module == "xllamacpp" and setting.gguf is None:
            return f"it needs weights as a GGUF file, and only --model={smollm2.NAME} has one"
        return ""


@contextlib.contextmanager
def transformers(setting: Setting, *, dtype: str) -> Iterator[Run]:
    model = AutoModelForCausalLM.from_pretrained(setting.model_dir, torch_dtype=getattr(torch, dtype)).eval()
    yield partial(run_transformers, model, batch_size=setting.batch_size, end_tokens=setting.end_tokens)


def run_transformers(model: Any, workload: Workload, *, batch_size: int, end_tokens: Sequence[int]) -> int:
    return hf_generate.generate(
        model, workload.prompts, n=workload.n, max_tokens=workload.max_tokens, batch_size=batch_size,
        temperature=TEMPERATURE, top_p=TOP_P, end_tokens=end_tokens,
    )  # fmt: skip


@contextlib.contextmanager
def embedded(setting: Setting, *, dtype: str) -> Iterator[Run]:
    found = open_engine(EmbeddedSettings(dtype=dtype, max_batch_size=setting.batch_size), setting.model_dir)
    yield partial(run_engine, found)


def run_engine(found: GenerationEngine, workload: Workload) -> int:
    params = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=workload.max_tokens)
    batches = tqdm(found.generate(workload.requests(), params), desc="engine", leave=False, disable=None)
    return sum(completion.num_tokens for batch in batches for completion in batch)


@contextlib.contextmanager
def ctranslate2(setting: Setting, *, dtype: str) -> Iterator[Run]:
    from ctranslate2 import Generator

    model = _converted_for_ctranslate2(setting, dtype)
    tokenizer = AutoTokenizer.from_pretrained(setting.model_dir)
    yield partial(run_ctranslate2, Generator(str(model), compute_type=dtype, intra_threads=setting.threads), tokenizer,
                  batch_size=setting.batch_size, end_tokens=setting.end_tokens)  # fmt: skip


def run_ctranslate2(
    model: Any, tokenizer: Any, workload: Workload, *, batch_size: int, end_tokens: Sequence[int]
) -> int:
    """In CTranslate2, `batch_size` counts prompts.

    It sorts them by length: the prompts of a batch are computed together only up to the end of the shortest one, and
    token by token from there.
    """
    first, last = min(workload.prompts), max(workload.prompts)
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)) - 1
    )
    results = model.generate_batch(
        [tokenizer.convert_ids_to_tokens(prompt[shared:]) for prompt in workload.prompts],
        static_prompt=tokenizer.convert_ids_to_tokens(workload.prompts[0][:shared]) or None,
        max_batch_size=max(1, batch_size // workload.n),
        num_hypotheses=workload.n,
        include_prompt_in_result=False,
        max_length=workload.max_tokens,
        min_length=0 if end_tokens else workload.max_tokens,
        end_token=list(end_tokens) or None,
        return_end_token=True,
        sampling_topk=0,
        sampling_topp=TOP_P,
        sampling_temperature=TEMPERATURE,
    )
    return sum(len(ids) for result in results for ids in result.sequences_ids)


def _converted_for_ctranslate2(setting: Setting, dtype: str) -> Path:
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, model_class: Any, path: str, *, dtype: Any, **kwargs: Any) -> Any:
            # CTranslate2 says `dtype`, as transformers 5 does. Version 4 calls it `torch_dtype`.
            return model_class.from_pretrained(path, torch_dtype=dtype, **kwargs)

    directory = setting.scratch / f"ctranslate2-{dtype}"
    if not directory.exists():
        Converter(str(setting.model_dir)).convert(str(directory), quantization=dtype)
    return directory


@contextlib.contextmanager
def llama_cpp(setting: Setting, *, dtype: str) -> Iterator[Run]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(_requantised_gguf(setting, dtype))
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel = setting.batch_size
    params.kv_unified = True  # faster here than a context per slot
    params.n_ctx = setting.batch_size * -(-setting.max_length // 256) * 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setting.threads
    params.n_gpu_layers, params.ui, params.verbosity = 0, False, 1
    server = xllamacpp.Server(params)
    extra = {"samplers": ["temperature", "top_p"], "ignore_eos": not setting.end_tokens}
    dialect = CompletionsDialect(load_tokenizer(setting.model_dir), setting.end_tokens, extra)
    client = ClientSettings(max_concurrency=setting.batch_size)
    settings = ServerSettings(base_urls=[f"{server.listening_address}/v1"], model="m", client=client)
    yield partial(run_llama_cpp, OpenAIEngine(settings, dialect), endless=not setting.end_tokens)
    del server


def run_llama_cpp(found: OpenAIEngine, workload: Workload, *, endless: bool) -> int:
    num_tokens = run_engine(found, workload)
    # The engine counts tokens of the text, and the model may have made others. The true number is known if none ends.
    return len(workload.prompts) * workload.n * workload.max_tokens if endless else num_tokens


def _requantised_gguf(setting: Setting, dtype: str) -> Path:
    """The published GGUF with every matrix in `dtype`, and with the same metadata."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize, quantize

    path = setting.scratch / f"{dtype}.gguf"
    if path.exists():
        return path
    assert setting.gguf is not None
    reader = GGUFReader(setting.gguf)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    file_type = "ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"
    writer.add_file_type(LlamaFileType[file_type])
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType[dtype] if len(tensor.shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextlib.contextmanager
def vllm(setting: Setting, *, dtype: str) -> Iterator[Run]:
    """vLLM keeps what it has compiled in the scratch directory, so later starts are faster than the first."""
    variables = {
        "OMP_NUM_THREADS": setting.threads,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads that are bound to a core wait for every other program on it
        "VLLM_CPU_KVCACHE_SPACE": 1,
        "VLLM_CACHE_ROOT": setting.scratch / "vllm",
    }
    cfg = VllmSettings(
        command=["env", *(f"{name}={value}" for name, value in variables.items()), str(VLLM), "serve"],
        dtype=dtype,
        max_model_len=setting.max_length,
        max_concurrency=256,
        timeout_seconds=3600,
        max_retries=0,
        start_timeout_seconds=3600,
        # On a CPU, vLLM 0.32 dies when it splits the prompt of a request with a seed.
        extra_options={"enable_chunked_prefill": False},
    )
    extra = {"ignore_eos": not setting.end_tokens}
    dialect = VllmDialect(CompletionsDialect(load_tokenizer(setting.model_dir), setting.end_tokens, extra))
    needed = engines.services(cfg, setting.model_dir, setting.scratch)
    with (
        running(needed, job_name=f"vllm-{dtype}", log_dir=setting.scratch) as services,
        mock.patch.dict(os.environ, services.environment),
    ):
        check = length_check(setting.max_length)
        yield partial(
            run_engine,
            open_served(cfg, setting.model_dir, dialect, prefix=SERVICE_PREFIX, check=check, probe=False),
        )


CANDIDATES = (
    Candidate("HF generate, float32", partial(transformers, dtype="float32")),
    Candidate("HF generate, bfloat16", partial(transformers, dtype="bfloat16")),
    Candidate("CTranslate2, float32", partial(ctranslate2, dtype="float32"), "ctranslate2"),
    Candidate("CTranslate2, int8", partial(ctranslate2, dtype="int8"), "ctranslate2"),
    Candidate("llama.cpp, F32", partial(llama_cpp, dtype="F32"), "xllamacpp"),
    Candidate("llama.cpp, Q8_0", partial(llama_cpp, dtype="Q8_0"), "xllamacpp"),
    Candidate("vLLM, float32", partial(vllm, dtype="float32"), served=True),
    Candidate("vLLM, bfloat16", partial(vllm, dtype="bfloat16"), served=True),
    Candidate("embedded, float32", partial(embedded, dtype="float32")),
    Candidate("embedded, bfloat16", partial(embedded, dtype="bfloat16")),
)

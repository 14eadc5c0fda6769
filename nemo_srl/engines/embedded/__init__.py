"""The embedded engine: batched decoding on the CPU or on one GPU, in process.

    settings.py   what can be set
    batching.py   which sequences run together, and which tokens their prompts share
    llama.py      the model: weights, prefill of a prefix tree, one decoding step
    prefill.py    which prompts are computed together, and their attention
    cuda_graphs.py  decoding steps on a GPU, recorded and replayed
    kv_cache.py   keys and values of the sequences of a batch
    sampling.py   temperature, top-p and the randomness of each sample
    stop.py       stop strings
    engine.py     the loop, and `GenerationEngine` around it

There is one process and one model, with torch's own number of threads. It needs no server and sends nothing anywhere.
"""

from __future__ import annotations

from pathlib import Path

from nemo_srl.engines import EngineBackend, EngineSize
from nemo_srl.engines.embedded.settings import BATCH_SIZES, EmbeddedSettings
from nemo_srl.errors import ConfigError
from nemo_srl.models.hf import read_spec
from nemo_srl.protocols import GenerationEngine

ROPE_TYPES = ("default", "linear", "llama3")
"""The kinds of scaling of the rotary embedding that `llama.py` has."""


def _open(settings: EmbeddedSettings, model_dir: Path) -> GenerationEngine:
    from nemo_srl.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(model_dir, settings)


def _check(settings: EmbeddedSettings, model_dir: Path) -> None:
    if not model_dir.is_dir():
        return  # a model that is still to be trained, which has the scaling of the model before it
    spec = read_spec(model_dir)
    if spec.rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"engine.name='embedded': {model_dir} has rope_scaling={spec.rope_scaling}, and this engine knows the "
            f"types {', '.join(ROPE_TYPES)}. Serve this model with another engine."
        )


def _size(settings: EmbeddedSettings) -> EngineSize:
    if settings.device != "cuda":
        return EngineSize()  # with "auto", a cluster's job gets no GPU, and so the engine runs on the CPU
    return EngineSize(num_replicas=1, in_process=True, max_batch_size=settings.max_batch_size or BATCH_SIZES["cuda"])


BACKEND = EngineBackend(settings=EmbeddedSettings, decisive=("dtype",), open=_open, check=_check, size=_size)

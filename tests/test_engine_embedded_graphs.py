"""What only a GPU uses, on CPU tensors: recorded decoding steps, and prompts that are prefilled with padding.

The stand-in for a CUDA graph is `make_fx`. It records a step's operations on the tensors that it saw, and no Python
value that changes. So a replay is wrong wherever a CUDA graph's would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nemo_srl.engines.embedded import llama, prefill
from nemo_srl.engines.embedded.batching import prefix_tree
from nemo_srl.engines.embedded.cuda_graphs import GraphedSteps
from nemo_srl.engines.embedded.engine import EmbeddedEngine
from nemo_srl.engines.embedded.llama import LlamaModel
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.protocols import GenerationRequest, SamplingParams
from tests.completions import collect
from tests.tiny import make_model

SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=40)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("graphs") / "model"
    return make_model(directory, ["a tiny text"], vocab_size=300, family=request.param)


@pytest.fixture(autouse=True)
def _no_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: `make_fx` cannot record oneDNN's own layout of weights."""
    monkeypatch.setattr(llama, "make_linear", lambda w, b=None: lambda x: torch.nn.functional.linear(x, w, b))


class Recorder:
    """`Capture` with `make_fx`. It counts replays."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], object]:
        recorded = make_fx(function)()
        self.num_captured += 1

        def run() -> None:
            self.num_replayed += 1
            recorded()

        return run


def requests(num: int, *, length: int, n: int) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(length)
    stem = tuple(torch.randint(3, 100, (length // 2,), generator=generator).tolist())
    ends = torch.randint(3, 100, (num, length - len(stem)), generator=generator).tolist()
    return [
        GenerationRequest(key=f"r{i}", prompt_token_ids=(*stem, *end[: length // 2 - i]), n=n, seed=3)
        for i, end in enumerate(ends)
    ]


def test_replayed_steps_give_the_same_text_as_plain_ones(model_dir: Path) -> None:
    """Batches that shrink, that outgrow the buffers, and that follow a batch whose rows hold other text."""
    settings = EmbeddedSettings(dtype="float32", max_batch_size=20)
    plain, graphed = EmbeddedEngine(model_dir, settings), EmbeddedEngine(model_dir, settings)
    recorder = Recorder()
    graphed._steps = steps = GraphedSteps(graphed._model, recorder)
    ends = frozenset(range(100, 130))  # so that rows leave the batch at different steps
    for engine in (plain, graphed):
        engine._model.spec = replace(engine._model.spec, eos_token_ids=tuple(ends))
    places = []
    for num, length, n in ((3, 24, 4), (5, 150, 7), (2, 40, 3)):
        asked = requests(num, length=length, n=n)
        want, got = (collect(engine.generate(asked, SAMPLED)) for engine in (plain, graphed))
        assert len({c.num_tokens for c in want.values()}) > 3
        assert got == want
        assert steps._buffers is not None
        places.append(steps._buffers.cache.keys.data_ptr())
    assert places[0] != places[1] == places[2], "the second call needs more room, the third one has it"
    assert 0 < recorder.num_captured < recorder.num_replayed / 3


@torch.inference_mode()
def test_a_step_of_one_shape_is_recorded_the_second_time(model_dir: Path) -> None:
    model = LlamaModel(model_dir, dtype=torch.float32)
    recorder = Recorder()
    steps = GraphedSteps(model, recorder)
    cache = steps.new_cache(num_rows=3, max_prompt=10, max_tokens=200)
    cache.fill(0, 3, *(torch.randn(len(cache.keys), 10, *cache.keys.shape[2:4]) for _ in range(2)))
    counts = []
    for i in range(100):
        steps.decode(model.tensor([5, 6, 7]), model.tensor([10 + i] * 3), cache)
        counts.append((recorder.num_captured, recorder.num_replayed))
    assert counts[:3] == [(0, 0), (1, 1), (1, 2)]
    assert counts[95:98] == [(1, 95), (1, 95), (2, 96)], "prompts take 32 columns; the 97th token is the 129th column"


@torch.inference_mode()
def test_rows_of_an_earlier_batch_leave_nothing_behind(model_dir: Path) -> None:
    """NaN in a masked column would become NaN in the product with the values."""
    model = LlamaModel(model_dir, dtype=torch.float32)
    steps = GraphedSteps(model, Recorder())
    cache = steps.new_cache(num_rows=2, max_prompt=64, max_tokens=64)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    assert steps.new_cache(num_rows=1, max_prompt=3, max_tokens=8) is cache
    cache.fill(0, 1, *(torch.randn(len(cache.keys), 3, *cache.keys.shape[2:4]) for _ in range(2)))
    assert steps.decode(model.tensor([5]), model.tensor([3]), cache).isfinite().all()


@pytest.mark.parametrize("limit", [10**6, 64])
def test_padded_prefill_computes_what_prefill_by_segment_computes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    model = LlamaModel(model_dir, dtype=torch.float32)
    stem = tuple(range(20, 120))
    prompts = [stem, (*stem[:50], 7, 8, 9), (5,), stem[:20], (*stem, *range(30, 70)), (*stem, *range(40, 60))]
    segments, ends = prefix_tree(prompts)
    want = model.prefill(segments)
    monkeypatch.setattr(prefill, "_GPU_TOKENS", limit)
    gpu_chunks = list(prefill.chunks(segments, torch.device("cuda")))
    assert len(gpu_chunks) > (3 if limit == 64 else 1)
    monkeypatch.setattr(llama, "chunks", lambda *_: gpu_chunks)
    monkeypatch.setattr(llama, "attention", prefill.attend_padded)
    got = model.prefill(segments)
    for prompt in prompts:
        end = ends[prompt]
        for x, y in zip(got.of_prompt(end), want.of_prompt(end), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.last_hidden[id(end)], want.last_hidden[id(end)], atol=1e-5, rtol=1e-4)

"""One server of the real vLLM: what it is asked, and what it answers, against the embedded engine in float32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemo_srl import engines
from nemo_srl.engines import open_engine
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.engines.vllm.settings import VllmSettings
from nemo_srl.errors import EngineError, JobFailedError
from nemo_srl.launchers.services import running
from nemo_srl.protocols import SERVICES_VARIABLE, GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import Completion
from tests import tiny
from tests.completions import collect

pytestmark = pytest.mark.timeout(3600)

SAMPLED = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=200)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[Path], Path]) -> Path:
    """Ends with either of two tokens, and brings sampling settings that nobody asked for."""
    made = tiny_model(tmp_path_factory.mktemp("model"))
    settings = {"eos_token_id": [2, 0], "bos_token_id": 1, "do_sample": True, "top_k": 1, "repetition_penalty": 1.5}
    (made / "generation_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def url(engine: dict[str, Any], model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    needed = engines.services(VllmSettings(**engine), model_dir, directory)
    with running(needed, job_name="job", log_dir=directory) as services:
        yield services.urls["vllm-0"]


@pytest.fixture
def vllm(url: str, engine: dict[str, Any], model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> GenerationEngine:
    monkeypatch.setenv(SERVICES_VARIABLE, json.dumps({"vllm-0": url}))
    return open_engine(VllmSettings(**{**engine, "max_concurrency": 8}), model_dir)


def request(*ids: int, n: int = 4) -> GenerationRequest:
    return GenerationRequest(key=f"k{'-'.join(map(str, ids))}", prompt_token_ids=(1, *ids), n=n, seed=5)


def test_samples_differ_in_length_and_end_with_either_token(vllm: GenerationEngine) -> None:
    got = collect(vllm.generate([request(80 + i) for i in range(16)], SAMPLED))
    assert len(got) == 64
    by_reason = {r: [c for c in got.values() if c.finish_reason == r] for r in ("stop", "length")}
    assert {c.num_tokens for c in by_reason["length"]} == {200}
    lengths = {c.num_tokens for c in by_reason["stop"]}
    assert len(lengths) > 10
    assert max(lengths) <= 200
    assert len({c.text for c in got.values()}) == 64, "the model's own top_k=1 is not used"
    assert not [c for c in got.values() if "<|" in c.text], "no end token is in the text"


def test_more_prompts_than_fit_into_one_pass(vllm: GenerationEngine) -> None:
    """vLLM for CPUs takes 2048 tokens in a pass. It dies if it splits the prompt of a request with a seed."""
    asked = [request(*(80 + (i + j) % 200 for j in range(400))) for i in range(8)]
    got = collect(vllm.generate(asked, SAMPLED))
    assert len(got) == 32
    assert {c.finish_reason for c in got.values()} <= {"stop", "length"}


def test_both_end_tokens_are_seen(url: str, model_dir: Path, vllm: GenerationEngine) -> None:
    body = {
        "model": json.loads(httpx.get(f"{url}/v1/models").text)["data"][0]["id"], "prompt": [1, 80], "n": 64, "seed": 1,
        "max_tokens": 200, "temperature": 1.0, "stop_token_ids": [2, 0], "return_token_ids": True,
    }  # fmt: skip
    choices = httpx.post(f"{url}/v1/completions", json=body, timeout=600).json()["choices"]
    ends = [c["token_ids"][-1] for c in choices if c["finish_reason"] == "stop"]
    assert set(ends) == {0, 2}


@pytest.fixture(scope="module")
def embedded(model_dir: Path) -> GenerationEngine:
    return open_engine(EmbeddedSettings(dtype="float32"), model_dir)


def test_greedy_text_and_log_probabilities_are_those_of_the_embedded_engine(
    vllm: GenerationEngine, embedded: GenerationEngine, model_dir: Path
) -> None:
    digits = [tokenizer_ids(model_dir, str(k)) for k in range(10)]
    asked = [request(digit, 80 + i, digit, n=1) for i in range(3) for digit in digits]
    params = SamplingParams(temperature=0.0, top_p=1.0, max_tokens=12, num_logprobs=20)
    ours, theirs = (collect(e.generate(asked, params)) for e in (embedded, vllm))
    same = [key for key in ours if ours[key].text == theirs[key].text]
    assert len(same) >= 0.9 * len(ours), "rounding decides between tokens that are equally likely"
    num_compared = 0
    for key in same:
        assert ours[key].num_tokens == theirs[key].num_tokens
        num_compared += compare(ours[key], theirs[key])
    assert num_compared >= 5


def test_verdicts_of_one_token_have_log_probabilities(vllm: GenerationEngine) -> None:
    """Sampled with a temperature. The log-probabilities are those without it."""
    params = SamplingParams(temperature=2.0, top_p=1.0, max_tokens=1, num_logprobs=20)
    found = collect(vllm.generate([request(80 + i, n=16) for i in range(32)], params)).values()
    numbers = [c for c in found if c.number_logprobs]
    assert numbers
    for c in numbers:
        ((offset, top),) = c.number_logprobs or []
        assert c.text[offset:].strip() in {token.strip() for token in top}
        assert sum(map(math.exp, top.values())) < 1.001


def compare(ours: Completion, theirs: Completion) -> int:
    """How many log-probabilities both engines have, which must be the same."""
    compared = 0
    found = dict(ours.number_logprobs or [])
    for offset, top in theirs.number_logprobs or []:
        for token, logprob in top.items():
            assert found[offset][token] == pytest.approx(logprob, abs=1e-3)
            compared += 1
    return compared


def tokenizer_ids(model_dir: Path, text: str) -> int:
    from transformers import AutoTokenizer

    (found,) = AutoTokenizer.from_pretrained(model_dir).encode(text, add_special_tokens=False)
    return int(found)


def test_a_stop_string_ends_a_sample(vllm: GenerationEngine) -> None:
    asked = GenerationRequest(key="k", prompt_token_ids=(1, 80), n=16, seed=2, stop=("e",))
    got = collect(vllm.generate([asked], SAMPLED)).values()
    ended = [c for c in got if c.finish_reason == "stop" and "e" in c.text]
    assert ended
    assert not [c for c in got if "e" in c.text[:-12]], "nothing was generated after the token with the stop string"


def test_a_flag_that_vllm_refuses_comes_back_with_its_words(
    engine: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    (needed,) = engines.services(VllmSettings(**{**engine, "extra_options": {"speed": 11}}), model_dir, tmp_path)
    with (
        pytest.raises(
            JobFailedError, match=r"(?s)vllm-0 ended .* before it was ready.*unrecognized arguments: --speed"
        ),
        running([needed], job_name="job", log_dir=tmp_path),
    ):
        pass


def test_another_model_is_never_asked(engine: dict[str, Any], tmp_path: Path, vllm: GenerationEngine) -> None:
    other = tiny.make_model(tmp_path / "other", ["Score: 4"], num_attention_heads=2, num_query_groups=1, seed=2)
    with pytest.raises(EngineError, match=r"this server has model-[0-9a-f]{16}, and the stage asks model-"):
        list(open_engine(VllmSettings(**engine), other).generate([request(80)], SAMPLED))

"""`engine=openai` against a server that is not ours: llama.cpp's, with SmolLM2, both from PyPI."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_srl.artifacts import BaseModel
from nemo_srl.chat import ChatTemplate
from nemo_srl.engines import open_engine
from nemo_srl.experiment import Experiment
from nemo_srl.models import resolve, smollm2
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion
from nemo_srl.stages import judgements
from tests.completions import collect
from tests.support import ROOT, composed, server
from tests.tables import answers_to

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp: pip install -e '.[dev]'"
)

CACHE = Path("~/.cache/nemo_srl").expanduser()
NUM_SLOTS = 4
SAME_SAMPLING = {"samplers": ["temperature", "top_p"]}
"""Otherwise llama.cpp adds a top-k and a min-p of its own, and takes top-p before the temperature."""
GREEDY = SamplingParams(temperature=0, top_p=1, max_tokens=16)
APIS = pytest.mark.parametrize("api", ["chat", "completions"])


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve(smollm2.NAME, CACHE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("llama_cpp")
    smollm2.fetch_gguf(CACHE, directory / "model.gguf")
    command = [sys.executable, str(ROOT / "tests/llama_cpp_server.py"), str(directory / "model.gguf"), str(NUM_SLOTS)]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    with process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            assert address, (directory / "log").read_text()
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait(20)


def ask(
    url: str, model_dir: Path, api: str, requests: list[GenerationRequest], params: SamplingParams
) -> dict[str, Completion]:
    cfg = server(url, api=api, extra_body=SAME_SAMPLING, max_concurrency=2, max_retries=1)
    return collect(open_engine(cfg, model_dir).generate(requests, params))


def request(model_dir: Path, text: str, *, n: int, seed: int = 1) -> GenerationRequest:
    chat = ChatTemplate(model_dir)
    return GenerationRequest(key="k", prompt_token_ids=chat.encode(chat.render(text)), text=text, n=n, seed=seed)


@APIS
def test_token_ids_and_the_servers_own_template_give_the_same_answer(url: str, model_dir: Path, api: str) -> None:
    asked = request(model_dir, "What is the capital of Germany?", n=2)
    got = ask(url, model_dir, api, [asked], GREEDY)
    assert got.keys() == {"k/00", "k/01"}
    c = got["k/01"]
    assert (c.text, c.finish_reason, c.num_tokens) == ("The capital of Germany is Berlin.", "stop", 8)
    short = SamplingParams(temperature=0, top_p=1, max_tokens=3)
    c = ask(url, model_dir, api, [asked], short)["k/00"]
    assert (c.text, c.finish_reason, c.num_tokens) == ("The capital of", "length", 3)


@APIS
def test_samples_differ_and_their_seed_decides_them(url: str, model_dir: Path, api: str) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=12)
    text = "Write the first words of a story."

    def texts(seed: int) -> list[str]:
        got = ask(url, model_dir, api, [request(model_dir, text, n=3, seed=seed)], params)
        return [got[f"k/{i:02d}"].text for i in range(3)]

    first = texts(1)
    assert len(set(first)) == 3
    assert texts(1) == first
    assert texts(2) != first


@APIS
def test_log_probabilities_come_with_either_api(url: str, model_dir: Path, api: str) -> None:
    params = SamplingParams(temperature=0, top_p=1, max_tokens=16, num_logprobs=5)
    c = ask(url, model_dir, api, [request(model_dir, "What is 2 + 2? Answer with one number.", n=1)], params)["k/00"]
    assert c.number_logprobs
    for offset, top in c.number_logprobs:
        assert c.text[offset].isdigit()
        assert c.text[offset] in {token.strip() for token in top}
        assert 0 < sum(map(math.exp, top.values())) < 1.001


def test_more_samples_than_the_server_has_slots(url: str, model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=8)
    got = ask(url, model_dir, "completions", [request(model_dir, "Name a fruit.", n=NUM_SLOTS + 1)], params)
    assert len(got) == NUM_SLOTS + 1
    assert "one at a time" in caplog.text


def test_a_judge_on_the_server(url: str, model_dir: Path, tmp_path: Path) -> None:
    cfg = composed(
        f"run_dir={tmp_path / 'run'}", "+engine@judge.engine=openai", f"judge.engine.base_url={url}",
        "+judge.engine.extra_body={samplers: [temperature, top_p]}", "judge.max_tokens=24",
    )  # fmt: skip
    answers = answers_to(tmp_path, ("a", "Capital of France?", "Paris."), ("b", "2 + 2?", "4"))
    with Experiment(cfg) as exp:
        made = exp.run(judgements.STAGE, 1, judge=BaseModel(model_dir, "digest"), candidates=answers)
        assert made.identity["judge.engine.base_url"] == url
        verdicts = made.read()
    assert len(verdicts) == 2 * cfg.judge.num_judgements
    assert all(v.verdict for v in verdicts)
    assert len({v.verdict for v in verdicts}) > 2

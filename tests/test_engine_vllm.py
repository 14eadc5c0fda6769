"""vLLM without vLLM: what we send is in the record of its names, and an answer that it gave is read right.

`tests/vllm/` runs the real one (`make vllm`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.engines import engine_backend, open_engine, services
from nemo_srl.engines.openai.dialects import BadChoiceError, CompletionsDialect
from nemo_srl.engines.vllm.options import serve_command
from nemo_srl.engines.vllm.requests import VllmDialect
from nemo_srl.engines.vllm.settings import VllmSettings
from nemo_srl.errors import ConfigError
from nemo_srl.models import hf
from nemo_srl.protocols import SERVICES_VARIABLE, GenerationRequest, SamplingParams
from tests import tiny
from tests.loopback import CharTokenizer
from tests.support import composed

CONTRACT = Path(__file__).parent / "contracts" / "vllm-0.32.json"
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=20, num_logprobs=2)
DIALECT = VllmDialect(CompletionsDialect(CharTokenizer(), (0, 7)))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"), ["text"], vocab_size=300)


def contract() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(CONTRACT.read_text())
    return found


def test_every_flag_is_in_the_contract() -> None:
    extra = {"enforce_eager": True, "async_scheduling": False, "override_generation_config": {"top_k": 0}, "seed": 3}
    cfg = VllmSettings(tensor_parallel_size=4, max_num_batched_tokens=4096, extra_options=extra)
    command = serve_command(cfg, Path("/model"), name="m", max_model_len=2048)
    assert command[:3] == ["vllm", "serve", "/model"]
    assert not {word for word in command if word.startswith("--")} - set(contract()["serve_flags"])
    text = " ".join(command)
    for part in (
        "--host {host} --port {port} --served-model-name m", "--enable-prefix-caching", "--max-model-len 2048",
        "--generation-config vllm", "--max-num-batched-tokens 4096", "--tensor-parallel-size 4", "--enforce-eager",
        '--no-async-scheduling --override-generation-config {"top_k": 0} --seed 3',
    ):  # fmt: skip
        assert part in text
    assert "--max-num-batched-tokens" not in serve_command(VllmSettings(), Path("/m"), name="m", max_model_len=1)


@pytest.mark.parametrize("num_logprobs", [0, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_field_of_a_request_is_in_the_contract(num_logprobs: int, temperature: float) -> None:
    params = replace(PARAMS, num_logprobs=num_logprobs, temperature=temperature)
    request = GenerationRequest(key="k", prompt_token_ids=(1, 2), n=2, seed=1, stop=("Score: 4\n",))
    body = DIALECT.body(request, params, model="m", n=2, seed=3)
    assert not set(body) - set(contract()["completion_request"]), "vLLM would ignore these"
    assert (body["stop"], body["include_stop_str_in_output"]) == (["Score: 4\n"], True)
    assert (body["stop_token_ids"], body["return_token_ids"]) == ([0, 7], True)
    assert ("logprobs" in body) == (num_logprobs > 0)


def choice(text: str, *, end: int | None, reason: str = "stop", stop_reason: object = None) -> dict[str, Any]:
    """As vLLM 0.32 gives it. Its text is wrong on purpose, because it is not used."""
    ids = [*map(ord, text), *(() if end is None else (end,))]
    found = {
        "index": 0, "text": "??", "token_ids": ids, "finish_reason": reason, "stop_reason": stop_reason,
        "prompt_logprobs": None, "prompt_token_ids": [1, 2], "routed_experts": None,
        "logprobs": {
            "text_offset": [0] * len(ids),
            "tokens": [f"token_id:{i}" for i in ids],
            "token_logprobs": [-0.5] * len(ids),
            "top_logprobs": [{f"token_id:{i}": -0.5, "token_id:53": -1.5} for i in ids],
        },
    }  # fmt: skip
    assert not set(found) - set(contract()["completion_choice"])
    assert not set(found["logprobs"]) - set(contract()["completion_logprobs"])
    return found


@pytest.mark.parametrize(("end", "stop_reason"), [(0, None), (7, 7)])
def test_ids_and_log_probabilities_are_read_from_token_ids(end: int, stop_reason: object) -> None:
    sample = DIALECT.sample(choice("So 4", end=end, stop_reason=stop_reason), PARAMS)
    assert (sample.text, sample.num_tokens, sample.finish_reason) == ("So 4", 5, "stop")
    assert sample.number_logprobs == [(3, {"4": -0.5, "5": -1.5})]
    cut = DIALECT.sample(choice("So 4", end=None, reason="length"), PARAMS)
    assert (cut.text, cut.num_tokens, cut.finish_reason) == ("So 4", 4, "length")


def test_a_sample_that_a_stop_string_ended_has_no_end_token() -> None:
    sample = DIALECT.sample(choice("So 4\n", end=None, stop_reason="4\n"), replace(PARAMS, num_logprobs=0))
    assert (sample.text, sample.num_tokens, sample.finish_reason) == ("So 4\n", 5, "stop")


def test_answers_that_lack_something_are_refused() -> None:
    for broken in (
        {"token_ids": None},
        {"finish_reason": "abort"},
        {"logprobs": None},
        {"logprobs": {"tokens": ["four"], "token_logprobs": [-1.0], "top_logprobs": [{}]}},
    ):
        with pytest.raises(BadChoiceError):
            DIALECT.sample({**choice("4", end=0), **broken}, PARAMS)


def test_replicas_are_services_whose_name_follows_the_weights(model_dir: Path, tmp_path: Path) -> None:
    cfg = VllmSettings(num_replicas=4, num_nodes=2, tensor_parallel_size=2, command=["/envs/vllm/bin/vllm", "serve"])
    found = services(cfg, model_dir, tmp_path)
    assert [(s.name, s.node, s.num_gpus) for s in found] == [(f"vllm-{i}", i // 2, 2) for i in range(4)]
    command = list(found[0].command)
    assert command[command.index("--served-model-name") + 1] == f"model-{hf.digest(model_dir)[:16]}"
    assert command[command.index("--max-model-len") + 1] == "1024", "the model's context"
    assert engine_backend(cfg).size(cfg).num_gpus == 8
    with pytest.raises(ConfigError, match=r"max_model_len=2048.*1024"):
        services(replace(cfg, max_model_len=2048), model_dir, tmp_path)


def test_a_prompt_over_the_limit_is_not_sent(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVICES_VARIABLE, json.dumps({"vllm-0": "http://127.0.0.1:9"}))  # nothing listens there
    engine = open_engine(VllmSettings(max_model_len=32, max_retries=0), model_dir)
    request = GenerationRequest(key="k", prompt_token_ids=(1,) * 13, n=2, seed=1)
    found = [c for batch in engine.generate([request], PARAMS) for c in batch]
    assert [(c.finish_reason, c.text) for c in found] == [("too_long", "")] * 2
    assert "13 tokens and max_tokens=20 exceed the limit of 32 tokens" in found[0].reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extra_options": {"port": 1}}, r"'port': the engine sets this option itself"),
        ({"extra_options": {"max-num-seqs": 8}}, r"Use engine\.max_num_seqs"),
        ({"extra_options": {"no_enable_prefix_caching": True}}, "sets this option itself"),
        ({"extra_options": {"--enforce-eager": True}}, "write the name as 'enforce_eager'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"command": []}, "must name a program"),
        ({"num_replicas": 3, "num_nodes": 2}, "must divide"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VllmSettings(**settings)


def test_only_what_decides_the_text_is_decisive() -> None:
    cfg = composed("engine=vllm", "engine.command=[/envs/vllm/bin/vllm, serve]", "+engine.extra_options.seed=3")
    assert cfg.engine.extra_options == {"seed": 3}
    assert engine_backend(cfg.engine).decisive == ("dtype", "extra_options")

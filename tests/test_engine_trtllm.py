"""TensorRT-LLM without a GPU: what we send is in the recorded contract, and a stand-in server runs the real path."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_srl import engines, shared_storage
from nemo_srl.artifacts import BaseModel, Table
from nemo_srl.config import CandidatesConfig, Config, JudgeConfig
from nemo_srl.engines import trtllm
from nemo_srl.engines.openai.dialects import CompletionsDialect
from nemo_srl.engines.trtllm.options import llm_options, llm_sizes, serve_command
from nemo_srl.engines.trtllm.requests import TrtllmDialect
from nemo_srl.engines.trtllm.settings import BACKENDS, TrtllmSettings
from nemo_srl.errors import ConfigError, EngineError, JobFailedError
from nemo_srl.experiment import Experiment
from nemo_srl.launchers import keeper
from nemo_srl.launchers import services as launcher_services
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.models import hf
from nemo_srl.protocols import GenerationRequest, Job, SamplingParams
from nemo_srl.records import Candidate, Judgement, Prompt
from nemo_srl.stages import candidates, judgements
from tests import tensorrt_llm_stub, tiny
from tests.completions import collect
from tests.loopback import CharTokenizer, Loopback
from tests.support import ROOT, composed
from tests.tables import answers_to, published
from tests.trtllm_contract import contract, problem_with_options, unknown_names

STUBS = Path(__file__).parent / "stubs"
PARAMS = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=20, num_logprobs=5)
RUBRIC = "Grade {response} to {instruction} with Score: <points>"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("model"), ["Score: 4", "Name color number 1."], vocab_size=300)


@pytest.fixture(autouse=True)
def _stub_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{STUBS}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(launcher_services, "GRACE_SECONDS", 2.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def config(**fields: Any) -> TrtllmSettings:
    return TrtllmSettings(**{"start_timeout_seconds": 120, **fields})


def request(text: str = "p", n: int = 2) -> GenerationRequest:
    return GenerationRequest(key=f"k-{text}", prompt_token_ids=tuple(map(ord, text)), n=n, seed=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_flag_and_option_is_in_the_contract(backend: str) -> None:
    cfg = config(backend=backend, tensor_parallel_size=4, pipeline_parallel_size=2)
    command = serve_command(cfg, Path("/model"), Path("/options.yaml"), max_seq_len=4096)
    assert command[:2] == ["trtllm-serve", "/model"]
    flags = dict(zip(command[2::2], command[3::2], strict=True))
    assert not set(flags) - set(contract()["serve_flags"])
    assert flags["--backend"] in contract()["serve_backends"]
    assert (flags["--tp_size"], flags["--pp_size"]) == ("4", "2")
    assert (flags["--host"], flags["--port"]) == ("{host}", "{port}"), "for the launcher"
    assert problem_with_options({**llm_sizes(cfg, max_seq_len=4096), **llm_options(cfg)}) == ""


@pytest.mark.parametrize("num_logprobs", [0, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_every_field_of_a_request_is_in_the_contract(num_logprobs: int, temperature: float) -> None:
    params = replace(PARAMS, num_logprobs=num_logprobs, temperature=temperature)
    dialect = TrtllmDialect(CompletionsDialect(CharTokenizer(), (0, 7)))
    body = dialect.body(request(), params, model="m", n=2, seed=3)
    assert "stop" not in body
    assert body["include_stop_str_in_output"] is True, "or ids and log-probabilities differ in number"
    body = dialect.body(replace(request(), stop=("Score: 4\n",)), params, model="m", n=2, seed=3)
    assert not unknown_names("completion_request", body)
    assert body["stop"] == ["Score: 4\n"]
    assert body["stop_token_ids"] == [0, 7]
    assert body["temperature"] > 0
    assert (body["top_k"] == 1) == (temperature == 0)
    assert ("logprobs" in body) == (num_logprobs > 0)


def test_the_recommended_settings_are_written_out_and_can_be_overridden(tmp_path: Path, model_dir: Path) -> None:
    extra = {"kv_cache_config": {"enable_block_reuse": False}, "guided_decoding_backend": "xgrammar"}
    cfg = config(num_replicas=2, tensor_parallel_size=4, extra_options=extra)
    found = trtllm.services(cfg, model_dir, tmp_path)
    assert [(s.name, s.num_gpus) for s in found] == [("trtllm-0", 4), ("trtllm-1", 4)]
    served = Path(found[0].command[1])
    assert (served.name, served.resolve()) == (f"model-{hf.digest(model_dir)[:16]}", model_dir.resolve())
    assert OmegaConf.to_container(OmegaConf.load(found[0].command[-1])) == {
        "dtype": "bfloat16",
        "enable_chunked_prefill": True,
        "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.9},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": 32},
        "guided_decoding_backend": "xgrammar",
    }
    assert "1024" in found[0].command, "the model's context"
    with pytest.raises(ConfigError, match=r"max_seq_len=2048.*1024"):
        trtllm.services(config(max_seq_len=2048), model_dir, tmp_path)


def test_a_bare_program_is_started_by_mpirun_and_a_command_of_the_users_is_left_alone(
    model_dir: Path, tmp_path: Path
) -> None:
    own = ["apptainer", "exec", "image.sif", "trtllm-serve"]
    for command, uses_mpi in ((["trtllm-serve"], True), (["/opt/bin/trtllm-serve"], True), (own, False)):
        (found,) = trtllm.services(config(command=command), model_dir, tmp_path)
        assert found.uses_mpi == uses_mpi


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf" / "engine").glob("trtllm*.yaml")))
def test_the_engines_of_recipes_leave_mpi_to_the_launcher(name: str) -> None:
    # A command with its own mpirun would lack `--bind-to none`, and all threads of a server would share one core.
    assert composed(f"engine={name}").engine.command == ["trtllm-serve"]


def test_replicas_are_spread_evenly_over_the_nodes_of_a_job(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(num_replicas=4, num_nodes=2, tensor_parallel_size=2)
    assert [s.node for s in trtllm.services(cfg, model_dir, tmp_path)] == [0, 0, 1, 1]
    with pytest.raises(ConfigError, match=r"engine\.num_nodes=2: must divide engine\.num_replicas=3"):
        config(num_replicas=3, num_nodes=2)
    with pytest.raises(ConfigError, match=r"engine\.num_nodes=2.*launcher\.name='local'.*num_nodes=1, or"):
        experiment(tmp_path, cfg)

    class Launcher:
        def run(self, job: Job) -> None:
            self.job = job

    monkeypatch.setattr(shared_storage, "appears", lambda *arguments: False)  # nothing will be published
    exp, launcher = experiment(tmp_path, cfg, launcher=SlurmSettings()), Launcher()
    exp._launcher = launcher
    with exp, pytest.raises(JobFailedError, match="without publishing"):
        exp.run(candidates.STAGE, 1, policy=BaseModel(model_dir, "digest"), prompts=prompts(tmp_path))
    assert (launcher.job.role, launcher.job.num_nodes, launcher.job.num_gpus_per_node) == ("engine", 2, 4)


def test_more_requests_at_once_than_open_files_are_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_SRL_SERVICES", '{"trtllm-0": "http://127.0.0.1:8000"}')
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, limits[1]))
    try:
        engines.open_engine(replace(config(), max_concurrency=300), model_dir)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (556, limits[1])
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 1024))
        with pytest.raises(ConfigError, match=r"engine\.max_concurrency=1000: .*1024"):
            engines.open_engine(replace(config(), max_concurrency=1000), model_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_servers_the_remedy_is_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_SRL_SERVICES", raising=False)
    with pytest.raises(ConfigError, match="NEMO_SRL_SERVICES"):
        engines.open_engine(config(), model_dir)


def test_a_server_of_another_model_is_asked_nothing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = Loopback(lambda body, index: ([1], "stop"), model="model-of-another-run")
    with loopback.running() as url:
        monkeypatch.setenv("NEMO_SRL_SERVICES", json.dumps({"trtllm-0": url.removesuffix("/v1")}))
        with pytest.raises(EngineError, match=r"has model-of-another-run, and the stage asks model-[0-9a-f]{16}"):
            list(engines.open_engine(config(), model_dir).generate([request()], PARAMS))
    assert not loopback.requests


# In process.


def in_process_reply(ids: list[int], sampling: Any, index: int) -> dict[str, Any]:
    logprobs = [{i: SimpleNamespace(logprob=-0.5), 256: SimpleNamespace(logprob=-1.5)} for i in range(3)]
    return {"token_ids": [100 + index, 101, 2], "finish_reason": "stop", "logprobs": logprobs}


def test_in_process_asks_as_the_contract_wants(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = tensorrt_llm_stub.install(monkeypatch, in_process_reply)
    engine = engines.open_engine(config(in_process=True, tensor_parallel_size=2), model_dir)
    asked = [request(c, n=3) for c in "abc"]
    completed = {f"k-a/{i:02d}" for i in range(3)} | {"k-b/01"}
    got = [c for cs in engine.generate(asked, PARAMS, completed=completed) for c in cs]
    assert [c.key for c in got] == ["k-b/00", "k-b/02", "k-c/00", "k-c/01", "k-c/02"]
    assert {(c.num_tokens, c.finish_reason) for c in got} == {(3, "stop")}
    (llm,) = module.instances
    assert [(ids, s.n, s.stop_token_ids, s.logprobs) for ids, s in llm.calls] == [([98], 3, [2], 5), ([99], 3, [2], 5)]
    assert llm.options["kv_cache_config"]["enable_block_reuse"] is True
    greedy = replace(PARAMS, temperature=0.0)
    assert len({c.text for cs in engine.generate(asked[:1], greedy) for c in cs}) == 1
    ((long, _),) = engine.generate([request("x" * 1020)], PARAMS)
    assert long.finish_reason == "too_long"
    assert "limit of 1024" in long.reason
    engine.close()
    assert llm.is_shut_down


def test_in_process_samples_may_lack_a_finish_reason(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(ids: list[int], sampling: Any, index: int) -> dict[str, Any]:
        whole = [100, 101, 102, 2]
        end = {"token_ids": whole[: sampling.max_tokens], "finish_reason": None}
        return end if index < sampling.n - 1 else {"token_ids": [100, 2], "finish_reason": "stop"}

    tensorrt_llm_stub.install(monkeypatch, reply)
    engine = engines.open_engine(config(in_process=True), model_dir)
    for max_tokens, reason in ((4, "stop"), (3, "length")):
        params = replace(PARAMS, num_logprobs=0, max_tokens=max_tokens)
        found = collect(engine.generate([request(n=3)], params))
        assert [c.finish_reason for c in found.values()] == [reason, reason, "stop"]


def test_in_process_refusals_are_in_words(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tensorrt_llm cannot be imported"):
        engines.open_engine(config(in_process=True), model_dir)
    tensorrt_llm_stub.install(monkeypatch, lambda ids, sampling, i: {"token_ids": [], "finish_reason": "cancelled"})
    with pytest.raises(ConfigError, match=r"extra_options.*\['speed'\]"):
        engines.open_engine(config(in_process=True, extra_options={"speed": 11}), model_dir)
    with pytest.raises(ConfigError, match="backend='_autodeploy'"):
        engines.open_engine(config(in_process=True, backend="_autodeploy"), model_dir)
    with pytest.raises(ConfigError, match="backend='tensorrt': must be one of"):
        config(backend="tensorrt")
    with pytest.raises(ConfigError, match="num_replicas=2"):
        config(in_process=True, num_replicas=2)
    with pytest.raises(EngineError, match="'cancelled'"):
        list(engines.open_engine(config(in_process=True), model_dir).generate([request()], PARAMS))


def test_in_process_one_request_that_fails_is_left_out(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RequestError(RuntimeError):
        pass

    def reply(ids: list[int], sampling: Any, index: int) -> dict[str, Any]:
        if ids == [ord("b")]:
            raise RequestError("The sum of prompt length (9), query length (0) should not exceed max_num_tokens (8)")
        if ids == [ord("c")]:
            raise RequestError("no such adapter")
        return in_process_reply(ids, sampling, index)

    tensorrt_llm_stub.install(monkeypatch, reply)
    engine = engines.open_engine(config(in_process=True, max_concurrency=2), model_dir)
    found = collect(engine.generate([request(c, n=1) for c in "cbade"], PARAMS))
    ends = {key: c.finish_reason for key, c in found.items()}
    assert ends == {"k-a/00": "stop", "k-b/00": "too_long", "k-c/00": "malformed", "k-d/00": "stop", "k-e/00": "stop"}
    assert found["k-c/00"].reason == "TensorRT-LLM: no such adapter"
    with pytest.raises(EngineError, match="no such adapter"):
        list(engine.generate([request("c")], PARAMS))


def test_in_process_probabilities_are_those_at_numbers(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model_dir).encode("Score: 4", add_special_tokens=False)
    three = AutoTokenizer.from_pretrained(model_dir).encode("3", add_special_tokens=False)[0]

    def reply(prompt: list[int], sampling: Any, index: int) -> dict[str, Any]:
        top = [{i: SimpleNamespace(logprob=math.log(0.9)), three: SimpleNamespace(logprob=math.log(0.1))} for i in ids]
        return {"token_ids": [*ids, 2], "finish_reason": "stop", "logprobs": [*top, {2: SimpleNamespace(logprob=0.0)}]}

    tensorrt_llm_stub.install(monkeypatch, reply)
    ((c, _),) = engines.open_engine(config(in_process=True), model_dir).generate([request()], PARAMS)
    assert c.text == "Score: 4"
    assert c.number_logprobs is not None
    for _, top in c.number_logprobs:
        assert sum(math.exp(p) for p in top.values()) == pytest.approx(1, abs=0.2)


# Stages on servers, started, waited for and stopped by the launcher.


def experiment(
    tmp_path: Path, engine: TrtllmSettings | None = None, /, *, judge: Any = None, **sections: Any
) -> Experiment:
    """The engine generates, or the judge's does."""
    if engine is not None:
        sections["engine"] = replace(engine, dtype="float32", max_retries=2)
    cfg = Config(
        run_dir=str(tmp_path / "run"), candidates=CandidatesConfig(max_tokens=24),
        judge=judge or JudgeConfig(rubric=RUBRIC, max_tokens=24), **sections,
    )  # fmt: skip
    return Experiment(cfg)


def prompts(tmp_path: Path, count: int = 4) -> Table[Prompt]:
    rows = [Prompt(prompt_id=f"p{i}", text=f"Name color number {i}.") for i in range(count)]
    return published(tmp_path, "prompts", Prompt, rows)


def faults(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    monkeypatch.setenv("NEMO_SRL_STUB_FAULTS", json.dumps(found))


def test_a_stage_runs_on_replicas_that_serve_its_model(tmp_path: Path, model_dir: Path) -> None:
    m0 = BaseModel(model_dir, "digest")
    with experiment(tmp_path, config(num_replicas=2)) as exp:
        made: list[Candidate] = exp.run(candidates.STAGE, 1, policy=m0, prompts=prompts(tmp_path)).read()
    assert [c.key for c in made] == [f"p{i}/{j:02d}" for i in range(4) for j in range(4)]
    assert len({c.response for c in made}) > 8, "a random model says something else each time"
    logs = [(tmp_path / "run" / "logs" / f"iter_01-candidates-trtllm-{i}.log").read_text() for i in range(2)]
    assert [f"serving {model_dir} on GPUs {i}" in log for i, log in enumerate(logs)] == [True, True]


def test_a_faulty_server_changes_nothing_in_the_result(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_SRL_STUB_REPLY", "It is red.")
    faults(
        monkeypatch, unhealthy_seconds=1, error_500=2, malformed=2, drop_choice=2, port_taken=str(tmp_path / "marker"),
        refuse_logprobs=True,
    )  # fmt: skip
    with experiment(tmp_path, config()) as exp:
        made = exp.run(candidates.STAGE, 1, policy=BaseModel(model_dir, "digest"), prompts=prompts(tmp_path))
    assert [c.response for c in made.read()] == ["It is red."] * 16
    log = (tmp_path / "run" / "logs" / "iter_01-candidates-trtllm-0.log").read_text()
    assert "Address already in use" in log


def test_a_server_that_dies_ends_the_stage_and_a_restart_goes_on(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_SRL_STUB_REPLY", "It is red.")
    monkeypatch.setattr(keeper, "NUM_RESTARTS", 0)
    faults(monkeypatch, die_after=12, slow_seconds=0.05)
    given = {"policy": BaseModel(model_dir, "digest"), "prompts": prompts(tmp_path, 8)}
    with experiment(tmp_path, replace(config(), max_concurrency=2)) as exp:
        with pytest.raises(JobFailedError, match=r"trtllm-0 ended.*run again to go on"):
            exp.run(candidates.STAGE, 1, **given)
        journal = tmp_path / "run" / "iter_01" / "candidates" / "journal.jsonl"
        kept = len(journal.read_text().splitlines())
        assert kept >= 12 - 5, "three probes and at most two requests under way are not in it"
        faults(monkeypatch)
        made = exp.run(candidates.STAGE, 1, **given)
    assert len(made.read()) == 32
    assert len(journal.read_text().splitlines()) == 32, "nothing was asked for twice"


def test_a_server_that_dies_is_restarted_and_the_stage_goes_on(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_SRL_STUB_REPLY", "It is red.")
    faults(monkeypatch, die_after=20)
    given = {"policy": BaseModel(model_dir, "digest"), "prompts": prompts(tmp_path, 8)}
    with experiment(tmp_path, replace(config(), max_concurrency=2)) as exp:
        made = exp.run(candidates.STAGE, 1, **given)
    assert [c.response for c in made.read()] == ["It is red."] * 32
    journal = tmp_path / "run" / "iter_01" / "candidates" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 32, "nothing was asked for twice"
    log = (tmp_path / "run" / "logs" / "iter_01-candidates-trtllm-0.log").read_text()
    assert 2 <= log.count("serving ") <= 3
    ports = [line.split("--port ")[1].split()[0] for line in log.splitlines() if line.startswith("$ trtllm-serve")]
    assert len(set(ports)) == 1, "the steps know one URL"


def test_options_that_the_server_refuses_come_back_with_its_words(tmp_path: Path, model_dir: Path) -> None:
    with (
        experiment(tmp_path, config(extra_options={"speed": 11})) as exp,
        pytest.raises(JobFailedError, match=r"(?s)before it was ready.*llm_args \['speed'\]"),
    ):
        exp.run(candidates.STAGE, 1, policy=BaseModel(model_dir, "digest"), prompts=prompts(tmp_path))


def test_expected_scores_and_a_judge_of_its_own(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_SRL_STUB_REPLY", "Fine. Score: 4")
    given = {"judge": BaseModel(model_dir, "digest"), "candidates": answers_to(tmp_path, ("p", "Q", "R"))}
    judge = JudgeConfig(rubric=RUBRIC, max_tokens=24, mode="expected", engine=config())
    with experiment(tmp_path, judge=judge) as exp:
        artifact = exp.run(judgements.STAGE, 1, **given)
        made: list[Judgement] = artifact.read()
        assert artifact.identity["judge.engine.name"] == "trtllm"
        assert not [k for k in artifact.identity if "timeout" in k or "concurrency" in k]
        assert artifact.manifest().metrics["mean_coverage"] == pytest.approx(1)
    assert [j.score for j in made] == [pytest.approx(3.75)] * 3

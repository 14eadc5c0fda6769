"""The doctor of a cluster: each check finds what is wrong, and one bad check ends no other.

Two threads stand in for two nodes here. `tests/slurm/test_doctor.py` has real jobs on several nodes.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.config import Config, ModelConfig
from nemo_srl.doctor import (  # fmt: skip
    cluster,
    images,
    memory,
    ports,
    probe,
    report,
    sampling,
    serving,
    stopping,
    storage,
    training,
    versions,
)
from nemo_srl.doctor.cluster import Check
from nemo_srl.doctor.findings import Finding
from nemo_srl.doctor.probe import Node
from nemo_srl.doctor.site import Site, wait_until
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.engines.trtllm.settings import TrtllmSettings
from nemo_srl.errors import JobFailedError, NemoSrlError
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.protocols import Job
from nemo_srl.records import Completion
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.trainer import NemoAlignerTrainer
from nemo_srl.workload import Assumptions, assumptions
from tests.models_support import make_llama

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "tests" / "stubs"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def site(model_dir: Path, tmp_path: Path) -> Site:
    """A recipe for this machine, whose files go to a new directory."""
    cfg = Config(run_dir="unused", model=ModelConfig(path=str(model_dir)))
    cfg.engine, cfg.trainer = EmbeddedSettings(dtype="float32"), NemoAlignerSettings(precision="32")
    return Site(cfg, Assumptions(), tmp_path)


def on_two_nodes(
    run: Callable[[Node], Any], directory: Path, *, seconds: float = 20, other: Path | None = None, **asked: Any
) -> list[dict[str, Any]]:
    """What a probe returns on each of two nodes at the same time. `other` is the second node's directory."""
    found: dict[int, Any] = {}

    def node(index: int) -> None:
        where = other if other and index else directory
        try:
            found[index] = run(Node(where, index, 2, asked, seconds))
        except Exception as e:
            found[index] = {"error": str(e)}

    threads = [threading.Thread(target=node, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


def facts(name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"host": f"node{i}", "node": i, name: one} for i, one in enumerate(found)]


def by_name(findings: Iterator[Finding] | list[Finding]) -> dict[str, Finding]:
    return {x.name: x for x in findings}


# ---- storage


def probe_storage(directory: Path, **options: Any) -> list[dict[str, Any]]:
    with storage.held(directory):
        return on_two_nodes(storage.probe, directory, storage={"num_bytes": 1 << 20}, **options)


def judged_storage(site: Site, found: list[dict[str, Any]]) -> dict[str, Finding]:
    return by_name(storage.judge(site, facts("storage", found)))


def test_good_storage_is_good(site: Site, tmp_path: Path) -> None:
    findings = judged_storage(site, probe_storage(tmp_path))
    assert [x.name for x in findings.values() if not x.ok] == []
    assert "one that another node holds: busy" in findings["storage.locks"].text
    assert "0 torn, no errors" in findings["storage.rename"].text
    assert not list(tmp_path.glob("large*")), "the large files are removed"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_storage_without_locks_is_named(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr("fcntl.flock", refuse)
    locks = judged_storage(site, probe_storage(tmp_path))["storage.locks"]
    assert not locks.ok
    assert errno.errorcode[number] in locks.text
    assert "Lustre: -o flock" in locks.remedy


def test_locks_that_each_node_has_for_itself_are_named(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda handle, how: None)
    locks = judged_storage(site, probe_storage(tmp_path))["storage.locks"]
    assert not locks.ok
    assert "localflock" in locks.remedy


def test_a_directory_that_the_other_node_does_not_see_is_named(site: Site, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    broken = judged_storage(site, probe_storage(tmp_path, other=other, seconds=0.3))
    assert broken.keys() == {"storage"}
    assert not broken["storage"].ok
    assert "node0: a new file of the other node was not visible" in broken["storage"].text
    assert "all nodes share" in broken["storage"].remedy


@pytest.mark.parametrize(("change", "name", "remedy"), [
    ({"rename": {"torn": 1, "errors": {}, "seen": 9, "directory": True}}, "storage.rename", "must be atomic"),
    ({"rename": {"torn": 0, "errors": {"EIO": 2}, "seen": 9, "directory": True}}, "storage.rename", "must be atomic"),
    ({"rename": {"torn": 0, "errors": {}, "seen": 9, "directory": False}}, "storage.rename", "must be atomic"),
    ({"write_gb_per_second": 1e-9}, "storage.speed", "launcher.signal_seconds="),
    ({"free_gb": 0.0}, "storage.space", "larger file system"),
    ({"new_file_seconds": [70.0]}, "storage.visibility", "acdirmax"),
    ({"replaced_file_seconds": [0.1, None]}, "storage.visibility", "lookupcache=positive"),
])  # fmt: skip
def test_each_fault_of_storage_has_its_remedy(
    site: Site, tmp_path: Path, change: dict[str, Any], name: str, remedy: str
) -> None:
    site.cfg.launcher = SlurmSettings(signal_seconds=60)
    findings = judged_storage(site, [one | change for one in probe_storage(tmp_path)])
    assert [x.name for x in findings.values() if not x.ok] == [name]
    assert remedy in findings[name].remedy


def test_a_late_file_of_a_job_is_remarked(site: Site, tmp_path: Path) -> None:
    site.result_delays = [20.0]
    visibility = judged_storage(site, probe_storage(tmp_path))["storage.visibility"]
    assert visibility.ok
    assert "seen here 20.00 s" in visibility.text
    assert "acdirmax" in visibility.remedy


def test_a_node_that_reads_a_replaced_file_while_it_is_written_finds_torn_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "put", lambda path, text: path.write_text(text[: len(text) // 2]))
    found = on_two_nodes(lambda node: storage._renames(node), tmp_path)
    assert sum(one["torn"] for one in found) > 0


# ---- ports


def test_open_ports_are_all_reached(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    finding = by_name(ports.judge(site, facts("ports", on_two_nodes(ports.probe, tmp_path))))["ports"]
    assert finding.ok, finding.text
    assert finding.text == f"{4 * ports.NUM_PORTS} of {4 * ports.NUM_PORTS} connections"


def test_a_closed_port_is_named(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ports.Listeners.__init__

    def closed(self: ports.Listeners, wanted: Any) -> None:
        real(self, wanted)
        self._sockets.pop().close()  # it stays in the list that others get

    monkeypatch.setattr(ports.Listeners, "__init__", closed)
    finding = by_name(ports.judge(site, facts("ports", on_two_nodes(ports.probe, tmp_path))))["ports"]
    assert not finding.ok
    assert "(free): [Errno 111] Connection refused" in finding.text
    assert "firewall" in finding.remedy


def test_a_node_that_does_not_answer_is_named(site: Site, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    finding = by_name(ports.judge(site, facts("ports", on_two_nodes(ports.probe, tmp_path, seconds=0.3, other=other))))
    assert "did not say where it listens" in finding["ports"].text
    assert not finding["ports"].ok


# ---- versions and memory

COMPLETE = {name: "1.0" for name in (*versions.SHOWN["trainer"], "tensorrt-llm")}


def version_facts(role: str = "trainer", gpus: int = 0, **change: Any) -> list[dict[str, Any]]:
    found = {
        "python": "3.12", "packages": {**COMPLETE, "tensorrt-llm": "1.2.1"}, "missing_modules": {}, "program": None,
        "home": "", **change,
    }  # fmt: skip
    return [{"host": "node1", "versions": found, "memory": {"gpus": [{}] * gpus}}]


def without(package: str, **more: str) -> dict[str, Any]:
    return {"packages": {**version_facts()[0]["versions"]["packages"], package: None, **more}}


@pytest.mark.parametrize(("role", "platform", "gpus", "change", "remedy"), [
    ("trainer", "ngc", 0, without("transformer-engine"), "transformer-engine is absent"),
    ("trainer", "auto", 8, without("apex"), "trainer.platform=cuda, which needs neither"),
    ("trainer", "auto", 0, without("torch"), "torch is absent"),
    ("trainer", "auto", 0, {"platform": {"error": "nemo-aligner 0.7.x: not installed"}}, "nemo-aligner 0.7.x"),
    ("trainer", "auto", 0, {"missing_modules": {"nemo_srl.worker": "No module named 'gguf'"}}, "gguf"),
    ("trainer", "auto", 0, {"home": "HOME='' is not a directory that can be written to."}, "cluster.env.HOME"),
    ("engine", "auto", 0, without("tensorrt-llm"), "tensorrt-llm is absent"),
    ("engine", "auto", 0, {"packages": {**COMPLETE, "tensorrt-llm": "1.3.0rc27"}}, "another version than 1.2"),
    ("engine", "auto", 0, {"program": ["mpirun", None]}, "no program 'mpirun'"),
    ("engine", "auto", 0, {"error": "ImportError: x"}, "containers/trtllm.Dockerfile"),
])  # fmt: skip
def test_what_a_container_lacks_is_named_with_its_remedy(
    site: Site, role: Any, platform: str, gpus: int, change: dict[str, Any], remedy: str
) -> None:
    site.cfg.trainer, site.cfg.engine = NemoAlignerSettings(platform=platform), TrtllmSettings()
    nodes = version_facts(role, gpus)
    nodes[0]["versions"] = {**nodes[0]["versions"], **change}
    (finding,) = versions.judge(site, role, nodes)
    assert not finding.ok
    assert remedy in finding.remedy
    (good,) = versions.judge(site, role, version_facts(role, gpus))
    assert good.ok, good.remedy


def test_the_probe_of_versions_finds_what_is_here(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    site.cfg.engine = TrtllmSettings(command=["no-such-program"])
    for role, missing in (("trainer", "apex"), ("engine", "tensorrt-llm")):
        found = versions.probe(Node(tmp_path, 0, 1, {"versions": versions.asked(site, role)}))  # type: ignore[arg-type]
        assert found["packages"]["torch"]
        assert found["packages"][missing] is None
        assert found["missing_modules"] == {}
        assert "HOME='/nowhere'" in found["home"]
    assert found["program"] == ["no-such-program", None]
    assert "platform" not in found, "only a trainer has one"


def gpu_facts(total_gb: float = 80.0, number: int = 8, used_gb: float = 0.0, **more: Any) -> list[dict[str, Any]]:
    gpus = [{"name": "H100", "total_gb": total_gb, "used_gb": used_gb}] * number
    found = {"gpus": gpus, "host_gb": 2000.0, "available_gb": 1900.0, "limit_gb": None, "cores": 96, **more}
    return [{"host": "node1", "memory": found}]


@pytest.mark.parametrize(("nodes", "name", "remedy"), [
    (gpu_facts(total_gb=1.0), "gpus.trainer", "Raise the parallel sizes"),
    (gpu_facts(number=4), "gpus.trainer", "The recipe uses 8 on a node"),
    (gpu_facts(used_gb=40.0), "gpus.trainer", "nvidia-smi lists"),
    (gpu_facts(number=0), "gpus.trainer", "cluster.gpus_per_node"),
    (gpu_facts(host_gb=1.0), "host.trainer", "Use more nodes"),
    (gpu_facts(limit_gb=4.0), "host.trainer", "cluster.trainer.sbatch.mem=0"),
])  # fmt: skip
def test_memory_below_the_plan_is_named(site: Site, nodes: list[dict[str, Any]], name: str, remedy: str) -> None:
    site.cfg.model.path = "/models/Llama-3.1-8B-Instruct"  # the shape is in recipes/shapes/
    site.cfg.cluster.gpus_per_node = 8
    site.cfg.trainer = NemoAlignerSettings(tensor_model_parallel_size=8, devices=8, platform="ngc")
    good = by_name(memory.judge(site, "trainer", gpu_facts()))
    assert all(x.ok for x in good.values()), good
    findings = by_name(memory.judge(site, "trainer", nodes))
    assert [x.name for x in findings.values() if not x.ok] == [name]
    assert remedy in findings[name].remedy


def test_an_engine_without_room_for_a_sequence_is_named(site: Site) -> None:
    site.cfg.model.path, site.cfg.engine = "/models/Llama-2-70b-hf", TrtllmSettings(tensor_parallel_size=8)
    assert all(x.ok for x in memory.judge(site, "engine", gpu_facts()))
    assert not by_name(memory.judge(site, "engine", gpu_facts(total_gb=16.0)))["gpus.engine"].ok


def test_the_lowest_limit_of_a_jobs_control_groups_counts(tmp_path: Path) -> None:
    job = tmp_path / "slurm" / "job_1"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4000000000\n")
    assert memory.job_limit_gb("0::/slurm/job_1\n", tmp_path) == 4.0
    first = tmp_path / "memory" / "job_2"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory.job_limit_gb("5:cpu,cpuacct:/x\n4:memory:/job_2\n", tmp_path) is None
    (first / "memory.limit_in_bytes").write_text("2000000000\n")
    assert memory.job_limit_gb("5:cpu,cpuacct:/x\n4:memory:/job_2\n", tmp_path) == 2.0


def test_a_probe_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(node: Node) -> dict[str, Any]:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(storage, "probe", fail)
    monkeypatch.setattr(memory, "probe", lambda node: {"gpus": []})
    found = probe.collect(Node(tmp_path, 0, 1, {}), ("storage", "memory"))
    assert "read-only" in found["storage"]["error"]
    assert found["memory"] == {"gpus": []}


# ---- trainings


def answer_with(site: Site, monkeypatch: pytest.MonkeyPatch, **files: Any) -> list[Job]:
    """Jobs do nothing but write these files, by their names without `.json`. Returns the jobs that were run."""
    jobs: list[Job] = []

    def run(self: Site, job: Job) -> None:
        jobs.append(job)
        for name, value in files.items():
            if isinstance(value, NemoSrlError):
                raise value
            site.write(f"{name.replace('_', '-')}.json", value)

    monkeypatch.setattr(Site, "run", run)
    return jobs


def test_wrong_losses_over_nodes_are_shown(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cfg.trainer = NemoAlignerSettings(num_nodes=8, devices=8, tensor_model_parallel_size=8)
    jobs = answer_with(site, monkeypatch, dpo_losses={"losses": [0.693147, 0.9, 0.9, 0.9]})
    (finding,) = training.check(site, "dpo")
    assert not finding.ok
    assert "TP=2 PP=2 on 2 nodes" in finding.tried
    assert (jobs[0].num_nodes, jobs[0].num_ranks_per_node, jobs[0].role) == (2, 2, "trainer")
    assert "the right ones are 0.693147" in finding.text
    assert "trainer.num_nodes=1" in finding.remedy


def test_a_training_that_fails_is_shown_with_its_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(site, monkeypatch, x=JobFailedError("sft failed\n  | NCCL error"))
    (finding,) = training.check(site, "sft")
    assert not finding.ok
    assert "NCCL error" in finding.text
    assert "NCCL_DEBUG" in finding.remedy


@pytest.mark.parametrize(("nodes", "ranks", "sizes"), [
    (1, 1, "TP=1 PP=1 on 1 node"), (1, 2, "TP=2 PP=1 on 1 node"), (1, 8, "TP=2 PP=2 on 1 node"),
    (2, 1, "TP=1 PP=2 on 2 nodes"), (8, 8, "TP=2 PP=2 on 2 nodes"),
])  # fmt: skip
def test_the_tiny_training_is_divided_as_far_as_the_recipe_has_ranks(
    site: Site, nodes: int, ranks: int, sizes: str
) -> None:
    site.cfg.trainer = NemoAlignerSettings(num_nodes=nodes, devices=ranks)
    assert str(training.sizes(site)) == sizes
    assert training.settings(site, precision="32").data_parallel_size == 1


@pytest.mark.parametrize("part", [
    {"frozen_share": 0.5}, {"lora_rank": 8, "devices": 8}, {"recompute_granularity": "full"},
    {"context_parallel_size": 2, "devices": 8, "tensor_model_parallel_size": 4}, {"context_parallel_size": 2},
    {
        "ub_tp_comm_overlap": True, "sequence_parallel": True, "tensor_model_parallel_size": 8, "devices": 8,
        "precision": "bf16-O2",
    },
])  # fmt: skip
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_tiny_training_is_a_plain_one_whatever_the_recipe_trains(
    site: Site, part: dict[str, Any], nodes: int
) -> None:
    site.cfg.trainer = NemoAlignerSettings(num_nodes=nodes, platform="ngc", **part)
    made = training.settings(site, precision="32")
    assert (made.frozen_share, made.lora_rank, made.data_parallel_size) == (0, 0, 1)
    assert (made.platform, made.precision) == ("ngc", "32")


@pytest.mark.parametrize(("found", "ok"), [
    ({"before": 7, "kept": 7, "after": 9}, True),
    ({"before": 7, "kept": 6, "after": 9}, False),
    ({"before": 7, "kept": 7, "after": 7}, False),
])  # fmt: skip
def test_steps_that_a_stop_loses_are_found(found: dict[str, int], ok: bool) -> None:
    assert stopping.judge(found, "").ok is ok


def test_a_stop_request_that_does_not_arrive_is_found(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The process that waits gives up, and the next start fails with the reason."""
    lesson = training.write_lesson(site.directory, "sft", site.cfg.trainer, model_dir=site.directory, name="stopping")
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(stopping, "REACH_SECONDS", 0.0)
    (site.directory / stopping.ASKED).touch()
    stopping._give_up_without_a_request(lesson)
    assert ended == [4]
    assert "did not reach the training" in capfd.readouterr().out
    with pytest.raises(NemoSrlError, match="did not reach the training"):
        stopping.train(lesson, lesson.open_trainer())


def test_a_job_that_fails_after_a_stop_request_is_shown(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cfg.launcher = SlurmSettings()
    answer_with(site, monkeypatch, x=JobFailedError("stopping failed\n  | BrokenPipeError"))
    (finding,) = stopping.check(site)
    assert not finding.ok
    assert "BrokenPipeError" in finding.text
    assert "JobRequeue" in finding.remedy


def test_a_request_that_cannot_be_sent_is_shown_and_ends_the_training(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_when_asked(self: Site, job: Job) -> None:
        assert wait_until((self.directory / stopping.ASKED).exists, 60)
        raise JobFailedError("the stop request did not reach the training")

    site.cfg.launcher = SlurmSettings()
    site.write("logs/stopping.slurm.json", {"token": "t", "job_id": "7"})
    monkeypatch.setattr(Site, "run", fail_when_asked)
    monkeypatch.setattr(NemoAlignerTrainer, "metrics", lambda self, work_dir: [{}] * stopping.MIN_STEPS)
    monkeypatch.setattr(
        "nemo_srl.launchers.slurm.client.ask_to_stop", lambda job_id: f"scancel {job_id}: Access denied"
    )
    (finding,) = stopping.check(site)
    assert not finding.ok
    assert "The request could not be sent: scancel 7: Access denied" in finding.text


# ---- servers


def simulated(
    *, ends: int = 2, drop: Callable[[str], bool] = lambda text: False, seed: int = 0, shown: str = ""
) -> list[Completion]:
    """Samples of the known model, as a server would give them that honours so many ends."""
    rng, letters = random.Random(seed), "".join(map(chr, range(ord(" "), ord("~") + 1)))
    made = []
    for request in range(sampling.NUM_PROMPTS):
        for index in range(sampling.N):
            while True:
                text, reason = "", "length"
                for _ in range(sampling.MAX_TOKENS):
                    if rng.random() < sampling.P_END * ends / (1 - sampling.P_END * (2 - ends)):
                        reason = "stop"
                        break
                    text += rng.choice(letters)
                if not drop(text):
                    break
            number = len(text) + (reason == "stop")
            made.append(Completion(request_key=f"p{request}", index=index, text=text + shown, num_tokens=number,
                                   finish_reason=reason))  # type: ignore[arg-type] # fmt: skip
    return made


def test_right_samples_are_right() -> None:
    for seed in range(20):
        assert list(sampling.problems(simulated(seed=seed))) == []


@pytest.mark.parametrize(("completions", "problem"), [
    (simulated(ends=1), "with one end only"),
    (simulated(drop=lambda text: len(text) < 4), "short ones are lost"),
    (simulated(shown="<|turn|>"), "are part of texts"),
    (simulated()[:-1], "instead of 4 of each"),
    ([c for c in simulated() if c.index == 0 for _ in range(sampling.N)], "copies"),
    ([Completion(request_key="p0", index=0, text="", num_tokens=0, finish_reason="malformed", reason="null")],
     "unusable: null"),
])  # fmt: skip
def test_samples_that_are_not_what_was_asked_are_found(completions: list[Completion], problem: str) -> None:
    assert problem in "; ".join(sampling.problems(completions))


def with_logprobs(shift: float = 0.0) -> list[Completion]:
    row = {d: p + shift for d, p in sampling.digit_logprobs().items()}
    return [Completion(request_key="p", index=0, text="a7", num_tokens=2, finish_reason="length",
                       number_logprobs=[(1, row)])]  # fmt: skip


@pytest.mark.parametrize(("completions", "problem"), [
    (with_logprobs(0.3), "instead of"),
    ([Completion(request_key="p", index=0, text="7", num_tokens=1, finish_reason="length", number_logprobs=[])],
     "no log-probability of its own"),
    ([Completion(request_key="p", index=0, text="7", num_tokens=1, finish_reason="length")], "there are none"),
    ([], "no sample has a digit"),
])  # fmt: skip
def test_wrong_logprobs_are_found(completions: list[Completion], problem: str) -> None:
    assert list(sampling.wrong_logprobs(with_logprobs())) == []
    assert problem in next(sampling.wrong_logprobs(completions))
    rows = {"completions": [vars(c) for c in completions]}
    assert not serving.judge_logprobs({"logprobs": rows}, is_needed=True).ok
    assert not serving.judge_logprobs({"logprobs": rows}, is_needed=False).is_checked


@pytest.fixture
def trtllm_site(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """With the stand-ins for `trtllm-serve` and its package."""
    monkeypatch.setenv("PYTHONPATH", f"{STUBS / 'packages'}:{ROOT}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    site.cfg.engine = TrtllmSettings(dtype="float32", command=[str(STUBS / "trtllm-serve")])
    return site


def test_a_server_that_always_says_the_same_is_found(trtllm_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_SRL_STUB_REPLY", "abcd")
    findings = by_name(serving.check(trtllm_site))
    assert not findings["serving.samples"].ok
    assert "copies of another sample" in findings["serving.samples"].text
    assert "as the server sends them: stop, stop, stop, stop" in findings["serving.samples"].text
    assert "engine=vllm" in findings["serving.samples"].remedy


def test_a_server_that_samples_as_it_was_asked_is_right(trtllm_site: Site) -> None:
    trtllm_site.cfg.judge.mode = "expected"
    findings = by_name(serving.check(trtllm_site))
    assert [x.text for x in findings.values() if not x.ok] == []
    assert findings["serving.logprobs"].is_checked
    assert "lengths and both ends as computed" in findings["serving.samples"].text


def test_a_server_that_does_not_start_is_found(trtllm_site: Site) -> None:
    trtllm_site.cfg.engine.command = ["false"]
    (finding,) = serving.check(trtllm_site)
    assert not finding.ok
    assert "ended with exit status 1 before it was ready" in finding.text
    assert "mpirun" in finding.remedy


def test_a_version_of_tensorrt_llm_with_other_names_is_found(
    trtllm_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good,) = images.check_contract(trtllm_site)
    assert good.ok, good.text
    assert "TensorRT-LLM 1.2.1, recorded in trtllm-1.2.1.json; it has all names" in good.text
    monkeypatch.setenv("NEMO_SRL_STUB_WITHOUT", "completion_choice")
    (bad,) = images.check_contract(trtllm_site)
    assert not bad.ok
    assert "CompletionResponseChoice" in bad.text
    assert "containers/trtllm.Dockerfile" in bad.remedy


def test_names_that_a_new_version_lacks_are_listed() -> None:
    known, recorded = {"version": "1.2", "llm_args": ["a", "b"], "gone": ["c"]}, {"version": "1.3", "llm_args": ["b"]}
    assert images.missing_names(known, recorded) == ["llm_args.a", "gone.c"]


def test_a_conversion_that_is_not_exact_in_the_container_is_found(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path := tmp_path / "test_bad.py").write_text("def test_it(): assert 1 == 2\n")
    monkeypatch.setattr(images, "TESTS", str(path))
    (finding,) = images.check_conversion(site)
    assert not finding.ok
    assert "1 failed" in finding.text
    monkeypatch.setattr(images, "run", lambda *args, **options: {"status": None})
    (finding,) = images.check_conversion(site)
    assert not finding.is_checked
    assert "cluster.env.PYTHONPATH" in finding.remedy


# ---- the whole


def test_one_bad_check_ends_no_other(site: Site) -> None:
    def refuse(site: Site) -> Iterator[Finding]:
        yield Finding(name="first", ok=True, text="")
        raise JobFailedError("refused")

    def break_down(site: Site) -> Iterator[Finding]:
        raise ZeroDivisionError("a mistake")

    checks = [
        Check(name="one", tried="a", run=refuse, remedy="b"),
        Check(name="two", tried="c", run=break_down),
        Check(name="three", tried="d", run=lambda site: [Finding(name="three", ok=True, text="good")]),
    ]
    found = list(cluster.examine(site, checks))
    assert [(x.name, x.ok) for x in found] == [("first", True), ("one", False), ("two", False), ("three", True)]
    assert (found[1].text, found[1].tried, found[1].remedy) == ("refused", "a", "b")
    assert found[2].text == "ZeroDivisionError: a mistake"


def test_without_any_job_every_check_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(site, monkeypatch, x=JobFailedError("the partition is down"))
    site.cfg.launcher, site.cfg.engine = SlurmSettings(), TrtllmSettings()
    found = list(cluster.examine(site))
    assert [x.name for x in found] == [check.name for check in cluster.CHECKS]
    assert not any(x.ok for x in found)
    assert "cluster.partition" in found[0].remedy
    assert all(x.remedy for x in found)


def test_the_report_has_everything_but_secrets(site: Site) -> None:
    site.cfg.cluster.env = {"HF_TOKEN": "hf_secret"}
    bad = Finding(name="ports", ok=False, text="closed | 8100\nnode2", tried="t", remedy="open them")
    site.facts["trainer"] = [{"host": "node1"}]
    arguments = ["cluster=x", "+cluster.env.HF_TOKEN=hf_secret", "cluster.env={A: hf_secret}", "a.api_key=hf_secret"]
    path = report.write(site, arguments, [bad, bad, Finding(name="sft", ok=True, text="good")])
    text = path.read_text()
    assert "Wrong: ports\n" in text
    assert "| WRONG | ports | t | closed \\| 8100<br>node2 | open them |" in text
    found = json.loads(path.with_suffix(".json").read_text())
    assert found["findings"][0]["state"] == "WRONG"
    assert found["nodes"]["trainer"] == [{"host": "node1"}]
    for file in (path, path.with_suffix(".json")):
        assert "hf_secret" not in file.read_text()
        assert "HF_TOKEN" in file.read_text()
    lines = report.line(bad).splitlines()
    assert lines[0].split() == ["WRONG", "ports", "t"]
    assert lines[-1].split(maxsplit=1) == ["set:", "open them"]


def test_an_unknown_assumption_is_refused() -> None:
    assert assumptions({"num_sft_rows": 7.0}).num_sft_rows == 7
    with pytest.raises(NemoSrlError, match=r"assume\.x=1: no such assumption"):
        assumptions({"x": 1.0})

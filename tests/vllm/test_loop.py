"""The whole loop on the real vLLM, with a server on each of M0, M1 and M2, and with three faults on the way.

The orchestrator is killed, and a server hangs. After each of these faults nothing runs any more, and the next start
goes on. One of two replicas is killed, and is restarted. At the end no completed call was made again, and the answers
are those of the right models.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_srl.artifacts import JOURNAL
from nemo_srl.chat import ChatTemplate
from tests.processes import wait_for
from tests.support import RECIPE, ROOT
from tests.tiny_loop import tiny_settings

pytestmark = pytest.mark.timeout(5400)

PATIENCE = 1800.0
"""Seconds for what takes a minute on a machine that has nothing else to do."""
JUDGED = "iter_01/judgements"


class Run:
    """A run directory, and the orchestrators that work on it one after the other."""

    def __init__(self, base: Path, model: Path, engine: dict[str, Any]) -> None:
        self.run_dir, self._log = base / "run", base / "log"
        settings = {
            **tiny_settings(base / "tiny"),
            "model.path": model,
            "judge.mode": "expected",
            "candidates.top_p": 1.0,
            "dpo.learning_rate": 1e-3,  # so that M2 says something else than M1
            "dpo.max_epochs": 4,
            "engine": "vllm",
            "engine.command": json.dumps(engine["command"]),
            "+engine.extra_options.enforce_eager": "true",
            **{f"engine.{key}": engine[key] for key in ("dtype", "max_num_seqs", "max_concurrency")},
        }
        self._command = [
            sys.executable, str(ROOT / "recipes" / "iterate.py"), f"recipe={RECIPE}", f"run_dir={self.run_dir}",
            *(f"{key}={value}" for key, value in settings.items()),
        ]  # fmt: skip
        self.process: psutil.Popen

    def start(self, **engine: object) -> None:
        more = [f"engine.{key}={value}" for key, value in engine.items()]
        with self._log.open("ab") as log:
            self.process = psutil.Popen(
                [*self._command, *more], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )

    def wait_for_calls(self, stage: str, number: int) -> None:
        """Wait until the stage has so many calls in its journal."""
        journal = self.run_dir / stage / JOURNAL

        def reached() -> bool:
            assert self.process.poll() is None, self.said()
            return journal.exists() and journal.read_bytes().count(b"\n") >= number

        wait_for(reached, PATIENCE)

    def family(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def servers(self) -> list[psutil.Process]:
        """The processes that the network talks to."""
        commands = [(p, " ".join(p.cmdline())) for p in self.family()]
        found = [p for p, text in commands if "--served-model-name" in text and "supervisor.py" not in text]
        assert found
        return found

    def ends(self) -> str:
        """Wait for a failure. Returns what was said in all starts."""
        family = self.family()
        assert self.process.wait(PATIENCE) == 2, self.said()
        all_gone(family)
        return self.said()

    def said(self) -> str:
        return self._log.read_text()


def all_gone(family: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(family, timeout=120)
    assert not left


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[Path], Path], engine: dict[str, Any]) -> Run:
    """The finished run."""
    base = tmp_path_factory.mktemp("loop")
    made = Run(base, tiny_model(base), engine)

    made.start()
    made.wait_for_calls("iter_00/evaluation", 2)
    family = made.family()
    made.process.kill()
    all_gone(family)

    made.start(timeout_seconds=60, max_retries=0)
    made.wait_for_calls("iter_01/candidates", 2)
    (server,) = made.servers()
    server.send_signal(signal.SIGSTOP)
    assert "no answer within engine.timeout_seconds=60" in made.ends()

    made.start(num_replicas=2)
    made.wait_for_calls(JUDGED, 2)
    server = made.servers()[1]
    server.send_signal(signal.SIGSTOP)  # so that its requests are under way for certain
    server.kill()
    assert made.process.wait(PATIENCE) == 0, made.said()
    logs = "".join(path.read_text() for path in (made.run_dir / "logs").glob("*-vllm-?.log"))
    assert "restarting: the service ended by SIGKILL" in logs
    assert "| M2" in made.said()
    return made


def test_no_completed_call_is_made_again(run: Run) -> None:
    num_requests = 0
    for journal in run.run_dir.glob(f"iter_*/*/{JOURNAL}"):
        calls = [json.loads(line) for line in journal.read_text().splitlines()]
        keys = [(call["request_key"], call["index"]) for call in calls]
        assert len(keys) == len(set(keys))
        num_requests += len({key for key, _ in keys})
    logs = "".join(path.read_text() for path in (run.run_dir / "logs").glob("*-vllm-*.log"))
    answered = logs.count('"POST /v1/completions HTTP/1.1" 200 OK')
    assert num_requests <= answered <= num_requests + 3, "at each fault, one call may be answered and not yet written"


def test_each_model_answers_for_itself(run: Run) -> None:
    models = {"M0": run.run_dir.parent / "vllm-model"}
    models |= {"M1": run.run_dir / "iter_00/sft/hf", "M2": run.run_dir / "iter_01/policy/hf"}
    for file, name in (
        ("iter_00/evaluation_m0/answers.jsonl", "M0"),
        ("iter_00/evaluation/answers.jsonl", "M1"),
        ("iter_01/candidates/data.jsonl", "M1"),
        ("iter_01/evaluation/answers.jsonl", "M2"),
    ):
        rows = [json.loads(line) for line in (run.run_dir / file).read_text().splitlines()]
        likely = {m: log_likelihood(path, rows) for m, path in models.items()}
        assert max(likely, key=lambda m: likely[m]) == name, (file, likely)


def log_likelihood(model_dir: Path, rows: list[dict[str, Any]]) -> float:
    """Of all responses under this model, by Hugging Face's own computation."""
    import torch
    from transformers import AutoModelForCausalLM

    model, chat = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32), ChatTemplate(model_dir)
    total = 0.0
    for row in rows:
        prompt, response = chat.encode(chat.render(row["prompt"])), chat.encode(row["response"])
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
        own = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)
        total += float(own[len(prompt) - 1 :].sum())
    return total


def test_a_model_has_one_start_for_all_its_stages(run: Run) -> None:
    """In the last start, M1 went on with its candidates and judged them, and M2 was evaluated."""
    logs = {path.name: path.read_text() for path in (run.run_dir / "logs").glob("*-vllm-0.log")}
    names = {name: set(part.split()[0] for part in log.split("--served-model-name ")[1:]) for name, log in logs.items()}
    assert {name: len(found) for name, found in names.items()} == dict.fromkeys(names, 1)
    assert "kept for iter_01-prompts" in logs["iter_00-evaluation-vllm-0.log"]
    m1, m2 = names["iter_00-evaluation-vllm-0.log"], names["iter_01-evaluation-vllm-0.log"]
    assert not m1 & m2
    assert names["iter_01-candidates-vllm-0.log"] == m1
    assert "kept for iter_01-judgements" in logs["iter_01-candidates-vllm-0.log"]


def test_verdicts_have_expected_scores(run: Run) -> None:
    rows = [json.loads(line) for line in (run.run_dir / JUDGED / "data.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row["score"] is not None]
    assert len(scored) >= 0.5 * len(rows), "M1 has learned to judge"
    assert any(row["score"] != round(row["score"]) for row in scored)
    assert all(0.5 < row["coverage"] <= 1 for row in scored)

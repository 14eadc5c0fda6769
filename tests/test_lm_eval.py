"""lm-evaluation-harness, the real one, loads an exported model and measures it on a task of two questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_srl.models.publication import publish_model
from tests.tiny import make_model

TASK = """
task: primes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    {"question": "Name a prime.", "choices": [" 7", " 8"], "answer": 0},
    {"question": "Name another.", "choices": [" 4", " 5"], "answer": 1},
]
EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

model, tasks = sys.argv[1:]
found = simple_evaluate(
    model="hf", model_args={"pretrained": model, "dtype": "float32"}, tasks=["primes"], device="cpu", bootstrap_iters=0,
    task_manager=TaskManager(include_path=tasks, include_defaults=False), apply_chat_template=True, log_samples=True,
)
print(json.dumps([[x["arguments"], x["resps"]] for x in found["samples"]["primes"]]))
"""


def test_the_harness_measures_a_published_model_by_its_chat_template(tmp_path: Path) -> None:
    publish_model(
        make_model(tmp_path / "made", ["Name a prime. 7"]), tmp_path / "model", card="# M", chat_template=None
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "tasks" / "primes.yaml").write_text(TASK.format(questions=tmp_path / "q.jsonl"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(tmp_path / "model"), str(tmp_path / "tasks")],
        env={**os.environ, **offline}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    samples = json.loads(done.stdout.splitlines()[-1])
    assert len(samples) == 2
    for question, (requests, results) in zip(QUESTIONS, samples, strict=True):
        for request, ((log_likelihood, _),) in zip(_texts(requests), results, strict=True):
            assert request[0] == f"<|im_start|>user\n{question['question']}<|im_end|>\n<|im_start|>assistant\n"
            assert float(log_likelihood) == pytest.approx(_log_likelihood(tmp_path / "model", *request), abs=1e-3)


def _texts(requests: Any) -> list[list[str]]:
    """Context and continuation of each request, by the numbers in the harness's samples."""
    return [list(r.values())[:2] for r in requests.values()] if isinstance(requests, dict) else requests


def _log_likelihood(model_dir: Path, context: str, continuation: str) -> float:
    """The log-likelihood by transformers. The harness moves blanks at the end of the context to the continuation."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    given, both = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context.rstrip(), context + continuation)
    )
    wanted = both[len(given) :]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model_dir)(torch.tensor([both])).logits[0]
    steps = logits.log_softmax(-1)[len(given) - 1 : -1]
    return float(steps.gather(1, torch.tensor(wanted)[:, None]).sum())

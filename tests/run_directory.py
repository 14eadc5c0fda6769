"""Makes run directories without any model, with the records of the real stages in the files that these publish.

`make_run` makes a run of two iterations, `make_comparison` one of recipes/evaluate.py. Some of the texts break a page
or a file that does not escape them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from nemo_srl.artifacts import SPEC, Manifest, Table, to_line, write_atomic
from nemo_srl.config import Config, JudgeConfig, ModelConfig, PairsConfig
from nemo_srl.data.verifiable import Followed
from nemo_srl.judging import mean_scores
from nemo_srl.judging.intervals import rows_of
from nemo_srl.pairing import build_pairs
from nemo_srl.records import Candidate, Comparison, EFTExample, IFTExample, Judgement, Metric, Prompt
from nemo_srl.stages import head_to_head, ifeval
from nemo_srl.stages.evaluation import answering_metrics, judging_metrics, judging_sums, verdict_metrics
from nemo_srl.stages.head_to_head import matches_of

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script> \u2028 \u2029 \\u003c &lt; {{ 7 * 7 }} {% raw %}",
    'a "quoted" `text` with \u202e marks, \u00e9\u00e8 \U0001f642 and a NUL\x00',
)
RUBRIC = "Grade this.\n{instruction}\n{response}\nScore: <points>"


def _publish(path: Path, name: str, iteration: int, metrics: dict[str, float], seconds: float, **spec: Any) -> None:
    run_dir = path.parent.parent
    model = ModelConfig(path=str(run_dir.parent / "base"))
    config = asdict(Config(run_dir=str(run_dir), model=model, judge=JudgeConfig(rubric=RUBRIC)))
    inputs = spec.get("inputs", {})
    write_atomic(
        path / SPEC,
        json.dumps({"stage": name, "iteration": iteration, "config": config, "identity": {}, "inputs": inputs}),
    )
    write_atomic(path / "manifest.json", json.dumps(asdict(Manifest(name, {}, "0" * 16, metrics, seconds))))


def _training(path: Path, num_steps: int, *, dpo: bool) -> None:
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "loss": (0.69 if dpo else 3.6) / step**0.2, "lr": 1e-5, "grad_norm": 4.0}
        if dpo:
            line |= {"rewards_chosen": -0.01 * step, "rewards_rejected": -0.02 * step, "rewards_margin": 0.01 * step}
            line |= {"acc": min(1.0, 0.5 + 0.01 * step)}
        lines.append(json.dumps(line))
    # The last line is cut off, as a killed process leaves it.
    write_atomic(path / "training" / "metrics.jsonl", "\n".join(lines) + '\n{"step": 99, "lo')


def _write_part(directory: Path, name: str, records: Sequence[Any]) -> None:
    write_atomic(directory / f"{name}.jsonl", "".join(map(to_line, sorted(records, key=lambda r: r.key))))


def make_run(run_dir: Path, *, num_prompts: int = 12, num_iterations: int = 2, seed: int = 1) -> Path:
    """Write M1, `num_iterations` iterations of `num_prompts` prompts with 4 candidates each, and all evaluations."""
    rng = random.Random(seed)
    ift = {"kind": "file", "path": "/elsewhere/ift.jsonl", "record": IFTExample.__name__}
    base = {"kind": "base_model", "path": str(run_dir.parent / "base"), "digest": "1"}
    sft = run_dir / "iter_00" / "sft"
    _publish(sft, "sft", 0, {"num_steps": 30}, 200.0, inputs={"ift": ift, "policy": base})
    _training(sft, 30, dpo=False)
    _evaluation(run_dir / "iter_00" / "evaluation_m0", 0, rng, skill=0.0, model=base)
    m = {"kind": "model", "path": str(sft)}
    _evaluation(run_dir / "iter_00" / "evaluation", 0, rng, skill=0.5, model=m)
    for t in range(1, num_iterations + 1):
        _iteration(run_dir / f"iter_{t:02d}", t, rng, num_prompts, judge=m)
        m = {"kind": "model", "path": str(run_dir / f"iter_{t:02d}" / "policy")}
        _evaluation(run_dir / f"iter_{t:02d}" / "evaluation", t, rng, skill=0.5 + 0.1 * t, model=m)
    return run_dir


def add_anchor(run_dir: Path, iteration: int, *, agreement: float) -> None:
    """Write what the anchor measured in an iteration."""
    directory = run_dir / f"iter_{iteration:02d}" / "anchor"
    _publish(directory, "anchor", iteration, {}, 9.0)
    metrics = [
        Metric(name="anchor_agreement", value=agreement, n=100, low=agreement - 0.05, high=agreement + 0.05),
        Metric(name="score_entropy", value=0.9, n=100),
    ]
    Table(directory, {}, Metric).write(metrics)


def _words(rng: random.Random, low: int, high: int) -> str:
    vocabulary = ["the", "a", "model", "answer", "list", "word", "river", "green", "seven", "small", "why", "how"]
    return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(low, high)))


def _iteration(directory: Path, t: int, rng: random.Random, num_prompts: int, *, judge: dict[str, str]) -> None:
    prompts = [
        Prompt(prompt_id=f"iter{t}-{i:06d}", text=HOSTILE[i] if i < len(HOSTILE) else f"Say {i}: {_words(rng, 3, 20)}?")
        for i in range(num_prompts)
    ]
    candidates = []
    judgements = []
    for p in prompts:
        for i in range(4):
            text = rng.choice(HOSTILE) if rng.random() < 0.05 else _words(rng, 5, 90)
            cut = rng.random() < 0.1
            c = Candidate(
                prompt_id=p.prompt_id, sample_index=i, prompt=p.text, response=text, num_tokens=len(text.split()) + 1,
                finish_reason="length" if cut else "stop",
            )  # fmt: skip
            candidates.append(c)
            for k in range(3):
                score = None if rng.random() < 0.1 else float(rng.randint(0, 5))
                verdict = f"{rng.choice(HOSTILE)} {_words(rng, 4, 30)}\nScore: {score}"
                judgements.append(Judgement(candidate_key=c.key, judgement_index=k, verdict=verdict, score=score))
    pairs, dropped = build_pairs(candidates, mean_scores(judgements), PairsConfig())
    _publish(directory / "prompts", "prompts", t, {"num_calls": 2 * num_prompts, "num_kept": num_prompts,
                                                   "num_similar": 5, "num_length": 3}, 30.0)  # fmt: skip
    Table(directory / "prompts", {}, Prompt).write(prompts)
    valid = sum(j.score is not None for j in judgements) / len(judgements)
    _publish(directory / "candidates", "candidates", t, {"num_candidates": len(candidates), "mean_tokens": 40.0,
                                                         "truncated_rate": 0.1}, 100.0)  # fmt: skip
    Table(directory / "candidates", {}, Candidate).write(candidates)
    _publish(
        directory / "judgements",
        "judgements",
        t,
        {"num_judgements": len(judgements), "valid_rate": valid},
        180.0,
        inputs={"judge": judge},
    )
    Table(directory / "judgements", {}, Judgement).write(judgements)
    reasons = {f"num_{r}": float(dropped[r]) for r in ("tied", "identical", "unscored", "truncated")}
    per_100 = 100 * len(pairs) / num_prompts
    metrics = {"num_pairs": len(pairs), "pairs_per_100_prompts": per_100, **reasons}
    _publish(directory / "pairs", "pairs", t, metrics, 1.0)
    Table(directory / "pairs", {}, type(pairs[0])).write(pairs)
    _publish(directory / "policy", "policy", t, {"num_steps": 20}, 300.0)
    _training(directory / "policy", 20, dpo=True)


def _evaluation(directory: Path, t: int, rng: random.Random, *, skill: float, model: dict[str, str]) -> None:
    examples = [
        EFTExample(example_id=f"{i}-{s}", instruction=f"Do {i}.", response=f"Answer {s}", justification="So.", score=s)
        for i in range(8)
        for s in range(0, 6, 2)
    ]
    judged = [
        Judgement(candidate_key=x.key, judgement_index=0, verdict="",
                  score=float(x.score if rng.random() < skill else rng.randint(0, 5)))
        for x in examples
    ]  # fmt: skip
    answers = [
        Candidate(prompt_id=f"answer-{i}", sample_index=j, prompt=f"Do {i}.", response=_words(rng, 5, 40 + 20 * t),
                  num_tokens=20 + t, finish_reason="stop")
        for i in range(8) for j in range(2)
    ]  # fmt: skip
    own = [
        Judgement(candidate_key=c.key, judgement_index=0, verdict="", score=float(rng.randint(0, 5))) for c in answers
    ]
    sums = judging_sums(examples, judged, max_score=5)
    metrics = [
        *answering_metrics(answers, own, PairsConfig()),
        *judging_metrics(sums),
        *verdict_metrics(own + judged, max_score=5),
    ]
    _publish(directory, "evaluation", t, {}, 60.0, inputs={"policy": model})
    Table(directory, {}, Metric).write(metrics)
    parts = {"answers": answers, "self_judgements": own, "judgements": judged, "groups": rows_of(sums)}
    for name, part in parts.items():
        _write_part(directory, name, part)


def make_comparison(run_dir: Path, *, num_questions: int = 20, seed: int = 1) -> Path:
    """Write what recipes/evaluate.py makes of two models (`m_1`, `m.2`) and a file of answers (`big`)."""
    rng = random.Random(seed)
    directory = run_dir / "iter_00"
    texts = [HOSTILE[i] if i < len(HOSTILE) else f"Say {i}: {_words(rng, 3, 20)}?" for i in range(num_questions)]
    found: dict[str, dict[str, Candidate]] = {}
    for name, most in (("m_1", 40), ("m.2", 60), ("big", 90)):
        answers = [
            Candidate(
                prompt_id=f"q{i:04d}", sample_index=0, prompt=text, num_tokens=7, finish_reason="stop",
                response=HOSTILE[0] if i % 9 == 0 else _words(rng, 5, most),
            )
            for i, text in enumerate(texts)
        ]  # fmt: skip
        found[name] = {c.prompt_id: c for c in answers}
        if name == "big":
            write_atomic(run_dir / "given" / "answers_big.jsonl", "".join(map(to_line, answers)))
            continue
        policy = {"policy": {"path": f"/elsewhere/{name}/hf"}}
        _publish(directory / f"answers_{name}", "answers", 0, {}, 5.0, inputs=policy)
        Table(directory / f"answers_{name}", {}, Candidate).write(answers)
        _publish(directory / f"ifeval_{name}", "ifeval", 0, {}, 1.0)
        followed = {str(i): Followed(strict=[rng.random() < 0.3], loose=[True, False]) for i in range(9)}
        sums = ifeval.sums_in_prompts(followed)
        Table(directory / f"ifeval_{name}", {}, Metric).write(ifeval.metrics_of(sums))
        _write_part(directory / f"ifeval_{name}", "groups", rows_of(sums))
        _evaluation(directory / f"evaluation_{name}", 0, rng, skill=0.5, model=policy["policy"])
    for a, b in (("m_1", "m.2"), ("m_1", "big")):
        _match(run_dir, a, b, found, rng)
    return run_dir


def _match(run_dir: Path, a: str, b: str, found: dict[str, dict[str, Candidate]], rng: random.Random) -> None:
    """The judge prefers the longer answer. Some verdicts are a tie, and some cannot be read."""
    directory = run_dir / "iter_00" / f"match_{a}_{b}"
    verdicts = []
    orders: dict[Literal["ab", "ba"], tuple[str, str]] = {"ab": (a, b), "ba": (b, a)}
    for key in found[a]:
        for order, (first, second) in orders.items():
            longer = "A" if len(found[first][key].response) > len(found[second][key].response) else "B"
            winner = rng.choices([longer, "tie", "nobody"], [8, 1, 1])[0]
            text = f"{rng.choice(HOSTILE)}\nWinner: {winner}"
            share = {"A": 1.0, "B": 0.0, "tie": 0.5}.get(winner)
            verdicts.append(Comparison(question_id=key, order=order, verdict_index=0, verdict=text, first_share=share))
    paths = {name: run_dir / "iter_00" / f"answers_{name}" for name in (a, b)}
    paths |= {"big": run_dir / "given" / "answers_big.jsonl"}
    judge = "/elsewhere/m.2/hf" if b == "m.2" else "/elsewhere/judge-7b"
    inputs = {"a": {"path": str(paths[a])}, "b": {"path": str(paths[b])}, "judge": {"path": judge}}
    _publish(directory, "head_to_head", 0, {}, 9.0, inputs=inputs)
    metrics = head_to_head.metrics_of(matches_of(found[a], found[b], verdicts))
    Table(directory, {}, Metric).write(metrics)
    _write_part(directory, "verdicts", verdicts)

"""Compare models: their answers side by side, how well each judges, and files for AlpacaEval and MT-Bench.

    python recipes/evaluate.py '++evaluate.models={m1: runs/x/iter_00/sft/hf, m2: runs/x/iter_01/policy/hf}' \\
        evaluate.judge_model=runs/x/iter_00/sft/hf
    python recipes/evaluate.py '++evaluate.models={m2: runs/x/iter_01/policy/hf, gpt4: gpt4_outputs.json}' \\
        evaluate.questions=alpaca_eval.json \\
        +engine@judge.engine=openai judge.engine.base_url=https://host/v1 judge.engine.model=big
    python recipes/evaluate.py '++evaluate.models={x: <its tokenizer>}' engine=openai engine.base_url=http://host/v1

A model is a Hugging Face directory, a name that can be fetched, or a `.json` file of answers in AlpacaEval's format.
With `engine=openai` the server answers, and the directory only tells the tokenizer and chat template. Results go to
`<run_dir>/evaluation.md` and `<run_dir>/exports/<model>/`; a killed run goes on when it is started again.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from nemo_srl import questions as formats
from nemo_srl import report
from nemo_srl.artifacts import SourceFile, to_line, write_atomic
from nemo_srl.config import Config
from nemo_srl.errors import ConfigError, NemoSrlError
from nemo_srl.experiment import Experiment
from nemo_srl.records import Candidate, EFTExample, Metric, Question
from nemo_srl.stages import answers, evaluation, head_to_head

log = logging.getLogger(__name__)


@dataclass
class EvaluateSettings:
    models: dict[str, str] = field(default_factory=dict)
    """Name and directory (or answers' file) of each; the order is that of the tables."""
    questions: str = "data/seed/eft_eval.jsonl"
    """AlpacaEval's or MT-Bench's questions, our prompts, or anything with an `instruction`."""
    judge_model: str = ""
    """Who compares answers; empty: the first model. With `judge.engine` set, only its tokenizer counts."""
    judging: bool = True
    """Also measure how well each model judges, on `data.eft_eval_path`."""


@dataclass
class EvaluateConfig(Config):
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def evaluate(settings: EvaluateSettings, exp: Experiment) -> str:
    """Run everything; returns the tables as Markdown."""
    for name in settings.models:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(f"evaluate.models: {name!r} names directories; use letters, digits, '.', '_' and '-'")
    directories = {name: path for name, path in settings.models.items() if not path.endswith(".json")}
    if not directories and not settings.judge_model:
        raise ConfigError(f"evaluate.models={settings.models}: give one or more Hugging Face directories by name")
    asked = formats.read_questions(Path(settings.questions))
    questions = given(exp, "questions", asked, Question)
    models = {name: exp.base_model(path) for name, path in directories.items()}
    judge = exp.base_model(settings.judge_model or next(iter(directories.values())))
    answered: dict[str, Any] = {}
    for name, path in settings.models.items():
        if name in models:
            y = exp.run(answers.STAGE, 0, policy=models[name], questions=questions, directory=f"answers_{name}")
        else:
            y = given(exp, f"answers_{name}", formats.read_answers(Path(path), asked), Candidate)
        answered[name] = y
        write_exports(exp.run_dir / "exports" / name, asked, y.read(), name)
    sections = []
    if settings.judging and models:
        held_out = exp.source(exp.cfg.data.eft_eval_path, EFTExample)
        measured = {
            name: exp.run(evaluation.STAGE, 0, policy=m, eft_eval=held_out, directory=f"evaluation_{name}").read()
            for name, m in models.items()
        }
        sections.append("## Each model by itself\n\n" + report.table(measured))
    matches = {
        (a, b): exp.run(
            head_to_head.STAGE, 0, policy=judge, a=answered[a], b=answered[b], directory=f"match_{a}_{b}"
        ).read()
        for a, b in itertools.combinations(answered, 2)
    }
    if matches:
        sections.append("## Head to head\n\n" + match_table(matches))
    return "\n\n".join(sections)


def given(exp: Experiment, name: str, records: Sequence[Any], record: type) -> SourceFile[Any]:
    """Records that no stage made, as a file that stages can read."""
    path = exp.run_dir / "given" / f"{name}.jsonl"
    write_atomic(path, "".join(map(to_line, records)))
    return exp.source(str(path), record)


def write_exports(directory: Path, asked: Sequence[Question], found: Sequence[Candidate], model: str) -> None:
    """AlpacaEval's file always, MT-Bench's where every question has all its turns answered."""
    rows = formats.alpaca_eval_rows(asked, found, model)
    write_atomic(directory / "alpaca_eval.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    if len(found) == sum(len(q.turns) for q in asked):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in formats.mt_bench_rows(asked, found, model)]
        write_atomic(directory / "mt_bench.jsonl", "".join(lines))


def match_table(matches: Mapping[tuple[str, str], Sequence[Metric]]) -> str:
    """One line per pair of models."""
    lines = [
        "| a v b | a wins | tied | b wins | length-controlled | p | first preferred | questions |",
        "|" + "---|" * 8,
    ]
    for (a, b), metrics in matches.items():
        m = {x.name: x for x in metrics}
        shares = [_share(m[name]) for name in ("win_rate", "tie_rate", "loss_rate", "length_controlled_win_rate")]
        p = m["sign_test_p"].value
        shares += ["-" if p is None else f"{p:.3g}", _share(m["first_position_rate"]), str(m["win_rate"].n)]
        lines.append(f"| {a} v {b} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _share(m: Metric) -> str:
    if m.value is None:
        return "-"
    interval = "" if m.low is None or m.high is None else f" [{m.low:.0%}, {m.high:.0%}]"
    return f"{m.value:.1%}{interval}"


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        config = OmegaConf.to_object(cfg)
        assert isinstance(config, EvaluateConfig)
        plain = Config(**{f.name: getattr(config, f.name) for f in fields(Config)})
        with Experiment(plain) as exp:
            text = evaluate(config.evaluate, exp)
            write_atomic(exp.run_dir / "evaluation.md", f"# {exp.run_dir.name}\n\n{text}\n")
        print(text)
    except NemoSrlError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()

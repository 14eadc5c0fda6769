"""Compare models: answers side by side, IFEval, how well each judges, and files for AlpacaEval and MT-Bench.

    python recipes/evaluate.py '++evaluate.models={m1: runs/x/iter_00/sft/hf, m2: runs/x/iter_01/policy/hf}' \\
        evaluate.judge_model=runs/x/iter_00/sft/hf
    python recipes/evaluate.py '++evaluate.models={m2: runs/x/iter_01/policy/hf, gpt4: gpt4_outputs.json}' \\
        evaluate.questions=alpaca_eval.json \\
        +engine@judge.engine=openai judge.engine.base_url=https://host/v1 judge.engine.model=big
    python recipes/evaluate.py '++evaluate.models={m2: runs/x/iter_01/policy/hf}' evaluate.questions= \\
        evaluate.ifeval=ifeval.jsonl candidates.temperature=0 candidates.max_tokens=1280
    python recipes/evaluate.py '++evaluate.models={x: <its tokenizer>}' engine=openai engine.base_url=http://host/v1

A model is a Hugging Face directory, a name that can be fetched, or a `.json` file of answers in AlpacaEval's format.
With `engine=openai` the server answers, and only tokenizer and chat template are read from the directory. Results go to
`<run_dir>/evaluation.md`, `report.html` and `exports/<model>/`. A killed run continues at the next start.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from nemo_srl import cli, jsonio, preflight, report
from nemo_srl.artifacts import BaseModel, SourceFile, write_atomic
from nemo_srl.config import Config
from nemo_srl.data import questions as formats
from nemo_srl.data import verifiable
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.experiment import Experiment
from nemo_srl.records import Candidate, EFTExample, Metric, Question, VerifiablePrompt
from nemo_srl.runs import open_run
from nemo_srl.stages import answers, evaluation, head_to_head
from nemo_srl.stages import ifeval as ifeval_stage

log = logging.getLogger(__name__)


@dataclass
class EvaluateSettings:
    models: dict[str, str] = field(default_factory=dict)
    """Name and directory (or file of answers) of each model, in the order of the tables."""
    questions: str = "data/seed/eft_eval.jsonl"
    """Questions of AlpacaEval or MT-Bench, our prompts, or rows with an `instruction`. Empty: none."""
    ifeval: str = ""
    """IFEval's prompts, as published (JSONL). Files of answers take no part in it. Empty: none."""
    judge_model: str = ""
    """The model that compares answers. Empty: the first model. With `judge.engine`, only its tokenizer is used."""
    judging: bool = True
    """Also measure how well each model judges, on `data.eft_eval_path`."""


@dataclass
class EvaluateConfig(Config):
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)


cli.register_schemas(sys.argv[1:], evaluate_schema=EvaluateConfig)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user gives. All of it is checked before any model is asked."""

    models: Mapping[str, BaseModel]
    """By name, without the files of answers."""
    judge: BaseModel
    """The model that compares answers."""
    questions: Sequence[Question]
    ifeval: Sequence[VerifiablePrompt]
    files: Mapping[str, Sequence[Candidate]]
    """The answers of the other models, by name."""
    held_out: SourceFile[EFTExample] | None
    """What each model judges, if that is measured."""


def open_given(settings: EvaluateSettings, exp: Experiment) -> Given:
    """Open and check everything that the user gives. Errors begin with the setting's name."""
    for name in settings.models:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(
                f"evaluate.models: {name!r} names directories, so it must begin with a letter or digit. Use letters, "
                "digits, '.', '_' and '-'."
            )
    with naming("evaluate.questions"):
        questions = formats.read_questions(Path(settings.questions)) if settings.questions else []
    with naming("evaluate.ifeval"):
        ifeval = verifiable.read_prompts(Path(settings.ifeval), verifiable.Verifier()) if settings.ifeval else []
    models: dict[str, BaseModel] = {}
    files: dict[str, list[Candidate]] = {}
    for name, path in settings.models.items():
        key = f"evaluate.models.{name}"
        if path.endswith(".json"):
            with naming(key):
                files[name] = formats.read_answers(Path(path), questions)
        else:
            models[name] = exp.base_model(path, key=key)
    key = "evaluate.judge_model"
    judge = exp.base_model(settings.judge_model, key=key) if settings.judge_model else next(iter(models.values()), None)
    if judge is None:
        raise ConfigError(f"evaluate.models={settings.models}: give one or more Hugging Face directories by name")
    named = {f"evaluate.models.{name}": model for name, model in models.items()}
    named |= {key: judge} if settings.judge_model else {}
    preflight.check_models(exp.cfg, {key: model.model_dir for key, model in named.items()})
    held_out = None
    if settings.judging and models:
        held_out = exp.source(exp.cfg.data.eft_eval_path, EFTExample, key="data.eft_eval_path")
    if questions and len(settings.models) > 1:
        head_to_head.check(exp.cfg.judge)
    return Given(models=models, judge=judge, questions=questions, ifeval=ifeval, files=files, held_out=held_out)


def evaluate(settings: EvaluateSettings, exp: Experiment, given: Given) -> str:
    """Run everything; returns the tables as Markdown."""
    sections = []
    own = {name: ask(exp, given, name) for name in given.models}
    if given.ifeval and own:
        sections.append("## IFEval\n\n" + report.markdown(report.ifeval_cells(follow(exp, own, given.ifeval))))
    if given.held_out:
        measured = {name: asked_of.evaluation.read() for name, asked_of in own.items()}
        sections.append("## Each model by itself\n\n" + report.table(measured))
    answered = answer(settings, exp, given, own) if given.questions else {}
    if len(answered) > 1:
        matches = compare(exp, given.judge, answered)
        ours, theirs = report.markdown(report.match_cells(matches)), report.markdown(report.paper_cells())
        sections.append("\n\n".join(["## Head to head", ours, *report.unreadable(matches)]))
        sections.append(f"In the paper (70B, GPT-4 as judge):\n\n{theirs}")
    return "\n\n".join(sections)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Let errors in a file begin with the setting that names it."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{key}={e}") from e


@dataclass
class Own:
    """What one model said. None for what is not asked."""

    ifeval: Any = None
    evaluation: Any = None
    answers: Any = None


def ask(exp: Experiment, given: Given, name: str) -> Own:
    """Everything that one model is asked, one stage after the other, so that its servers start once."""
    own, policy = Own(), given.models[name]
    if given.ifeval:
        prompts = [Question(question_id=p.key, turns=[p.text], dataset="ifeval") for p in given.ifeval]
        questions = exp.given("ifeval_questions", prompts, Question)
        own.ifeval = exp.run(answers.STAGE, 0, policy=policy, questions=questions, directory=f"ifeval_answers_{name}")
    if given.held_out:
        directory = f"evaluation_{name}"
        own.evaluation = exp.run(evaluation.STAGE, 0, policy=policy, eft_eval=given.held_out, directory=directory)
    if given.questions:
        questions = exp.given("questions", given.questions, Question)
        own.answers = exp.run(answers.STAGE, 0, policy=policy, questions=questions, directory=f"answers_{name}")
    return own


def answer(settings: EvaluateSettings, exp: Experiment, given: Given, own: Mapping[str, Own]) -> dict[str, Any]:
    """The answers of each model, as artifacts. Also writes them as files for other programs."""
    answered: dict[str, Any] = {}
    for name in settings.models:
        y = own[name].answers if name in own else exp.given(f"answers_{name}", given.files[name], Candidate)
        answered[name] = y
        write_exports(exp.run_dir / "exports" / name, given.questions, y.read(), name)
    return answered


def follow(exp: Experiment, own: Mapping[str, Own], verifiable: Sequence[VerifiablePrompt]) -> dict[str, list[Metric]]:
    """The IFEval metrics of each model."""
    prompts = exp.given("ifeval", verifiable, VerifiablePrompt)
    return {
        name: exp.run(ifeval_stage.STAGE, 0, prompts=prompts, answers=x.ifeval, directory=f"ifeval_{name}").read()
        for name, x in own.items()
    }


def compare(exp: Experiment, judge: BaseModel, answered: Mapping[str, Any]) -> dict[tuple[str, str], Sequence[Metric]]:
    """The head-to-head metrics of every two models."""
    return {
        (a, b): exp.run(
            head_to_head.STAGE, 0, judge=judge, a=answered[a], b=answered[b], directory=f"match_{a}_{b}"
        ).read()
        for a, b in itertools.combinations(answered, 2)
    }


def write_exports(directory: Path, asked: Sequence[Question], found: Sequence[Candidate], model: str) -> None:
    """Write AlpacaEval's file, and MT-Bench's if all turns of every question are answered."""
    rows = formats.alpaca_eval_rows(asked, found, model)
    if len(rows) < len(asked):
        missing = len(asked) - len(rows)
        log.warning("%s: %d of %d questions have no answer and are left out of its exports", model, missing, len(asked))
    write_atomic(directory / "alpaca_eval.json", jsonio.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    if sum(a.is_answered for a in found) == sum(len(q.turns) for q in asked):
        lines = [jsonio.dumps(row, ensure_ascii=False) + "\n" for row in formats.mt_bench_rows(asked, found, model)]
        write_atomic(directory / "mt_bench.jsonl", "".join(lines))


def run(config: EvaluateConfig) -> None:
    plain = Config(**{f.name: getattr(config, f.name) for f in fields(Config)})
    with Experiment(plain) as exp:
        text = evaluate(config.evaluate, exp, open_given(config.evaluate, exp))
        if lines := report.evidence_cells(open_run(exp.run_dir)):
            text += f"\n\n## Changes from the model before, on the same items\n\n{report.markdown(lines)}"
        write_atomic(exp.run_dir / "evaluation.md", f"# {exp.run_dir.name}\n\n{text}\n")
        page = report.write_report(open_run(exp.run_dir))
    print(f"{text}\n\n{page}")


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    cli.run_composed(cfg, EvaluateConfig, run)


if __name__ == "__main__":
    cli.start(main)

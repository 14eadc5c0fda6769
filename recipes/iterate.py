"""Self-Rewarding Language Models (arXiv 2401.10020): M0 -> M1 -> ... -> M_{T+1}.

    python recipes/iterate.py                                    # SmolLM2-135M on a bare CPU machine
    python recipes/iterate.py dpo.beta=0.2 run_dir=runs/beta     # anything in conf/ can be set
    python recipes/iterate.py method=cream run_dir=runs/cream    # another method: docs/methods.md
    python recipes/iterate.py --cfg job                          # show the whole configuration

Run it again after a crash, a kill or a reboot, and it continues where it stopped. With changed settings on an
old run_dir, it refuses to run and names each change.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig

from nemo_srl import checked, cli, combinations, early_stopping, machine_time, preflight, report
from nemo_srl.artifacts import BaseModel, Model, SourceFile, Table, write_atomic
from nemo_srl.config import Config
from nemo_srl.data import questions
from nemo_srl.data.checked.truth import CheckedInstruction
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.experiment import Experiment
from nemo_srl.iteration import Iteration, names_of_models
from nemo_srl.judging import asks_models, reader
from nemo_srl.judging.verifier import read_checked
from nemo_srl.records import (
    EFTExample,
    IFTExample,
    Metric,
    PreferencePair,
    Prompt,
    Question,
    RankedAnswers,
    VerifiablePrompt,
)
from nemo_srl.report import tracking
from nemo_srl.report.alarms import Alarm, alarms
from nemo_srl.runs import open_run
from nemo_srl.stages import (  # fmt: skip
    anchor,
    candidates,
    eft,
    evaluation,
    policy,
    prompts,
    refresh,
    sft,
)

log = logging.getLogger(__name__)

cli.register_schemas(sys.argv[1:], schema=Config)


@dataclass(frozen=True)
class Given:
    """What the user gives to a run. All of it is checked before the first stage."""

    m0: BaseModel
    generator: BaseModel | None
    """Another model for new prompts (`prompts.model`)."""
    anchor: BaseModel | None
    """Another model as the anchor (`anchor.model`)."""
    others: Mapping[str, BaseModel]
    """Other models for the pairs (`judge.model`, `pairs.anchor`, `pairs.second_judge`), by setting."""
    ift: SourceFile[IFTExample]
    eft: SourceFile[EFTExample] | None
    held_out: SourceFile[EFTExample]
    rankings: SourceFile[RankedAnswers] | None
    prompts: Mapping[int, SourceFile[Prompt]]
    """By iteration; empty if prompts are generated."""
    checked: SourceFile[VerifiablePrompt] | None
    """The prompts that code can check (`judge.verifier_path`)."""
    validation: SourceFile[Question] | None
    """The prompts on which checkpoints are compared (`early_stopping.prompts_path`)."""


def open_given(cfg: Config, exp: Experiment) -> Given:
    """Open and check everything that the user gives."""
    tracking.check(cfg.tracking)
    data = cfg.data
    ranked = exp.source(data.rankings_path, RankedAnswers, key="data.rankings_path") if data.rankings_path else None
    given = Given(
        m0=exp.base_model(),
        generator=other_model(exp, "prompts.model", "" if cfg.prompts.path else cfg.prompts.model),
        anchor=other_model(exp, "anchor.model", cfg.anchor.model if cfg.anchor.num_prompts else ""),
        others={key: exp.base_model(name, key=key) for key, name in names_of_models(cfg).items()},
        ift=exp.source(data.ift_path, IFTExample, key="data.ift_path"),
        eft=exp.source(data.eft_path, EFTExample, key="data.eft_path") if data.eft_path else None,
        held_out=exp.source(data.eft_eval_path, EFTExample, key="data.eft_eval_path"),
        rankings=ranked,
        prompts=prompt_files(cfg, exp),
        checked=checked_prompts(cfg, exp),
        validation=validation_prompts(cfg, exp),
    )
    others = {"prompts.model": given.generator, "anchor.model": given.anchor, **given.others}
    preflight.check(
        cfg,
        given.m0.model_dir,
        given.held_out.read(),
        given.eft.read() if given.eft else (),
        ift=given.ift.read(),
        other_models={key: model.model_dir for key, model in others.items() if model},
    )
    if data.checked_path:
        instructions = exp.source(data.checked_path, CheckedInstruction, key="data.checked_path").read()
        checked.check([x.instruction for x in given.held_out.read()], instructions)
    num_eft = len(given.eft.read()) if given.eft else 0
    preflight.check_prompts(cfg, {str(x.path): x.read() for x in given.prompts.values()}, num_eft=num_eft)
    if given.checked:
        texts = {p.text for p in given.checked.read()}
        combinations.check_verifiable(cfg, {str(x.path): x.read() for x in given.prompts.values()}, texts)
    if given.rankings:
        eft.check(given.rankings.read())
    return given


def iterate(cfg: Config, exp: Experiment) -> dict[str, list[Metric]]:
    """The loop of the paper. Returns the evaluation of each model."""
    given = open_given(cfg, exp)
    ift, held_out, m0 = given.ift, given.held_out, given.m0
    if line := machine_time.announcement(cfg, m0.model_dir, ift.read(), given.eft.read() if given.eft else ()):
        log.info("%s", line)
    m = m1 = previous = exp.run(sft.STAGE, 0, policy=m0, ift=ift, eft=given.eft)
    made = ready_prompts(cfg, exp, given)
    evaluations = {"M0": evaluate(exp, 0, m0, suffix="_m0", is_alone=True)}
    evaluations["M1"] = evaluate(exp, 0, m, is_alone=not cfg.num_iterations)
    earlier: list[Table[Prompt]] = []
    kept: list[Table[EFTExample]] = []
    all_pairs: list[Table[PreferencePair]] = []
    for t in range(1, cfg.num_iterations + 1):
        if (x := made.get(t)) is None:
            x = exp.run(prompts.STAGE, t, policy=m, ift=ift, eft_eval=held_out, earlier=earlier)
            earlier.append(x)
        iteration = Iteration(
            exp=exp, number=t, policy=m, previous=previous, first=m1, others=given.others, checked=given.checked,
            eft=given.eft,
        )  # fmt: skip
        y = exp.run(candidates.STAGE, t, policy=m, prompts=x)
        r = iteration.judge(y)
        d = iteration.pairs(x, y, r)
        if cfg.anchor.num_prompts and asks_models(reader(cfg.judge)):
            exp.run(anchor.STAGE, t, judge=given.anchor or m1, candidates=y, judgements=r, pairs=d, small=True)
            for alarm in found_alarms(exp):
                if alarm.iteration == t:
                    log.warning("ALARM, %s", alarm.text)
        v = iteration.verdict_pairs(y, r)
        earlier_pairs = all_pairs if cfg.pairs.accumulate else []
        inputs = {"policy": m, "pairs": d, "verdict_pairs": v, "earlier": earlier_pairs}
        if given.validation:
            previous, m = m, early_stopping.train(iteration, given.validation, **inputs)
        else:
            previous, m = m, exp.run(policy.STAGE, t, **inputs)
        all_pairs.append(d)
        if given.rankings:
            kept.append(exp.run(eft.STAGE, t, judge=m, rankings=given.rankings))
            own = exp.run(candidates.STAGE, t, policy=m, prompts=x, directory="own_answers")
            m = exp.run(refresh.STAGE, t, policy=m, own_answers=own, eft=given.eft, kept=kept)
        evaluations[f"M{t + 1}"] = evaluate(exp, t, m, is_alone=t == cfg.num_iterations)
        tracking.track(open_run(exp.run_dir), cfg.tracking)
    return evaluations


def ready_prompts(cfg: Config, exp: Experiment, given: Given) -> Mapping[int, SourceFile[Prompt] | Table[Prompt]]:
    """The prompts that need no model of the loop, by iteration: from files, or by another model (`prompts.model`).

    That model writes those of all iterations now, so that its servers start once.
    """
    if given.prompts or given.generator is None:
        return given.prompts
    made: list[Table[Prompt]] = []
    for t in range(1, cfg.num_iterations + 1):
        inputs = {"policy": given.generator, "ift": given.ift, "eft_eval": given.held_out}
        made.append(exp.run(prompts.STAGE, t, **inputs, earlier=list(made), small=True))
    return dict(enumerate(made, start=1))


def evaluate(
    exp: Experiment, t: int, m: Model | BaseModel, *, suffix: str = "", is_alone: bool = False
) -> list[Metric]:
    """How a model answers and judges. With `data.checked_path`, also what code knows about that.

    `is_alone` says that nothing else of the loop asks this model afterwards.
    """
    data = exp.cfg.data
    held_out = exp.source(data.eft_eval_path, EFTExample)
    directory = f"evaluation{suffix}"
    found = exp.run(evaluation.STAGE, t, policy=m, eft_eval=held_out, directory=directory, small=is_alone)
    if not data.checked_path:
        return found.read()
    true = exp.run(
        checked.STAGE,
        t,
        evaluation=found,
        instructions=exp.source(data.checked_path, CheckedInstruction),
        eft_eval=held_out,
        eft=exp.source(data.eft_path, EFTExample) if data.eft_path else None,
        directory=f"checked{suffix}",
    )
    return [*found.read(), *true.read()]


def prompt_files(cfg: Config, exp: Experiment) -> dict[int, SourceFile[Prompt]]:
    """The file of `prompts.path` for each iteration. Empty if the prompts are generated."""
    key, path, found = "prompts.path", cfg.prompts.path, {}
    for t in range(1, cfg.num_iterations + 1 if path else 1):
        try:
            name = path.format(iteration=t)
        except (KeyError, IndexError, ValueError, AttributeError) as e:
            reason = "the only name in braces is {iteration}. Correct it, or rename the file."
            raise ConfigError(f"{key}={path!r}: {reason}") from e
        try:
            exp.path_of(name, key=key)
        except DataError as e:
            others = f"Or set num_iterations={t - 1}, or {key}='' for prompts that the model writes."
            raise DataError(f"{e} {others}" if t > 1 else str(e)) from e
        found[t] = exp.source(name, Prompt, key=key)
    return found


def checked_prompts(cfg: Config, exp: Experiment) -> SourceFile[VerifiablePrompt] | None:
    """The prompts of `judge.verifier_path`, if answers are checked by them."""
    if cfg.judge.mode != "verifier" or not cfg.judge.verifier_path:
        return None
    path = exp.path_of(cfg.judge.verifier_path, key="judge.verifier_path")
    return exp.given("checked_prompts", read_checked(path), VerifiablePrompt)


def validation_prompts(cfg: Config, exp: Experiment) -> SourceFile[Question] | None:
    """The prompts of `early_stopping.prompts_path`, if checkpoints are compared."""
    key, path = "early_stopping.prompts_path", cfg.early_stopping.prompts_path
    if not path:
        return None
    try:
        found = questions.read_questions(exp.path_of(path, key=key))
    except DataError as e:
        raise DataError(f"{key}={e}") from e
    return exp.given("validation", found, Question)


def other_model(exp: Experiment, key: str, path: str) -> BaseModel | None:
    """The model that a setting names, if it names one."""
    return exp.base_model(path, key=key) if path else None


def found_alarms(exp: Experiment) -> list[Alarm]:
    """Signs of reward hacking in the published iterations."""
    run = open_run(exp.run_dir)
    return alarms({t: run.table(t, "anchor", Metric) for t in run.iterations})


def run(cfg: Config) -> None:
    started = time.monotonic()
    with Experiment(cfg) as exp:
        table = report.table(iterate(cfg, exp))
        if lines := report.evidence_cells(open_run(exp.run_dir)):
            table += f"\n\nChanges on the same items, with 95% intervals:\n\n{report.markdown(lines)}"
        table += "".join(f"\n\nALARM, {alarm.text}" for alarm in found_alarms(exp))
        write_atomic(exp.run_dir / "report.md", f"# {exp.run_dir.name}\n\n{table}\n")
        report.write_report(open_run(exp.run_dir))
    print(f"\n{table}\n\nDone in {time.monotonic() - started:.0f} s. All results are in {exp.run_dir}:")
    print("  report.html                      figures, and all candidates and verdicts to browse; opens offline")
    print("  report.md                        this table")
    print("  iter_00/sft/hf                   M1; iter_01/policy/hf is M2, and so on (Hugging Face directories)")
    print("  iter_01/pairs/data.jsonl         the preference pairs; every stage has such a file")
    print("  logs                             the output of each stage")


@hydra.main(version_base="1.3", config_path="../conf", config_name="iterate")
def main(cfg: DictConfig) -> None:
    cli.run_composed(cfg, Config, run)


if __name__ == "__main__":
    cli.start(main)

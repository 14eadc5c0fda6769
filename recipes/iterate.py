"""Self-Rewarding Language Models (arXiv 2401.10020): M0 -> M1 -> ... -> M_{T+1}.

    python recipes/iterate.py                                    # SmolLM2-135M on a bare CPU machine
    python recipes/iterate.py dpo.beta=0.2 run_dir=runs/beta     # anything in conf/ can be set
    python recipes/iterate.py --cfg job                          # show the whole configuration

Run it again after a crash, a kill or a reboot, and it continues where it stopped. With changed settings on an
old run_dir, it refuses to run and names each change.
"""

from __future__ import annotations

import logging
import sys
import time

import hydra
from omegaconf import DictConfig

from nemo_srl import checked, cli, machine_time, preflight, report
from nemo_srl.artifacts import BaseModel, Model, Table, write_atomic
from nemo_srl.config import Config
from nemo_srl.data.checked.truth import CheckedInstruction
from nemo_srl.experiment import Experiment
from nemo_srl.records import EFTExample, IFTExample, Metric, Prompt, RankedAnswers
from nemo_srl.report.alarms import Alarm, alarms
from nemo_srl.report.tracking import track
from nemo_srl.runs import open_run
from nemo_srl.stages import (  # fmt: skip
    anchor,
    candidates,
    eft,
    evaluation,
    judgements,
    pairs,
    policy,
    prompts,
    refresh,
    sft,
    verdict_pairs,
)

log = logging.getLogger(__name__)

cli.register_schemas(sys.argv[1:], schema=Config)


def iterate(cfg: Config, exp: Experiment) -> dict[str, list[Metric]]:
    """The loop of the paper. Returns the evaluation of each model."""
    ift = exp.source(cfg.data.ift_path, IFTExample)
    seed_eft = exp.source(cfg.data.eft_path, EFTExample) if cfg.data.eft_path else None
    rankings = exp.source(cfg.data.rankings_path, RankedAnswers) if cfg.data.rankings_path else None
    kept: list[Table[EFTExample]] = []
    held_out = exp.source(cfg.data.eft_eval_path, EFTExample)

    m0 = exp.base_model()
    preflight.check(cfg, m0.model_dir, held_out.read(), seed_eft.read() if seed_eft else ())
    if line := machine_time.announcement(cfg, m0.model_dir, ift.read(), seed_eft.read() if seed_eft else ()):
        log.info("%s", line)
    m = m1 = exp.run(sft.STAGE, 0, policy=m0, ift=ift, eft=seed_eft)
    evaluations = {"M0": evaluate(exp, 0, m0, suffix="_m0"), "M1": evaluate(exp, 0, m)}
    generator = exp.base_model(cfg.prompts.model) if cfg.prompts.model else None
    other_judge = exp.base_model(cfg.anchor.model) if cfg.anchor.model else None
    earlier: list[Table[Prompt]] = []
    for t in range(1, cfg.num_iterations + 1):
        if cfg.prompts.path:
            x = exp.source(cfg.prompts.path.format(iteration=t), Prompt)
        else:
            x = exp.run(prompts.STAGE, t, policy=generator or m, ift=ift, eft_eval=held_out, earlier=earlier)
            earlier.append(x)
        y = exp.run(candidates.STAGE, t, policy=m, prompts=x)
        r = exp.run(judgements.STAGE, t, judge=m, candidates=y)
        d = exp.run(pairs.STAGE, t, candidates=y, judgements=r)
        if cfg.anchor.num_prompts:
            exp.run(anchor.STAGE, t, judge=other_judge or m1, candidates=y, judgements=r, pairs=d)
            for alarm in found_alarms(exp):
                if alarm.iteration == t:
                    log.warning("ALARM, %s", alarm.text)
        v = exp.run(verdict_pairs.STAGE, t, candidates=y, judgements=r) if cfg.verdict_pairs.num_prompts else None
        m = exp.run(policy.STAGE, t, policy=m, pairs=d, verdict_pairs=v)
        if rankings:
            kept.append(exp.run(eft.STAGE, t, judge=m, rankings=rankings))
            own = exp.run(candidates.STAGE, t, policy=m, prompts=x, directory="own_answers")
            m = exp.run(refresh.STAGE, t, policy=m, own_answers=own, eft=seed_eft, kept=kept)
        evaluations[f"M{t + 1}"] = evaluate(exp, t, m)
        track(open_run(exp.run_dir), cfg.tracking)
    return evaluations


def evaluate(exp: Experiment, t: int, m: Model | BaseModel, *, suffix: str = "") -> list[Metric]:
    """How a model answers and judges. With `data.checked_path`, also what code knows about that."""
    data = exp.cfg.data
    held_out = exp.source(data.eft_eval_path, EFTExample)
    found = exp.run(evaluation.STAGE, t, policy=m, eft_eval=held_out, directory=f"evaluation{suffix}")
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


def found_alarms(exp: Experiment) -> list[Alarm]:
    """Signs of reward hacking in the published iterations."""
    run = open_run(exp.run_dir)
    return alarms({t: run.table(t, "anchor", Metric) for t in run.iterations})


def run(cfg: Config) -> None:
    started = time.monotonic()
    with Experiment(cfg) as exp:
        table = report.table(iterate(cfg, exp))
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

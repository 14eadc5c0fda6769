"""The arms of the proof: what each of them changes in the self-rewarding loop, and the loop itself."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import Any

import toy_language

from nemo_srl.artifacts import Model, SourceFile, Table
from nemo_srl.errors import ConfigError
from nemo_srl.experiment import Experiment
from nemo_srl.iteration import Iteration, Judged
from nemo_srl.judging import asks_models, reader
from nemo_srl.judging.scores import shuffled
from nemo_srl.records import (
    Candidate,
    EFTExample,
    IFTExample,
    Judgement,
    PreferencePair,
    Prompt,
    RankedAnswers,
)
from nemo_srl.stages import anchor, candidates, eft, evaluation, policy, refresh, sft

log = logging.getLogger(__name__)


@dataclass
class ArmConfig:
    judge: str = "self"
    """Whose scores make the pairs. self: those of the judge that the settings name, by default M_t. shuffled: the same,
    but each candidate gets the scores of another one, drawn at random. oracle: the true scores."""
    method: str = "self_rewarding"
    """A method of `conf/method/`."""
    set: dict[str, Any] = field(default_factory=dict)
    """Further settings of the run, by their dotted paths."""
    train: str = "dpo"
    """dpo: DPO on the pairs. best: SFT on the chosen responses alone."""
    eft: str = "all"
    """The EFT examples that M1 is trained on. all; weak: only the first few; none. meta: all, and M1 also sees
    comparisons of verdicts, with the oracle's choice."""
    refresh: bool = False
    """Refresh the judge after each DPO (stages `eft` and `refresh`)."""
    second_anchor: bool = False
    """Also ask the M1 of another seed about the pairs of the finished run (stage `anchor`)."""
    seeds: list[int] | None = None
    """Use these seeds instead of `proof.seeds`."""
    num_iterations: int | None = None
    """Use this number instead of `num_iterations`."""

    def __post_init__(self) -> None:
        known = {
            "judge": ("self", "shuffled", "oracle"),
            "train": ("dpo", "best"),
            "eft": ("all", "weak", "none", "meta"),
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ConfigError(f"proof.arms: {key}={getattr(self, key)!r}: must be one of {', '.join(values)}")


@dataclass(frozen=True)
class Trained:
    """What one iteration was trained on."""

    number: int
    candidates: Table[Candidate]
    judgements: Judged
    pairs: Table[PreferencePair]


def make_m1(exp: Experiment, *, with_eft: bool) -> Model:
    """Train and evaluate M1."""
    ift = exp.source(exp.cfg.data.ift_path, IFTExample)
    judged = exp.source(exp.cfg.data.eft_path, EFTExample) if with_eft else None
    m1 = exp.run(sft.STAGE, 0, policy=exp.base_model(), ift=ift, eft=judged)
    exp.run(evaluation.STAGE, 0, policy=m1, eft_eval=exp.source(exp.cfg.data.eft_eval_path, EFTExample))
    return m1


def iterate(arm: ArmConfig, exp: Experiment, m1: Model) -> list[Trained]:
    """The loop of the paper from M1 on, with the changes of the arm."""
    cfg, m, previous = exp.cfg, m1, m1
    seed_eft = exp.source(cfg.data.eft_path, EFTExample)
    held_out = exp.source(cfg.data.eft_eval_path, EFTExample)
    kept: list[Table[EFTExample]] = []
    done: list[Trained] = []
    for t in range(1, cfg.num_iterations + 1):
        x = exp.source(cfg.prompts.path.format(iteration=t), Prompt)
        y = exp.run(candidates.STAGE, t, policy=m, prompts=x)
        iteration = Iteration(exp=exp, number=t, policy=m, previous=previous, first=m1, eft=seed_eft)
        r = scores(arm, iteration, y)
        if all(j.score is None for j in r.read()):
            log.info("no verdict has a score, so there is nothing to train on: the loop ends with M%d", t)
            return done
        d = iteration.pairs(x, y, r)
        done.append(Trained(t, y, r, d))
        if asks_models(reader(cfg.judge)):
            exp.run(anchor.STAGE, t, judge=m1, candidates=y, judgements=r, pairs=d)
        before = m
        if arm.train == "best":
            m = exp.run(sft.STAGE, t, policy=m, ift=chosen(exp, t, d), directory="policy")
        else:
            m = exp.run(policy.STAGE, t, policy=m, pairs=d, verdict_pairs=iteration.verdict_pairs(y, r))
        if arm.refresh:
            rankings = exp.source(cfg.data.rankings_path, RankedAnswers)
            kept.append(exp.run(eft.STAGE, t, judge=m, rankings=rankings))
            own = exp.run(candidates.STAGE, t, policy=m, prompts=x, directory="own_answers")
            m = exp.run(refresh.STAGE, t, policy=m, own_answers=own, eft=seed_eft, kept=kept)
        previous = before
        exp.run(evaluation.STAGE, t, policy=m, eft_eval=held_out)
    return done


def scores(arm: ArmConfig, iteration: Iteration, candidates: Table[Candidate]) -> Judged:
    """The judgements from which the arm makes pairs."""
    exp, t = iteration.exp, iteration.number
    if arm.judge == "oracle":
        return exp.given(f"oracle_{t}", [oracle_judgement(c) for c in candidates.read() if c.is_answered], Judgement)
    r = iteration.judge(candidates)
    if arm.judge == "shuffled":
        return exp.given(f"shuffled_{t}", shuffled(r.read(), random.Random(f"{exp.cfg.seed}/{t}")), Judgement)
    return r


def oracle_judgement(c: Candidate) -> Judgement:
    """The true score, as if a judge had given it."""
    true = float(toy_language.oracle_score(c.prompt, c.response))
    return Judgement(candidate_key=c.key, judgement_index=0, verdict="", score=true)


def chosen(exp: Experiment, t: int, d: Table[PreferencePair]) -> SourceFile[IFTExample]:
    """The chosen responses, as demonstrations."""
    best = [IFTExample(example_id=p.key, instruction=p.prompt, response=p.chosen) for p in d.read()]
    return exp.given(f"best_{t}", best, IFTExample)

"""Do both axes rise on a real language model? The default recipe over several seeds, beside two controls.

    python examples/axes/axes.py run_dir=runs/axes                       # what `make axes` does
    python examples/axes/axes.py run_dir=runs/axes axes.seeds=[1]        # one seed; the others can follow later

Stages, trainer, engine and settings are those of `recipes/iterate.py`. Each seed gives other samples and another M1,
and its arms share that M1:

    self               the loop of the recipe
    random             each candidate gets the scores of another one, and verdict pairs are turned round at random
    no_verdict_pairs   the loop without pairs of verdicts

Code scores the answers of every model (`nemo_srl/checked.py`). No arm trains on these scores. Start it again after a
crash, and it goes on. It writes `results.md` and `axes.png` to the run directory (`axes_figures.py`).
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import axes_figures
import hydra
from omegaconf import DictConfig

from nemo_srl import cli
from nemo_srl.artifacts import Model
from nemo_srl.config import Config
from nemo_srl.config.check import check
from nemo_srl.errors import ConfigError
from nemo_srl.experiment import Experiment
from nemo_srl.judging.scores import shuffled
from nemo_srl.records import EFTExample, IFTExample, Judgement, PreferencePair, Prompt
from nemo_srl.stages import candidates, judgements, pairs, policy, sft, verdict_pairs
from recipes.iterate import evaluate

log = logging.getLogger(__name__)

ARMS = ("self", "random", "no_verdict_pairs")


@dataclass
class AxesSettings:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    arms: list[str] = field(default_factory=lambda: list(ARMS))

    def __post_init__(self) -> None:
        for key, values, remedy in (("seeds", self.seeds, "[1]"), ("arms", self.arms, "[self]")):
            check(bool(values), f"axes.{key}", values, f"there is nothing to run. Set it to {remedy}, for example.")
        if unknown := sorted(set(self.arms) - set(ARMS)):
            raise ConfigError(f"axes.arms={self.arms}: no such arm as {unknown[0]!r}. There are {', '.join(ARMS)}.")


@dataclass
class AxesConfig(Config):
    axes: AxesSettings = field(default_factory=AxesSettings)


def config_of(cfg: AxesConfig, seed: int, name: str) -> Config:
    """The configuration of one run directory: that of an arm, or of the M1 that the arms of a seed share."""
    plain = Config(**{f.name: getattr(cfg, f.name) for f in fields(Config)})
    return replace(plain, run_dir=str(axes_figures.run_dir_of(Path(cfg.run_dir), seed, name)), seed=seed)


def make_m1(exp: Experiment) -> Model:
    """M1, evaluated."""
    data = exp.cfg.data
    ift, eft = exp.source(data.ift_path, IFTExample), exp.source(data.eft_path, EFTExample)
    m1 = exp.run(sft.STAGE, 0, policy=exp.base_model(), ift=ift, eft=eft)
    evaluate(exp, 0, m1)
    return m1


def iterate(arm: str, exp: Experiment, m1: Model) -> None:
    """The loop of the recipe from M1 on, with the changes of the arm."""
    cfg, m = exp.cfg, m1
    seed = exp.source(cfg.data.eft_path, EFTExample) if cfg.verdict_pairs.num_seed else None
    for t in range(1, cfg.num_iterations + 1):
        rng = random.Random(f"{cfg.seed}:{t}:{arm}")
        x = exp.source(cfg.prompts.path.format(iteration=t), Prompt)
        y = exp.run(candidates.STAGE, t, policy=m, prompts=x)
        r = exp.run(judgements.STAGE, t, judge=m, candidates=y)
        scores = exp.given(f"shuffled_{t}", shuffled(r.read(), rng), Judgement) if arm == "random" else r
        d = exp.run(pairs.STAGE, t, candidates=y, judgements=scores)
        v = None
        if arm != "no_verdict_pairs":
            v = exp.run(verdict_pairs.STAGE, t, candidates=y, judgements=scores, eft=seed)
        if v and arm == "random":
            v = exp.given(f"turned_{t}", turned(v.read(), rng), PreferencePair)
        m = exp.run(policy.STAGE, t, policy=m, pairs=d, verdict_pairs=v)
        evaluate(exp, t, m)


def turned(found: Sequence[PreferencePair], rng: random.Random) -> list[PreferencePair]:
    """Half of the pairs, drawn at random, with chosen and rejected exchanged. The two pairs of one answer go together,
    so that they say with one voice which of the two answers is better."""
    answers = sorted({p.prompt_id.rpartition("/")[0] for p in found})
    exchanged = set(rng.sample(answers, len(answers) // 2))
    return [
        replace(p, chosen=p.rejected, rejected=p.chosen) if p.prompt_id.rpartition("/")[0] in exchanged else p
        for p in found
    ]


def run(cfg: AxesConfig) -> None:
    if not cfg.data.checked_path or not cfg.prompts.path or not cfg.verdict_pairs.num_prompts:
        raise ConfigError(
            f"recipe: it needs data.checked_path ({cfg.data.checked_path!r}), prompts.path ({cfg.prompts.path!r}) and "
            f"verdict_pairs.num_prompts ({cfg.verdict_pairs.num_prompts}). recipe=srl-smollm2-135m-checked has them."
        )
    started = time.monotonic()
    for seed in cfg.axes.seeds:
        with Experiment(config_of(cfg, seed, "m1")) as exp:
            m1 = make_m1(exp)
        for arm in cfg.axes.arms:
            with Experiment(config_of(cfg, seed, arm)) as exp:
                iterate(arm, exp, m1)
            log.info("seed %d, %s: done after %.0f s", seed, arm, time.monotonic() - started)
    print(axes_figures.write(Path(cfg.run_dir), cfg.axes.seeds, cfg.axes.arms, cfg.num_iterations))


@hydra.main(version_base="1.3", config_path="../../conf", config_name="iterate")
def main(cfg: DictConfig) -> None:
    cli.run_composed(cfg, AxesConfig, run)


if __name__ == "__main__":
    cli.register_schemas(sys.argv[1:], schema=AxesConfig)
    main()

"""Does self-rewarding improve anything? Runs the loop on a toy language, whose true scores code can compute.

    python examples/proof/prove.py                                      # all arms and seeds
    python examples/proof/prove.py --config-name srl-proof-cpu-small    # a few minutes: this is `make proof`
    python examples/proof/prove.py proof.seeds=[1] proof.only=[self,random]    # some of them; the rest later

Stages, trainer and engine are those of `recipes/iterate.py`. The arms differ in who gives the scores, what is trained
on, or what the judge has learned (`proof_arms.ArmConfig`). The oracle measures every model. Only the arm `oracle` is
trained on its scores. Start it again after a crash, and it goes on. It writes its figures to
`<run_dir>/results.jsonl`, and `figures.py` makes tables and plots of them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import hydra
import toy_language
from omegaconf import DictConfig, OmegaConf
from proof_arms import ArmConfig, Trained, iterate, make_m1
from true_scores import measure

from nemo_srl import combinations
from nemo_srl.artifacts import Model, write_atomic
from nemo_srl.cli import one_line_errors, register_schemas, run_composed
from nemo_srl.config import Config, load
from nemo_srl.errors import ConfigError, NemoSrlError
from nemo_srl.experiment import Experiment
from nemo_srl.runs import open_run
from nemo_srl.stages import anchor

log = logging.getLogger(__name__)

LOG_FORMAT = "%(relativeCreated)7.0f %(threadName)-24s %(message)s"
METHODS = Path(__file__).resolve().parents[2] / "conf" / "method"
M1_DIRECTORIES = {"all": "m1", "weak": "m1_weak", "none": "m1_no_eft", "meta": "m1_meta"}
"""Where M1 is, by `ArmConfig.eft`."""


class ProofError(NemoSrlError):
    """The run does not show what its settings claim."""


@dataclass
class ProofSettings:
    seeds: list[int] = field(default_factory=lambda: [1])
    """Each seed gives other weights of M0, other data and other samples."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    """Run only these arms. Empty: all of them."""
    min_advantage: float | None = None
    """Fail unless, in every seed, the last model of `self` has a true score this much above that of `random`."""
    max_random_gain: float | None = None
    """Fail if, in any seed, the true score of `random` rises by more than this from M1 to its last model."""
    num_parallel: int = 2
    """How many runs work at the same time, each on one core."""
    num_ift: int = 2000
    num_eft: int = 1000
    num_weak_eft: int = 100
    num_held_out: int = 300
    """Held-out instructions. Each has four judged answers."""
    num_rankings: int = 200
    """Instructions with four ranked answers each."""
    num_meta: int = 1000
    """Comparisons of two verdicts, for arms with `eft: meta`."""
    num_prompts: int = 800
    """New prompts per iteration."""


@dataclass
class ProofConfig(Config):
    proof: ProofSettings = field(default_factory=ProofSettings)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One arm of one seed after its last iteration."""

    arm: str
    exp: Experiment
    m1_run_dir: Path
    iterations: Sequence[Trained]


def seed_config(cfg: ProofConfig, seed: int, eft: str) -> Config:
    """The configuration with which M1 of a seed is made. `eft` is that of the arm."""
    directory = Path(cfg.run_dir).absolute() / f"seed_{seed}"
    files = toy_language.SeedFiles(directory / "data")
    plain = Config(**{f.name: getattr(cfg, f.name) for f in fields(Config)})
    return replace(
        plain,
        run_dir=str(directory / M1_DIRECTORIES[eft]),
        seed=seed,
        model=replace(plain.model, path=str(directory / "m0")),
        data=replace(
            plain.data,
            ift_path=str(files.meta_ift if eft == "meta" else files.ift),
            eft_path=str(files.weak_eft if eft == "weak" else files.eft),
            eft_eval_path=str(files.eft_eval),
            rankings_path=str(files.rankings),
        ),
        prompts=replace(plain.prompts, path=str(files.new_prompts)),
    )


def arm_config(base: Config, name: str, arm: ArmConfig) -> Config:
    """The configuration of an arm, from that of its M1. Raises `ConfigError` for settings that do not fit together."""
    # SFT on the best responses trains as long, and at the same learning rate, as DPO on the pairs.
    names = ("learning_rate", "min_learning_rate", "warmup_fraction", "global_batch_size", "max_epochs")
    like_dpo = {key: getattr(base.dpo, key) for key in names}
    plain = replace(
        base,
        run_dir=str(Path(base.run_dir).with_name(name)),
        num_iterations=arm.num_iterations or base.num_iterations,
        sft=replace(base.sft, **like_dpo) if arm.train == "best" else base.sft,
    )
    if not (METHODS / f"{arm.method}.yaml").exists():
        known = sorted(path.stem for path in METHODS.glob("*.yaml"))
        raise ConfigError(f"proof.arms.{name}.method={arm.method!r}: no such method. There are {', '.join(known)}.")
    method = OmegaConf.load(METHODS / f"{arm.method}.yaml")
    further = OmegaConf.from_dotlist([f"{key}={json.dumps(value)}" for key, value in arm.set.items()])
    cfg = load(OmegaConf.merge(asdict(plain), method, further), Config)
    combinations.check(cfg)
    return cfg


class Runs:
    """All arms and seeds of a configuration. `num_parallel` of them work at once. Each M1 is made by one of them."""

    def __init__(self, cfg: ProofConfig) -> None:
        arms, self.cfg = cfg.proof.arms, cfg
        names = cfg.proof.only or list(arms)
        if unknown := sorted(set(names) - arms.keys()):
            raise ConfigError(f"proof.only={unknown}: no such arm. There are {', '.join(sorted(arms))}.")
        self.todo = [(seed, name) for name in names for seed in arms[name].seeds or cfg.proof.seeds]
        self.seeds = sorted({seed for seed, _ in self.todo})
        self._locks = {(seed, arms[name].eft): threading.Lock() for seed, name in self.todo}
        self._m1: dict[tuple[int, str], Model] = {}

    def all(self) -> list[dict[str, Any]]:
        """The rows of all arms. When one fails, the others go on to their end; then its error is raised."""
        for seed in self.seeds:
            write_inputs(self.cfg, seed)
        with ThreadPoolExecutor(self.cfg.proof.num_parallel) as pool:
            futures = [pool.submit(self.one, seed, name) for seed, name in self.todo]
        done = [future.result() for future in futures]
        for finished in done:
            if self.cfg.proof.arms[finished.arm].second_anchor:
                self.second_anchor(finished)  # it needs the M1 of another seed, so all of them must be there
        return [
            {"seed": f.exp.cfg.seed, "arm": f.arm, **row}
            for f in done
            for row in measure(open_run(f.exp.run_dir), open_run(f.m1_run_dir))
        ]

    def one(self, seed: int, name: str) -> Finished:
        threading.current_thread().name = f"seed {seed} {name}"
        arm = self.cfg.proof.arms[name]
        base = seed_config(self.cfg, seed, arm.eft)
        with self._locks[seed, arm.eft], Experiment(base) as exp:
            m1 = self._m1[seed, arm.eft] = make_m1(exp, with_eft=arm.eft != "none")
        with Experiment(arm_config(base, name, arm)) as exp:
            return Finished(arm=name, exp=exp, m1_run_dir=Path(base.run_dir), iterations=iterate(arm, exp, m1))

    def second_anchor(self, finished: Finished) -> None:
        """The M1 of the next seed, which has learned from other EFT data, judges the pairs as well."""
        position = self.seeds.index(finished.exp.cfg.seed)
        other = self.seeds[(position + 1) % len(self.seeds)]
        judge = self._m1.get((other, self.cfg.proof.arms[finished.arm].eft))
        if judge is None or len(self.seeds) == 1:
            return
        with finished.exp as exp:
            for i in finished.iterations:
                exp.run(
                    anchor.STAGE,
                    i.number,
                    judge=judge,
                    candidates=i.candidates,
                    judgements=i.judgements,
                    pairs=i.pairs,
                    directory="second_anchor",
                )


def write_inputs(cfg: ProofConfig, seed: int) -> None:
    """M0, the seed data and the new prompts of one seed."""
    directory = Path(cfg.run_dir).absolute() / f"seed_{seed}"
    sizes = ("num_ift", "num_eft", "num_weak_eft", "num_held_out", "num_rankings", "num_meta", "num_prompts")
    toy_language.write_seed(
        directory / "data",
        seed=seed,
        num_iterations=max([cfg.num_iterations, *(a.num_iterations or 0 for a in cfg.proof.arms.values())]),
        **{name: getattr(cfg.proof, name) for name in sizes},
    )
    if not (directory / "m0" / "model.safetensors").exists():
        toy_language.write_model(directory / "m0", seed=seed)


def check(rows: Sequence[dict[str, Any]], settings: ProofSettings) -> None:
    """Raise `ProofError` if the rows do not show what `min_advantage` and `max_random_gain` claim."""
    true: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        true.setdefault((row["seed"], row["arm"]), []).append(row["oracle_score"])
    for (seed, arm), scores in sorted(true.items()):
        log.info("seed %d, %s: true score %s", seed, arm, " -> ".join(f"{s:.2f}" for s in scores))
        if arm != "random":
            continue
        if settings.max_random_gain is not None and scores[-1] - scores[0] > settings.max_random_gain:
            raise ProofError(
                f"seed {seed}: with random scores, the true score rose from {scores[0]:.2f} to {scores[-1]:.2f}. "
                f"proof.max_random_gain={settings.max_random_gain} claims less."
            )
        if settings.min_advantage is None:
            continue
        advantage = true[seed, "self"][-1] - scores[-1]
        if advantage < settings.min_advantage:
            raise ProofError(
                f"seed {seed}: with self-rewarding, the last true score is {advantage:+.2f} points from that with "
                f"random scores. proof.min_advantage={settings.min_advantage} claims more."
            )


def prove(cfg: ProofConfig) -> None:
    """Run everything, write `results.jsonl`, and check what it shows."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads are no faster on a model this small
    # The arm `iterative_rpo` names a function of toy_language.py, and every process of a run imports it.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    started = time.monotonic()
    rows = Runs(cfg).all()
    results = Path(cfg.run_dir).absolute() / "results.jsonl"
    write_atomic(results, "".join(json.dumps(row) + "\n" for row in rows))
    log.info("done in %.0f s: %s", time.monotonic() - started, results)
    check(rows, cfg.proof)


@hydra.main(version_base="1.3", config_path="conf", config_name="srl-proof-cpu")
def main(cfg: DictConfig) -> None:
    run_composed(cfg, ProofConfig, prove, form=LOG_FORMAT)


if __name__ == "__main__":
    with one_line_errors():
        register_schemas(sys.argv[1:], proof_schema=ProofConfig)
    main()

"""Does self-rewarding improve anything? The loop on a task that code can check (`examples/proof/task.py`).

    python examples/proof/run.py                                       # all arms and seeds
    python examples/proof/run.py --config-name srl-proof-cpu-small     # a few minutes: what `make proof` runs
    python examples/proof/run.py proof.seeds=[1] proof.only=[self,random]  # some of them; later the rest

The stages, the trainer and the engine are those of `iterate.py`; an arm differs in who scores, what is
trained on, or what the judge learned (`ArmConfig`). The oracle measures every model, and feeds a training in
the arm `oracle` alone. Run it again after a crash: it goes on. `<run_dir>/results.jsonl` holds the figures, and
`examples/proof/figures.py` makes tables and plots of them.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from examples.proof import task as proof
from nemo_srl.artifacts import JOURNAL, Model, SourceFile, Table, read_jsonl, to_line, write_atomic
from nemo_srl.config import Config
from nemo_srl.errors import ConfigError, NemoSrlError
from nemo_srl.experiment import Experiment
from nemo_srl.records import (
    Candidate,
    Completion,
    EFTExample,
    IFTExample,
    Judgement,
    Metric,
    PreferencePair,
    Prompt,
    RankedAnswers,
)
from nemo_srl.report.alarms import alarms
from nemo_srl.stages import anchor, candidates, eft, evaluation, judgements, pairs, policy, refresh, sft
from nemo_srl.stages.evaluation import instructions_of

log = logging.getLogger(__name__)


class ProofError(NemoSrlError):
    """The run does not show what it was claimed to show."""


@dataclass
class ArmConfig:
    judge: str = "self"
    """Whose scores make the pairs. self: M_t's. m1: M1's, always. shuffled: M_t's, dealt to other candidates at
    random. oracle: the true ones."""
    train: str = "dpo"
    """dpo: DPO on the pairs. best: SFT on the chosen responses alone."""
    eft: str = "all"
    """What M1's judging was trained on. all, weak: the first few examples only, none."""
    refresh: bool = False
    """Refresh the judge after each DPO (stages `eft` and `refresh`)."""
    seeds: list[int] | None = None
    """Other seeds than `proof.seeds`."""
    num_iterations: int | None = None
    """Another number than `num_iterations`."""

    def __post_init__(self) -> None:
        known = {
            "judge": ("self", "m1", "shuffled", "oracle"),
            "train": ("dpo", "best"),
            "eft": ("all", "weak", "none"),
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ConfigError(f"proof.arms: {key}={getattr(self, key)!r}: must be one of {values}")


@dataclass
class ProofSettings:
    seeds: list[int] = field(default_factory=lambda: [1])
    """Each gives other weights of M0, other data and other samples."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    """Run these arms alone; empty: all."""
    min_advantage: float | None = None
    """Fail unless the last model of `self` has a true score this much above that of `random`, in every seed."""
    max_random_gain: float | None = None
    """Fail if the true score of `random` rises by more than this from M1 to its last model, in any seed."""
    num_parallel: int = 2
    """Runs under way at once, each on one core."""
    num_ift: int = 2000
    num_eft: int = 1000
    num_weak_eft: int = 100
    num_held_out: int = 300
    """Held-out instructions, with four judged answers each."""
    num_rankings: int = 200
    """Of the four answers to an instruction each."""
    num_prompts: int = 800
    """New prompts per iteration."""


@dataclass
class ProofConfig(Config):
    proof: ProofSettings = field(default_factory=ProofSettings)


ConfigStore.instance().store(name="proof_schema", node=ProofConfig)


def iterate(arm: ArmConfig, exp: Experiment, m1: Model) -> None:
    """The loop of the paper from M1 on, with what the arm changes."""
    cfg, m = exp.cfg, m1
    seed_eft = exp.source(cfg.data.eft_path, EFTExample)
    held_out = exp.source(cfg.data.eft_eval_path, EFTExample)
    refreshed: dict[str, Table[EFTExample]] = {}
    for t in range(1, cfg.num_iterations + 1):
        x = exp.source(cfg.prompts.path.format(iteration=t), Prompt)
        y = exp.run(candidates.STAGE, t, policy=m, prompts=x)
        r = scores(arm, exp, t, policy=m, m1=m1, candidates=y)
        if isinstance(r, Table) and r.manifest().metrics["valid_rate"] == 0:
            log.info("no verdict has a score, so there is nothing to train on: the loop ends with M%d", t)
            return
        d = exp.run(pairs.STAGE, t, candidates=y, judgements=r)
        exp.run(anchor.STAGE, t, policy=m1, candidates=y, judgements=r, pairs=d)
        if arm.train == "best":
            m = exp.run(sft.STAGE, t, policy=m, ift=chosen(exp, t, d), directory="policy")
        else:
            m = exp.run(policy.STAGE, t, policy=m, pairs=d)
        if arm.refresh:
            rankings = exp.source(cfg.data.rankings_path, RankedAnswers)
            refreshed[f"eft_{t}"] = exp.run(eft.STAGE, t, policy=m, rankings=rankings)
            own = exp.run(candidates.STAGE, t, policy=m, prompts=x, directory="own_answers")
            m = exp.run(refresh.STAGE, t, policy=m, own_answers=own, eft=seed_eft, **refreshed)
        exp.run(evaluation.STAGE, t, policy=m, eft_eval=held_out)


def scores(
    arm: ArmConfig, exp: Experiment, t: int, *, policy: Model, m1: Model, candidates: Table[Candidate]
) -> Table[Judgement] | SourceFile[Judgement]:
    """The judgements of which the arm makes pairs."""
    if arm.judge == "oracle":
        return given(exp, f"oracle_{t}", [oracle_judgement(c) for c in candidates.read()], Judgement)
    r = exp.run(judgements.STAGE, t, policy=m1 if arm.judge == "m1" else policy, candidates=candidates)
    if arm.judge == "shuffled":
        return given(exp, f"shuffled_{t}", shuffled(r.read(), random.Random(f"{exp.cfg.seed}/{t}")), Judgement)
    return r


def shuffled(found: list[Judgement], rng: random.Random) -> list[Judgement]:
    """All verdicts on one candidate go to another one; the scores' distribution stays the same."""
    keys = list(dict.fromkeys(j.candidate_key for j in found))
    others = rng.sample(keys, len(keys))
    new_key = dict(zip(keys, others, strict=True))
    return sorted((replace(j, candidate_key=new_key[j.candidate_key]) for j in found), key=lambda j: j.key)


def oracle_judgement(c: Candidate) -> Judgement:
    true = float(proof.oracle_score(c.prompt, c.response))
    return Judgement(candidate_key=c.key, judgement_index=0, verdict="", score=true)


def chosen(exp: Experiment, t: int, d: Table[PreferencePair]) -> SourceFile[IFTExample]:
    """The chosen responses, as demonstrations."""
    best = [IFTExample(example_id=p.key, instruction=p.prompt, response=p.chosen) for p in d.read()]
    return given(exp, f"best_{t}", best, IFTExample)


def given(exp: Experiment, name: str, records: list[Any], record: type) -> Any:
    """Records that no stage made, as a file that stages can read."""
    path = exp.run_dir / "given" / f"{name}.jsonl"
    write_atomic(path, "".join(map(to_line, records)))
    return exp.source(str(path), record)


# What the oracle measures. Nothing below is read by a stage.


def measure(exp: Experiment, m1_exp: Experiment) -> Iterator[dict[str, Any]]:
    """One row per model: `model` t stands for M_t, with what was made of M_t's candidates in iteration t."""
    for t in range(1, exp.cfg.num_iterations + 2):
        directory = m1_exp.run_dir / "iter_00" if t == 1 else exp.run_dir / f"iter_{t - 1:02d}"
        if not (directory / "evaluation" / "manifest.json").exists():
            return
        row = {"model": t, **measure_model(directory / "evaluation", exp.cfg)}
        iteration = exp.run_dir / f"iter_{t:02d}"
        if (iteration / "pairs" / "manifest.json").exists():
            row |= measure_iteration(iteration)
        for name in ("anchor", "second_anchor"):
            if (iteration / name / "manifest.json").exists():
                seen = read_jsonl(iteration / name / "data.jsonl", Metric)
                row |= {f"{name}.{m.name}": m.value for m in seen}
                row[f"{name}.alarms"] = sorted(alarm.name for alarm in alarms({t: seen}))
        yield row


def measure_model(directory: Path, cfg: Config) -> dict[str, float | None]:
    """True scores of the held-out answers, from the journal of the evaluation, and its own metrics."""
    prompts = instructions_of(read_jsonl(Path(cfg.data.eft_eval_path), EFTExample), cfg.evaluation.num_prompts)
    text = {p.prompt_id: p.text for p in prompts}
    answers = [c for c in read_jsonl(directory / JOURNAL, Completion) if c.request_key in text]
    true = [proof.oracle_score(text[c.request_key], c.text) for c in answers]
    found = {m.name: m.value for m in read_jsonl(directory / "data.jsonl", Metric)}
    row = {"oracle_score": fmean(true), "perfect": fmean(s == proof.NUM_CRITERIA for s in true)}
    row["distinct"] = len({(c.request_key, c.text) for c in answers}) / len(answers)
    row |= {k: v for k, v in found.items() if not k.startswith("score_share")}
    if found["self_score"] is not None:
        row["self_minus_true"] = found["self_score"] - row["oracle_score"]
    return row


def measure_iteration(directory: Path) -> dict[str, float]:
    """How good the iteration's pairs are in truth."""
    found = read_jsonl(directory / "pairs" / "data.jsonl", PreferencePair)
    margins = [proof.oracle_score(p.prompt, p.chosen) - proof.oracle_score(p.prompt, p.rejected) for p in found]
    manifest = json.loads((directory / "pairs" / "manifest.json").read_text())
    signs = [(m > 0) - (m < 0) for m in margins]
    return {
        "num_pairs": len(found),
        "num_tied": manifest["metrics"]["num_tied"],
        "true_margin": fmean(margins),
        "true_pair_sign": fmean(signs),
    }


# One run per seed and arm, several at once.


def arm_config(cfg: ProofConfig, seed: int, name: str, files: proof.SeedFiles, directory: Path) -> Config:
    """The plain configuration of one run."""
    arm = cfg.proof.arms[name]
    plain = Config(**{f.name: getattr(cfg, f.name) for f in fields(Config)})
    paths = {"all": files.eft, "weak": files.weak_eft, "none": files.eft}
    data = replace(
        plain.data,
        ift_path=str(files.ift),
        eft_path=str(paths[arm.eft]),
        eft_eval_path=str(files.eft_eval),
        rankings_path=str(files.rankings),
    )
    # The best responses are trained on as long, and at the same learning rate, as DPO trains on the pairs.
    names = ("learning_rate", "min_learning_rate", "warmup_fraction", "global_batch_size", "max_epochs")
    shared = {name: getattr(plain.dpo, name) for name in names}
    return replace(
        plain,
        run_dir=str(directory / name),
        seed=seed,
        num_iterations=arm.num_iterations or plain.num_iterations,
        model=replace(plain.model, path=str(directory / "m0")),
        data=data,
        prompts=replace(plain.prompts, path=str(files.new_prompts)),
        sft=replace(plain.sft, **shared) if arm.train == "best" else plain.sft,
    )


@contextmanager
def first_model(cfg: Config, eft_kind: str) -> Iterator[tuple[Experiment, Model]]:
    """M1 and its evaluation; arms of one seed share it."""
    directory = Path(cfg.run_dir).parent / {"all": "m1", "weak": "m1_weak", "none": "m1_no_eft"}[eft_kind]
    with Experiment(replace(cfg, run_dir=str(directory))) as exp:
        ift = exp.source(cfg.data.ift_path, IFTExample)
        judged = {} if eft_kind == "none" else {"eft": exp.source(cfg.data.eft_path, EFTExample)}
        m1 = exp.run(sft.STAGE, 0, policy=exp.base_model(), ift=ift, **judged)
        exp.run(evaluation.STAGE, 0, policy=m1, eft_eval=exp.source(cfg.data.eft_eval_path, EFTExample))
        yield exp, m1


class Runs:
    """All runs of a configuration, `num_parallel` at a time; those of one M1 wait for it, once."""

    def __init__(self, cfg: ProofConfig) -> None:
        self.cfg = cfg
        self.root = Path(cfg.run_dir).absolute()
        self.files: dict[int, proof.SeedFiles] = {}
        self._m1_locks: dict[tuple[int, str], threading.Lock] = {}

    def all(self) -> list[dict[str, Any]]:
        """The rows of every run. A run that fails does not stop the others; its error is raised at the end."""
        arms = self.cfg.proof.arms
        names = self.cfg.proof.only or list(arms)
        if unknown := sorted(set(names) - arms.keys()):
            raise ConfigError(f"proof.only={unknown}: no such arm; there are {sorted(arms)}")
        todo = [(seed, name) for name in names for seed in arms[name].seeds or self.cfg.proof.seeds]
        for seed in {seed for seed, _ in todo}:
            self.files[seed] = write_inputs(self.cfg, seed, self.root / f"seed_{seed}")
        self._m1_locks = {(seed, arms[name].eft): threading.Lock() for seed, name in todo}
        seeds = sorted(self.files)
        with ThreadPoolExecutor(self.cfg.proof.num_parallel) as pool:
            futures = [pool.submit(self.one, seed, name) for seed, name in todo]
        runs = [future.result() for future in futures]
        for run_exp, m1_exp in runs:  # when every M1 is there
            self.second_anchor(run_exp, m1_exp, other=seeds[(seeds.index(run_exp.cfg.seed) + 1) % len(seeds)])
        return [
            {"seed": exp.cfg.seed, "arm": exp.run_dir.name, **row}
            for exp, m1_exp in runs
            for row in measure(exp, m1_exp)
        ]

    def second_anchor(self, exp: Experiment, m1_exp: Experiment, *, other: int) -> None:
        """A second judge of the same make, M1 of another seed with other EFT data, looks at the finished run."""
        judge_dir = self.root / f"seed_{other}" / m1_exp.run_dir.name / "iter_00" / "sft"
        if other == exp.cfg.seed or not (judge_dir / "manifest.json").exists():
            return
        with exp:
            for t in range(1, exp.cfg.num_iterations + 1):
                found = [exp.run_dir / f"iter_{t:02d}" / name for name in ("candidates", "judgements", "pairs")]
                if exp.run_dir.name in ("self", "weak_judge") and all((d / "manifest.json").exists() for d in found):
                    y, r, d = (
                        Table(p, {}, k) for p, k in zip(found, (Candidate, Judgement, PreferencePair), strict=True)
                    )
                    inputs = {"candidates": y, "judgements": r, "pairs": d}
                    exp.run(anchor.STAGE, t, policy=Model(judge_dir, {}), directory="second_anchor", **inputs)

    def one(self, seed: int, name: str) -> tuple[Experiment, Experiment]:
        threading.current_thread().name = f"seed {seed} {name}"
        arm = self.cfg.proof.arms[name]
        cfg = arm_config(self.cfg, seed, name, self.files[seed], self.root / f"seed_{seed}")
        base = replace(cfg, sft=self.cfg.sft)
        with self._m1_locks[seed, arm.eft], first_model(base, arm.eft) as (m1_exp, m1):
            pass
        with Experiment(cfg) as exp:
            iterate(arm, exp, m1)
            return exp, m1_exp


def write_inputs(cfg: ProofConfig, seed: int, directory: Path) -> proof.SeedFiles:
    sizes = ("num_ift", "num_eft", "num_weak_eft", "num_held_out", "num_rankings", "num_prompts")
    files = proof.write_seed(
        directory / "data",
        seed=seed,
        num_iterations=max([cfg.num_iterations, *(a.num_iterations or 0 for a in cfg.proof.arms.values())]),
        **{name: getattr(cfg.proof, name) for name in sizes},
    )
    if not (directory / "m0" / "model.safetensors").exists():
        proof.write_model(directory / "m0", seed=seed)
    return files


def check(rows: list[dict[str, Any]], settings: ProofSettings) -> None:
    """Raise `ProofError` if the run does not show what `min_advantage` and `max_random_gain` claim."""
    true: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        true.setdefault((row["seed"], row["arm"]), []).append(row["oracle_score"])
    for (seed, arm), scores in sorted(true.items()):
        log.info("seed %d, %s: true score %s", seed, arm, " -> ".join(f"{s:.2f}" for s in scores))
        if arm != "random":
            continue
        if settings.max_random_gain is not None and scores[-1] - scores[0] > settings.max_random_gain:
            raise ProofError(
                f"seed {seed}: random scores raised the true score from {scores[0]:.2f} to {scores[-1]:.2f}"
            )
        advantage = true[seed, "self"][-1] - scores[-1]
        if settings.min_advantage is not None and advantage < settings.min_advantage:
            raise ProofError(
                f"seed {seed}: self-rewarding ended {advantage:+.2f} points from random scores, and "
                f"proof.min_advantage={settings.min_advantage} was claimed"
            )


def run(cfg: ProofConfig) -> list[dict[str, Any]]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the model is too small to be worth two threads
    started = time.monotonic()
    runs = Runs(cfg)
    rows = runs.all()
    write_atomic(runs.root / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    log.info("done in %.0f s: %s", time.monotonic() - started, runs.root / "results.jsonl")
    check(rows, cfg.proof)
    return rows


@hydra.main(version_base="1.3", config_path="conf", config_name="srl-proof-cpu")
def main(cfg: DictConfig) -> None:
    form = "%(relativeCreated)7.0f %(threadName)-24s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr, force=True)
    try:
        config = OmegaConf.to_object(cfg)
        assert isinstance(config, ProofConfig)
        run(config)
    except NemoSrlError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()

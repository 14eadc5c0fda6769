"""One iteration's data: which models judge, what pairs are made of, and who makes pairs of verdicts.

The settings `judge`, `pairs` and `verdict_pairs` decide. `recipes/iterate.py` is the loop around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_srl.artifacts import BaseModel, Model, SourceFile, Table
from nemo_srl.config import Config
from nemo_srl.config.generation import OF_THE_LOOP
from nemo_srl.experiment import Experiment
from nemo_srl.judging import asks_models, reader
from nemo_srl.records import Candidate, EFTExample, Judgement, PreferencePair, Prompt, VerifiablePrompt
from nemo_srl.stages import candidates, judgements, meta_judge, pairs, taught_verdicts, verdict_pairs

AnyModel = Model | BaseModel
Judged = Table[Judgement] | SourceFile[Judgement]
Prompts = Table[Prompt] | SourceFile[Prompt]

MODEL_KEYS = ("judge.model", "pairs.anchor", "pairs.second_judge", "early_stopping.model")
"""The settings that name a model of the loop, or another one."""


def names_of_models(cfg: Config) -> dict[str, str]:
    """The models outside the loop that these settings name, by setting."""
    found = {key: value_of(cfg, key) for key in MODEL_KEYS}
    return {key: name for key, name in found.items() if name and name not in OF_THE_LOOP}


def value_of(cfg: Config, key: str) -> str:
    """The value of a setting `section.name`."""
    section, name = key.split(".")
    return str(getattr(getattr(cfg, section), name))


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """Runs the stages between M_t's answers and its training, in the iteration `number`."""

    exp: Experiment
    number: int
    policy: AnyModel
    """M_t."""
    previous: AnyModel
    """M_{t-1}; M1 in the first iteration."""
    first: AnyModel
    """M1."""
    others: Mapping[str, BaseModel] = field(default_factory=dict)
    """The models outside the loop, by the settings that name them."""
    checked: SourceFile[VerifiablePrompt] | None = None
    """The prompts of `judge.verifier_path`."""
    eft: SourceFile[EFTExample] | None = None
    """The EFT seed."""

    def model(self, key: str) -> AnyModel:
        """The model that a setting names. An empty setting names M_t."""
        of_the_loop = {"": self.policy, "m1": self.first, "previous": self.previous}
        return of_the_loop.get(value_of(self.exp.cfg, key)) or self.others[key]

    def judge(self, answers: Table[Candidate], *, by: AnyModel | None = None, directory: str = "") -> Table[Judgement]:
        """Verdicts on answers by `judge.model`, by another model, or by code (`judge.mode=verifier`)."""
        cfg = self.exp.cfg.judge
        inputs: dict[str, Any] = {"candidates": answers}
        if asks_models(reader(cfg)):
            stage, inputs["judge"] = judgements.STAGE, by or self.model("judge.model")
        else:
            stage, inputs["checked"] = judgements.BY_CODE, self.checked
        return self.exp.run(stage, self.number, directory=directory, **inputs)

    def pairs(self, prompts: Prompts, answers: Table[Candidate], judged: Judged) -> Table[PreferencePair]:
        """The pairs of answers. Another model's answers or verdicts are made if the settings ask for them."""
        cfg, t = self.exp.cfg.pairs, self.number
        more: dict[str, Any] = {}
        # In the first iteration, M1 and M_{t-1} are M_t itself: there is nothing to add.
        if cfg.anchor and (earlier := self.model("pairs.anchor")) is not self.policy:
            y = self.exp.run(candidates.STAGE, t, policy=earlier, prompts=prompts, directory="anchor_candidates")
            more |= {"anchor_candidates": y, "anchor_judgements": self.judge(y, directory="anchor_judgements")}
        if cfg.second_judge and (second := self.model("pairs.second_judge")) is not self.model("judge.model"):
            more["second_judgements"] = self.judge(answers, by=second, directory="second_judgements")
        return self.exp.run(pairs.STAGE, t, candidates=answers, judgements=judged, **more)

    def verdict_pairs(self, answers: Table[Candidate], judged: Judged) -> Table[PreferencePair] | None:
        """The pairs of verdicts, if there are to be any."""
        cfg = self.exp.cfg.verdict_pairs
        if not cfg.of_iteration(self.number):
            return None
        if cfg.source == "damaged":
            seed = self.eft if cfg.num_seed else None
            return self.exp.run(verdict_pairs.STAGE, self.number, candidates=answers, judgements=judged, eft=seed)
        stage = {"sampled": taught_verdicts.STAGE, "meta_judge": meta_judge.STAGE}[cfg.source]
        by = self.model("judge.model")
        return self.exp.run(stage, self.number, judge=by, candidates=answers, judgements=judged)

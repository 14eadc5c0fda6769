"""Combinations of settings that cannot work together: judge, pair rule, pairs of verdicts, loss.

Each message names the settings and a remedy that the run will accept. `preflight` calls this before the first stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import comb

from nemo_srl import judging, pairing
from nemo_srl.config import Config, JudgeConfig, PairsConfig, VerdictPairsConfig
from nemo_srl.config.check import check as check_value
from nemo_srl.engines import engine_backend
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.judging import rubrics
from nemo_srl.judging.pairwise import check_rubric
from nemo_srl.records import EFTExample, Prompt
from nemo_srl.trainers import trainer_backend

_OF_ONE_RULE = {"rho": "length_control", "num_pairs": "all_pairs", "anchor": "anchored"}
"""Settings of `pairs` that only one of this package's rules uses."""


def check(cfg: Config, eft: Sequence[EFTExample] = ()) -> None:
    """Raises `ConfigError` for settings that would be ignored, that contradict each other, or that would fail later."""
    check_pairs(cfg)
    check_judges(cfg)
    check_verdict_pairs(cfg, eft)
    check_early_stopping(cfg)


def check_pairs(cfg: Config) -> None:
    """The pair rule and its settings."""
    pairs, default = cfg.pairs, PairsConfig()
    pairing.rule(pairs)
    for key, rule in _OF_ONE_RULE.items():
        value = getattr(pairs, key)
        if value != getattr(default, key) and pairs.rule in pairing.RULES and pairs.rule != rule:
            raise ConfigError(
                f"pairs.{key}={value!r}: pairs.rule={pairs.rule!r} does not use it. Set pairs.rule={rule}, or leave "
                f"pairs.{key} out."
            )
    if pairs.rule == "anchored" and not pairs.anchor:
        raise ConfigError("pairs.anchor='': pairs.rule='anchored' needs an earlier model. Set pairs.anchor=m1.")


def check_judges(cfg: Config) -> None:
    """Who judges, and whether anything uses the agreement of two judges."""
    judge, second = cfg.judge, cfg.pairs.second_judge
    if not judging.asks_models(judging.reader(judge)):
        for key, name in (("judge.model", judge.model), ("pairs.second_judge", second)):
            reason = f"with judge.mode={judge.mode!r} no model judges the answers. Leave it empty"
            check_value(not name, key, name, reason)
    engine = cfg.engine_for("judge")
    check_value(
        not judge.begin_verdict or not engine_backend(engine).has_own_template(engine),
        "judge.begin_verdict", judge.begin_verdict,
        f"the judge's engine ({engine.name}) puts prompts into a chat template of its own, and nothing can follow it. "
        "Set judge.begin_verdict=false",
    )  # fmt: skip
    check_value(
        not second or second != judge.model, "pairs.second_judge", second,
        "judge.model is the same, and a judge always agrees with itself. Name another one, such as previous",
    )  # fmt: skip
    check_value(
        not second or judge.engine is None, "pairs.second_judge", second,
        "judge.engine answers for every judge, so both would be the same. Leave judge.engine or pairs.second_judge out",
    )  # fmt: skip
    if second and not trainer_backend(cfg.trainer).uses_confidence(cfg.dpo):
        raise ConfigError(
            f"pairs.second_judge={second!r}: its agreement with the judge is the confidence in the pairs, and "
            f"dpo.preference_loss={cfg.dpo.preference_loss!r} does not use that. Set dpo.preference_loss=cdpo, or "
            "leave pairs.second_judge out."
        )


def check_verdict_pairs(cfg: Config, eft: Sequence[EFTExample]) -> None:
    """Pairs of verdicts. With `source=damaged`, they must not teach another kind of verdict than the EFT examples."""
    settings, judge = cfg.verdict_pairs, cfg.judge
    number, remedy = settings.num_prompts, f"Set {_without_verdict_pairs(cfg)}."
    has_likelihood = number and cfg.dpo.sft_loss_weight
    if cfg.dpo.verdict_weight != 1 and not has_likelihood:
        raise ConfigError(
            f"dpo.verdict_weight={cfg.dpo.verdict_weight}: it weighs the likelihood of chosen verdicts. There is none "
            f"with verdict_pairs.num_prompts={number} and dpo.sft_loss_weight={cfg.dpo.sft_loss_weight}. Set "
            "dpo.verdict_weight=1, or set both of the others above 0."
        )
    if not cfg.dpo.compare_verdicts and not has_likelihood:
        raise ConfigError(
            "dpo.compare_verdicts=false: so verdicts teach by the likelihood of chosen ones alone. There is "
            f"none with verdict_pairs.num_prompts={number} and dpo.sft_loss_weight={cfg.dpo.sft_loss_weight}. Set "
            "dpo.compare_verdicts=true, or set both of the others above 0."
        )
    if settings.num_seed:
        _check_seed_pairs(settings, eft)
    if not number:
        return
    if not _asks_for_text(judge):
        raise ConfigError(
            f"verdict_pairs.num_prompts={number}: a verdict of such a pair is a text with a score, and judge.mode="
            f"{judge.mode!r} gives none. {remedy}"
        )
    reasons = [x.key for x in eft if x.justification.strip()] if judge.justification else []
    if settings.source == "damaged" and reasons:
        raise ConfigError(
            f"verdict_pairs.num_prompts={number}: with verdict_pairs.source='damaged' a verdict of such a pair is the "
            f"score alone, and data.eft_path teaches verdicts with reasons ({len(reasons)} of {len(eft)} examples, the "
            f"first is {reasons[0]!r}). {remedy} Or set verdict_pairs.source=sampled. Or give EFT examples with an "
            "empty `justification`."
        )
    if settings.source != "damaged" and (judge.num_judgements < 2 or judge.temperature == 0):
        raise ConfigError(
            f"verdict_pairs.source={settings.source!r}: it needs different verdicts on one answer, and there are none "
            f"with judge.num_judgements={judge.num_judgements} and judge.temperature={judge.temperature}. Set "
            "judge.num_judgements=3 judge.temperature=0.7."
        )
    if settings.source == "meta_judge":
        key, rubric = "verdict_pairs.meta_rubric", settings.meta_rubric
        check_value(
            rubric != "", key, rubric, "verdict_pairs.source='meta_judge' needs it; method=meta_rewarding sets one"
        )
        slots = ("{instruction}", "{response}", "{verdict_a}", "{verdict_b}", "Winner:")
        rubrics.check_holds_once(rubric, *slots, key=key)


def _without_verdict_pairs(cfg: Config) -> str:
    """The settings for a run without pairs of verdicts."""
    others = {
        "verdict_pairs.num_seed=0": cfg.verdict_pairs.num_seed,
        "dpo.verdict_weight=1": cfg.dpo.verdict_weight != 1,
        "dpo.compare_verdicts=true": not cfg.dpo.compare_verdicts,
    }
    return " ".join(["verdict_pairs.num_prompts=0", *(setting for setting, needed in others.items() if needed)])


def _check_seed_pairs(settings: VerdictPairsConfig, eft: Sequence[EFTExample]) -> None:
    """Pairs of EFT examples, which the stage `verdict_pairs` makes beside those of damaged answers."""
    refused = {
        "verdict_pairs.num_prompts=0 makes no pairs of verdicts": not settings.num_prompts,
        f"verdict_pairs.source={settings.source!r} is about M_t's own verdicts": settings.source != "damaged",
        "data.eft_path names no examples": not eft,
    }
    for reason, holds in refused.items():
        check_value(not holds, "verdict_pairs.num_seed", settings.num_seed, f"{reason}. Set verdict_pairs.num_seed=0")


def check_early_stopping(cfg: Config) -> None:
    """Whether checkpoints can be compared."""
    settings, key = cfg.early_stopping, "early_stopping.prompts_path"
    if not settings.prompts_path:
        reason = f"{key}='' turns early stopping off, so nobody is asked. Set {key}, or leave this out"
        check_value(not settings.model, "early_stopping.model", settings.model, reason)
        return
    if not trainer_backend(cfg.trainer).keeps_checkpoints:
        raise ConfigError(
            f"{key}={settings.prompts_path!r}: trainer.name={cfg.trainer.name!r} keeps no checkpoints that could be "
            f"compared. Set {key}='', or use trainer=nemo_aligner."
        )
    check_rubric(cfg.judge)


def _asks_for_text(cfg: JudgeConfig) -> bool:
    """Whether the judge is asked about one answer at a time, and answers with a text."""
    questions = judging.reader(cfg).questions({"x/00": ("Say it.", "It.")}, cfg)
    return bool(questions) and all(isinstance(prompt, str) for prompt in questions.values())


def check_verifiable(cfg: Config, prompts: Mapping[str, Sequence[Prompt]], texts: Collection[str]) -> None:
    """Refuse prompts that `judge.verifier_path` does not have: their answers could not be checked.

    `prompts` are those of each file of `prompts.path`, and `texts` are those that can be checked.
    """
    if not prompts and cfg.num_iterations:
        raise ConfigError(
            "prompts.path='': judge.verifier='ifeval' checks answers to the prompts of judge.verifier_path alone, and "
            "M_t would write others. Set prompts.path to a file with these prompts."
        )
    for path, found in prompts.items():
        if unknown := [p for p in found if p.text not in texts]:
            raise DataError(
                f"prompts.path={path!r}: {len(unknown)} of {len(found)} prompts are not in judge.verifier_path, so "
                f"their answers cannot be checked. The first is {unknown[0].key!r}. Remove them, or add their "
                "instructions."
            )


def most_pairs(cfg: Config) -> int:
    """How many pairs of answers a prompt gives at most."""
    if cfg.pairs.rule != "all_pairs":
        return 1
    number = comb(cfg.candidates.num_samples, 2)
    return min(cfg.pairs.num_pairs or number, number)

"""What the models generate (prompts, candidates, verdicts), and the pairs that are made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_srl.config.check import check


@dataclass
class SamplingConfig:
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    max_tokens: int = 512
    """The highest number of generated tokens."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        check(self.temperature >= 0, f"{name}.temperature", self.temperature, "must be 0 (greedy) or above")
        check(0 < self.top_p <= 1, f"{name}.top_p", self.top_p, "must be in (0, 1]")
        check(self.max_tokens >= 1, f"{name}.max_tokens", self.max_tokens, "must be at least 1")


@dataclass
class PromptsConfig(SamplingConfig):
    """New prompts by 8-shot self-instruct (paper section 3.1.1: T 0.6, p 0.9, ROUGE-L filter)."""

    path: str = ""
    """Take the prompts from this file (JSONL of Prompt), and generate none. `{iteration}` in the path stands for the
    iteration's number. Empty string: self-instruct."""
    temperature: float = 0.6
    max_tokens: int = 128
    num_prompts: int = 1000
    """Prompts per iteration, after the filters."""
    num_seed_shots: int = 6
    """Few-shot examples taken from the IFT seed."""
    num_generated_shots: int = 2
    """Few-shot examples taken from prompts kept so far."""
    max_rouge_l: float = 0.7
    """A new prompt is dropped if its ROUGE-L F1 with the seed or with a kept prompt is this high or higher."""
    min_words: int = 3
    max_words: int = 150
    """Limits of a prompt's length. In scripts without spaces, such as Chinese, two characters count as a word."""
    blocked_words: list[str] = field(
        default_factory=lambda: ["image", "images", "graph", "graphs", "picture", "pictures", "file", "files",
                                 "map", "maps", "draw", "plot", "video", "audio", "music", "flowchart", "diagram"]
    )  # fmt: skip
    """A prompt with such a word asks for what a text model cannot give (the list of Self-Instruct, section A)."""
    max_rounds: int = 20
    """Rounds of generation. If there are too few prompts after them, the run ends with an error."""
    language: str = "en"
    """en: prompts that cannot be English are dropped (a heuristic). any: no such check."""
    model: str = ""
    """A fixed model for new prompts, as in the paper, written like `model.path`. Empty string: M_t itself."""
    engine: Any = None
    """Another engine for new prompts only, such as a server with a fixed chat model. null: `engine`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_prompts", "min_words", "max_rounds"):
            check(getattr(self, key) >= 1, f"prompts.{key}", getattr(self, key), "must be at least 1")
        check(self.language in ("en", "any"), "prompts.language", self.language, "must be 'en' or 'any'")
        check(0 < self.max_rouge_l <= 1, "prompts.max_rouge_l", self.max_rouge_l, "must be in (0, 1]")
        check(self.max_words >= self.min_words, "prompts.max_words", self.max_words, "must not be below min_words")


@dataclass
class CandidatesConfig(SamplingConfig):
    num_samples: int = 4
    """Responses per prompt (N in the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_samples >= 2, "candidates.num_samples", self.num_samples, "a pair needs at least 2 responses")


@dataclass
class JudgeConfig(SamplingConfig):
    rubric: str = MISSING
    """The judge's prompt, with `{instruction}` and `{response}`, from `conf/judge/`. It asks for a justification first
    and for a line `Score: <points>` last."""
    num_judgements: int = 3
    """Verdicts per response. The score of the response is their mean."""
    max_score: int = 5
    """The highest number of points that the rubric gives."""
    stop_at_score: bool = False
    """false: the model ends the verdict, and the last line that states a score counts.
    true: a verdict ends after its first such line, if the engine supports it. It saves tokens with a judge that goes on
    after its score. A judge that gives points to each criterion would be cut off after the first one."""
    mode: str = "sampled"
    """How the judge is asked and how its verdicts are read: a name in `nemo_srl.judging.READERS`, or `module:object`
    of your own. Each reader checks the settings that it needs.
    sampled: a verdict's score is the one that it states (the paper).
    expected: the score is the mean of all points that the judge could have stated there, weighted by their
    probabilities. It needs an engine with log-probabilities.
    pairwise: the judge compares every two answers to a prompt, in both orders, and their wins are their scores."""
    pairwise_rubric: str = ""
    """The prompt of a comparison, with `{instruction}`, `{response_a}` and `{response_b}`. It asks for a line
    `Winner: <A, B or tie>` last. `+judge_mode=pairwise` sets one."""
    engine: Any = None
    """Another engine for judging only, such as a hosted judge. null: `engine` with M_t (self-rewarding)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_judgements >= 1, "judge.num_judgements", self.num_judgements, "must be at least 1")


@dataclass
class VerdictPairsConfig:
    """Pairs of verdicts on M_t's answers and on damaged copies of them (`nemo_srl/stages/verdict_pairs.py`). With them,
    each iteration's DPO trains judging as well as answering."""

    num_prompts: int = 0
    """The best answers to so many prompts are damaged. Each makes two pairs. 0: no such pairs, as in the paper."""

    def __post_init__(self) -> None:
        check(self.num_prompts >= 0, "verdict_pairs.num_prompts", self.num_prompts, "must be 0 (off) or above")


@dataclass
class PairsConfig:
    rule: str = "best_worst"
    """How one prompt's scored answers make a pair: a name in `nemo_srl/pairing/`, or `module:object` of your own."""
    min_margin: float = 0.0
    """The best mean score must exceed the worst by more than this. 0 drops only ties, as in the paper."""

    def __post_init__(self) -> None:
        check(self.min_margin >= 0, "pairs.min_margin", self.min_margin, "must be 0 or above")

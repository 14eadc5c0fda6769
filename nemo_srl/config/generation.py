"""What the models generate (prompts, candidates, verdicts), and the pairs that are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_srl.config.check import check

AN_INPUT: Mapping[str, Any] = {"is_input": True}
"""Metadata of a setting that names an input of a stage. The input's digest decides the result, and not its name."""
OF_THE_LOOP = ("m1", "previous")
"""Names of models that the loop makes: M1, and M_{t-1}. In the first iteration both are M1."""


def check_model_name(key: str, name: str) -> None:
    """Refuse the address of a server where a model is named."""
    check(
        not name.startswith(("http://", "https://")), key, name,
        "it names a model directory. For a server: +engine@judge.engine=openai judge.engine.base_url=<address>",
    )  # fmt: skip


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
    pairwise: the judge compares every two answers to a prompt, in both orders, and their wins are their scores.
    verifier: code checks each answer, see `verifier`. No model is asked.
    reward: a reward model behind a server gives the score (`+judge_mode=reward`)."""
    model: str = field(default="", metadata=AN_INPUT)
    """Whose verdicts make the pairs. Empty string: M_t itself. m1: M1 in every iteration. previous: M_{t-1}, and M1 in
    the first iteration. Or another model, written like `model.path`. With `engine`, the server answers, and only
    tokenizer and chat template are read here. Evaluations always ask M_t how it judges."""
    verifier: str = ""
    """For `mode=verifier`. ifeval: the share of a prompt's instructions in `verifier_path` that the answer follows
    strictly. Or your own function, my.module:function, of the prompt's text and the answer. It returns the share of
    what was asked that the answer does, from 0 to 1, or None if it cannot tell. That times `max_score` is the score."""
    verifier_path: str = field(default="", metadata=AN_INPUT)
    """For `verifier=ifeval`: prompts with their instructions, in IFEval's format (JSONL). The prompts of the run
    (`prompts.path`) must be among them."""
    justification: bool = True
    """Whether EFT teaches verdicts with the justifications that its examples have. false: a verdict is the score alone.
    It costs one token or two. With `mode=expected`, a small judge may be better so (arXiv 2503.03064). The rubric must
    then ask for the score alone: `judge=score_only_5pt`."""
    begin_verdict: bool = False
    """true: the judge's prompt ends with what every verdict begins with (`Score: `), so that a verdict costs one token,
    and a model that was taught no verdicts states scores, too. For `mode=expected` with `justification=false`, and an
    engine that takes token ids."""
    pairwise_rubric: str = ""
    """The prompt of a comparison, with `{instruction}`, `{response_a}` and `{response_b}`. It asks for a line
    `Winner: <A, B or tie>` last. `+judge_mode=pairwise` sets one."""
    engine: Any = None
    """Another engine for judging only, such as a hosted judge. null: `engine` with M_t (self-rewarding)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_judgements >= 1, "judge.num_judgements", self.num_judgements, "must be at least 1")
        check_model_name("judge.model", self.model)

    def num_generated(self, verdict_tokens: float) -> float:
        """How many tokens the judge itself writes of a verdict that has `verdict_tokens` on average."""
        return 1.0 if self.begin_verdict else min(verdict_tokens, self.max_tokens)


@dataclass
class VerdictPairsConfig:
    """Pairs of verdicts. With them, each iteration's DPO trains judging as well as answering."""

    num_prompts: int = 0
    """Verdicts on answers to so many prompts are taken. 0: no such pairs, as in the paper."""
    source: str = "damaged"
    """How it is known which verdict is better.
    damaged: a damaged copy of an answer is worse. Code writes both verdicts, which are the score alone
    (`nemo_srl/stages/verdict_pairs.py`). An answer makes two pairs.
    sampled: M_t judges the damaged copy as well, and its right verdicts are better than its wrong ones
    (`nemo_srl/stages/taught_verdicts.py`). An answer makes two pairs at most.
    meta_judge: M_t compares its verdicts on one answer (`nemo_srl/stages/meta_judge.py`). An answer makes one pair."""
    num_seed: int = 0
    """For `source=damaged`: so many EFT examples make a pair each as well, so that M_t keeps what they taught. The
    chosen verdict is the example's, and the rejected one has another score. The iterations take turns through
    `data.eft_path`."""
    last_iteration: int = 0
    """Later iterations make no such pairs. 0: all do. Meta-Rewarding stops after 2, because the meta-judge then prefers
    the higher score."""
    meta_rubric: str = ""
    """For `source=meta_judge`: the prompt of a comparison, with `{instruction}`, `{response}`, `{verdict_a}` and
    `{verdict_b}`. It asks for a line `Winner: <A, B or tie>` last. `method=meta_rewarding` sets one."""
    max_chars: int = 0
    """For `source=meta_judge`: a pair is left out if its chosen verdict has more characters, because such a judge likes
    long verdicts. 0: no limit."""

    def __post_init__(self) -> None:
        check(self.num_prompts >= 0, "verdict_pairs.num_prompts", self.num_prompts, "must be 0 (off) or above")
        check(self.num_seed >= 0, "verdict_pairs.num_seed", self.num_seed, "must be 0 (off) or above")
        sources = ("damaged", "sampled", "meta_judge")
        check(self.source in sources, "verdict_pairs.source", self.source, f"must be one of {', '.join(sources)}")
        last = self.last_iteration
        check(last >= 0, "verdict_pairs.last_iteration", last, "must be 0 (all iterations) or above")
        check(self.max_chars >= 0, "verdict_pairs.max_chars", self.max_chars, "must be 0 (no limit) or above")

    def of_iteration(self, t: int) -> bool:
        """Whether iteration `t` makes such pairs."""
        return self.num_prompts > 0 and (not self.last_iteration or t <= self.last_iteration)


@dataclass
class PairsConfig:
    rule: str = "best_worst"
    """How one prompt's scored answers make pairs: a name in `nemo_srl/pairing/`, or `module:object` of your own.
    best_worst: the best answer against the worst (the paper).
    length_control: the shortest of the good answers against the longest of the bad ones, see `rho`.
    margin: the best answer against the next one that is worse by more than `min_margin`.
    anchored: the best answer of M_t against the worst answer of M_t and of an earlier model, see `anchor`.
    all_pairs: the `num_pairs` pairs with the largest margins."""
    min_margin: float = 0.0
    """In every pair, the better score must exceed the other by more than this. 0 drops only ties, as in the paper."""
    rho: float = 0.0
    """length_control: answers within this share of the range of scores count as good as the best, or as bad as the
    worst (Meta-Rewarding, Wu et al. 2024, arXiv 2407.19594, section 2.2)."""
    num_pairs: int = 0
    """all_pairs: how many pairs a prompt gives at most. 0: all pairs whose scores differ."""
    anchor: str = field(default="", metadata=AN_INPUT)
    """anchored: the earlier model that answers the prompts as well: m1, previous (M_{t-1}), or a model, written like
    `model.path`. The judge scores its answers, too."""
    second_judge: str = field(default="", metadata=AN_INPUT)
    """Another judge of the same answers: m1, previous (M_{t-1}), or a model, written like `model.path`. The agreement
    of the two rankings is the confidence in all pairs of the iteration (CREAM, Wang et al. 2024, arXiv 2410.12735). The
    loss `cdpo` uses it. Empty string: none, and the confidence is 1."""
    accumulate: bool = field(default=False, metadata=AN_INPUT)
    """Train M_{t+1} on the pairs of all iterations up to t. false: on those of iteration t, as in the paper."""

    def __post_init__(self) -> None:
        check(self.min_margin >= 0, "pairs.min_margin", self.min_margin, "must be 0 or above")
        check(0 <= self.rho <= 0.5, "pairs.rho", self.rho, "must be in [0, 0.5]")
        check(self.num_pairs >= 0, "pairs.num_pairs", self.num_pairs, "must be 0 (all) or above")
        for key in ("anchor", "second_judge"):
            check_model_name(f"pairs.{key}", getattr(self, key))

"""What a run starts from: M0 and the seed data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_srl.config.check import check


@dataclass
class ModelConfig:
    path: str = "smollm2-135m-instruct"
    """M0: a Hugging Face directory of a supported family, or the name of a model that this package can fetch."""
    family: str = ""
    """The module of your own model family, such as my.module. It has a FAMILY (`nemo_srl/models/families`). Empty
    string: this package chooses one of its families by `model_type` in the model's config.json."""
    cache_dir: str = "~/.cache/nemo_srl"
    """The directory for downloaded models, shared between runs. It is not part of any identity."""
    chat_template: str | None = None
    """Jinja2 chat template. null: the tokenizer's own. A base model without a template needs this."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables that the chat template reads, by name. `{enable_thinking: false}` turns the thinking of Qwen3 off."""
    thinking_tags: list[str] | None = None
    """The tags between which the model thinks before it answers, such as ['<think>', '</think>']. null: those of its
    chat template or tokenizer, if they have any. []: none. What the model thinks is kept in the journal and beside the
    answer. It is not judged, not trained on and not measured."""

    def __post_init__(self) -> None:
        tags = self.thinking_tags
        fits = not tags or (len(set(tags)) == len(tags) == 2 and all(tag.strip() for tag in tags))
        reason = "give the tag that begins the thinking and the one that ends it"
        check(fits, "model.thinking_tags", tags, reason)
        for name in self.chat_template_kwargs:
            check(name.isidentifier(), "model.chat_template_kwargs", name, "must be the name of a variable")


@dataclass
class DataConfig:
    ift_path: str = "data/seed/ift.jsonl"
    """Instruction fine-tuning seed (JSONL of IFTExample). A relative path may also start at the project root."""
    eft_path: str = "data/seed/eft.jsonl"
    """Evaluation fine-tuning seed (JSONL of EFTExample). Empty string: train without it (an ablation)."""
    eft_eval_path: str = "data/seed/eft_eval.jsonl"
    """Held-out EFT examples, several answers to one instruction, for the reward-model metrics."""
    checked_path: str = ""
    """Held-out instructions for which code knows true scores (JSONL of CheckedInstruction, `data/checked/`). When
    given, code scores the held-out answers of each model (`nemo_srl/checked.py`). No training reads it."""
    rankings_path: str = ""
    """Answers that people ranked (JSONL of RankedAnswers). When given, the judge is refreshed after each
    iteration's DPO: see `refresh`. Empty string: no refresh, as in the paper."""

"""Preference pairs in the formats of other training systems.

    nemo_aligner.jsonl         prompt, chosen_response, rejected_response, chosen_reward, rejected_reward; the text is
                               rendered, and responses end with the model's end of turn (`DPOModelDataset`)
    nemo_rl.jsonl              context, completions by rank; NeMo-RL renders the text (`PreferenceDataset`)
    trl.jsonl                  prompt, chosen, rejected as plain text (TRL's standard preference format)
    trl_conversational.jsonl   the same as lists of messages, which TRL renders with the model's template
    pairs.parquet              our records and their iteration, as columns
    dataset/                   the same for `datasets.load_from_disk`

All pairs are written, and their texts are not shortened. Only the last two need the package `datasets`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_srl.artifacts import write_atomic
from nemo_srl.errors import ConfigError
from nemo_srl.records import PreferencePair, to_row

Row = dict[str, Any]


class Renderer(Protocol):
    """The part of `chat.ChatTemplate` that is needed here."""

    def render(self, instruction: str) -> str: ...

    def response_text(self, response: str) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ExportedPair:
    """A pair, and the self-rewarding iteration that it comes from."""

    iteration: int
    pair: PreferencePair


def nemo_aligner_row(pair: PreferencePair, chat: Renderer, *, end_of_turn: str) -> Row:
    """The DPO format of NeMo-Aligner 0.7, with rendered text. Its other format, lists of messages, cannot be used:
    NeMo-Aligner renders it with its own turn markers instead of the model's chat template."""
    return {
        "prompt": chat.render(pair.prompt),
        "chosen_response": chat.response_text(pair.chosen) + end_of_turn,
        "rejected_response": chat.response_text(pair.rejected) + end_of_turn,
        "chosen_reward": pair.chosen_score,
        "rejected_reward": pair.rejected_score,
    }


def nemo_rl_row(pair: PreferencePair) -> Row:
    """The preference format of NeMo-RL. Rank 0 is the chosen response."""
    ranked = enumerate((pair.chosen, pair.rejected))
    return {
        "context": [_message("user", pair.prompt)],
        "completions": [{"rank": rank, "completion": [_message("assistant", text)]} for rank, text in ranked],
    }


def trl_row(pair: PreferencePair) -> Row:
    """TRL's standard preference format. The scores have the names that TRL's own data sets use."""
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **_scores(pair)}


def trl_conversational_row(pair: PreferencePair) -> Row:
    """TRL's conversational preference format."""
    return {
        "prompt": [_message("user", pair.prompt)],
        "chosen": [_message("assistant", pair.chosen)],
        "rejected": [_message("assistant", pair.rejected)],
        **_scores(pair),
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _scores(pair: PreferencePair) -> dict[str, float]:
    return {"score_chosen": pair.chosen_score, "score_rejected": pair.rejected_score}


FORMATS = ("nemo_aligner", "nemo_rl", "trl", "trl_conversational", "parquet", "datasets")


def write_pairs(
    pairs: Sequence[ExportedPair], directory: Path, *, formats: Sequence[str], chat: Renderer, end_of_turn: str
) -> list[Path]:
    """Write the pairs to `directory` in each of `formats` (see `FORMATS`); returns the paths. Raises `ConfigError`."""
    rows: Mapping[str, Callable[[PreferencePair], Row]] = {
        "nemo_aligner": lambda p: nemo_aligner_row(p, chat, end_of_turn=end_of_turn),
        "nemo_rl": nemo_rl_row,
        "trl": trl_row,
        "trl_conversational": trl_conversational_row,
    }
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise ConfigError(f"formats={unknown}: no such format; choose among {', '.join(FORMATS)}")
    written = []
    for name in formats:
        if name in rows:
            path = directory / f"{name}.jsonl"
            write_atomic(path, _jsonl(rows[name](x.pair) for x in pairs))
        else:
            path = _write_dataset(pairs, directory, parquet=name == "parquet")
        written.append(path)
    return written


def _jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_dataset(pairs: Sequence[ExportedPair], directory: Path, *, parquet: bool) -> Path:
    from datasets import Dataset, Features, Value

    kinds = dict.fromkeys(PreferencePair.__dataclass_fields__, Value("string"))
    kinds |= {"chosen_score": Value("float64"), "rejected_score": Value("float64")}
    rows = [{"iteration": x.iteration, **to_row(x.pair)} for x in pairs]
    data = Dataset.from_list(rows, features=Features({"iteration": Value("int32"), **kinds}))
    directory.mkdir(parents=True, exist_ok=True)
    if parquet:
        path = directory / "pairs.parquet"
        data.to_parquet(path)
    else:
        path = directory / "dataset"
        data.save_to_disk(path)
    return path

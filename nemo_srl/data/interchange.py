"""Preference pairs in the formats of other training systems.

    nemo_aligner.jsonl         prompt, chosen_response, rejected_response, chosen_reward, rejected_reward; the text is
                               rendered, and responses that were not cut off end with the model's end of turn
                               (`DPOModelDataset`)
    nemo_rl.jsonl              context, completions by rank; NeMo-RL renders the text (`PreferenceDataset`)
    trl.jsonl                  prompt, chosen, rejected as plain text (TRL's standard preference format)
    trl_conversational.jsonl   the same as lists of messages, which TRL renders with the model's template
    pairs.parquet              our records and their iteration, as columns
    dataset/                   the same for `datasets.load_from_disk`

All pairs are written, and their texts are not shortened. NeMo-RL and TRL end every response themselves, also one that
was cut off at `max_tokens`. Only the last two need the package `datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.chat import ChatTemplate
from nemo_srl.config.check import check
from nemo_srl.records import PreferencePair

Row = dict[str, Any]


def nemo_aligner_row(pair: PreferencePair, chat: ChatTemplate) -> Row:
    """The DPO format of NeMo-Aligner 0.7, with rendered text. Its other format, lists of messages, cannot be used:
    NeMo-Aligner renders it with its own turn markers instead of the model's chat template."""
    ends = {"stop": chat.end_of_turn, "length": ""}
    return {
        "prompt": chat.render_for_training(pair.prompt),
        "chosen_response": chat.response_text(pair.chosen) + ends[pair.chosen_finish_reason],
        "rejected_response": chat.response_text(pair.rejected) + ends[pair.rejected_finish_reason],
        "chosen_reward": pair.chosen_score,
        "rejected_reward": pair.rejected_score,
    }


def nemo_rl_row(pair: PreferencePair, chat: ChatTemplate) -> Row:
    """The preference format of NeMo-RL. Rank 0 is the chosen response."""
    ranked = enumerate((pair.chosen, pair.rejected))
    return {
        "context": [_message("user", pair.prompt)],
        "completions": [{"rank": rank, "completion": [_message("assistant", text)]} for rank, text in ranked],
    }


def trl_row(pair: PreferencePair, chat: ChatTemplate) -> Row:
    """TRL's standard preference format. The scores have the names that TRL's own data sets use."""
    scores = {"score_chosen": pair.chosen_score, "score_rejected": pair.rejected_score}
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **scores}


def trl_conversational_row(pair: PreferencePair, chat: ChatTemplate) -> Row:
    """TRL's conversational preference format."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = trl_row(pair, chat)
    return row | {field: [_message(role, row[field])] for field, role in roles.items()}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_ROWS: Mapping[str, Callable[[PreferencePair, ChatTemplate], Row]] = {
    "nemo_aligner": nemo_aligner_row,
    "nemo_rl": nemo_rl_row,
    "trl": trl_row,
    "trl_conversational": trl_conversational_row,
}
FORMATS = (*_ROWS, "parquet", "datasets")


def write_pairs(
    pairs: Sequence[tuple[int, PreferencePair]], directory: Path, *, formats: Sequence[str], chat: ChatTemplate
) -> list[Path]:
    """Write the pairs to `directory` in each of `formats` (see `FORMATS`); returns the paths. Raises `ConfigError`.

    Each pair comes with its iteration, and `chat` is the chat template of the model.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    check(not unknown, "formats", unknown, f"no such format; choose among {', '.join(FORMATS)}")
    written = []
    for name in formats:
        if row := _ROWS.get(name):
            path = directory / f"{name}.jsonl"
            write_atomic(path, "".join(jsonio.dumps(row(p, chat), ensure_ascii=False) + "\n" for _, p in pairs))
        else:
            path = directory / ("pairs.parquet" if name == "parquet" else "dataset")
            _write_dataset(pairs, path)
        written.append(path)
    return written


def _write_dataset(pairs: Sequence[tuple[int, PreferencePair]], path: Path) -> None:
    from datasets import Dataset, Features, Value

    kinds = dict.fromkeys(PreferencePair.__dataclass_fields__, Value("string"))
    kinds |= dict.fromkeys(("chosen_score", "rejected_score", "confidence"), Value("float64"))
    kinds |= {"pair_index": Value("int32")}
    rows = [{"iteration": iteration, **asdict(p)} for iteration, p in pairs]
    data = Dataset.from_list(rows, features=Features({"iteration": Value("int32"), **kinds}))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)

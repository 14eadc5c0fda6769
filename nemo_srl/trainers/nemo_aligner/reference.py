"""The reference's log-probabilities: computed once, before the first step of a DPO training, and kept beside the rows.

NeMo-Aligner computes them in every step. It keeps a second copy of the model in the host's memory, and swaps both for
every batch. They never change, so each row needs them once, whatever the number of epochs.

Rows are computed in chunks, which the data-parallel ranks share among each other. Each chunk is published as a file
with a digest of its rows, so a training that was interrupted computes what is missing. After the first step the
starting weights are gone. Then all must be there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo_aligner.utils.train_utils import set_eval, set_sync_funcs, set_train
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner import context_parallel
from nemo_srl.trainers.nemo_aligner.batches import batch_dpo, collate_dpo
from nemo_srl.trainers.nemo_aligner.micro_batches import MicroBatches
from nemo_srl.trainers.nemo_aligner.overlap import fetch_weights
from nemo_srl.trainers.nemo_aligner.training_plan import REFERENCE_DIR

CHUNK_ROWS = 64
"""Rows of one file. So many are lost at most when a rank is killed."""

Chunk = dict[str, torch.Tensor]
"""`chosen` and `rejected`: float32, the log-probabilities of all tokens of all responses, one after the other."""


def attach(
    model: Any, rows: Sequence[dict[str, Any]], work_dir: Path, micro_batches: MicroBatches, *, step: int
) -> None:
    """Give every row `reference`: the log-probabilities of the tokens of both responses, {side: [tokens] float32}.

    Rows that are not `compared` get zeros. Every rank calls it, with the same rows. `step` is the number of steps that
    the training has made. Raises `ConfigError` if something is missing after the first step.
    """
    directory = work_dir / REFERENCE_DIR
    for row in rows:
        row["reference"] = {side: torch.zeros(len(row[f"{side}_ids"])) for side in ("chosen", "rejected")}
    rows = [row for row in rows if row.get("compared", True)]
    chunks = [rows[i : i + CHUNK_ROWS] for i in range(0, len(rows), CHUNK_ROWS)]
    found = _read_on_rank_0(directory, chunks)
    missing = [i for i in range(len(chunks)) if i not in found]
    if missing and step:
        raise ConfigError(
            f"{directory}: {len(missing)} of {len(chunks)} files with the reference's log-probabilities are missing or "
            f"damaged. After step {step}, the weights that they were computed with are no longer there. Delete "
            f"{work_dir} to start this training again. The other stages of the run stay."
        )
    if missing:
        fetch_weights(model)
    for index in missing[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]:
        chunk = _compute(model, chunks[index], micro_batches)
        if chunk is not None:
            _write(directory, index, chunks[index], chunk)
            found[index] = chunk
    if missing:
        found = _union_of_all_ranks(found)
    for index, part in enumerate(chunks):
        _give(part, found[index])


def of_batch(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """In the place of NeMo-Aligner's `get_ref_policy_logprobs`: [2 x pairs, sequence], first of the chosen.

    Zeros for rows that have none, because the loss has no reference.
    """
    none = torch.zeros(batch["chosen"].shape)
    return torch.cat([batch.pop(f"reference_{side}", none) for side in ("chosen", "rejected")])


def _compute(model: Any, rows: Sequence[dict[str, Any]], micro_batches: MicroBatches) -> Chunk | None:
    """The log-probabilities of a chunk on the last pipeline stage; None on the others. All ranks of it call this."""
    pad_id, size = model.tokenizer.eos_id, model.cfg.micro_batch_size
    batch = batch_dpo(collate_dpo(rows, pad_id=pad_id), pad_id=pad_id, multiple=micro_batches.multiple)
    parts = micro_batches.split(batch, size)
    set_sync_funcs(model, forward_only=True)
    set_eval(model)  # no dropout
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=model.get_forward_output_and_loss_func(logprobs_only=True),
            data_iterator=(micro_batches.take(batch, part) for part in parts),
            model=model.model,
            num_microbatches=len(parts),
            forward_only=True,
            seq_length=batch["chosen"].shape[1],
            micro_batch_size=2 * size,
            collect_non_loss_data=True,
        )
    set_train(model)
    if not parallel_state.is_pipeline_last_stage():
        return None
    of_row: dict[int, list[torch.Tensor]] = {}
    for part, output in zip(parts, outputs, strict=True):
        logprobs = context_parallel.whole(output["logprobs"].float()).cpu()
        sides = logprobs.chunk(2)  # [rows, sequence] of the chosen, then of the rejected
        of_row |= {int(row): [side[i] for side in sides] for i, row in enumerate(part.index)}
    chunk: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
    for number, row in enumerate(rows):
        first = len(row["prompt_ids"]) - 1
        for side, logprobs in zip(chunk, of_row[number], strict=True):
            chunk[side].append(logprobs[first : first + len(row[f"{side}_ids"])])
    return {side: torch.cat(parts) for side, parts in chunk.items()}


def _give(rows: Sequence[dict[str, Any]], chunk: Chunk) -> None:
    parts = {side: torch.split(chunk[side], [len(row[f"{side}_ids"]) for row in rows]) for side in chunk}
    for number, row in enumerate(rows):
        row["reference"] = {side: parts[side][number] for side in chunk}


def _digest(rows: Sequence[dict[str, Any]]) -> str:
    ids = [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in rows]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:05d}.safetensors"


def _write(directory: Path, index: int, rows: Sequence[dict[str, Any]], chunk: Chunk) -> None:
    if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0:
        directory.mkdir(exist_ok=True)
        path = _path(directory, index)
        save_file(chunk, path.with_suffix(".new"), metadata={"rows": _digest(rows)})
        path.with_suffix(".new").replace(path)


def _read(directory: Path, index: int, rows: Sequence[dict[str, Any]]) -> Chunk | None:
    """The chunk, if its file is whole and is of these rows."""
    try:
        with safe_open(_path(directory, index), framework="pt") as file:
            if (file.metadata() or {}).get("rows") == _digest(rows):
                return {side: file.get_tensor(side) for side in ("chosen", "rejected")}
    except (OSError, SafetensorError):
        pass  # it was not written, or its node died while the disk had not written all of it
    return None


def _read_on_rank_0(directory: Path, chunks: Sequence[Sequence[dict[str, Any]]]) -> dict[int, Chunk]:
    """What rank 0 finds, on all ranks. On shared storage, another node may see a file later."""
    box: list[dict[int, Chunk]] = [{}]
    if torch.distributed.get_rank() == 0:
        box = [{i: c for i, part in enumerate(chunks) if (c := _read(directory, i, part)) is not None}]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _union_of_all_ranks(found: dict[int, Chunk]) -> dict[int, Chunk]:
    boxes: list[dict[int, Chunk]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(boxes, found)
    return {index: chunk for box in boxes for index, chunk in box.items()}

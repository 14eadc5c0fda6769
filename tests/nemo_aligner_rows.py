"""Reads a JSONL of preference pairs with NeMo-Aligner's own `DPOModelDataset` and NeMo's own tokenizer class.

`python -m tests.nemo_aligner_rows MODEL_DIR PAIRS.jsonl OUT.json` in its own process, since what NeMo imports needs
the CPU platform first and changes a process for good. OUT.json holds the items, tensors as lists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model_dir: str, pairs: str, output: str) -> None:
    from nemo_srl.trainers.nemo_aligner.platforms import cpu

    cpu.install()
    import torch
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer
    from nemo_aligner.data.nlp.datasets import DPOModelDataset
    from omegaconf import OmegaConf

    with Path(pairs).open(encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    data = DPOModelDataset(
        cfg=OmegaConf.create({"data": {}}),
        tokenizer=get_nmt_tokenizer(library="huggingface", model_name=model_dir, use_fast=True),
        name="train", data_prefix=pairs, documents=list(range(len(rows))), data=rows, seq_length=512, seed=1,
    )  # fmt: skip
    items = [
        {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in data[i].items()} for i in range(len(data))
    ]
    Path(output).write_text(json.dumps(items))


if __name__ == "__main__":
    main(*sys.argv[1:])

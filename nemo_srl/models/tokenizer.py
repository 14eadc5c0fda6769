"""Loads the tokenizer of a model directory. It never runs code of the model, and downloads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_srl.errors import ModelError


def load_tokenizer(model_dir: Path) -> Any:
    """The Hugging Face tokenizer of a directory. Raises `ModelError` for one that is missing or damaged."""
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such directory. Give a Hugging Face model directory.")
    from transformers import AutoTokenizer  # imported here, because it takes a second and a launcher does not need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        # Newer versions of transformers read this file, and read it first.
        if (template := model_dir / "chat_template.jinja").is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain `Exception` for a file that is cut off
        raise ModelError(
            f"{model_dir}: no usable tokenizer ({_reason(error)}). The directory needs tokenizer.json and "
            "tokenizer_config.json, or other files that transformers can load without running the model's own code. "
            "If a file is cut off or damaged, copy or download it again."
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

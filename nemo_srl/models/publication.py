"""A trained model as a directory to give away: weights, tokenizer with its chat template, and a model card.

`transformers.from_pretrained` reads it. It is complete when it has its name. An existing directory is refused
(`ModelError`). Not covered: uploading it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_srl import jsonio
from nemo_srl.models import directories

TOKENIZER_CONFIG = "tokenizer_config.json"


def publish_model(source: Path, directory: Path, *, card: str, chat_template: str | None) -> None:
    """Copy the Hugging Face directory `source` and add `card` as its README.

    `chat_template` is the template that it was trained with, or None if that is the tokenizer's own.
    """
    directories.refuse_existing(directory)
    partial = directories.fresh_partial(directory)
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, partial / path.name)
    if chat_template is not None:
        config = jsonio.loads((partial / TOKENIZER_CONFIG).read_bytes())
        config["chat_template"] = chat_template
        (partial / TOKENIZER_CONFIG).write_text(jsonio.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "chat_template.jinja").unlink(missing_ok=True)  # transformers would read this file first
    (partial / "README.md").write_text(card, encoding="utf-8")
    if directory.exists():
        directory.rmdir()  # it is empty, as was checked above, and a rename would not replace it
    directories.publish(partial, directory)

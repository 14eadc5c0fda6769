"""A trained model as a directory to give away: weights, tokenizer with its chat template, and a model card.

`transformers.from_pretrained` reads it, and so does everything built on that. It appears whole or not at all;
an existing directory is refused (`ModelError`). Not covered: uploading it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nemo_srl.models import directories

TOKENIZER_CONFIG = "tokenizer_config.json"


def publish_model(source: Path, directory: Path, *, card: str, chat_template: str | None) -> None:
    """Copy the Hugging Face directory `source`, add `card` as its README, and the template that it was trained with if
    that is not the tokenizer's own (None)."""
    directories.refuse_existing(directory)
    partial = directories.fresh_partial(directory)
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, partial / path.name)
    if chat_template is not None:
        config = json.loads((partial / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        config["chat_template"] = chat_template
        (partial / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (partial / "chat_template.jinja").unlink(missing_ok=True)  # it would be read before the other
    (partial / "README.md").write_text(card, encoding="utf-8")
    if directory.exists():
        directory.rmdir()  # an empty one is let through above, and a rename does not replace it
    directories.publish(partial, directory)

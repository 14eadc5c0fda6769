"""Models on disk: Hugging Face directories, the one that can be fetched, and NeMo checkpoints.

`hf` describes a directory, `families` holds what differs between families of models, `smollm2` fetches the default
M0, `convert` goes to NeMo and back. Importing this package imports neither torch nor gguf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nemo_srl.errors import ModelError
from nemo_srl.models import smollm2
from nemo_srl.models.hf import read_spec, tensor_index

_FETCHERS: Mapping[str, Callable[[Path], Path]] = {smollm2.NAME: smollm2.fetch}


def resolve(path: str, cache_dir: Path, *, key: str = "model.path") -> Path:
    """The directory of the model that a user named: one that is fetched by its name, or a local one, which is checked.

    `key` is the setting that names it. Raises `ModelError` for what is neither, and for a directory that cannot be used
    (see `hf`).
    """
    if path in _FETCHERS:
        return _FETCHERS[path](cache_dir.expanduser())
    directory = Path(path).expanduser()
    if not directory.exists():
        raise ModelError(
            f"{key}={path!r}: is neither a directory nor a model that can be fetched ({', '.join(_FETCHERS)}). "
            "Models are not downloaded from a hub by their name. Download it yourself and give its directory."
        )
    try:
        read_spec(directory)
        tensor_index(directory)
    except ModelError as e:
        raise ModelError(f"{key}={path!r}: {e}") from e
    return directory.resolve()

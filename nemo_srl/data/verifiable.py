"""IFEval (Zhou et al. 2023): prompts with instructions that code can check, such as "use at least 300 words".

The checks are lm-evaluation-harness's (`lm_eval.tasks.ifeval`), which go back to the authors' own; none is written
here. Two things are added, since that code makes do with anything: rows are refused that it would check at random
(an argument that is missing is *drawn* there), and language detection gets a fixed seed. Nothing is fetched: NLTK's
sentence splitter, which the harness would download while it is imported, must be there.

Needs the extra `ifeval`. The prompts are no part of this package: JSONL of {"key", "prompt", "instruction_id_list",
"kwargs"}, as published. Raises `DataError` with file and line, `ConfigError` for what is not installed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_srl.errors import ConfigError, DataError
from nemo_srl.records import VerifiablePrompt

_FIELDS: Mapping[str, type] = {"prompt": str, "instruction_id_list": list, "kwargs": list}


@dataclass(frozen=True, kw_only=True)
class Followed:
    """Of one response, an entry per instruction. `strict` looks at the response as it is; `loose` also without its
    first line, its last line, its asterisks, or several of these, and is content with any of them."""

    strict: Sequence[bool]
    loose: Sequence[bool]
    num_errors: int = 0
    """Checks that failed by themselves; their instructions count as not followed."""


class Verifier:
    """The harness's checks. Loading them takes a second."""

    def __init__(self) -> None:
        self._instructions, self._process_results = _load()

    def check_row(self, prompt: VerifiablePrompt, *, where: str) -> None:
        """Refuse instructions that are unknown, or whose arguments are not those that their checks take."""
        if len(prompt.instruction_ids) != len(prompt.arguments) or not prompt.instruction_ids:
            raise DataError(
                f"{where}: {len(prompt.instruction_ids)} instruction(s) in `instruction_id_list` and "
                f"{len(prompt.arguments)} in `kwargs`; give one or more, with one object of arguments each"
            )
        for name, given in zip(prompt.instruction_ids, prompt.arguments, strict=True):
            if name not in self._instructions:
                near = difflib.get_close_matches(name, self._instructions, n=3) or sorted(self._instructions)
                raise DataError(f"{where}: nobody can check the instruction {name!r}; known are {', '.join(near)}")
            expected = set(self._instructions[name](name).get_instruction_args_keys())
            if given.keys() != expected or not all(given.values()):
                raise DataError(
                    f"{where}: arguments {given} of {name!r}; its check takes {sorted(expected) or 'none'}, none of "
                    "them empty or 0"
                )
            try:
                self._check(prompt, name, given, "Some words.")
            except Exception as e:  # third-party code on values of any kind
                raise DataError(f"{where}: {name!r} cannot be checked with the arguments {given}: {e}") from e

    def followed(self, prompt: VerifiablePrompt, response: str) -> Followed:
        """Which instructions of `prompt` the response follows."""
        strict, loose, num_errors = [], [], 0
        for name, given in zip(prompt.instruction_ids, prompt.arguments, strict=True):
            try:
                found = self._check(prompt, name, given, response)
            except Exception:  # third-party code on untrusted text, e.g. JSON that is nested too deeply for its parser
                found, num_errors = (False, False), num_errors + 1
            strict.append(found[0])
            loose.append(found[1])
        return Followed(strict=strict, loose=loose, num_errors=num_errors)

    def _check(
        self, prompt: VerifiablePrompt, name: str, arguments: Mapping[str, Any], response: str
    ) -> tuple[bool, bool]:
        row = {"key": prompt.key, "prompt": prompt.text, "instruction_id_list": [name], "kwargs": [dict(arguments)]}
        found = self._process_results(row, [response])
        return bool(found["prompt_level_strict_acc"]), bool(found["prompt_level_loose_acc"])


def _load() -> tuple[Mapping[str, Any], Any]:
    """The harness's instructions by name, and the function that checks a row."""
    try:
        import langdetect
        import nltk

        # Looked for here, as the harness would try to download it while it is imported.
        nltk.data.find("tokenizers/punkt_tab")
        from lm_eval.tasks.ifeval import instructions_registry, utils
    except ImportError as e:
        raise ConfigError(
            f"IFEval: its checks are lm-evaluation-harness's, and {e.name or e} is not installed; "
            'pip install "nemo-srl[ifeval]"'
        ) from e
    except LookupError as e:
        raise ConfigError(
            "IFEval: NLTK's sentence splitter `punkt_tab` is not there; run `python -m nltk.downloader punkt_tab`, or "
            "set NLTK_DATA to a directory with tokenizers/punkt_tab"
        ) from e
    # Without it, the detected language of a doubtful text differs from one time to the next.
    langdetect.DetectorFactory.seed = 0
    return instructions_registry.INSTRUCTION_DICT, utils.process_results


def read_prompts(path: Path, verifier: Verifier) -> list[VerifiablePrompt]:
    """The prompts of a file, each of which `verifier` can check."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected IFEval's prompts as JSONL")
    prompts: dict[str, VerifiablePrompt] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        prompt = _prompt(line, where=where)
        if prompt.key in prompts:
            raise DataError(f"{where}: there is a prompt with the key {prompt.key!r} before")
        verifier.check_row(prompt, where=where)
        prompts[prompt.key] = prompt
    if not prompts:
        raise DataError(f"{path}: empty; expected IFEval's prompts as JSONL")
    return list(prompts.values())


def _prompt(line: str, *, where: str) -> VerifiablePrompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: not JSON ({e})") from e
    if not isinstance(row, dict) or "key" not in row or not all(isinstance(row.get(k), t) for k, t in _FIELDS.items()):
        raise DataError(f"{where}: expected an object with `key` and {', '.join(f'`{k}`' for k in _FIELDS)}")
    if not all(isinstance(x, dict) for x in row["kwargs"]) or not row["prompt"].strip():
        raise DataError(f"{where}: expected a text in `prompt` and objects in `kwargs`")
    return VerifiablePrompt(
        prompt_id=f"ifeval-{row['key']}",
        text=row["prompt"],
        instruction_ids=[str(x) for x in row["instruction_id_list"]],
        # The Hub's copy of the data has every argument in every row, most of them null.
        arguments=[{k: v for k, v in x.items() if v is not None} for x in row["kwargs"]],
    )

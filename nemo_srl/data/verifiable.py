"""IFEval (Zhou et al. 2023): its prompts, and a verifier of answers. `stages/ifeval.py` makes the figures.

The prompts have instructions that code can check, such as "use at least 300 words". The checks are those of
lm-evaluation-harness (`lm_eval.tasks.ifeval`), which come from the authors' own code. This module adds two safeguards.
It refuses rows that the harness would check at random: the harness *draws* an argument that is missing. And it gives
the language detection a fixed seed. Nothing is downloaded: NLTK's sentence splitter, which the harness would download
when it is imported, must be installed.

Needs the extra `ifeval`. The prompts are not part of this package; they are JSONL of {"key", "prompt",
"instruction_id_list", "kwargs"}, as published. Raises `DataError` with file and line, and `ConfigError` for something
that is not installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_srl.errors import ConfigError, DataError
from nemo_srl.records import VerifiablePrompt
from nemo_srl.rows import read_rows

_FIELDS: Mapping[str, type] = {"prompt": str, "instruction_id_list": list, "kwargs": list}


@dataclass(frozen=True, kw_only=True)
class Followed:
    """Which instructions one response follows: an entry per instruction of the prompt.

    `strict` checks the response as it is. `loose` also checks it without its first line, its last line, its asterisks,
    and without several of these; it is true when any of the checks succeeds.
    """

    strict: Sequence[bool]
    loose: Sequence[bool]
    num_errors: int = 0
    """Checks that raised an error; their instructions count as not followed."""


class Verifier:
    """The checks of the harness. It takes a second to load them."""

    def __init__(self) -> None:
        try:
            import langdetect
            import nltk

            # Checked before the harness is imported, which would try to download it.
            nltk.data.find("tokenizers/punkt_tab")
            from lm_eval.tasks.ifeval import instructions_registry, utils
        except ImportError as e:
            raise ConfigError(
                f"IFEval needs lm-evaluation-harness for its checks, and {e.name or e} is not installed; "
                'pip install "nemo-srl[ifeval]"'
            ) from e
        except LookupError as e:
            raise ConfigError(
                "IFEval needs NLTK's sentence splitter `punkt_tab`, which is not there; run `python -m nltk.downloader "
                "punkt_tab`, or set NLTK_DATA to a directory with tokenizers/punkt_tab"
            ) from e
        # Without a seed, the language that is detected for a doubtful text differs from call to call.
        langdetect.DetectorFactory.seed = 0
        self._instructions: Mapping[str, Any] = instructions_registry.INSTRUCTION_DICT
        self._process_results = utils.process_results

    def check_row(self, prompt: VerifiablePrompt, *, where: str) -> None:
        """Refuse an unknown instruction, and one whose arguments are not those that its check takes."""
        if len(prompt.instruction_ids) != len(prompt.arguments) or not prompt.instruction_ids:
            raise DataError(
                f"{where}: {len(prompt.instruction_ids)} instruction(s) in `instruction_id_list` and "
                f"{len(prompt.arguments)} in `kwargs`; give one or more, with one object of arguments each"
            )
        for name, given in zip(prompt.instruction_ids, prompt.arguments, strict=True):
            if name not in self._instructions:
                near = difflib.get_close_matches(name, self._instructions, n=3) or sorted(self._instructions)
                raise DataError(
                    f"{where}: no check for the instruction {name!r}; known are {', '.join(near)}. Correct it, or "
                    "remove the row."
                )
            expected = set(self._instructions[name](name).get_instruction_args_keys())
            if given.keys() != expected or not all(given.values()):
                raise DataError(
                    f"{where}: arguments {given} of {name!r}; its check takes {sorted(expected) or 'none'}, and "
                    "none of them empty or 0. Correct them, or remove the row."
                )
            try:
                self._check(prompt, name, given, "Some words.")
            except Exception as e:  # the harness's code may raise anything on a wrong value
                raise DataError(
                    f"{where}: {name!r} cannot be checked with the arguments {given}: {e}. Correct them, or "
                    "remove the row."
                ) from e

    def followed(self, prompt: VerifiablePrompt, response: str) -> Followed:
        """Which instructions of `prompt` the response follows."""
        found, num_errors = [], 0
        for name, given in zip(prompt.instruction_ids, prompt.arguments, strict=True):
            try:
                found.append(self._check(prompt, name, given, response))
            except Exception:  # the harness's code may raise anything on a model's text, e.g. on deeply nested JSON
                found.append((False, False))
                num_errors += 1
        return Followed(strict=[x for x, _ in found], loose=[x for _, x in found], num_errors=num_errors)

    def _check(self, prompt: VerifiablePrompt, name: str, given: Mapping[str, Any], response: str) -> tuple[bool, bool]:
        """Whether the response follows one instruction, strictly and loosely."""
        row = {"key": prompt.key, "prompt": prompt.text, "instruction_id_list": [name], "kwargs": [dict(given)]}
        found = self._process_results(row, [response])
        return bool(found["prompt_level_strict_acc"]), bool(found["prompt_level_loose_acc"])


def read_prompts(path: Path, verifier: Verifier) -> list[VerifiablePrompt]:
    """The prompts of a file, after `verifier` has checked that it can verify each."""
    prompts: dict[str, VerifiablePrompt] = {}
    for where, row in read_rows(path, what="IFEval's prompts"):
        prompt = _prompt(row, where=where)
        if prompt.key in prompts:
            raise DataError(f"{where}: an earlier prompt has the same key, {prompt.key!r}. Give each a key of its own.")
        verifier.check_row(prompt, where=where)
        prompts[prompt.key] = prompt
    return list(prompts.values())


def _prompt(row: Mapping[str, Any], *, where: str) -> VerifiablePrompt:
    if "key" not in row or not all(isinstance(row.get(k), t) for k, t in _FIELDS.items()):
        expected = ", ".join(f"`{k}` ({t.__name__})" for k, t in _FIELDS.items())
        raise DataError(
            f"{where}: expected an object with `key`, {expected}; found {sorted(row)}. Give IFEval's file as published."
        )
    if not all(isinstance(x, dict) for x in row["kwargs"]) or not row["prompt"].strip():
        raise DataError(f"{where}: expected a text in `prompt` and objects in `kwargs`. Correct it, or remove the row.")
    return VerifiablePrompt(
        prompt_id=f"ifeval-{row['key']}",
        text=row["prompt"],
        instruction_ids=[str(x) for x in row["instruction_id_list"]],
        # The Hub's copy of the data has every argument in every row, most of them null.
        arguments=[{k: v for k, v in x.items() if v is not None} for x in row["kwargs"]],
    )

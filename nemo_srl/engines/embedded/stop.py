"""Stop strings: a sample ends where its text has one of them. The string stays in the text.

A text is only decoded and searched where the newest token could have completed a stop string. So the search costs next
to nothing beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]


class StopStrings:
    """Searches texts of one tokenizer. It remembers the text of each token."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._texts: dict[int, str] = {}

    def reached(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last of `tokens` completes a string of `stop`."""
        if not stop:
            return False
        last = tokens[-1]
        if last not in self._texts:
            self._texts[last] = self._decode([last])
        if not any(s[-1] in self._texts[last] for s in stop):
            return False
        # Each token of a stop string is at least one of its characters. One more token is context for the decoder.
        tail = self._decode(list(tokens[-max(map(len, stop)) - 1 :]))
        return any(s in tail for s in stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the end of the first stop string in it. The last token may have brought more characters."""
    ends = [begin + len(s) for s in stop if (begin := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text

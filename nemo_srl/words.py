"""Words and tokens of a text in any script.

Some scripts write no spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese and others. There, each
character is a token, and two characters count as a word. That is about right for Chinese, and good enough for limits of
length. Korean, Arabic, Hindi and others put spaces between words, as English does. Marks such as Hindi's vowel signs
belong to the letter before them.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_ASCII_TOKEN = re.compile(r"[a-z0-9]+")

# Blocks of scripts that are written without spaces between words (Unicode 15, Blocks.txt).
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff\u1000-\u109f"  # Tibetan, Myanmar
    "\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"  # Khmer, Tai Le, New Tai Lue, Tai Tham, Balinese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u303c"  # radicals, numerals and marks of Chinese and Japanese
    "\u3040-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"  # Kana, Bopomofo, Han
    "\ua000-\ua4cf\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff"  # Yi, Javanese, Myanmar, Tai Viet, Han
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"  # Kana, Han
)
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]"
)
"""Joiners, marks of direction, soft hyphens, and selectors of variants."""
_WORD = re.compile(rf"[{_UNSPACED}]{{1,2}}|[^{_UNSPACED}]+")


def normalised(text: str) -> str:
    """The text without differences that a reader does not see: NFKC, case folding, single spaces, no characters
    without a width."""
    if text.isascii():
        return " ".join(text.lower().split())
    # Case folding may undo a composition, so compose again.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_INVISIBLE.sub("", folded).split())


def tokenize(text: str) -> list[str]:
    """Lower-case words without marks of punctuation, and single characters in scripts without spaces.

    In a text of ASCII these are the tokens of rouge-score without stemming: runs of letters and digits.
    """
    text = normalised(text)
    return (_ASCII_TOKEN if text.isascii() else _token()).findall(text)


def words(text: str) -> list[str]:
    """What blanks separate, and two characters at a time in scripts without spaces."""
    found = []
    for part in text.split():
        if _IS_UNSPACED.search(part):
            found += [word for word in _WORD.findall(part) if any(map(str.isalnum, word))]
        else:
            found.append(part)
    return found


def is_unspaced(character: str) -> bool:
    """Whether the character is of a script without spaces."""
    return bool(_IS_UNSPACED.match(character))


@functools.cache
def _token() -> re.Pattern[str]:
    """A letter or a digit of a script without spaces with its marks, or a run of other letters, digits and marks."""
    marks = _ranges([i for i in range(0x300, 0x20000) if unicodedata.category(chr(i)).startswith("M")])
    return re.compile(rf"(?=[^\W_])(?:[{_UNSPACED}][{marks}]*|(?:(?![{_UNSPACED}])[^\W_][{marks}]*)+)")


def _ranges(code_points: list[int]) -> str:
    """Ascending code points as the inside of a character class."""
    found: list[tuple[int, int]] = []
    for i in code_points:
        if found and found[-1][1] == i - 1:
            found[-1] = found[-1][0], i
        else:
            found.append((i, i))
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in found)

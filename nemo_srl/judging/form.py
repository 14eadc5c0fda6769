"""What a verdict states in the asked form: a line such as `Score: 4`. Nothing else counts.

A verdict is the text of a model that was shown the text of another one. So a number in it may be the judge's own, a
draft, a part of the sum, or a quotation. The rule that keeps them apart:

1. What the judge thinks before it answers, quotes or shows as code is not looked at: thinking tags, also without an
   end; quotations that are not a line of their own; Markdown's quotations and code fences; `<response>` blocks.
2. A line of the asked form counts, and the last one decides. Markdown, list marks, and Total, Final or Overall may
   stand before the key. Other words may not: `Relevance score: 1` is a part of the sum.
3. Only if there is no such line, the asked form counts at the end of a line of text. It must not follow a word
   (`it claims Score: 5`) or report what somebody says. Two such places with different values are none.

Everything here takes time that is linear in the length of the text. Only ASCII counts as letters and digits, and the
full-width forms of ASCII as ASCII.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from nemo_srl.thinking import NAMES

# Full-width ASCII and blanks of other widths. One character stays one character, so that offsets stay valid.
_BLANKS = "\u00a0\u2002\u2003\u2009\u202f\u3000"
_SAME = {0xFF01 + i: 0x21 + i for i in range(94)} | {ord(blank): 0x20 for blank in _BLANKS}

# Also for a judge of another family than the model whose tags the stage knows (`thinking.answer_of`).
_THINKING = "|".join(NAMES)
_BLOCK_TAG = re.compile(
    r"<(?P<end>/?)(?P<name>(?ai:response|instruction|answer|quote|blockquote|q|code|pre))\b[^<>]{0,99}>"
)
# Each alternative is one way to say something that is not the verdict. The order matters: a fence holds quotes.
_NOT_SAID = re.compile(
    r"""
      (?P<fence>``` | ~~~) (?s:.)*? (?: (?P=fence) | \Z )
    | (?: \A | (?<=[\r\n]) ) [ \t]{0,9} > [^\r\n]*
    | " [^"]* " | \u201c [^\u201c\u201d]* \u201d | \u00ab [^\u00ab\u00bb]* \u00bb
    """,
    re.VERBOSE,
)
_THOUGHT = re.compile(rf"<(?P<tag>(?ai:{_THINKING}))>(?s:.)*?(?:</(?ai:(?P=tag))>|\Z)")
_THOUGHT_END = re.compile(rf"</(?ai:{_THINKING})>")
_WHOLE_LINE_BEFORE = re.compile(r"(?:\A|[\r\n])[ \t#*_+-]{0,16}\Z")
_WHOLE_LINE_AFTER = re.compile(r"[*_ \t]{0,8}(?:[\r\n]|\Z)")

_MARKS = r"(?: [ \t#*_+=\u2022-] | \d{1,3}[.)] ){0,12}"
_QUALIFIERS = r"(?: (?ai:total|final|overall) [ \t_-]{1,3} ){0,3}"
# After the key: emphasis, the colon, and the value, which may stand alone on the next line.
_COLON = r"""["'*_`]{0,4} [ \t]{0,4} : [*_` \t]{0,8} (?: (?: \r?\n [ \t]{0,4} ){1,2} [*_` \t]{0,8} )?"""
_REPORTS = re.compile(
    r"\b(?ai:say|says|said|saying|state|states|stated|claim|claims|claimed|assert|asserts|read|reads|write|writes|"
    r"wrote|ends?|concludes?|declares?|announces?|quotes?|itself|follows|contains?|includes?|asks?|demands?|"
    r"instructs?|tells?|told|wants?)\b"
)
_OF_OTHERS = re.compile(r"\b(?ai:response|answer|reply|text|author|assistant|user|instruction|it|its|they|their)\b")
_CONTROL = r"(?:</s>|<eos>|<end_of_turn>|<\|[A-Za-z_]{1,30}\|>)"
_CONTROL_AT_END = re.compile(rf"{_CONTROL}\Z")
_WINDOW = 400  # characters looked back at; a bound keeps the reading linear


def own_words(verdict: str) -> str:
    """`verdict` with blanks in the place of what rule 1 leaves out. It has the same length."""
    text = verdict.translate(_SAME)
    # Some chat templates open the thinking themselves, so the text may hold its end alone.
    ends = [match.end() for match in _THOUGHT_END.finditer(text)]
    if ends and not _THOUGHT.search(text):
        text = _blank(text[: ends[-1]]) + text[ends[-1] :]
    text = _THOUGHT.sub(lambda m: _blank(m[0]), text)
    return _NOT_SAID.sub(_blank_unless_a_line, _blank_blocks(text))


def _blank_blocks(text: str) -> str:
    """Without what stands between the two tags of a quoted block. A tag without its partner is nothing special."""
    parts, done = [], 0
    begins: dict[str, int] = {}
    for tag in _BLOCK_TAG.finditer(text):
        name = tag["name"].lower()
        if not tag["end"]:
            begins.setdefault(name, tag.start())
        elif (begin := begins.pop(name, -1)) >= done:
            parts += [text[done:begin], _blank(text[begin : tag.end()])]
            done = tag.end()
    return "".join([*parts, text[done:]])


def _blank(text: str) -> str:
    return re.sub(r"[^\r\n]", " ", text)


def _blank_unless_a_line(match: re.Match[str]) -> str:
    """A quotation that is one whole line is the judge's way to set its line off."""
    found, text = match[0], match.string
    if found[0] in '"\u201c\u00ab' and "\n" not in found:
        before = _WHOLE_LINE_BEFORE.search(text, max(0, match.start() - 20), match.start())
        if before and _WHOLE_LINE_AFTER.match(text, match.end()):
            return found
        if _is_json_key(text, match.end()):
            return found
    return _blank(found)


def _is_json_key(text: str, end: int) -> bool:
    return text[end : end + 1] in (":", ",", "}")


class AskedForm:
    """Finds `<key>: <value>` in verdicts by the rule above."""

    def __init__(self, key: str, *, begins: str, value: str) -> None:
        """`key` is in lower case. `begins` is a pattern of what makes the place one where a value is given.

        `value` is a pattern of the whole value, with a group `value`. What follows it must be the end of the line or of
        the sentence. Both patterns are in verbose mode.
        """
        opener = r"""(?: \$ | \\boxed | \\\( | [<\[({"'`*_] ){0,4} [ \t]?"""
        closer = r"""(?P<closer> [>\])}"'`*_$\u201d\u2019\u00bb]{0,6} )"""
        control = rf"(?: [ \t]{{0,4}} {_CONTROL} ){{0,4}}"
        line_end = r"(?= [ \t]* (?: [\r\n] | \Z ) )"
        sentence_end = r"""[.!] (?= [*_"'`\u201d\u2019]{0,4} (?: [\r\n] | \Z | [ \t]+ (?![ \t0-9]) ) )"""
        quote = r"""["'`\u201c\u2018\u00ab]?"""
        place = rf"{_QUALIFIERS} (?ai:{key}) {_COLON} {opener} (?= {begins} )"
        self._line = re.compile(rf"(?: \A | (?<=[\r\n]) ) {_MARKS} (?P<quote>{quote}) [*_]{{0,3}} {place}", re.VERBOSE)
        self._in_text = re.compile(rf"(?<=[.!?,;)\u2026]) [ \t]{{1,4}} [*_]{{0,3}} {place}", re.VERBOSE)
        self._value = re.compile(rf"{value} {closer} {control} (?: {line_end} | {sentence_end} )", re.VERBOSE)
        self._at_line_end = re.compile(rf"{value} {closer} {control} [.!]? [*_]{{0,3}} {line_end}", re.VERBOSE)
        self._whole = re.compile(rf"{value} {closer}", re.VERBOSE)
        self._json_keys = {key, *(f"{word} {key}" for word in ("total", "final", "overall"))}

    def find(self, verdict: str) -> tuple[re.Match[str] | None, int]:
        """The value, and where the line or the words that state it begin.

        The value is None if there is none, or if the place that decides has something else. The place is the end of the
        verdict if nothing states a value.
        """
        if (in_json := self._in_json(verdict)) is not None:
            return in_json, 0
        text = own_words(verdict)
        lines = list(self._line.finditer(text))
        if lines:
            on_next_line = "\n" in lines[-1][0].lstrip("\r\n")
            value = (self._at_line_end if on_next_line else self._value).match(text, lines[-1].end())
            if value and not lines[-1]["quote"] and re.search("[\"'`\u201d\u2019\u00bb]", value["closer"]):
                value = None  # the end of a quotation that began earlier
            return value, lines[-1].start()
        places = list(self._said_in_text(text))
        if len({value["value"].lower() for _, value in places}) == 1:
            start, value = places[-1]
            return value, start
        return None, places[-1][0] if places else len(verdict)

    def _said_in_text(self, text: str) -> Iterator[tuple[int, re.Match[str]]]:
        for place in self._in_text.finditer(text):
            value = self._at_line_end.match(text, place.end())
            before = re.split(r"[\r\n]", text[max(0, place.start() - _WINDOW) : place.start()])[-1]
            of_others = before[-1:] not in (".", "!", "?") and _OF_OTHERS.search(re.split(r"[.!?] ", before)[-1])
            if value and not _REPORTS.search(before) and not of_others:
                yield place.start(), value

    def _in_json(self, verdict: str) -> re.Match[str] | None:
        """The value of the key in a verdict that is a JSON object, or whose last line is one."""
        text = verdict.rstrip()
        while control := _CONTROL_AT_END.search(text, max(0, len(text) - 40)):
            text = text[: control.start()].rstrip()
        for candidate in {text.lstrip(), text.rsplit("\n", 1)[-1].lstrip()}:
            if candidate.startswith("{") and candidate.endswith("}"):
                try:
                    found = json.loads(candidate, parse_int=str, parse_float=str, parse_constant=str)
                except (ValueError, RecursionError):
                    continue
                for name, value in found.items():
                    if name.lower().replace("_", " ") in self._json_keys and isinstance(value, str):
                        return self._whole.fullmatch(value.strip())
        return None

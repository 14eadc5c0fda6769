"""Turns an instruction into the text and token ids that a model sees, with the model's own chat template.

Instructions and responses are untrusted. They may contain the strings of control tokens, such as `<|im_end|>`, which
are broken up (`markers.py`). The default system message of a template stays.

Some templates ignore `add_generation_prompt`: they never open the assistant's turn. Then the opening is what they write
before an assistant's message.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_srl import jsonio, markers
from nemo_srl.errors import ConfigError, ModelError
from nemo_srl.models.tokenizer import load_tokenizer
from nemo_srl.thinking import dropped_by_engines, find_tags

# Some templates tell the model the date. With the real date, the same run would give other prompts on the next day.
# So they get a fixed date: that of the last Llama template of this kind.
_TODAY = datetime.date(2024, 7, 26)

_INSTRUCTION, _PROBE = "instruction", "Q7response7Q"
"""Texts to find in what a template writes. No template has the second one itself."""


class ChatTemplate:
    """The tokenizer and the chat template of one model directory, for chats that begin with a user's turn.

    `chat_template` (the setting `model.chat_template`) replaces the model's own. `variables`
    (`model.chat_template_kwargs`) are set in it. Raises `ModelError` for a directory without a usable tokenizer,
    `ConfigError` for a template that is missing or does not work.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        chat_template: str | None = None,
        thinking_tags: Sequence[str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = load_tokenizer(model_dir)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"model.chat_template=None: the tokenizer in {model_dir} has no chat template, as is usual for a base "
                "model. Give one as a Jinja2 text in model.chat_template, or use the instruct model."
            )
        if variables:
            self._tokenizer.chat_template = _set_at_the_start(variables) + str(self._tokenizer.chat_template)
        if self._tokenizer.eos_token is None:
            raise ModelError(
                f"{model_dir / 'tokenizer_config.json'}: it has no eos_token, so a trained response would never end. "
                "Set it to the text of the token that ends a response."
            )
        self._markers = markers.of(self._tokenizer)
        self._marker_ids = _ids_by_normalization(self._tokenizer, self._markers)
        self._is_opened_here = False
        self._response_start, self._turn_end = self._find_borders()
        self.thinking_tags = find_tags(self._tokenizer, thinking_tags)
        """The tags between which the model thinks before it answers. Empty if it has none."""
        if dropped := dropped_by_engines(self._tokenizer, self.thinking_tags):
            raise ModelError(
                f"{model_dir}: the tags of the model's thinking, {dropped}, are special tokens, so they are missing in "
                "generated texts, and thoughts could not be told from answers. Set their `special` to false in "
                "tokenizer.json and tokenizer_config.json. If the model does not think: model.thinking_tags=[]."
            )
        self.opens_thinking, self._empty_thinking = self._find_thinking()

    def render(self, instruction: str, *, after: Sequence[tuple[str, str]] = ()) -> str:
        """The text of the user's turn with `instruction`, and of the start of the assistant's turn.

        `after` are earlier turns, as pairs of instruction and response.
        """
        roles = [(role, text) for turn in after for role, text in zip(("user", "assistant"), turn, strict=True)]
        messages = [{"role": role, "content": self._harmless(text)} for role, text in [*roles, ("user", instruction)]]
        if not self._is_opened_here:
            return self._apply(messages, open_turn=True)
        # The last one, because a text may hold the probe, too.
        text = self._apply([*messages, {"role": "assistant", "content": _PROBE}], open_turn=False)
        return text.rpartition(_PROBE)[0].rstrip(" ")

    def render_for_training(self, instruction: str) -> str:
        """The same, for a response that is an answer without its thoughts: if the template opens the thinking, or
        writes an empty one, the prompt ends with it. So no training teaches when to think, and when not."""
        return self.render(instruction) + self._empty_thinking

    def response_text(self, response: str) -> str:
        """The text that follows the rendered prompt when the assistant says `response`. It has the space that some
        templates (Llama 2's) put before a response, and no end-of-sequence token, because trainers add it."""
        return self._response_start + self._harmless(response)

    @property
    def may_think(self) -> bool:
        """Whether a response can begin with thoughts. It cannot if the prompt ends with an empty thinking."""
        return bool(self.thinking_tags) and not self.render(_INSTRUCTION).rstrip().endswith(self.thinking_tags[1])

    @property
    def template(self) -> str:
        """The Jinja2 template. It sets its `variables` itself."""
        return str(self._tokenizer.chat_template)

    @property
    def end_of_turn(self) -> str:
        """The text of the token that ends a response. `response_text` leaves it out."""
        return str(self._tokenizer.eos_token)

    @property
    def eos_token_id(self) -> int:
        """The id of that token."""
        return int(self._tokenizer.eos_token_id)

    @property
    def closing_token(self) -> tuple[str, int] | None:
        """The control token that the template writes after a response, and its id. None if it writes another text."""
        ids = self.encode(self._turn_end.lstrip())[:1]
        text = self._tokenizer.convert_ids_to_tokens(ids[0]) if ids else ""
        return (text, ids[0]) if text in self._markers.strings else None

    @property
    def max_token_id(self) -> int:
        """The highest id that the tokenizer can give."""
        return int(max(self._tokenizer.get_vocab().values()))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of rendered text. Adds no token, because the template has already written the first one."""
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Token ids of untrusted text outside a chat, which a model continues. The only control token in it is
        the tokenizer's first token (Llama's BOS), if it adds one."""
        return tuple(self._tokenizer(self._harmless(text), add_special_tokens=True, verbose=False)["input_ids"])

    def num_tokens(self, text: str) -> int:
        """Length of `encode(text)`."""
        return len(self.encode(text))

    def num_trained_tokens(self, instruction: str, response: str, *, at_most: int = 0) -> int:
        """Length of a training row: prompt, response and the token that ends it.

        A row that surely has no more than `at_most` tokens is not tokenised; then this is an upper bound.
        """
        prompt, text = self.render(instruction), self.response_text(response)
        if (bound := len(prompt.encode()) + len(text.encode()) + 1) <= at_most:
            return bound  # no token is shorter than a byte
        begin, both = self.encode(prompt), self.encode(prompt + text)
        # Tokens that would merge across the end of the prompt are kept apart, as the trainer does.
        merged = both[: len(begin)] != begin
        return (len(begin) + len(self.encode(text)) if merged else len(both)) + 1

    def _harmless(self, text: str) -> str:
        text = self._markers.broken_up(text)
        while self._marker_ids:
            found = self._tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            tokens = zip(found["input_ids"], found["offset_mapping"], strict=True)
            places = [begin for token, (begin, end) in tokens if token in self._marker_ids and end - begin > 1]
            if not places:
                break
            for begin in reversed(places):
                text = f"{text[: begin + 1]} {text[begin + 1 :]}"
        return text

    def _apply(self, messages: list[dict[str, str]], *, open_turn: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn, strftime_now=_TODAY.strftime
        )
        assert isinstance(text, str)
        return text

    def _find_borders(self) -> tuple[str, str]:
        """What the template writes between the start of the assistant's turn and the response, and after it.

        Finds out, too, whether the template opens the assistant's turn. Raises `ConfigError` for a template that does
        not work."""
        import jinja2

        user = {"role": "user", "content": _INSTRUCTION}
        chat, error = "", None
        try:
            chat = self._apply([user, {"role": "assistant", "content": _PROBE}], open_turn=False)
            closed, prompt = (self._apply([user], open_turn=is_open) for is_open in (False, True))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as e:
            closed = prompt = ""  # some templates take only chats that end with an assistant's message
            error = e
        before, found, end = chat.rpartition(_PROBE)
        is_usable = bool(found) and _INSTRUCTION in before and _PROBE not in before
        if error is not None and not is_usable:
            raise self._refused(
                f"rendering a user's and an assistant's message fails: {error}. Correct the template, or set "
                "model.chat_template."
            ) from error
        if error is None and _INSTRUCTION not in prompt:
            raise self._refused(
                "it leaves out the user's message. Write the messages as message['role'] and message['content']."
            )
        start = before.removeprefix(prompt) if found and before.startswith(prompt) else None
        if prompt != closed or (start is not None and not start.strip()):
            # Some templates write a new turn and a past turn differently. Then nothing is added.
            return (start if start is not None and not start.strip() else ""), end
        # It ignores `add_generation_prompt`.
        if is_usable:
            self._is_opened_here = True
            return before[len(before.rstrip(" ")) :], end
        if prompt.rstrip().endswith(tuple(self._markers.strings)):
            raise self._refused(
                "it ends the user's turn, ignores add_generation_prompt, and does not write an assistant's message as "
                "it is. So the start of a response is not known. Write that start at the end, inside "
                "{% if add_generation_prompt %}...{% endif %}."
            )
        return "", ""  # a text that a response continues, such as `Question: ... Answer:`

    def _refused(self, reason: str) -> ConfigError:
        return ConfigError(f"model.chat_template={str(self._tokenizer.chat_template)[:60]!r}...: {reason}")

    def _find_thinking(self) -> tuple[bool, str]:
        """Whether a prompt ends within the thinking, and the text that ends an empty thinking after a prompt."""
        if not self.thinking_tags:
            return False, ""
        begin, end = self.thinking_tags
        user = {"role": "user", "content": "instruction"}
        prompt = self.render("instruction")
        opens = prompt.rfind(begin) > prompt.rfind(end)
        if opens:
            return True, f"\n{end}\n\n"
        chat = self._apply([user, {"role": "assistant", "content": _PROBE}], open_turn=False)
        start, found, _ = chat.removeprefix(prompt).partition(_PROBE)
        thoughts = start.replace(begin, "").replace(end, "")
        return False, start if chat.startswith(prompt) and found and end in start and not thoughts.strip() else ""


def _set_at_the_start(variables: Mapping[str, Any]) -> str:
    """Jinja2 statements, so that whoever has the template alone renders the same. JSON's `null` has another name."""
    values = {name: "none" if value is None else jsonio.dumps(value) for name, value in variables.items()}
    return "".join(f"{{% set {name} = {value} %}}" for name, value in values.items())


def _ids_by_normalization(tokenizer: Any, found: markers.Markers) -> frozenset[int]:
    """The ids of markers that also match other texts, such as `<|IM_END|>`, because the tokenizer normalizes first.

    Empty if there is no such marker, which is the usual case.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return frozenset()
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.normalized and token.content in found.strings)

"""Turns an instruction into the text and token ids that a model sees, with the model's own chat template.

Instructions and responses are untrusted. They may contain the strings of control tokens, such as `<|im_end|>`. A
tokenizer would turn such a string into the token itself, and a text could end its own turn and open another one.
`ChatTemplate` writes a space after the first character (`< |im_end|>`). This reads the same, and encodes as ordinary
text. All other text, such as braces, is not changed. The default system message of a template stays, too.

Not covered: markers that a template writes as ordinary text, such as Llama 2's `[INST]`. They are not tokens. Only
training can teach a model to tell the template's markers from those in a user's text.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_srl.errors import ConfigError, ModelError
from nemo_srl.thinking import dropped_by_engines, find_tags

# Some templates tell the model the date. With the real date, the same run would give other prompts on the next day.
# So they get a fixed date: that of the last Llama template of this kind.
_TODAY = datetime.date(2024, 7, 26)

_PROBE = "response"


class ChatTemplate:
    """The tokenizer and the chat template of one model directory, for chats that begin with a user's turn.

    `chat_template` (the setting `model.chat_template`) replaces the model's own. Raises `ModelError` for a
    directory without a tokenizer, `ConfigError` for a template that is missing or does not work.
    """

    def __init__(
        self, model_dir: Path, *, chat_template: str | None = None, thinking_tags: Sequence[str] | None = None
    ) -> None:
        self._tokenizer = _load_tokenizer(model_dir)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"model.chat_template=None: the tokenizer in {model_dir} has no chat template, as is usual for a base "
                "model. Give one as a Jinja2 text in model.chat_template, or use the instruct model."
            )
        self._control = _control_strings(self._tokenizer)
        self._response_start = self._find_response_start()
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
        return self._apply(messages, open_turn=True)

    def render_for_training(self, instruction: str) -> str:
        """The same, for a response that is an answer without its thoughts: if the template opens the thinking, or
        writes an empty one, the prompt ends with it. So no training teaches when to think, and when not."""
        return self.render(instruction) + self._empty_thinking

    def response_text(self, response: str) -> str:
        """The text that follows the rendered prompt when the assistant says `response`. It has the space that some
        templates (Llama 2's) put before a response, and no end-of-sequence token, because trainers add it."""
        return self._response_start + self._harmless(response)

    @property
    def end_of_turn(self) -> str:
        """The text of the token that ends a response. `response_text` leaves it out."""
        return str(self._tokenizer.eos_token)

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

    def _harmless(self, text: str) -> str:
        # Repeat until nothing matches, because a space may uncover another control string: `<|a|>` holds `|a|`.
        while self._control.search(text):
            text = self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text

    def _apply(self, messages: list[dict[str, str]], *, open_turn: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn, strftime_now=_TODAY.strftime
        )
        assert isinstance(text, str)
        return text

    def _find_response_start(self) -> str:
        """The text that the template writes between the start of the assistant's turn and the response.

        Raises `ConfigError` for a template that does not work."""
        import jinja2

        setting = f"model.chat_template={str(self._tokenizer.chat_template)[:60]!r}..."
        user = {"role": "user", "content": "instruction"}
        try:
            prompt = self._apply([user], open_turn=True)
            chat = self._apply([user, {"role": "assistant", "content": _PROBE}], open_turn=False)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{setting}: rendering a user's and an assistant's message fails: {error}. Correct the template, or "
                "set model.chat_template."
            ) from error
        if "instruction" not in prompt:
            raise ConfigError(
                f"{setting}: it leaves out the user's message. Write the messages as message['role'] and "
                "message['content']."
            )
        start, found, _ = chat.removeprefix(prompt).partition(_PROBE)
        # Some templates write a new turn and a past turn differently. Then nothing is added.
        return start if chat.startswith(prompt) and found and not start.strip() else ""

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


def _load_tokenizer(model_dir: Path) -> Any:
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such directory. Give a Hugging Face model directory.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{model_dir}: no usable tokenizer ({error}). The directory needs tokenizer.json and "
            "tokenizer_config.json, or other files that transformers can load without running the model's own code."
        ) from error


def _control_strings(tokenizer: Any) -> re.Pattern[str]:
    """Matches the strings of the tokenizer's special tokens, the longest first. A string of one character is left
    out, because no space can break it up."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    strings = {text for text in [*added, *tokenizer.all_special_tokens] if len(text) > 1}
    # An empty pattern would match everywhere; `(?!)` matches nowhere.
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)")

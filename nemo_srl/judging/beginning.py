"""The beginning that all verdicts share, such as `Score: ` (`judge.begin_verdict`). The judge's prompt ends with it.

So the judge has one token left to say, and a model that was never taught the form of verdicts states scores, too. It is
a beginning in tokens as well: the judge must not be asked for half of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import JudgeConfig
from nemo_srl.errors import ConfigError
from nemo_srl.judging.readers import VerdictReader, all_verdicts
from nemo_srl.records import Completion


@dataclass(frozen=True)
class Beginning:
    """What verdicts begin with. The empty one changes nothing."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    ends: tuple[str, ...] = ()
    """What can follow. A verdict has ended then."""

    def before(self, c: Completion) -> Completion:
        """The whole verdict, for what the judge wrote after the beginning."""
        return c.after(self.text) if c.is_answered else c


NOTHING = Beginning()


def beginning(reader: VerdictReader, cfg: JudgeConfig, chat: ChatTemplate) -> Beginning:
    """The beginning that the settings ask for, in tokens of the judging model.

    Raises `ConfigError` if verdicts can begin in other ways.
    """
    if not cfg.begin_verdict:
        return NOTHING
    if not (verdicts := all_verdicts(reader, cfg)):
        raise ConfigError(
            f"judge.begin_verdict=True: with judge.mode={cfg.mode!r} and judge.justification={cfg.justification}, "
            "verdicts may begin in any way. Set judge.begin_verdict=false, or judge.mode=expected and "
            "judge.justification=false."
        )
    if chat.may_think:
        raise ConfigError(
            f"judge.begin_verdict=True: the judging model may write thoughts in {chat.thinking_tags[0]} before its "
            "verdict. Set judge.begin_verdict=false, or turn the thinking off. For Qwen3: "
            "model.chat_template_kwargs={enable_thinking: false}."
        )
    if not (text := _common(verdicts, chat)):
        return NOTHING
    return Beginning(text, chat.encode(chat.response_text(text)), tuple(v.removeprefix(text) for v in verdicts))


def _common(verdicts: Sequence[str], chat: ChatTemplate) -> str:
    """The longest text that all `verdicts` begin with, whose tokens they begin with, too. A tokenizer with tokens for
    whole verdicts may leave nothing."""
    whole = [chat.encode(chat.response_text(verdict)) for verdict in verdicts]
    text = verdicts[0]
    while text:
        tokens = chat.encode(chat.response_text(text))
        if all(v.startswith(text) for v in verdicts) and all(ids[: len(tokens)] == tokens for ids in whole):
            break
        text = text[:-1]
    return text

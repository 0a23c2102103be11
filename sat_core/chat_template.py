"""A tokenizer's chat template, applied with care.

A base model without one gets `PLAIN_TEMPLATE`, which is saved with the result. A template is a program of strangers: its
output and its time are bounded, and the first conversation is rendered piece by piece, so that one that writes without end
is found while memory still lasts.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from transformers.utils.chat_template_utils import _compile_jinja_template

from sat_core.plan.errors import DataError

PLAIN_TEMPLATE = (
    "{% if tools %}{{ '### Tools:\n' + (tools | tojson) + '\n\n' }}{% endif %}"
    "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% if eos_token %}{{ eos_token }}{% endif %}{{ '\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
# A template may write this many characters of its own, and this many times what it was given.
TEMPLATE_CHARS = 2**20
TEMPLATE_EXPANSION = 16
# Seconds of computing that one rendering may take, one more for so many characters that it may write: tokens may be made in
# the same call, and an honest row of 8 MB then takes 14.
RENDER_SECONDS = 10.0
CHARS_PER_SECOND = 2**22

T = TypeVar("T")


class ChatTemplate:
    """The template of one tokenizer, which gets one where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.text = str(tokenizer.chat_template)
        self._watched = False
        self._late: str | None = None

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant would speak.

        Raises:
            DataError: where the chat template fails, or writes or computes without bound.
        """
        messages = self.known_roles(messages)
        text = self.apply(messages, None, self.bound(messages, None), prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def known_roles(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages, the developer's as the system's where the template knows no developer."""
        if "developer" in self.text:
            return messages
        return [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]

    def bound(self, messages: list[dict[str, Any]], tools: Any) -> int:
        """The characters that the template may write for a row; the first row is watched while it is written."""
        given = len(json.dumps([messages, tools], ensure_ascii=False))
        bound = TEMPLATE_CHARS + TEMPLATE_EXPANSION * given
        if not self._watched:
            self._watched = True
            self._dry_run(messages, tools, bound)
        return bound

    def apply(
        self, messages: list[dict[str, Any]], tools: Any, bound: int, *, prompt: bool = False
    ) -> str:
        """Render as text. Raises DataError: where the template fails, does not end, or writes more than `bound`."""
        text = str(self.call(messages, tools, bound, tokenize=False, add_generation_prompt=prompt))
        _refuse_flood(len(text), bound)
        return text

    def call(self, messages: list[dict[str, Any]], tools: Any, bound: int, **kwargs: Any) -> Any:
        """`apply_chat_template`, whose every failure is a DataError."""
        return self._guarded(
            lambda: self.tokenizer.apply_chat_template(messages, tools=tools, **kwargs), bound
        )

    def _dry_run(self, messages: list[dict[str, Any]], tools: Any, bound: int) -> None:
        """Render the first row piece by piece, to find a template that writes without end while memory still lasts."""

        def pieces() -> None:
            template = _compile_jinja_template(self.tokenizer.get_chat_template(tools=tools))
            written = 0
            for piece in template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                **self.tokenizer.special_tokens_map,
            ):
                written += len(piece)
                _refuse_flood(written, bound)

        self._guarded(pieces, bound)

    def _guarded(self, work: Callable[[], T], bound: int) -> T:
        """What `work` makes of the template. Raises DataError: where it fails or takes too long."""
        # A file has many rows, and each would take as long as the first.
        if self._late is not None:
            raise DataError(self._late)
        seconds = RENDER_SECONDS + bound / CHARS_PER_SECOND
        try:
            return _in_time(work, seconds)
        except _Late as error:
            self._late = (
                f"The model's chat template did not end within {seconds:.1f} s of computing for one row, and no row after it "
                "was tried. Use another template."
            )
            raise DataError(self._late) from error
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"The model's chat template failed: {type(error).__name__}: {error}"[:2000]
            ) from error


class _Late(BaseException):
    """The time is over; no Exception, which a filter may catch."""


def _in_time(work: Callable[[], T], seconds: float) -> T:
    """What `work` returns. Raises _Late: where this process computes for longer than `seconds` until then."""
    # Only the main thread can be interrupted, and only where there is such a clock. Who renders elsewhere has bounds of
    # its own, as a chat has.
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        return work()
    # It stays: to set it takes longer than all else here, and nothing but this clock sends the signal.
    if signal.getsignal(signal.SIGPROF) is not _ring:
        signal.signal(signal.SIGPROF, _ring)
    # Of computing, since an honest row waits long for its turn on a busy machine. And again and again: an exception is
    # lost where it meets a finalizer.
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _ring(_: int, __: FrameType | None) -> None:
    raise _Late


def _refuse_flood(written: int, bound: int) -> None:
    if written > bound:
        raise DataError(
            f"The model's chat template writes more than {bound} characters for one row, which is out of all proportion "
            "to the row. Use another template."
        )

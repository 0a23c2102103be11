"""A tokenizer's chat template, applied with care.

A base model without one gets `PLAIN_TEMPLATE`, which is saved with the result. A template is a program of strangers: its
output is bounded, and the first conversation is rendered piece by piece, so that one that never ends is found while memory
still lasts.
"""

from __future__ import annotations

import json
from typing import Any

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


class ChatTemplate:
    """The template of one tokenizer, which gets one where it has none."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.text = str(tokenizer.chat_template)
        self._watched = False

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant would speak.

        Raises:
            DataError: where the chat template fails, or writes without bound.
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
        """Render as text. Raises DataError: where the template fails, or writes more than `bound`."""
        text = str(self.call(messages, tools, tokenize=False, add_generation_prompt=prompt))
        _refuse_flood(len(text), bound)
        return text

    def call(self, messages: list[dict[str, Any]], tools: Any, **kwargs: Any) -> Any:
        """`apply_chat_template`, whose every failure is a DataError."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **kwargs)
        except Exception as error:
            raise _failed(error) from error

    def _dry_run(self, messages: list[dict[str, Any]], tools: Any, bound: int) -> None:
        """Render the first row piece by piece, to find a template that never ends while memory still lasts."""
        try:
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
        except DataError:
            raise
        except Exception as error:
            raise _failed(error) from error


def _refuse_flood(written: int, bound: int) -> None:
    if written > bound:
        raise DataError(
            f"The model's chat template writes more than {bound} characters for one row, which is out of all proportion "
            "to the row. Use another template."
        )


def _failed(error: Exception) -> DataError:
    return DataError(f"The model's chat template failed: {type(error).__name__}: {error}"[:2000])

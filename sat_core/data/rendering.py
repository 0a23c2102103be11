"""From a row to token ids and a mask of the tokens that carry loss.

The tokenizer's own chat template is used; a base model without one gets `PLAIN_TEMPLATE`, which is saved with the result.
The mask comes from the template's generation marks where it has them, else from rendering prefixes: the text an
assistant's turn adds is trained, and a template in which a prefix is not rendered as the start of the whole is refused,
because any mask made from it would be a guess.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sat_core.plan.errors import DataError

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% if eos_token %}{{ eos_token }}{% endif %}{{ '\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class Rendered(NamedTuple):
    """Token ids of one row, and for each whether it carries loss."""

    ids: list[int]
    trained: list[bool]


class Renderer:
    """Rows to tokens, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, train_on: str = "assistant") -> None:
        """`train_on` is "assistant" (or completion) tokens only, or "all"."""
        self.tokenizer, self.train_on = tokenizer, train_on
        self.default_template = not getattr(tokenizer, "chat_template", None)
        if self.default_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self._marked = "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(
            tokenizer.chat_template
        )

    def render(self, format: str, row: dict[str, Any]) -> Rendered:
        """Tokens of one row of a known format.

        Raises:
            DataError: where the chat template fails, or allows no exact mask.
        """
        if format == "text":
            return self._text(row["text"])
        if format == "prompt_completion":
            return self._masked(
                row["prompt"] + row["completion"],
                [(len(row["prompt"]), None)],
                add_special_tokens=True,
            )
        if format == "alpaca":
            asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
            row = {
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": row["output"]},
                ]
            }
        return self._messages(row["messages"], row.get("tools"))

    def _text(self, text: str) -> Rendered:
        ids = self._with_end(
            self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        )
        return Rendered(ids, [True] * len(ids))

    def _messages(self, messages: list[dict[str, Any]], tools: Any) -> Rendered:
        if self._marked:
            encoded = self._apply(
                messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
            return Rendered(ids, mask if self.train_on == "assistant" else [True] * len(ids))
        whole = self._apply(messages, tools, tokenize=False)
        spans: list[tuple[int, int | None]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = (
                self._apply(messages[:i], tools, tokenize=False, add_generation_prompt=True)
                if i
                else ""
            )
            after = self._apply(messages[: i + 1], tools, tokenize=False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    "The chat template renders the start of a conversation differently from the whole, so no exact loss "
                    "mask can be made. Use a template with {% generation %} marks, or sat.train.train_on: all."
                    if self.train_on == "assistant"
                    else "The chat template changes earlier turns."
                )
            spans.append((len(before), len(after)))
        return self._masked(whole, spans, add_special_tokens=False)

    def _apply(self, messages: list[dict[str, Any]], tools: Any, **kwargs: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **kwargs)
        except Exception as error:
            raise DataError(
                f"The model's chat template failed: {type(error).__name__}: {error}"
            ) from error

    def _masked(
        self, text: str, spans: list[tuple[int, int | None]], *, add_special_tokens: bool
    ) -> Rendered:
        """Tokenise once; a token is trained when it starts inside a span of characters."""
        encoded = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        ends = [(a, len(text) if b is None else b) for a, b in spans]
        trained = [
            self.train_on == "all" or (end > start and any(a <= start < b for a, b in ends))
            for start, end in offsets
        ]
        if spans and spans[-1][1] is None:
            ids = self._with_end(ids)
            trained += [True] * (len(ids) - len(trained))
        return Rendered(ids, trained)

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*ids, end] if end is not None and (not ids or ids[-1] != end) else list(ids)

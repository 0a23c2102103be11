"""From a row to token ids and a mask of the tokens that carry loss.

The mask comes from the chat template's generation marks where it has them, else from rendering prefixes: the text an
assistant's turn adds is trained. A template in which that text does not stand literally in the whole is refused, because
any mask made from it would be a guess; one that drops tool calls is refused, because what should be learned would be missing.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from typing import Any, NamedTuple

from sat_core.chat_template import ChatTemplate
from sat_core.plan.errors import DataError
from sat_io.rows import Conversation, Text

# Reasoning models think inside the content, before this; templates drop it from earlier turns.
THOUGHT_END = "</think>"


class Rendered(NamedTuple):
    """Token ids of one row, and for each whether it carries loss."""

    ids: list[int]
    trained: list[bool]


class Renderer:
    """Rows to tokens, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, train_on: str = "assistant") -> None:
        """`train_on` is "assistant" (or completion) tokens only, or "all"."""
        self.tokenizer, self.train_on = tokenizer, train_on
        self.template = ChatTemplate(tokenizer)
        self._marked = re.search(r"\{%-?\s*generation\b", self.template.text) is not None

    def render(self, content: Text | Conversation) -> Rendered:
        """Tokens of one row.

        Raises:
            DataError: where the chat template fails, writes or computes without bound, or allows no exact mask.
        """
        if isinstance(content, Conversation):
            return self._conversation(content)
        if not content.prompt:
            encoded = self.tokenizer(content.completion, add_special_tokens=True, verbose=False)
            ids = self._with_end(encoded["input_ids"])
            return Rendered(ids, [True] * len(ids))
        rendered = self._masked(
            content.prompt + content.completion,
            [(len(content.prompt), len(content.prompt) + len(content.completion))],
            add_special_tokens=True,
        )
        ids = self._with_end(rendered.ids)
        return Rendered(ids, rendered.trained + [True] * (len(ids) - len(rendered.ids)))

    def _conversation(self, content: Conversation) -> Rendered:
        messages, trained, tools = content
        messages = self.template.known_roles(messages)
        bound = self.template.bound(messages, tools)
        whole = self.template.apply(messages, tools, bound)
        for call in (c["function"]["name"] for m in messages for c in m.get("tool_calls", ())):
            if call not in whole:
                raise DataError(
                    f"The model's chat template does not render tool calls (that of {call!r:.60} is missing), so they "
                    "cannot be trained on. Use a model whose template does."
                )
        if self.train_on == "all":
            return self._masked(whole, [(0, len(whole))], add_special_tokens=False)
        if self._marked:
            return self._by_marks(messages, trained, tools, bound)
        spans = [
            self._span(messages, i, tools, whole, bound) for i, flag in enumerate(trained) if flag
        ]
        return self._masked(whole, spans, add_special_tokens=False)

    def _span(
        self, messages: list[dict[str, Any]], i: int, tools: Any, whole: str, bound: int
    ) -> tuple[int, int]:
        """Where turn `i` of the assistant lies in the whole: what it adds to the rendering of all before it.

        Before the first turn there is nothing to render, but the template may write there, if only a system prompt of its
        own: it is what another answer would have before it too.

        A template may open the last turn with a thought, if an empty one, that it leaves out of an earlier turn; then it is
        the rest of what the turn adds, as long as that rest holds all of the answer and stands there literally.
        """
        after = self.template.apply(messages[: i + 1], tools, bound)
        if i:
            before = self.template.apply(messages[:i], tools, bound, prompt=True)
        else:
            other = self.template.apply([{"role": "assistant", "content": "\0"}], tools, bound)
            # A space before an answer is, for many tokenizers, part of its first token.
            before = os.path.commonprefix([other, after, whole]).rstrip(" ")  # noqa: RUF071
        if after.startswith(before) and whole.startswith(before):
            turn, begin = after[len(before) :], len(before)
            said = [messages[i]["content"].rpartition(THOUGHT_END)[2].strip()]
            said += [call["function"]["name"] for call in messages[i].get("tool_calls", ())]
            for at in (0, *(match.end() for match in re.finditer("\n", turn))):
                if at and not all(part in turn[at:] for part in said):
                    break
                if whole.startswith(turn[at:], begin):
                    return begin, begin + len(turn) - at
        raise DataError(
            "The chat template renders the start of a conversation differently from the whole, so no exact loss mask can be "
            "made. Use a template with {% generation %} marks, or sat.train.train_on: all."
        )

    def _by_marks(
        self, messages: list[dict[str, Any]], trained: list[bool], tools: Any, bound: int
    ) -> Rendered:
        """The template's own mask, less the turns of weight 0: each run of marked tokens is one assistant's turn."""
        encoded = self.template.call(
            messages,
            tools,
            bound,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
        wanted = [
            flag for m, flag in zip(messages, trained, strict=True) if m["role"] == "assistant"
        ]
        if all(wanted):
            return Rendered(ids, mask)
        starts = [i for i, m in enumerate(mask) if m and not (i and mask[i - 1])]
        if len(starts) != len(wanted):
            raise DataError(
                f"A conversation has {len(wanted)} turns of the assistant, of which the chat template marks "
                f"{len(starts)}, so the turns of weight 0 cannot be told from the others."
            )
        for start, flag in zip(starts, wanted, strict=True):
            for i in range(start, len(mask)):
                if not mask[i]:
                    break
                mask[i] = flag
        return Rendered(ids, mask)

    def _masked(
        self, text: str, spans: list[tuple[int, int]], *, add_special_tokens: bool
    ) -> Rendered:
        """Tokenise once; a token is trained when it starts inside one of the spans of characters, which are in order."""
        encoded = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        if self.train_on == "all":
            return Rendered(list(encoded["input_ids"]), [True] * len(encoded["input_ids"]))
        begins = [begin for begin, _ in spans]
        trained = []
        for start, end in encoded["offset_mapping"]:
            at = bisect_right(begins, start) - 1
            trained.append(end > start and at >= 0 and start < spans[at][1])
        return Rendered(list(encoded["input_ids"]), trained)

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*ids, end] if end is not None and (not ids or ids[-1] != end) else list(ids)

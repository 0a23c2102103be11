"""What a row of a data file means: a text, a prompt with its completion, or a conversation.

`parse_row` is the only place that knows the formats. The upload check calls it and drops the answer, `prepare` calls it
and renders the answer, so a row that was accepted is never refused later for its shape. All chat formats end as one
`Conversation` in the form that chat templates read: roles of OpenAI, content as one string, tool arguments as objects.
The road not taken is a JSON Schema: its messages do not say what a trainer would have done with the row.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, TypeVar

FORMATS = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Each turn is found by rendering all before it, so the cost of a row grows with the square.
MAX_MESSAGES = 1024
# Who speaks, by the names that ShareGPT files in circulation use.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
_CALLS = ("function_call", "tool_call")
_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
# All that any format reads; the other columns of a table can stay where they are.
KNOWN_COLUMNS = frozenset({"input", "system", "tools"}.union(*_COLUMNS.values()))
_KEPT = ("name", "tool_call_id", "reasoning_content")
_Kind = TypeVar("_Kind")
_SURROGATE = re.compile("[\ud800-\udfff]")


class RowError(ValueError):
    """A row that cannot be trained on: `code`, `pointer` (RFC 6901, inside the row), and the message as text."""

    def __init__(self, code: str, pointer: str, message: str) -> None:
        super().__init__(code, pointer, message)
        self.code, self.pointer, self.message = code, pointer, message


class Text(NamedTuple):
    """A completion, trained on, after a prompt that is not; a document is a completion without a prompt."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Messages for a chat template.

    Attributes:
        messages: role and content (a string), with tool_calls, name, tool_call_id or reasoning_content where given.
        trained: for each message whether its tokens carry loss; true for assistants only.
        tools: definitions in OpenAI's form, or None.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[dict[str, Any]] | None


def detect_format(row: Any) -> str:
    """The format of one row, the first of `FORMATS` whose columns it has.

    Raises:
        RowError: where the row has none of the known keys.
    """
    if not isinstance(row, dict):
        raise RowError(
            "unknown_format", "", f"a row must be a JSON object; got {type(row).__name__}"
        )
    for format in FORMATS:
        if all(column in row for column in _COLUMNS[format]):
            return format
    keys = ", ".join(repr(str(key)[:40]) for key in list(row)[:8]) or "none"
    hint = (
        "; preference pairs ('chosen', 'rejected') cannot be trained on here"
        if "chosen" in row and "rejected" in row
        else ""
    )
    raise RowError(
        "unknown_format",
        "",
        f"keys are {keys}; needed are 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and "
        f"'output', or 'text'{hint}",
    )


def parse_row(row: Any, format: str) -> Text | Conversation:
    """The meaning of one row of a known format; columns that the format does not name are ignored.

    Raises:
        RowError: naming the place inside the row and what is allowed there.
    """
    if not isinstance(row, dict) or any(column not in row for column in _COLUMNS[format]):
        found = detect_format(row)
        raise RowError("mixed_formats", "", f"this row is {found}, the file is {format}")
    if format == "text":
        return Text("", _string(row, "text"))
    if format == "alpaca":
        asked = _string(row, "instruction")
        more = _string(row, "input", empty=True) if row.get("input") is not None else ""
        asked = f"{asked}\n\n{more}" if more else asked
        said = [("user", asked), ("assistant", _string(row, "output"))]
        if row.get("system"):
            said.insert(0, ("system", _string(row, "system")))
        messages = [{"role": role, "content": content} for role, content in said]
        return Conversation(messages, [m["role"] == "assistant" for m in messages], None)
    if format == "prompt_completion":
        return _prompt_completion(row)
    if format == "sharegpt":
        return _sharegpt(row)
    return _finish(_messages(_list(row, "messages"), "/messages"), "/messages", row)


def _prompt_completion(row: dict[str, Any]) -> Text | Conversation:
    if not (isinstance(row["prompt"], list) and isinstance(row["completion"], list)):
        return Text(_string(row, "prompt", empty=True), _string(row, "completion"))
    asked = _messages(_list(row, "prompt"), "/prompt")
    answer = _messages(_list(row, "completion"), "/completion")
    masked = [(message, False) for message, _ in asked]
    return _finish([*masked, *answer], "/completion", row)


def _sharegpt(row: dict[str, Any]) -> Conversation:
    turns = _list(row, "conversations")
    messages: list[Any] = []
    if row.get("system"):
        messages.append({"role": "system", "content": _string(row, "system")})
    for i, turn in enumerate(turns):
        place = f"/conversations/{i}"
        _typed(turn, dict, place, "a turn must be an object with from and value")
        speaker = turn.get("from")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            allowed = ", ".join(SPEAKERS)
            raise RowError(
                "bad_role", f"{place}/from", f"from {speaker!r:.60} is not one of {allowed}"
            )
        value = _string(turn, "value", place, empty=role != "assistant")
        message: dict[str, Any] = {"role": role, "content": value}
        if speaker in _CALLS:
            calls = _decoded(value, f"{place}/value", "a function call")
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"content": "", "tool_calls": calls}
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    shift = len(messages) - len(turns)
    return _finish(
        _messages(messages, "/conversations", shift=shift, content="value"), "/conversations", row
    )


def _finish(
    messages: list[tuple[dict[str, Any], bool]], place: str, row: dict[str, Any]
) -> Conversation:
    trained = [flag for _, flag in messages]
    if not any(trained):
        answered = any(message["role"] == "assistant" for message, _ in messages)
        why = (
            "every assistant's message has weight 0"
            if answered
            else "no message has the role 'assistant'"
        )
        raise RowError("no_assistant", place, f"{why}, so there is nothing to train on")
    if len(messages) > MAX_MESSAGES:
        raise RowError(
            "too_long", place, f"{len(messages)} messages; allowed are {MAX_MESSAGES} in a row"
        )
    return Conversation([message for message, _ in messages], trained, _tools(row.get("tools")))


def _messages(
    messages: list[Any], place: str, *, shift: int = 0, content: str = "content"
) -> list[tuple[dict[str, Any], bool]]:
    return [
        _message(message, f"{place}/{i - shift}", content) for i, message in enumerate(messages)
    ]


def _message(message: Any, place: str, key: str) -> tuple[dict[str, Any], bool]:
    _typed(message, dict, place, "a message must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        shown = repr(role)[:60]
        raise RowError(
            "bad_role", f"{place}/role", f"role {shown} is not one of {', '.join(ROLES)}"
        )
    calls = _calls(message.get("tool_calls"), f"{place}/tool_calls")
    content = _content(message.get("content"), f"{place}/{key}", optional=bool(calls))
    if role == "assistant" and not content.strip() and not calls:
        raise RowError("empty_content", f"{place}/{key}", "an assistant's content is empty")
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError("bad_type", f"{place}/weight", f"weight is {weight!r:.60}; allowed: 0, 1")
    plain: dict[str, Any] = {"role": role, "content": content}
    plain |= {
        key: _string(message, key, place, empty=True)
        for key in _KEPT
        if message.get(key) is not None
    }
    if calls:
        plain["tool_calls"] = calls
    return plain, role == "assistant" and weight != 0


def _content(content: Any, place: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text":
                raise RowError(
                    "bad_type", f"{place}/{i}", f"a part of type {kind!r:.60}; allowed is text"
                )
            _string(part, "text", f"{place}/{i}", empty=True)
        return "".join(part["text"] for part in content)
    what = "content must be a string or a list of text parts"
    return _encodable(_typed(content, str, place, what), place)


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates read them: arguments as an object, though OpenAI's files hold them as JSON text."""
    if calls is None:
        return []
    plain = []
    for i, call in enumerate(_typed(calls, list, place, "tool_calls must be a list")):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("bad_type", f"{place}/{i}", "a tool call needs a name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _decoded(arguments or "{}", f"{place}/{i}/function/arguments", "arguments")
        if arguments is not None:
            at = f"{place}/{i}/function/arguments"
            _typed(arguments, dict, at, "arguments must be a JSON object")
        made = {
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments or {}},
        }
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        plain.append(made)
    return plain


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = _decoded(tools or "[]", "/tools", "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("bad_type", "/tools", "tools must be a list of objects")
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _list(row: dict[str, Any], key: str) -> list[Any]:
    """A list of messages; tables hold it as JSON text."""
    value = row[key]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _decoded(value, f"/{key}", key)
    if not isinstance(value, list) or not value:
        raise RowError("bad_type", f"/{key}", f"{key} must be a list with at least one message")
    return value


def _string(row: dict[str, Any], key: str, place: str = "", *, empty: bool = False) -> str:
    value = _typed(row.get(key), str, f"{place}/{key}", f"{key} must be a string")
    if not empty and not value.strip():
        raise RowError("empty_content", f"{place}/{key}", f"{key} is empty")
    return _encodable(value, f"{place}/{key}")


def _typed(value: Any, kind: type[_Kind], place: str, what: str) -> _Kind:
    if not isinstance(value, kind):
        raise RowError("bad_type", place, f"{what}; got {type(value).__name__}")
    return value


def _encodable(text: str, place: str) -> str:
    if not text.isascii() and _SURROGATE.search(text):
        raise RowError(
            "not_utf8", place, "half of a UTF-16 surrogate pair cannot be written as UTF-8"
        )
    return text


def _decoded(text: str, place: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply or a number too long")
        raise RowError("bad_json", place, f"{what} must be JSON: {reason}") from error

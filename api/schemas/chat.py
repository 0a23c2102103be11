"""OpenAI's chat completion, both ways. What is asked for and cannot be done is refused by its name, never left out in silence."""

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from api.errors import ApiError, refuse_unknown
from api.schemas.bodies import Body, checked
from api.schemas.create import json_object

MAX_STOP, MAX_STOP_CHARS = 4, 256
MAX_TOKENS = 2**31 - 1
# OpenAI's parameters that mean nothing here, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
}
_TOOLS_OF_MESSAGES = ("tool_calls", "tool_call_id", "function_call", "audio", "refusal")
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP: list[Any] = [
    _STOP_TEXT,
    {"type": "array", "items": _STOP_TEXT, "maxItems": MAX_STOP},
    {"type": "null"},
]
# Those that say nothing of the answer.
PASSED_OVER = ("user", "metadata", "safety_identifier", "prompt_cache_key")


def _text(content: Any) -> Any:
    """The text of a message's parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _unsupported(f"A message has a part of type {kind!r}; models here read text.")
        texts.append(part["text"])
    return "".join(texts)


class TextPart(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1)]


class ChatMessage(Body):
    """One turn of the conversation; an answer of before may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text, json_schema_input_type=str | Parts)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        said = {name: value for name, value in message.items() if value not in (None, [])}
        if said.get("role") in ("tool", "function") or any(n in said for n in _TOOLS_OF_MESSAGES):
            raise _unsupported("A message calls or answers a tool; tools are not supported here.")
        refuse_unknown(list(said), ["role", "content", "name"])
        return said


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatBody(Body):
    """What a client sends. Null is as good as absent, and so is what asks for nothing, such as `n: 1` or `tools: []`."""

    model: str = Field(min_length=1, max_length=700)
    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, json_schema_extra={"deprecated": True}
    )
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = Field(None, json_schema_extra={"anyOf": _STOP})
    # As far as integers are exact in JSON.
    seed: int | None = Field(None, ge=-(2**53), le=2**53)

    def asked(self) -> dict[str, Any]:
        """What the model's process is asked; OpenAI's defaults where nothing is said."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOP or not all(1 <= len(text) <= MAX_STOP_CHARS for text in stop):
            allowed = f"allowed are up to {MAX_STOP} texts of 1 to {MAX_STOP_CHARS} characters"
            raise ApiError("invalid_value", f"stop is {self.stop!r}; {allowed}.", "stop")
        return {
            "messages": [message.model_dump(exclude_none=True) for message in self.messages],
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "stop": stop,
            "seed": self.seed,
        }

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


async def read_chat(request: Request) -> ChatBody:
    """The body, every value of which can be done. Raises ApiError."""
    given = {
        name: value for name, value in (await json_object(request)).items() if value is not None
    }
    for name, neutral in UNSUPPORTED.items():
        if name in given and given.pop(name) not in neutral:
            only = " or ".join(map(repr, neutral))
            raise _unsupported(
                f"{name} is not supported" + (f", but as {only}." if only else "."), name
            )
    for name in PASSED_OVER:
        given.pop(name, None)
    body = checked(given, ChatBody)
    if None not in (body.max_tokens, body.max_completion_tokens) and (
        body.max_tokens != body.max_completion_tokens
    ):
        raise ApiError(
            "conflicting_parameters",
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}; send one of them.",
            "max_tokens",
        )
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            "conflicting_parameters", "stream_options need stream: true.", "stream_options"
        )
    return body


def _unsupported(message: str, param: str = "messages") -> ApiError:
    return ApiError("unsupported_parameter", message, param)


class Usage(BaseModel):
    """Tokens of the prompt and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What the model wrote."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: None = None


class Delta(BaseModel):
    """What comes next of the answer; only what is said stands in it."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _said(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in whole(self).items() if value is not None}


class ChunkChoice(BaseModel):
    """The one answer, a piece of it."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """A piece of an answer; the last one holds the usage and no choice, where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: None = None

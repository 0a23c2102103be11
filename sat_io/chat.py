"""The command `chat`: a model that answers conversations, until its process is ended.

config.json (format satune.chat/1) holds `model` (name, path, revision), `host` to listen on and a `token`. The event
`listening` tells the port. A POST with that token and a conversation is answered with JSON lines: the length of the prompt,
the text piece by piece as it is written, the end. Answers are made one after the other, because a seed sets the random
state of the whole process; whoever closes the connection ends theirs. One model and a handful of people who try it: the
standard library's server is enough for that, and `docs/decisions/0006-chat.md` says why it is not `transformers serve`.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sat_core.chat_template import ChatTemplate
from sat_core.model import load_model
from sat_core.plan.errors import ConfigError, PlanError, is_out_of_memory
from sat_core.plan.families import shape_of

if TYPE_CHECKING:
    from pathlib import Path

    from sat_core.events import EventLog

CHAT_FORMAT = "satune.chat/1"
# What an answer may have where nobody says more: a base model may never end by itself.
ANSWER_TOKENS = 1024
# Who waits for a turn holds a connection and a thread.
MAX_WAITING = 8
MAX_BODY_BYTES = 2**22
SOCKET_SECONDS = 30.0
TURN_SECONDS = 0.2
# A chat template is a program of strangers; one that does not end costs its own server.
RENDER_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A conversation, and how to answer it.

    Attributes:
        messages: with role and content, oldest first.
        max_tokens: of the answer; None is what the context leaves, at most `ANSWER_TOKENS`.
        temperature: 0 takes the likeliest token.
        top_p: share of probability to draw from, above 0 to 1.
        stop: texts that end the answer and do not stand in it.
        seed: the same one gives the same answer on the same machine; None draws one.
    """

    messages: list[dict[str, Any]]
    max_tokens: int | None
    temperature: float
    top_p: float
    stop: list[str]
    seed: int | None


class Speaker:
    """A model that answers."""

    def __init__(self, path: str, *, revision: str | None = None) -> None:
        """Load it: in bfloat16 on a GPU, in float32 on a CPU. Raises ModelError."""
        gpu = torch.cuda.is_available()
        model, tokenizer = load_model(path, revision=revision)
        self.model = model.to(
            "cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32
        ).eval()
        self.model.config.use_cache = True
        self.context = shape_of(model.config.to_dict()).context
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer)
        self._rendering = threading.Lock()
        ends = model.generation_config.eos_token_id
        found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self._ends = sorted(end for end in found if end is not None)

    def prompt(self, ask: Ask) -> tuple[list[int], int]:
        """Token ids of the conversation, and the most tokens that its answer may have.

        Raises:
            PlanError: where the context is too short for it, or the chat template fails.
        """
        watchdog = threading.Timer(RENDER_SECONDS, os._exit, (1,))
        watchdog.daemon = True
        with self._rendering:
            watchdog.start()
            try:
                ids = self._template.prompt(ask.messages)
            finally:
                watchdog.cancel()
        if not ids:
            raise ConfigError("The messages come to no token; say something.", "messages")
        wanted = ask.max_tokens or 1
        if len(ids) + wanted > self.context:
            raise PlanError(
                f"The model's context holds {self.context} tokens; the messages have {len(ids)} and the answer is to "
                f"have {'up to ' if ask.max_tokens else 'at least '}{wanted}. Shorten the messages or max_completion_tokens.",
                "messages",
                code="context_length_exceeded",
            )
        return ids, ask.max_tokens or min(ANSWER_TOKENS, self.context - len(ids))

    def answer(
        self,
        ids: list[int],
        ask: Ask,
        *,
        most: int,
        say: Callable[[str], None],
        gone: Callable[[], bool],
    ) -> tuple[str, int]:
        """Write an answer of at most `most` tokens; why it ended (stop or length), and how many it has.

        Args:
            ids: of the prompt.
            ask: how to answer.
            most: tokens.
            say: is called with each piece of text.
            gone: whether nobody listens any more; asked after each token.
        """
        if ask.seed is None:
            torch.seed()
        else:
            torch.manual_seed(ask.seed)
        drawn = {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0}
        writer = _Writer(self._tokenizer.backend_tokenizer, ask.stop, say, gone)
        prompt = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    max_new_tokens=most,
                    eos_token_id=self._ends or None,
                    pad_token_id=self._ends[0] if self._ends else 0,
                    do_sample=ask.temperature > 0,
                    **(drawn if ask.temperature > 0 else {}),
                ),
                streamer=writer,
                stopping_criteria=StoppingCriteriaList([writer]),
            )
        ended = writer.stopped or writer.last in self._ends
        return "stop" if ended else "length", writer.tokens


class _Writer(BaseStreamer, StoppingCriteria):
    """From tokens to text, up to the first stop text: what may be the beginning of one is held back."""

    def __init__(
        self, tokenizer: Any, stop: list[str], say: Callable[[str], None], gone: Callable[[], bool]
    ) -> None:
        self._tokenizer, self._stop, self._say, self._gone = tokenizer, stop, say, gone
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held, self._prompt_seen = "", False
        self.tokens, self.last, self.stopped = 0, -1, False

    def put(self, value: torch.Tensor) -> None:
        """`generate` hands over the prompt, then token after token."""
        if not self._prompt_seen or self.stopped:
            # It may be a token ahead of the wish to stop.
            self._prompt_seen = True
            return
        self.last = int(value.item())
        self.tokens += 1
        self._held += self._decoder.step(self._tokenizer, self.last) or ""
        at = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            self._tell(at)
            self._held = ""
        else:
            held = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
            self._tell(len(self._held) - max(held, default=0))

    def end(self) -> None:
        """What was held back was no stop text."""
        self._tell(len(self._held))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether to stop, for each of the one row."""
        return torch.tensor([self.stopped or self._gone()], device=input_ids.device)

    def _tell(self, length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._say(text)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, token: str, speaker: Speaker, events: EventLog) -> None:
        super().__init__((host, 0), _Handler)
        self.token, self.speaker, self._events = token, speaker, events
        self.turn, self._counting, self._count = threading.Lock(), threading.Lock(), 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those who are answered or wait for it; the events tell when there are some and when none."""
        with self._counting:
            if self._count > MAX_WAITING:
                raise PlanError(
                    f"{self._count} conversations with this model are being answered or wait; try again.",
                    code="gpu_busy",
                )
            self._count += 1
            if self._count == 1:
                self._events.emit("answering")
        try:
            yield
        finally:
            with self._counting:
                self._count -= 1
                if not self._count:
                    self._events.emit("idle")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SOCKET_SECONDS

    def do_POST(self) -> None:
        """Answer a conversation."""
        given = self.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            self._begin(401)
            return
        speaker = self.server.speaker
        try:
            with self.server.place():
                ask = self._read()
                ids, most = speaker.prompt(ask)
                self._begin(200)
                self._line(prompt_tokens=len(ids))
                if self._take_turn():
                    try:
                        self._answer(speaker, ids, ask, most)
                    finally:
                        self.server.turn.release()
        except PlanError as error:
            self._begin(503 if error.code == "gpu_busy" else 400)
            self._line(code=error.code, message=error.message, param=error.param)
        except (ConnectionError, TimeoutError):
            return

    def _answer(self, speaker: Speaker, ids: list[int], ask: Ask, most: int) -> None:
        try:
            reason, tokens = speaker.answer(
                ids, ask, most=most, say=lambda text: self._line(text=text), gone=self._gone
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._line(code="internal_error", message=f"Memory ran out: {error}", param=None)
            return
        self._line(finish_reason=reason, completion_tokens=tokens)

    def _take_turn(self) -> bool:
        while not self.server.turn.acquire(timeout=TURN_SECONDS):
            if self._gone():
                return False
        return True

    def _gone(self) -> bool:
        """Whether the other side has closed the connection."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _read(self) -> Ask:
        length = int(self.headers.get("content-length", 0))
        if length > MAX_BODY_BYTES:
            raise ConfigError(f"The body has {length} bytes; allowed are {MAX_BODY_BYTES}.")
        return Ask(**json.loads(self.rfile.read(length)))

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/x-ndjson")
        self.end_headers()

    def _line(self, **fields: Any) -> None:
        self.wfile.write(json.dumps(fields).encode() + b"\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who said what is nobody's business."""


def chat(_: Path, config: dict[str, Any], events: EventLog) -> None:
    """Load the model and answer until the process is ended.

    Raises:
        PlanError: where the model cannot be loaded.
    """
    if config.get("format") != CHAT_FORMAT:
        raise ConfigError(
            f"config.json has format {config.get('format')!r}; this program reads {CHAT_FORMAT!r}."
        )
    model = config["model"]
    events.state("loading_model", f"Loading {model['name']}")
    try:
        speaker = Speaker(model["path"] or model["name"], revision=model["revision"])
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"Memory ran out while {model['name']} was loaded: {error}."
        raise PlanError(message, "model", code="out_of_memory") from error
    with _Server(config["host"], config["token"], speaker, events) as server:
        events.emit("listening", port=server.server_port)
        server.serve_forever()

"""The life of a model that answers on this host: child, address, lease, end.

The child is the core's `chat`. Once it listens, the claimed row says where and with which token, and the API goes there by
itself: what is said passes no worker. The row is deleted before the child ends, so nobody is sent to a dead address for
longer than a lease. It goes when nobody asks, when the host is told to make room, or with its worker.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from jobs.artifacts import Artifacts
from jobs.errors import LeaseLost, NotFound, StoreUnavailable
from jobs.settings import Settings
from jobs.spec import ChoreRecord
from jobs.store import Store
from worker.child import Bounds, Child
from worker.inputs import Inputs
from worker.slots import hardware
from worker.tail import EventsUnsupported, Tail

log = logging.getLogger(__name__)

CHAT_FORMAT = "satune.chat/1"
POLL_SECONDS = 0.1
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared; the operator chose it
# The hub's files are written by the child.
FILE_BYTES = 2**40


@dataclass
class ChatRunner:
    """One claimed chat being kept alive."""

    settings: Settings
    store: Store
    claim: ChoreRecord
    devices: str
    stopping: threading.Event
    program: tuple[str, ...] | None = None
    # Set by the host, when somebody else is to have the slot.
    leaving: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.artifacts = Artifacts.from_settings(self.settings)
        self._inputs = Inputs(self.store, self.artifacts, self.claim.project)
        self.folder = self.artifacts.chore(self.claim.id, self.claim.attempt)
        self._tail = Tail(self.folder / "events.jsonl")
        self._token = secrets.token_urlsafe(32)
        self._listens = False
        self._idle_since: float | None = None
        self._failure: dict[str, Any] | None = None

    @property
    def idle_seconds(self) -> float:
        """For how long nobody has been answered; 0 while somebody is, or while the model loads."""
        since = self._idle_since
        return 0.0 if since is None else time.monotonic() - since

    def run(self) -> None:
        """Answer until it is time to go."""
        try:
            self._work()
        except LeaseLost as lost:
            log.warning("Standing down: %s", lost)
        except EventsUnsupported as unsupported:
            self._fail(unsupported.error)
        except NotFound as error:
            code = f"{error.kind}_not_found"
            self._fail({"code": code, "message": f"{error}.", "param": "model"})
        finally:
            self.artifacts.drop_chore(self.claim.id, self.claim.attempt)

    def _work(self) -> None:
        self.folder.mkdir(parents=True)
        config = {
            "format": CHAT_FORMAT,
            "model": self._inputs.model(self.claim.subject),
            "host": self.settings.chat_host,
            "token": self._token,
        }
        (self.folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
        # Pinned memory of a GPU's driver counts as the child's own, so a bound would be a guess there.
        memory = Bounds(memory_bytes=hardware()["memory_bytes"], file_bytes=FILE_BYTES)
        bounds = None if self.devices else memory
        child = Child(
            "chat", self.folder, devices=self.devices, program=self.program, bounds=bounds
        )
        try:
            self._attend(child)
        finally:
            child.kill()
            child.close()

    def _attend(self, child: Child) -> None:
        beat_at = time.monotonic()
        while not child.ended(POLL_SECONDS):
            unwanted = self.idle_seconds > self.settings.chat_idle_seconds
            if unwanted or self.leaving.is_set() or self.stopping.is_set():
                self._leave(child)
                return
            try:
                self._hear()
                if time.monotonic() - beat_at > self.settings.heartbeat_seconds:
                    beat_at = time.monotonic()
                    self.store.beat_chore(self.claim)
            except StoreUnavailable as error:
                log.warning("%s; %s goes on", error, self.claim.id)
        self._hear()
        ended = f"The model's process ended by exit code {child.process.returncode}."
        if self._failure is None:
            log.error("%s: %s\n%s", self.claim.id, ended, child.log_end())
        self._fail(self._failure or {"code": "internal_error", "message": ended, "param": None})

    def _leave(self, child: Child) -> None:
        """Tell nobody of it any more, then let it finish what it says, for a while."""
        self.store.delete_chore(self.claim.project, self.claim.id)
        self._hear()
        until = time.monotonic() + self.settings.grace_seconds
        while self._listens and self._idle_since is None and time.monotonic() < until:
            if child.ended(POLL_SECONDS):
                return
            self._hear()

    def _hear(self) -> None:
        events, position = self._tail.read()
        for event in events:
            if event["kind"] in ("listening", "idle"):
                self._idle_since = time.monotonic()
            if event["kind"] == "listening":
                self._publish(int(event["port"]))
            elif event["kind"] == "answering":
                self._idle_since = None
            elif event["kind"] == "failed":
                self._failure = {key: event.get(key) for key in ("code", "message", "param")}
        self._tail.taken(position)

    def _publish(self, port: int) -> None:
        host = self.settings.chat_host
        host = socket.gethostname() if host in EVERYWHERE else host
        host = f"[{host}]" if ":" in host else host
        found = {"url": f"http://{host}:{port}", "token": self._token}
        self.store.publish_chore(self.claim, found)
        self._listens = True

    def _fail(self, error: dict[str, Any]) -> None:
        try:
            self.store.fail_chore(self.claim, error)
        except LeaseLost as lost:
            log.warning("Standing down: %s", lost)

"""The life of one claimed chore on this host: folder, child, bounds, end.

The child is the core, as for a job, in a folder of this attempt's own that goes with it. Whatever a hostile input makes
of the child - a crash, a hang, a flood - ends as this chore's error and nothing else.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.artifacts import Artifacts
from jobs.errors import LeaseLost, NotFound, StoreUnavailable
from jobs.settings import Settings
from jobs.spec import ChoreRecord
from jobs.store import Store
from worker.child import Child
from worker.inputs import Inputs
from worker.kinds import KINDS, Kind
from worker.tail import EventsUnsupported, Tail

log = logging.getLogger(__name__)

DONE, FAILED = 0, 20
POLL_SECONDS = 0.1
# A result stands in a row, so it must stay small.
MAX_RESULT_BYTES = 8 * 2**20


class _Refused(Exception):
    """The chore ends with this error."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(code, message, param)
        self.error = {"code": code, "message": message, "param": param}


class _Stopped(Exception):
    """The worker ends."""


@dataclass
class ChoreRunner:
    """One claimed chore being worked on."""

    settings: Settings
    store: Store
    claim: ChoreRecord
    stopping: threading.Event
    program: tuple[str, ...] | None = None
    kinds: Mapping[str, Kind] = field(default_factory=lambda: KINDS)

    def __post_init__(self) -> None:
        self.artifacts = Artifacts.from_settings(self.settings)
        self.folder = self.artifacts.chore(self.claim.id, self.claim.attempt)

    def run(self) -> None:
        """Work on the chore to its end, whatever that is."""
        try:
            result = self._work()
        except _Stopped:
            self._write(lambda: self.store.release_chore(self.claim))
        except LeaseLost as lost:
            log.warning("Standing down: %s", lost)
        except (_Refused, EventsUnsupported) as refused:
            error = refused.error
            self._write(lambda: self.store.fail_chore(self.claim, error))
        else:
            kept = self._keep()
            if not self._write(lambda: self.store.finish_chore(self.claim, result)) and kept:
                shutil.rmtree(kept, ignore_errors=True)
        finally:
            self.artifacts.drop_chore(self.claim.id, self.claim.attempt)

    def _work(self) -> dict[str, Any]:
        kind = self.kinds.get(self.claim.kind)
        if kind is None:
            raise _Refused(
                "internal_error", f"This worker knows no chore of kind {self.claim.kind!r}."
            )
        self.folder.mkdir(parents=True)
        try:
            inputs = Inputs(self.store, self.artifacts, self.claim.project)
            config = kind.config(self.claim, inputs)
        except NotFound as error:
            raise _Refused(f"{error.kind}_not_found", f"{error}.") from error
        (self.folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
        child = Child(
            kind.command, self.folder, devices="", program=self.program, bounds=kind.bounds
        )
        try:
            self._attend(child, kind)
        finally:
            child.kill()
            child.close()
        return self._result(child, kind)

    def _attend(self, child: Child, kind: Kind) -> None:
        """Until the child has ended: renew the lease, and keep to the time."""
        started = beat_at = time.monotonic()
        while not child.ended(POLL_SECONDS):
            now = time.monotonic()
            if self.stopping.is_set():
                raise _Stopped
            if now - started > kind.seconds:
                raise _Refused(
                    "time_limit_exceeded",
                    f"The work was not done within {kind.seconds:g} s, the limit.",
                )
            if now - beat_at > self.settings.heartbeat_seconds:
                beat_at = now
                try:
                    self.store.beat_chore(self.claim)
                except StoreUnavailable as error:
                    log.warning("%s; %s goes on", error, self.claim.id)

    def _result(self, child: Child, kind: Kind) -> dict[str, Any]:
        code = child.process.returncode
        if code == DONE:
            return _read(self.folder / kind.result)
        failure = self._failure() if code == FAILED else None
        if failure is not None:
            raise _Refused(failure["code"], failure["message"], failure.get("param"))
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.error("%s ended by %s:\n%s", self.claim.id, ended, child.log_end())
        raise _Refused(
            "internal_error",
            f"The work ended by {ended}; the input may be broken, or larger than "
            f"{kind.bounds.memory_bytes} bytes of memory allow.",
        )

    def _keep(self) -> Path | None:
        """Move what outlives the child to its place, before the row says that it is there."""
        name = self.kinds[self.claim.kind].keeps
        if name is None:
            return None
        target = self.artifacts.export(self.claim.id, self.claim.attempt)
        self.artifacts.put(self.folder / name, target)
        return target

    def _failure(self) -> dict[str, Any] | None:
        """What the core's last word was, where it said why it failed."""
        tail, failure = Tail(self.folder / "events.jsonl"), None
        while (read := tail.read())[0]:
            events, position = read
            tail.taken(position)
            failure = next((e for e in events if e["kind"] == "failed"), failure)
        return failure

    def _write(self, write: Callable[[], None]) -> bool:
        """Write down how it ended; the last word waits for a database that is away, as long as the worker lives.

        False where it could not be: somebody else has the chore, or the worker ends.
        """
        while True:
            try:
                write()
                return True
            except LeaseLost as error:
                log.warning("Standing down: %s", error)
                return False
            except StoreUnavailable as error:
                log.warning("The end of %s waits: %s", self.claim.id, error)
                if self.stopping.wait(1):
                    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_RESULT_BYTES:
            raise _Refused(
                "result_too_large",
                f"The result has {size} bytes; allowed are {MAX_RESULT_BYTES}. Ask for less.",
            )
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _Refused("internal_error", f"The work left no readable result: {error}.") from error
    if not isinstance(result, dict):
        raise _Refused("internal_error", "The work left no JSON object.")
    return result

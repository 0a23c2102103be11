"""The life of one claimed job on this host: run folder, child, tail, end.

While the child runs, this loop renews the lease, moves its events into SQL and hears what people want. It writes under its
claim only; told that the lease is lost, it kills the child and leaves without a word, for the job has another owner. While
the database is away training goes on: the run folder holds what was not yet told.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jobs import quoting
from jobs.artifacts import Artifacts
from jobs.csv_table import csv_table
from jobs.errors import LeaseLost, NotFound, StoreUnavailable
from jobs.moves import LACKED_MEMORY
from jobs.names import result_name
from jobs.settings import Settings
from jobs.spec import Claim, NewFile, new_id
from jobs.states import Desired, Stage
from jobs.store import Store
from worker.child import Child
from worker.energy import Meter
from worker.inputs import PREPARE_FORMAT, Inputs
from worker.kinds import PREPARING
from worker.slots import hardware
from worker.tail import EventsUnsupported, Tail

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE, STOPPED, FAILED = 0, 10, 20
# Between two transactions of a run: each costs training a little, and people look no more often.
POLL_SECONDS = 0.5
# More than a job ever keeps, pinned ones included, to go on from one if the newer ones were damaged.
MOST_CHECKPOINTS = 100


@dataclass
class Runner:
    """One claim being worked on."""

    settings: Settings
    store: Store
    claim: Claim
    devices: str
    stopping: threading.Event
    program: tuple[str, ...] | None = None
    result: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    artifacts: Artifacts = field(init=False)

    def __post_init__(self) -> None:
        self.artifacts = Artifacts.from_settings(self.settings)
        self.folder = self.artifacts.run(self.claim.job_id, self.claim.attempt)
        self.tail = Tail(self.folder / "events.jsonl")
        self._desired = Desired.RUN
        self._asked = False
        # Since when it may be ended by force.
        self._hurry_at: float | None = None
        # Set once the run has had all the time that it may take.
        self._over_time = False
        self._spoke_at = self._beat_at = time.monotonic()
        self._said_bytes = 0
        # As far as they were recorded, however often catching up has to be tried.
        self._earlier = {
            attempt: Tail(self.artifacts.run(self.claim.job_id, attempt) / "events.jsonl", position)
            for attempt, position in self.claim.read.items()
        }
        self._kills_before = memory_kills()

    def run(self) -> None:
        """Work on the claim to its end, whatever that is."""
        try:
            self.folder.mkdir(parents=True)
            config = self._patiently(self._config)
            (self.folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
            meter = Meter(self.devices)
            child = Child(
                self.claim.stage,
                self.folder,
                devices=self.devices,
                program=self.program,
                bounds=PREPARING if self.claim.stage is Stage.PREPARE else None,
            )
            try:
                self._attend(child)
            finally:
                child.kill()
                child.close()
            joules = meter.joules()
            self._patiently(lambda: self._conclude(child, joules))
        except LeaseLost as error:
            log.warning("Standing down: %s", error)
        except EventsUnsupported as unsupported:
            log.error("%s It claims nothing more.", unsupported)
            self.store.release(self.claim, f"{unsupported}")
            self.stopping.set()
        except NotFound as error:
            self.store.fail(self.claim, {"code": "not_found", "message": f"{error}", "param": None})
        except Exception as error:
            # A lease that runs out by itself would end the same, but without a reason that a person can read.
            log.exception("The runner of %s broke", self.claim.job_id)
            message = f"The worker could not go on: {type(error).__name__}: {error}"
            broken = {"code": "internal_error", "message": message, "param": None}
            with suppress(LeaseLost):
                self._patiently(lambda: self._crash(broken))

    def _patiently(self, action: Callable[[], T]) -> T:
        """Do it; a database that is away is waited for."""
        while True:
            try:
                return action()
            except StoreUnavailable as error:
                log.warning("%s waits: %s", self.claim.job_id, error)
                time.sleep(1)

    def _config(self) -> dict[str, Any]:
        job = self.claim.job
        inputs = Inputs(self.store, self.artifacts, job.project)
        if self.claim.stage is Stage.TRAIN:
            self._catch_up()
            saved = self.store.checkpoints(job.project, job.id, limit=MOST_CHECKPOINTS).items
            folders = [self.artifacts.absolute(checkpoint.path) for checkpoint in saved]
            config = {
                **(job.config or {}),
                "micro_batch_size": self._micro_batch_size,
                "resume_from": [str(folder) for folder in folders if folder.is_dir()],
            }
            if job.model.startswith("ft:"):
                # A checkpoint that was pinned since lies elsewhere.
                config["model_path"] = inputs.model(job.model)["path"]
            return config
        files = {"training_file": job.training_file, "validation_file": job.validation_file}
        mix = job.request["sat"]["data"]["mix"]
        return {
            "format": PREPARE_FORMAT,
            "request": job.request,
            "model": inputs.model(job.model),
            **{name: inputs.file(id) if id else None for name, id in files.items()},
            "mix_files": [{**inputs.file(m["file"]), "weight": m["weight"]} for m in mix],
            "corpora_dir": str(self.artifacts.corpora),
            "hardware": hardware(),
        }

    def _catch_up(self) -> None:
        """Record what earlier attempts told after their worker was lost: they may have written and deleted checkpoints."""
        for attempt, tail in self._earlier.items():
            run = self.artifacts.relative(tail.path.parent)
            with suppress(EventsUnsupported):
                while (read := tail.read())[0]:
                    events, end = read
                    self.store.record(
                        self.claim, events, run=run, read_position=end, attempt=attempt
                    )
                    tail.taken(end)

    def _attend(self, child: Child) -> None:
        """Until the child has ended: tell, renew, obey."""
        most = self._max_seconds
        over_at = None if most is None else time.monotonic() + most - self.claim.seconds
        while not child.ended(POLL_SECONDS):
            self._tell()
            now = time.monotonic()
            self._over_time = over_at is not None and now > over_at
            if (
                self._asked
                or self._over_time
                or self._desired is not Desired.RUN
                or self.stopping.is_set()
            ):
                self._stop(child)
            # By the file, not by what could be recorded of it: the database may be away.
            if (said := self.tail.size) != self._said_bytes:
                self._said_bytes, self._spoke_at = said, now
            if now - self._spoke_at > self.settings.stall_seconds:
                log.error(
                    "%s: silent for %s s, killed", self.claim.job_id, self.settings.stall_seconds
                )
                child.kill()
        while self.tail.read()[0]:
            self._tell()

    def _tell(self) -> None:
        """Move new events into SQL, or at least renew the lease when it is time. Raises LeaseLost."""
        events, position = self.tail.read()
        now = time.monotonic()
        if not events and now - self._beat_at < self.settings.heartbeat_seconds:
            return
        try:
            if events:
                run = self.artifacts.relative(self.folder)
                self._desired = self.store.record(
                    self.claim, events, run=run, read_position=position
                )
                self._keep(events)
                self.tail.taken(position)
                if any(event["kind"] == "checkpoint" for event in events):
                    self._tidy_checkpoints()
            else:
                self._desired = self.store.heartbeat(self.claim)
            self._beat_at = now
        except StoreUnavailable as error:
            log.warning("%s; training goes on", error)
            time.sleep(1)

    def _keep(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["kind"] == "result":
                self.result = event
            elif event["kind"] == "failed":
                self.failure = {key: event.get(key) for key in ("code", "message", "param")}

    def _tidy_checkpoints(self) -> None:
        """`keep` counts over the whole job: the core of this attempt knows nothing of what earlier ones left, half-written too."""
        keep = int((self.claim.job.config or {})["checkpoint_keep"])
        stay = self.store.tidy_checkpoints(self.claim, keep)
        try:
            for tail in self._earlier.values():
                for folder in tail.path.parent.glob("checkpoints/*"):
                    if self.artifacts.relative(folder) not in stay:
                        shutil.rmtree(folder, ignore_errors=True)
                        self.store.heartbeat(self.claim)
        except OSError as error:
            log.warning("%s is not tidied: %s", self.claim.job_id, error)

    def _stop(self, child: Child) -> None:
        """Ask once, and end it by force when its time is up; a pause has no hurry, and its checkpoint may be large."""
        if not self._asked:
            self._asked = True
            child.ask_to_stop()
        if self.stopping.is_set() or self._over_time or self._desired is Desired.CANCEL:
            now = time.monotonic()
            self._hurry_at = self._hurry_at or now
            if now - self._hurry_at > self.settings.grace_seconds:
                child.kill()

    def _conclude(self, child: Child, joules: float | None) -> None:
        """Write down how it ended."""
        code = child.process.returncode
        if joules is not None:
            self.store.spent(self.claim, joules)
        if code == DONE and self.claim.stage is Stage.PREPARE:
            self.store.finish_prepare(self.claim, self._prepared())
        elif code == DONE and self.result:
            self._publish(self.result)
        elif self._lacks_memory(child, code):
            self._try_smaller(code)
        elif code == FAILED and self.failure and self.failure["code"] != "internal_error":
            self.store.fail(self.claim, self.failure)
        elif self._over_time:
            self.store.fail(self.claim, self._time_is_up())
        elif code == STOPPED or (self._asked and code != FAILED):
            written = " with a checkpoint written" if code == STOPPED else ""
            self.store.release(self.claim, f"Stopped{written}; waiting for a worker")
        else:
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            error = {
                "code": "internal_error",
                "message": f"The run ended by {ended}",
                "param": None,
            }
            # A disk that is full or away, say, may be well again.
            said = self.failure if code == FAILED and self.failure else error
            self._crash({**said, "log_excerpt": child.log_end()})

    def _crash(self, error: dict[str, Any], outcome: str = "crashed") -> None:
        self.store.crash(
            self.claim,
            error,
            max_failures=self.settings.max_failures,
            retry_seconds=self.settings.retry_seconds,
            outcome=outcome,
        )

    @property
    def _micro_batch_size(self) -> int:
        """Sequences in a forward: half as many for each attempt that ended for lack of memory."""
        asked = int((self.claim.job.config or {}).get("micro_batch_size", 1))
        return max(1, asked >> self.claim.memory_lacks)

    def _lacks_memory(self, child: Child, code: int) -> bool:
        """Whether it ended for lack of memory and would take less with a smaller micro-batch.

        A kernel says so by SIGKILL and counts it; a SIGKILL of ours says nothing. A run that has come down to single
        sequences names max_seq_len.
        """
        if self.claim.stage is not Stage.TRAIN or self._micro_batch_size == 1:
            return False
        if code == FAILED and self.failure is not None:
            hopeless = self.failure["param"] == "sat.train.max_seq_len"
            return self.failure["code"] == LACKED_MEMORY and not hopeless
        by_kernel = code == -signal.SIGKILL and not child.killed
        return by_kernel and memory_kills() > self._kills_before

    def _try_smaller(self, code: int) -> None:
        """From the newest checkpoint, with the same global batch. It ends: a micro-batch can be halved so often."""
        less = self._micro_batch_size // 2
        why = (
            self.failure["message"] if code == FAILED and self.failure else "The kernel killed it."
        )
        message = f"Memory did not suffice. {why} The next attempt makes micro-batches of {less}"
        error = {"code": LACKED_MEMORY, "message": message, "param": "sat.train.micro_batch_size"}
        self._crash(error, LACKED_MEMORY)

    @property
    def _max_seconds(self) -> int | None:
        # A job accepted before there were limits has none.
        limits = self.claim.job.request["sat"].get("limits") or {}
        most: int | None = limits.get("max_seconds")
        return most if self.claim.stage is Stage.TRAIN else None

    def _time_is_up(self) -> dict[str, Any]:
        message = (
            f"The run was ended after {self._max_seconds} s of training, as sat.limits.max_seconds says; "
            "a checkpoint that it has written is kept, and a new job can start from it"
        )
        return {
            "code": "time_limit_exceeded",
            "message": message,
            "param": "sat.limits.max_seconds",
        }

    def _prepared(self) -> dict[str, Any]:
        """What `prepare` left; its quote holds also what past runs say of it now."""
        prepared: dict[str, Any] = json.loads((self.folder / "train.json").read_text("utf-8"))
        said = quoting.said(prepared, self.store.past_runs(self.claim.job.project))
        prepared["quote"] |= {"hardware": prepared["hardware"], "said": said}
        return prepared

    def _publish(self, result: dict[str, Any]) -> None:
        """Move the model out of the run folder, then say so under the fence: readers follow the row."""
        job = self.claim.job
        target = self.artifacts.result(job.id, self.claim.attempt)
        if not target.exists():
            self.artifacts.put(self.folder / result["path"], target)
        path = self.folder / "step_metrics.csv"
        table = self._table(path)
        self.store.finish_train(
            self.claim,
            model=result_name(job),
            path=self.artifacts.relative(target),
            summary=result["summary"],
            table=table,
            place=lambda: self.artifacts.keep(path, table.sha256),
        )

    def _metrics(self) -> Iterator[Any]:
        """All metrics by lots; a million rows take longer than a lease."""
        for lot in self.store.each_metric(self.claim.job.project, self.claim.job_id):
            yield lot
            self.store.heartbeat(self.claim)

    def _table(self, path: Path) -> NewFile:
        """The metrics as a file: OpenAI's result file."""
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            for text in csv_table(self._metrics()):
                part = text.encode()
                digest.update(part)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        return NewFile(
            id=new_id("file-"),
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            bytes=size,
            sha256=digest.hexdigest(),
            format="csv",
        )


def memory_kills() -> int:
    """Processes that this machine's kernel has killed for lack of memory; 0 where it does not tell."""
    try:
        counters = Path("/proc/vmstat").read_text("utf-8")
    except FileNotFoundError:
        return 0
    found = re.search(r"^oom_kill (\d+)$", counters, re.MULTILINE)
    return int(found[1]) if found else 0

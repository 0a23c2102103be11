"""Tells trackers of experiments what jobs measure, from threads and children of its own: no job waits for it, or fails of it.

It reads what the store holds, so whatever was measured while no worker, tracker or network was there is told later, in
order and once. The road not taken is to tell from the runner as events come in: a tracker that hangs would then hold the
lease of a job in its hands.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jobs.csv_table import OPENAI_NAMES
from jobs.errors import LeaseLost, NotFound, StoreUnavailable
from jobs.integrations import SENDING_SECONDS, TYPES, Integration
from jobs.names import result_name
from jobs.states import TERMINAL, Status
from worker.child import NICENESS

if TYPE_CHECKING:
    from jobs.settings import Settings
    from jobs.spec import JobRecord
    from jobs.store import Store

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-P", "-m", "worker.trackers")
AT_ONCE = 16
ROWS = 200
# Less than the lease: whoever does not answer is ended before another may send.
ANSWER_SECONDS = SENDING_SECONDS - 30
HIDDEN = "***"


class TrackerError(Exception):
    """A tracker did not take what it was told; the message is for the job's owner."""


class Herald:
    """One process's teller."""

    def __init__(self, settings: Settings, store: Store, stopping: threading.Event) -> None:
        self.settings, self.store, self.stopping = settings, store, stopping
        self.types = [name for name in TYPES if importlib.util.find_spec(name)]
        self._telling: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name="herald", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self.types:
            self._thread.start()

    def stop(self, seconds: float) -> None:
        """Wait so long for those that tell to leave in order; what they lack is told later."""
        deadline = time.monotonic() + seconds
        for thread in [t for t in (self._thread, *self._telling) if t.is_alive()]:
            thread.join(max(0.0, deadline - time.monotonic()))

    def round(self) -> None:
        """Take up what waits. Raises StoreUnavailable."""
        self._telling = [thread for thread in self._telling if thread.is_alive()]
        while len(self._telling) < AT_ONCE and (claim := self.store.claim_integration(self.types)):
            thread = threading.Thread(target=self._attend, args=(claim,), daemon=True)
            thread.start()
            self._telling.append(thread)

    def _run(self) -> None:
        while not self.stopping.wait(self.settings.sweep_seconds):
            try:
                self.round()
            except StoreUnavailable as error:
                log.warning("%s", error)
            except Exception:
                # The next round may go well, and nobody else would begin it.
                log.exception("A round of the herald broke")

    def _attend(self, claim: Integration) -> None:
        try:
            self.tell(claim)
        except (LeaseLost, NotFound) as error:
            log.info("%s", error)
        except StoreUnavailable as error:
            log.warning("%s; what %s lacks is told later", error, claim.type)

    def tell(self, claim: Integration) -> None:
        """Send until the job has ended and all of it has arrived, or it stands still, or this worker ends."""
        secrets = self.store.secret_values(claim.project)
        try:
            self._tell(claim, secrets)
        except TrackerError as error:
            said = str(error)
            for value in secrets.values():
                said = said.replace(value, HIDDEN)
            log.warning("%s: %s: %s", claim.job_id, claim.type, said)
            self.store.fail_integration(claim, said)

    def _tell(self, claim: Integration, secrets: dict[str, str]) -> None:
        job = self.store.get_job(claim.project, claim.job_id)
        with Line(self._folder(claim), self._environment(secrets)) as line:
            reached, run = line.ask({"open": self._opening(claim, job)})
            claim, sent_at = self.store.integration_sent(claim, reached, run), time.monotonic()
            while True:
                leaving = self.stopping.is_set()
                # The job before its rows: where it has ended, these are all.
                job = self.store.get_job(claim.project, claim.job_id)
                ended = job.status in TERMINAL and not leaving
                rows, more = ([], False) if leaving else self._rows(claim, reached)
                if not (ended or more):
                    # The newest row may yet get its evaluation.
                    rows = rows[:-1]
                stays = bool(rows) or (job.status == Status.RUNNING and not leaving)
                if rows:
                    reached, _ = line.ask({"rows": rows})
                elif not stays:
                    line.ask({"close": _end(job) if ended else None})
                if rows or not stays or time.monotonic() - sent_at > SENDING_SECONDS / 4:
                    claim = self.store.integration_sent(claim, reached, run)
                    sent_at = time.monotonic()
                if not stays:
                    break
                if not rows:
                    self.stopping.wait(self.settings.sweep_seconds)
        if ended:
            self.store.end_integration(claim)
        else:
            self.store.release_integration(claim)

    def _rows(self, claim: Integration, after: int) -> tuple[list[dict[str, Any]], bool]:
        columns, rows, more = self.store.metrics(
            claim.project, claim.job_id, after_step=after, limit=ROWS
        )
        found = []
        for row in rows:
            values = dict(zip(columns, row, strict=True))
            step, when = values.pop("step"), values.pop("time")
            named = {OPENAI_NAMES.get(k, k): v for k, v in values.items() if v is not None}
            found.append({"step": step, "time": when, "values": named})
        return found, more

    def _opening(self, claim: Integration, job: JobRecord) -> dict[str, Any]:
        place = f"tensorboard/{job.project}/{job.id}"
        return {
            "type": claim.type,
            "settings": claim.settings,
            "id": job.id,
            "name": result_name(job),
            "project": job.project,
            "time": job.started_at or job.created_at,
            "step": claim.step,
            "folder": str(self.settings.data_dir / place),
            "place": place,
            "config": {
                "model": job.model,
                "training_file": job.training_file,
                "validation_file": job.validation_file,
                "metadata": job.metadata,
                "hyperparameters": job.hyperparameters,
                "sat": job.request["sat"],
            },
        }

    def _folder(self, claim: Integration) -> Path:
        folder = self.settings.data_dir / "integrations" / claim.job_id / claim.type
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _environment(self, secrets: dict[str, str]) -> dict[str, str]:
        """The worker's own without what is Satune's; the project's secrets come before the operator's."""
        data = self.settings.data_dir
        defaults = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{data / 'mlflow.db'}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "WANDB_DIR": str(data),
            "WANDB_SILENT": "true",
        }
        own = {k: v for k, v in os.environ.items() if not k.startswith("SATUNE_")}
        return {**defaults, **own, **{k.upper(): v for k, v in secrets.items()}}


class Line:
    """A child of `worker.trackers`, asked and answered line by line."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """Start it; what its library prints goes to log.txt in the folder."""
        # `-P` leaves the working folder out of the path, and with it the service's own sources.
        sources = str(Path(__file__).parents[1])
        with (folder / "log.txt").open("ab") as errors:
            self._process = subprocess.Popen(
                PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                env={**environment, "PYTHONPATH": sources},
                text=True,
                start_new_session=True,
            )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)

    def ask(self, question: dict[str, Any]) -> tuple[int, str | None]:
        """The last step that has arrived, and the run's name there.

        Raises:
            TrackerError: the library's own words, or that nothing came.
        """
        assert self._process.stdin is not None  # noqa: S101 - opened above
        assert self._process.stdout is not None  # noqa: S101 - opened above
        watch = threading.Timer(ANSWER_SECONDS, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        finally:
            watch.cancel()
        if answer is None:
            raise TrackerError(f"no answer within {ANSWER_SECONDS} s; its library hung or crashed")
        if "error" in answer:
            raise TrackerError(answer["error"])
        return answer["step"], answer["run"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Its input ends here, and with it the child; what it may still say is read, so that nothing blocks it.
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def _end(job: JobRecord) -> dict[str, Any]:
    figures: dict[str, Any] = {
        k: v for k, v in (job.summary or {}).items() if isinstance(v, int | float)
    }
    if job.fine_tuned_model:
        figures["fine_tuned_model"] = job.fine_tuned_model
    return {"status": job.status, "time": job.finished_at, "summary": figures}

"""The child that speaks to one tracker of experiments, by the tracker's own library: `python -P -m worker.trackers`.

One JSON line comes in, one goes out: first `{"open": ...}`, then `{"rows": [...]}` any number of times, `{"close": ...}` last.
An answer is `{"step": N, "run": NAME}`, all up to step N being there, or `{"error": TEXT}`. A process of its own, because
such libraries start threads and servers, read the environment, and may hang or crash; a thread of the worker could be
neither ended nor kept apart. It needs nothing of the service's, and leaves when its standard input ends.

A row is `{"step", "time", "values"}`. Each tracker says itself, when it is opened, up to which step it has a run; so a row that
arrived just before a sender died is not sent twice.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]
NOTHING = -1
# MLflow's own limits of one request, and of one value.
MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_CHARS = 1000, 100, 5000
STEP_TAG = "satune.step"


class Tracker(Protocol):
    """One run at one tracker; `step` is the last that it has, `run` its name there."""

    step: int
    run: str

    def log(self, rows: list[Row]) -> None:
        """Take these rows, whose steps rise; they are there when it returns."""

    def close(self, end: dict[str, Any] | None) -> None:
        """Leave it. `end` holds the job's `status`, `time` and `summary`; None where it will go on."""


class TensorBoard:
    """Event files in a folder: one event a row, so that a row is there or not."""

    def __init__(self, job: dict[str, Any], settings: dict[str, Any]) -> None:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.step = job["place"], NOTHING
        for path in folder.glob("events.out.tfevents.*"):
            steps = (e.step for e in EventFileLoader(str(path)).Load() if e.HasField("summary"))
            self.step = max(self.step, max(steps, default=NOTHING))
        self._writer = EventFileWriter(str(folder))

    def log(self, rows: list[Row]) -> None:
        """As `Tracker` says."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            values = [Summary.Value(tag=k, simple_value=v) for k, v in row["values"].items()]
            event = Event(step=row["step"], wall_time=row["time"], summary=Summary(value=values))
            self._writer.add_event(event)
        self._writer.flush()
        self.step = rows[-1]["step"]

    def close(self, end: dict[str, Any] | None) -> None:
        """As `Tracker` says."""
        self._writer.close()


class MLflow:
    """A run of the server or store that `MLFLOW_TRACKING_URI` names, found again by a tag."""

    def __init__(self, job: dict[str, Any], settings: dict[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient()
        name = settings["experiment"]
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([number], f"tags.`satune.job` = '{job['id']}'", max_results=1)
        if found:
            self._id, self.step = found[0].info.run_id, int(found[0].data.tags.get(STEP_TAG, -1))
            client.update_run(self._id, status="RUNNING")
        else:
            tags = settings.get("tags") or {}
            created = client.create_run(
                number,
                start_time=round(1000 * job["time"]),
                run_name=settings.get("name") or job["name"],
                tags={**tags, "satune.job": job["id"], "satune.project": job["project"]},
            )
            self._id, self.step = created.info.run_id, NOTHING
            self._describe(job["config"])
        uri = client.tracking_uri
        path = f"#/experiments/{number}/runs/{self._id}"
        self.run = f"{uri.rstrip('/')}/{path}" if uri.startswith("http") else self._id

    def log(self, rows: list[Row]) -> None:
        """As `Tracker` says."""
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, value, round(1000 * row["time"]), row["step"])
            for row in rows
            for key, value in row["values"].items()
        ]
        last = rows[-1]["step"]
        for some in _lots(metrics, MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=some)
        self._client.log_batch(self._id, tags=[RunTag(STEP_TAG, str(last))])
        self.step = last

    def close(self, end: dict[str, Any] | None) -> None:
        """As `Tracker` says."""
        if end is None:
            return
        from mlflow.entities import Metric

        when = round(1000 * end["time"])
        numbers = ((k, v) for k, v in end["summary"].items() if isinstance(v, int | float))
        final = [Metric(f"final/{k}", v, when, self.step) for k, v in numbers]
        for some in _lots(final, MLFLOW_METRICS):
            self._client.log_batch(self._id, metrics=some)
        words = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
        self._client.set_terminated(self._id, words[end["status"]], when)

    def _describe(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:MLFLOW_CHARS]) for name, value in _flat(config)]
        for some in _lots(params, MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=some)


class WandB:
    """A run with the job's id. W&B itself drops the steps that it has; offline, each opening is a file to be synced."""

    def __init__(self, job: dict[str, Any], settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=settings["project"],
            entity=settings.get("entity"),
            name=settings.get("name") or job["name"],
            tags=settings.get("tags"),
            id=job["id"],
            resume="allow",
            config=job["config"],
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_machine_info=True,
            ),
        )
        # Only the server knows what has reached it; a run that is begun anew has nothing.
        self.step = job["step"] if self._run.offline else self._run.step - 1
        self.run = self._run.url or Path(self._run.dir).parent.name

    def log(self, rows: list[Row]) -> None:
        """As `Tracker` says."""
        for row in rows:
            self._run.log(row["values"], step=row["step"])
        self.step = rows[-1]["step"]

    def close(self, end: dict[str, Any] | None) -> None:
        """As `Tracker` says."""
        if end is not None:
            self._run.summary.update({**end["summary"], "status": end["status"]})
        self._run.finish(exit_code=int(end is not None and end["status"] != "succeeded"))


KINDS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def main() -> None:
    """Serve one run until standard input ends."""
    # Libraries print; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    tracker: Tracker | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if tracker is None:
                job = asked["open"]
                tracker = KINDS[job["type"]](job, job["settings"])
            else:
                _tell(tracker, asked)
            answer = {"step": tracker.step, "run": tracker.run}
        except Exception as error:  # noqa: BLE001 - whatever a library raises is what is to be told
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _tell(tracker: Tracker, asked: dict[str, Any]) -> None:
    if "close" in asked:
        tracker.close(asked["close"])
    elif rows := [_finite(row) for row in asked["rows"] if row["step"] > tracker.step]:
        tracker.log(rows)


def _finite(row: Row) -> Row:
    """The row without what was not measured: no tracker draws a NaN."""
    return {**row, "values": {k: v for k, v in row["values"].items() if math.isfinite(v)}}


def _lots(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested objects, named with dots."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


if __name__ == "__main__":
    main()

"""From a run's events to rows.

Called inside the fenced transaction that also moves the read position, so that each event lands exactly once, however
often reader or writer dies.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from jobs.db import is_postgresql
from jobs.models import CheckpointRow, EventRow, JobRow, MetricRow
from jobs.spans import summarise
from jobs.spec import new_id

_STEP_COLUMNS = (
    "tokens",
    "loss",
    "token_accuracy",
    "learning_rate",
    "grad_norm",
    "omission_rate_mlp",
    "omission_rate_attention",
    "awake_share",
    "tokens_per_second",
    "step_seconds",
    "flops",
    "memory_bytes",
)
_EVAL_COLUMNS = ("eval_loss", "eval_token_accuracy")


def add_event(
    session: Session,
    job_id: str,
    message: str,
    *,
    kind: str = "state",
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
    created_at: float | None = None,
) -> None:
    """Append to a job's history."""
    session.add(
        EventRow(
            id=new_id("ftevent-"),
            job_id=job_id,
            created_at=created_at if created_at is not None else time.time(),
            level=level,
            type=type,
            kind=kind,
            message=message,
            data=data,
        )
    )


def apply(
    session: Session, job: JobRow, attempt: int, run: str, events: list[dict[str, Any]]
) -> None:
    """Write `events` of the run folder `run` (relative to the data folder) to their tables, in order.

    What an earlier attempt tells late is history; how the job stands now is not its to say.
    """
    steps = [e for e in events if e["kind"] == "metrics"]
    for event in events:
        handler = _HANDLERS.get(event["kind"])
        if handler:
            handler(session, job, attempt, run, event)
    if steps:
        _upsert(session, job.id, attempt, steps, _STEP_COLUMNS)
        summarise(session, job.id, (event["step"] for event in steps))
        if attempt == job.attempt:
            _progress(job, steps)


def _progress(job: JobRow, steps: list[dict[str, Any]]) -> None:
    last = steps[-1]
    job.progress_step, job.total_steps = last["step"], last["total_steps"]
    job.trained_tokens, job.loss = last["tokens"], last["loss"]
    job.omission_rate_mlp, job.omission_rate_attention = (
        last["omission_rate_mlp"],
        last["omission_rate_attention"],
    )
    job.tokens_per_second = last["tokens_per_second"]
    seconds = sum(s["step_seconds"] for s in steps) / len(steps)
    job.eta_seconds = seconds * (last["total_steps"] - last["step"])


def _state(session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]) -> None:
    if attempt == job.attempt:
        job.detail_state, job.detail_message, job.detail_since = (
            event["state"],
            event["message"],
            event["time"],
        )
    # Training goes on after each evaluation: said in the row alone, or the history would hold little else.
    if not event.get("again"):
        add_event(
            session,
            job.id,
            event["message"],
            data={"state": event["state"]},
            created_at=event["time"],
        )


def _message(session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]) -> None:
    level = event["level"] if event["level"] in ("info", "warn", "error") else "info"
    add_event(
        session,
        job.id,
        event["message"],
        kind="message",
        level=level,
        data=event.get("data"),
        created_at=event["time"],
    )


def _reading(session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]) -> None:
    if attempt == job.attempt:
        job.detail_message = f"{event['done']:,} {event['unit']} done"


def _evaluation(
    session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]
) -> None:
    _upsert(session, job.id, attempt, [event], _EVAL_COLUMNS)
    loss = event["eval_loss"]
    add_event(
        session,
        job.id,
        f"Step {event['step']}: held-out loss {'not a number' if loss is None else f'{loss:.4f}'}",
        kind="evaluation",
        type="metrics",
        data={
            "step": event["step"],
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": event["eval_token_accuracy"],
        },
        created_at=event["time"],
    )


def _checkpoint(
    session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]
) -> None:
    same = (CheckpointRow.job_id == job.id, CheckpointRow.step == event["step"])
    older = (CheckpointRow.pinned_from.is_(None), CheckpointRow.attempt <= attempt)
    session.execute(delete(CheckpointRow).where(*same, *older))
    # A step that is trained again makes the same checkpoint; the one that a person pinned stays, and that of a newer
    # attempt where this one's is told late.
    if session.scalar(select(CheckpointRow.id).where(*same)) is None:
        session.add(
            CheckpointRow(
                id=new_id("ftckpt_"),
                job_id=job.id,
                attempt=attempt,
                step=event["step"],
                path=f"{run}/{event['path']}",
                size_bytes=event["size_bytes"],
                metrics=event["metrics"],
                created_at=event["time"],
            )
        )
    add_event(
        session,
        job.id,
        f"Checkpoint at step {event['step']}",
        kind="checkpoint",
        data={"step": event["step"]},
        created_at=event["time"],
    )


def _checkpoint_deleted(
    session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]
) -> None:
    session.execute(
        delete(CheckpointRow).where(
            CheckpointRow.job_id == job.id, CheckpointRow.path == f"{run}/{event['path']}"
        )
    )


def _sample(session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]) -> None:
    data = {"step": event["step"], "prompt": event["prompt"], "text": event["text"]}
    add_event(
        session,
        job.id,
        f"Sample at step {event['step']}",
        kind="sample",
        data=data,
        created_at=event["time"],
    )


def _selection(
    session: Session, job: JobRow, attempt: int, run: str, event: dict[str, Any]
) -> None:
    """Who is awake, where a stage of the ladder begins; the choices inside a stage stay in the run folder."""
    if not event["stage_begins"]:
        return
    gap = event["gap"]
    words = "" if gap is None else f", sparse loss {gap:+.3f} against dense"
    add_event(
        session,
        job.id,
        f"Step {event['step']}: {event['share']:.0%} of the omission rate{words}",
        kind="selection",
        data={k: v for k, v in event.items() if k not in ("seq", "time", "kind")},
        created_at=event["time"],
    )


_HANDLERS = {
    "state": _state,
    "message": _message,
    "progress": _reading,
    "evaluation": _evaluation,
    "checkpoint": _checkpoint,
    "checkpoint_deleted": _checkpoint_deleted,
    "sample": _sample,
    "selection": _selection,
}


def _upsert(
    session: Session,
    job_id: str,
    attempt: int,
    events: list[dict[str, Any]],
    columns: tuple[str, ...],
) -> None:
    """Insert or replace `columns` of the rows (job, step); other columns of a row stay as they are."""
    rows = {
        e["step"]: {"job_id": job_id, "step": e["step"], "attempt": attempt, "time": e["time"]}
        | {c: e[c] for c in columns}
        for e in events
    }
    dialect: Any = postgresql if is_postgresql(session) else sqlite
    statement = dialect.insert(MetricRow)
    replaced = {name: statement.excluded[name] for name in ("attempt", "time", *columns)}
    session.execute(
        statement.on_conflict_do_update(index_elements=["job_id", "step"], set_=replaced),
        list(rows.values()),
    )

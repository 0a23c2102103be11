"""From a change of a job to the webhooks that want to know: written in the transaction of the change.

A session about to flush looks at what it will write: a status that moves, or a new checkpoint, becomes one event and one
delivery row for each address of the project that asked for its type. So an event is told exactly where the change
committed, whichever method made it. Bodies carry ids and no data: whoever is told asks the API, with a key.
"""

from __future__ import annotations

import json
import time
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.orm import Session

from jobs.models import CheckpointRow, JobRow
from jobs.spec import new_id
from jobs.states import Status
from jobs.tenant_models import DeliveryRow, WebhookRow

PREFIX = "fine_tuning.job."
EVENT_TYPES = tuple(
    PREFIX + name
    for name in (
        "cancelled", "checkpoint", "failed", "paused", "queued", "resumed", "started", "succeeded",
    )
)  # fmt: skip
_ENDS = {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.PAUSED}


def write_deliveries(session: Session, *_: Any) -> None:
    """Before a flush: a delivery for each change that an address asked for."""
    for row in list(session.dirty):
        if isinstance(row, JobRow) and (name := _told(row)):
            _deliver(session, row.project, PREFIX + name, {"id": row.id})
    for row in list(session.new):
        if isinstance(row, CheckpointRow):
            with session.no_autoflush:
                project = session.scalar(select(JobRow.project).where(JobRow.id == row.job_id))
            data = {"id": row.job_id, "checkpoint_id": row.id}
            _deliver(session, project or "", PREFIX + "checkpoint", data)


def new_delivery(endpoint: WebhookRow, event_type: str, data: dict[str, str]) -> DeliveryRow:
    """An event for one address, due at once."""
    return _row(endpoint.id, *_event(event_type, data))


def _told(row: JobRow) -> str | None:
    """What the change of a status is called, None where it is none that is told."""
    history = inspect(row).attrs.status.history
    if not history.deleted or history.deleted == history.added:
        return None
    before, after = Status(history.deleted[0]), Status(row.status)
    if after in _ENDS:
        return str(after)
    if before is Status.PAUSED:
        return "resumed"
    if after is Status.RUNNING:
        return "started"
    # Back from a lost worker is no news: the job goes on by itself.
    return "queued" if before is Status.VALIDATING_FILES else None


def _deliver(session: Session, project: str, event_type: str, data: dict[str, str]) -> None:
    with session.no_autoflush:
        query = select(WebhookRow.id, WebhookRow.event_types).where(
            WebhookRow.project == project, WebhookRow.disabled_at.is_(None)
        )
        wanting = [id for id, types in session.execute(query) if event_type in types]
    event = _event(event_type, data)
    session.add_all(_row(endpoint_id, *event) for endpoint_id in wanting)


def _event(event_type: str, data: dict[str, str]) -> tuple[str, str, str]:
    event_id = new_id("evt_")
    event = {
        "id": event_id,
        "object": "event",
        "created_at": int(time.time()),
        "type": event_type,
        "data": data,
    }
    return event_id, event_type, json.dumps(event, separators=(",", ":"))


def _row(endpoint_id: str, event_id: str, event_type: str, body: str) -> DeliveryRow:
    now = time.time()
    return DeliveryRow(
        id=new_id("whd_"),
        endpoint_id=endpoint_id,
        event_id=event_id,
        event_type=event_type,
        body=body,
        created_at=now,
        status="pending",
        next_at=now,
    )

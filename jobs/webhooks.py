"""Addresses that are told of events, and the deliveries to them.

A delivery is claimed by moving its `next_at` on before it is sent: whoever dies over it, it is tried again, and a
receiver may see it twice under one id, which is what Standard Webhooks promise. After the last try it stands as failed,
for people to see and to send again.
"""

from __future__ import annotations

import base64
import random
import secrets
import time
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from jobs.errors import InvalidCursor, NotFound
from jobs.library import record_of
from jobs.outbox import new_delivery
from jobs.receipts import Receipt, keep
from jobs.spec import DeliveryRecord, Page, WebhookRecord, new_id
from jobs.tenant_models import DeliveryRow, WebhookRow
from jobs.transactions import Transactions

# Seconds until the next try, after each one that failed: the schedule of the Standard Webhooks specification.
BACK_OFF = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
SENDING_SECONDS = 60
OLD_SECRET_SECONDS = 24 * 3600
KEPT_SECONDS = 30 * 24 * 3600
GONE = 410


class Webhooks(Transactions):
    """Addresses and deliveries of the store."""

    def create_webhook(
        self,
        project: str,
        *,
        name: str,
        url: str,
        event_types: list[str],
        receipt: Receipt | None = None,
    ) -> WebhookRecord:
        """A new address with a secret of its own."""
        now = time.time()
        with self.writing() as session:
            row = WebhookRow(
                id=new_id("we_"),
                project=project,
                name=name,
                url=url,
                event_types=event_types,
                secret=_new_secret(),
                created_at=now,
                updated_at=now,
            )
            session.add(row)
            session.flush()
            record: WebhookRecord = record_of(WebhookRecord, row)
            keep(session, receipt, record)
            return record

    def get_webhook(self, project: str, endpoint: str) -> WebhookRecord:
        """One address. Raises NotFound."""
        with self.reading() as session:
            return record_of(WebhookRecord, _endpoint(session, project, endpoint))  # type: ignore[no-any-return]

    def list_webhooks(
        self, project: str, *, after: str | None = None, limit: int = 20
    ) -> Page[WebhookRecord]:
        """Addresses of a project, newest first. Raises InvalidCursor."""
        query = select(WebhookRow).where(WebhookRow.project == project)
        with self.reading() as session:
            if after:
                query = query.where(WebhookRow.seq < _cursor(session, query, WebhookRow, after))
            rows = session.scalars(query.order_by(WebhookRow.seq.desc()).limit(limit + 1))
            found = [record_of(WebhookRecord, row) for row in rows]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def change_webhook(self, project: str, endpoint: str, changes: dict[str, Any]) -> WebhookRecord:
        """Other name, url, event_types; `enabled` switches it on or off. Raises NotFound."""
        now = time.time()
        with self.writing() as session:
            row = _endpoint(session, project, endpoint)
            enabled = changes.pop("enabled", None)
            if enabled is not None:
                row.disabled_at = None if enabled else row.disabled_at or now
            for name, value in changes.items():
                setattr(row, name, value)
            if session.is_modified(row):
                row.updated_at = now
            session.flush()
            return record_of(WebhookRecord, row)  # type: ignore[no-any-return]

    def rotate_webhook_secret(
        self, project: str, endpoint: str, *, keep_old: bool
    ) -> WebhookRecord:
        """A new secret; with `keep_old` the old one signs beside it for a day. Raises NotFound."""
        now = time.time()
        with self.writing() as session:
            row = _endpoint(session, project, endpoint)
            row.old_secret = row.secret if keep_old else None
            row.old_secret_until = now + OLD_SECRET_SECONDS if keep_old else None
            row.secret, row.updated_at = _new_secret(), now
            session.flush()
            return record_of(WebhookRecord, row)  # type: ignore[no-any-return]

    def delete_webhook(self, project: str, endpoint: str) -> None:
        """Forget an address and its deliveries. Raises NotFound."""
        with self.writing() as session:
            session.delete(_endpoint(session, project, endpoint))

    def add_test_delivery(self, project: str, endpoint: str, event_type: str) -> DeliveryRecord:
        """A sample event, about a job that does not exist; claimed by the caller, who sends it. Raises NotFound."""
        with self.writing() as session:
            row = new_delivery(
                _endpoint(session, project, endpoint), event_type, {"id": "ftjob-test"}
            )
            row.next_at += SENDING_SECONDS
            session.add(row)
            session.flush()
            return record_of(DeliveryRecord, row)  # type: ignore[no-any-return]

    def end_test_delivery(
        self, delivery: DeliveryRecord, status: int | None, error: str | None
    ) -> None:
        """What the one try of a test came to; tests are not repeated."""
        with self.writing() as session:
            row = session.scalar(select(DeliveryRow).where(DeliveryRow.id == delivery.id))
            if row is not None:
                row.status = "failed" if error else "delivered"
                row.tries, row.tried_at = 1, time.time()
                row.response_status, row.error = status, error

    def list_deliveries(
        self,
        project: str,
        endpoint: str,
        *,
        after: str | None = None,
        limit: int = 20,
        status: str | None = None,
    ) -> Page[DeliveryRecord]:
        """Deliveries to an address, newest first. Raises NotFound, InvalidCursor."""
        with self.reading() as session:
            _endpoint(session, project, endpoint)
            query = select(DeliveryRow).where(DeliveryRow.endpoint_id == endpoint)
            if after:
                query = query.where(DeliveryRow.seq < _cursor(session, query, DeliveryRow, after))
            if status:
                query = query.where(DeliveryRow.status == status)
            rows = session.scalars(query.order_by(DeliveryRow.seq.desc()).limit(limit + 1))
            found = [record_of(DeliveryRecord, row) for row in rows]
        return Page(items=tuple(found[:limit]), has_more=len(found) > limit)

    def redeliver(self, project: str, endpoint: str, delivery: str) -> DeliveryRecord:
        """Send again, under the same id and from the start of the schedule. Raises NotFound."""
        with self.writing() as session:
            _endpoint(session, project, endpoint)
            row = session.scalar(
                select(DeliveryRow).where(
                    DeliveryRow.endpoint_id == endpoint, DeliveryRow.id == delivery
                )
            )
            if row is None:
                raise NotFound.of("webhook_delivery", delivery)
            row.status, row.tries, row.next_at, row.error = "pending", 0, time.time(), None
            session.flush()
            return record_of(DeliveryRecord, row)  # type: ignore[no-any-return]

    def due_deliveries(self, limit: int) -> list[DeliveryRecord]:
        """Claim what is to be sent now."""
        now = time.time()
        with self.writing() as session:
            query = (
                select(DeliveryRow)
                .join(WebhookRow, WebhookRow.id == DeliveryRow.endpoint_id)
                .where(
                    DeliveryRow.status == "pending",
                    DeliveryRow.next_at <= now,
                    WebhookRow.disabled_at.is_(None),
                )
                .order_by(DeliveryRow.next_at)
                .limit(limit)
            )
            rows = list(session.scalars(query.with_for_update(of=DeliveryRow, skip_locked=True)))
            for row in rows:
                row.next_at = now + SENDING_SECONDS
            session.flush()
            return [record_of(DeliveryRecord, row) for row in rows]

    def any_due_delivery(self) -> bool:
        """Whether `due_deliveries` would find any; a read, so that idle workers do not write."""
        with self.reading() as session:
            query = select(DeliveryRow.seq).where(
                DeliveryRow.status == "pending", DeliveryRow.next_at <= time.time()
            )
            return session.scalar(query.limit(1)) is not None

    def address_of(self, delivery: DeliveryRecord) -> tuple[str, list[str]] | None:
        """URL and the secrets that sign now; None where the address was deleted."""
        with self.reading() as session:
            row = session.scalar(select(WebhookRow).where(WebhookRow.id == delivery.endpoint_id))
            if row is None:
                return None
            old = row.old_secret if (row.old_secret_until or 0) > time.time() else None
            return row.url, [row.secret, *([old] if old else [])]

    def delivered(
        self, delivery: DeliveryRecord, status: int | None, error: str | None, wait_seconds: float
    ) -> None:
        """What a try came to; `wait_seconds` is what the receiver asked for. 410 switches the address off."""
        now = time.time()
        with self.writing() as session:
            row = session.scalar(select(DeliveryRow).where(DeliveryRow.id == delivery.id))
            if row is None:
                return
            row.tries += 1
            row.tried_at, row.response_status, row.error = now, status, error
            endpoint = session.scalar(select(WebhookRow).where(WebhookRow.id == row.endpoint_id))
            if error is None:
                row.status = "delivered"
            elif status == GONE or row.tries > len(BACK_OFF):
                row.status = "failed"
            else:
                # Spread, so that a receiver that comes back is not met by all at once.
                wait = BACK_OFF[row.tries - 1] * random.uniform(1, 1.1)  # noqa: S311 - no secret
                row.next_at = now + max(wait, min(wait_seconds, BACK_OFF[-1]))
            if status == GONE and endpoint is not None:
                endpoint.disabled_at = endpoint.disabled_at or now

    def forget_deliveries(self) -> None:
        """Drop deliveries that ended a month ago."""
        with self.writing() as session:
            session.execute(
                delete(DeliveryRow).where(
                    DeliveryRow.status != "pending",
                    DeliveryRow.created_at < time.time() - KEPT_SECONDS,
                )
            )


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def _endpoint(session: Session, project: str, endpoint: str) -> WebhookRow:
    row = session.scalar(
        select(WebhookRow).where(WebhookRow.project == project, WebhookRow.id == endpoint)
    )
    if row is None:
        raise NotFound.of("webhook_endpoint", endpoint)
    return row


def _cursor(session: Session, query: Any, table: Any, after: str) -> int:
    row = session.scalar(query.where(table.id == after))
    if row is None:
        raise InvalidCursor(f"after {after!r} names nothing in this list")
    return int(row.seq)

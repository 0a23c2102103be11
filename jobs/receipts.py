"""Sending a create again gives the answer of the first time, byte for byte, and creates nothing.

A receipt is opened before the work, in a transaction of its own, and filled in by `keep` inside the transaction that
creates: both happen or neither. Filling names the token, so whoever was taken for dead and replaced can create nothing
more. Clients that send an Idempotency-Key get one receipt per key. OpenAI's clients send none, only
`x-stainless-retry-count`: for them each attempt is an entry of a log, and a retry is the same create where the newest
earlier attempt with the same body by the same API key was answered well, or not at all; where it was answered with an
error, nothing was made, and the retry is new even if an older equal object exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs.errors import IdempotencyMismatch, InProgress
from jobs.spec import new_id
from jobs.tenant_models import ReceiptRow
from jobs.transactions import Transactions

KEPT_SECONDS = 24 * 3600
# A client's time-out (10 minutes) and its back-off, with room.
RETRY_WINDOW_SECONDS = 15 * 60
# An attempt that has said nothing for so long has lost its process, and the next may take over: creating takes no time,
# and if it lives after all it finds its token gone.
STALE_SECONDS = 45
SUPERSEDED = 409


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One request to create something. `key` is the Idempotency-Key, `retry` the client's own count."""

    project: str
    key_id: str
    scope: str
    fingerprint: str
    key: str | None
    retry: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The right to create once; `render` makes the answer's body of the record that was created."""

    token: str
    render: Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What an attempt met: a `token` to go on with, the `body` of before, or neither: somebody is at it."""

    token: str | None = None
    body: str | None = None


class Receipts(Transactions):
    """Attempts to create, and their answers."""

    def open_receipt(self, attempt: Attempt) -> Opened:
        """Begin, or learn what an equal attempt was answered.

        Raises:
            IdempotencyMismatch: the key was used with another body.
        """
        try:
            return self._open(attempt)
        except IntegrityError:
            # Another request with the same key began between our look and our insert.
            return self._open(attempt)

    def _open(self, attempt: Attempt) -> Opened:
        now = time.time()
        with self.writing() as session:
            session.execute(delete(ReceiptRow).where(ReceiptRow.created_at < now - KEPT_SECONDS))
            row = _same_key(session, attempt) if attempt.key else _earlier(session, attempt, now)
            if row is not None and row.body is not None:
                return Opened(body=row.body)
            if row is not None and now - row.created_at < STALE_SECONDS:
                return Opened()
            token = new_id("rcp_")
            if row is not None and attempt.key:
                row.token, row.created_at = token, now
                return Opened(token=token)
            if row is not None:
                row.token, row.status = new_id("rcp_"), SUPERSEDED
            session.add(
                ReceiptRow(
                    token=token,
                    project=attempt.project,
                    scope=attempt.scope,
                    key=attempt.key,
                    key_id=attempt.key_id,
                    fingerprint=attempt.fingerprint,
                    retry=attempt.retry,
                    created_at=now,
                )
            )
            return Opened(token=token)

    def close_receipt(self, token: str, status: int) -> None:
        """The attempt was answered with an error: an Idempotency-Key is free again, the log remembers."""
        open_row = (ReceiptRow.token == token, ReceiptRow.body.is_(None))
        with self.writing() as session:
            session.execute(delete(ReceiptRow).where(*open_row, ReceiptRow.key.isnot(None)))
            session.execute(update(ReceiptRow).where(*open_row).values(status=status))


def keep(session: Session, receipt: Receipt | None, record: Any) -> None:
    """Write the answer beside what it tells of; at the end of a transaction that creates.

    Raises:
        InProgress: this attempt was taken for dead and another one replaced it.
    """
    if receipt is None:
        return
    kept = session.execute(
        update(ReceiptRow)
        .where(ReceiptRow.token == receipt.token)
        .values(status=200, body=receipt.render(record))
        .returning(ReceiptRow.seq)
    )
    if kept.first() is None:
        raise InProgress("Another attempt of this request has taken over")


def _same_key(session: Session, attempt: Attempt) -> ReceiptRow | None:
    query = select(ReceiptRow).where(
        ReceiptRow.project == attempt.project,
        ReceiptRow.scope == attempt.scope,
        ReceiptRow.key == attempt.key,
    )
    row = session.scalar(query.with_for_update())
    if row is not None and row.fingerprint != attempt.fingerprint:
        raise IdempotencyMismatch(f"Idempotency key {attempt.key!r} was used with another body")
    return row


def _earlier(session: Session, attempt: Attempt, now: float) -> ReceiptRow | None:
    """The attempt that this one repeats, unless we answered that with an error."""
    if attempt.retry < 1:
        return None
    query = (
        select(ReceiptRow)
        .where(
            ReceiptRow.key_id == attempt.key_id,
            ReceiptRow.fingerprint == attempt.fingerprint,
            ReceiptRow.project == attempt.project,
            ReceiptRow.scope == attempt.scope,
            ReceiptRow.key.is_(None),
            ReceiptRow.created_at >= now - RETRY_WINDOW_SECONDS,
        )
        .order_by(ReceiptRow.seq.desc())
        .limit(1)
    )
    row = session.scalar(query.with_for_update())
    if row is None or (row.status is not None and row.body is None):
        return None
    return row

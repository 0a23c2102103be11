"""Metrics of a job: rows after a step, few rows for a chart, all rows for a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from jobs.models import MetricRow, MetricSpanRow
from jobs.reads import job_exists
from jobs.spans import STEPS, span_of
from jobs.thinning import changes, extremes, thin
from jobs.transactions import Transactions

METRIC_COLUMNS = tuple(
    c.name for c in MetricRow.__table__.columns if c.name not in ("job_id", "attempt")
)
# Fewer rows than this are read whole: that is quick, and thins to the step.
READ_WHOLE = 32 * STEPS
ROWS_PER_READ = 10_000
STEP = METRIC_COLUMNS.index("step")

Rows = list[list[Any]]


class Span(NamedTuple):
    """A row of `metric_spans`."""

    span: int
    low_step: int
    low_loss: float
    high_step: int
    high_loss: float
    changes: bool


class Measures(Transactions):
    """Metrics of the store."""

    def metrics(
        self, project: str, job_id: str, *, after_step: int = -1, limit: int = 1000
    ) -> tuple[tuple[str, ...], Rows, bool]:
        """(column names, rows with step > `after_step` in order, whether there are more). Raises NotFound."""
        with self.reading() as session:
            job_exists(session, project, job_id)
            rows = _rows(session, job_id, MetricRow.step > after_step, limit=limit + 1)
        return METRIC_COLUMNS, rows[:limit], len(rows) > limit

    def thinned_metrics(
        self, project: str, job_id: str, *, after_step: int = -1, max_rows: int
    ) -> tuple[tuple[str, ...], Rows, int]:
        """(column names, about `max_rows` rows with step > `after_step`, how many were measured). Raises NotFound.

        Rows with an evaluation, both sides of a change of an omission rate, and both ends are kept beside `max_rows`.
        """
        with self.reading() as session:
            job_exists(session, project, job_id)
            later = MetricRow.step > after_step
            first, last = _ends(session, job_id, later)
            if first is None or last is None:
                return METRIC_COLUMNS, [], 0
            spans = _spans(session, job_id, first, last)
            if last - first < max(READ_WHOLE, max_rows) or not spans:
                rows = _rows(session, job_id, later)
                return METRIC_COLUMNS, _lists(thin(METRIC_COLUMNS, rows, max_rows)), len(rows)
            steps = _worth_showing(session, job_id, spans, first, last, max_rows)
            rows = _rows(session, job_id, MetricRow.step.in_(steps))
            return METRIC_COLUMNS, rows, last - first + 1

    def each_metric(self, project: str, job_id: str, *, after_step: int = -1) -> Iterator[Rows]:
        """All rows with step > `after_step` in order, a few thousand at a time, each lot a transaction. Raises NotFound."""
        after, more = after_step, True
        while more:
            _, rows, more = self.metrics(project, job_id, after_step=after, limit=ROWS_PER_READ)
            yield rows
            after = rows[-1][STEP] if rows else after


def _rows(
    session: Session, job_id: str, condition: ColumnElement[bool], limit: int | None = None
) -> Rows:
    columns = [getattr(MetricRow, name) for name in METRIC_COLUMNS]
    query = select(*columns).where(MetricRow.job_id == job_id, condition).order_by(MetricRow.step)
    return [list(row) for row in session.execute(query.limit(limit))]


def _ends(
    session: Session, job_id: str, condition: ColumnElement[bool]
) -> tuple[int | None, int | None]:
    # Two questions: SQLite answers each from its index, and both at once by reading all rows.
    first, last = (
        session.scalar(select(end(MetricRow.step)).where(MetricRow.job_id == job_id, condition))
        for end in (func.min, func.max)
    )
    return first, last


def _lists(rows: Any) -> Rows:
    return [list(row) for row in rows]


def _spans(session: Session, job_id: str, first: int, last: int) -> list[Span]:
    """The spans that lie wholly behind `first`, in order; plain rows, since they are thousands."""
    query = select(
        MetricSpanRow.span,
        MetricSpanRow.low_step,
        MetricSpanRow.low_loss,
        MetricSpanRow.high_step,
        MetricSpanRow.high_loss,
        MetricSpanRow.changes,
    ).where(
        MetricSpanRow.job_id == job_id,
        MetricSpanRow.span >= span_of(first + STEPS - 1),
        MetricSpanRow.span <= span_of(last),
    )
    return [Span(*row) for row in session.execute(query.order_by(MetricSpanRow.span))]


def _worth_showing(
    session: Session, job_id: str, spans: list[Span], first: int, last: int, max_rows: int
) -> list[int]:
    """The steps of a long run that a chart shows, found without reading the run."""
    # What lies before the first whole span is read as it is.
    begin = spans[0].span * STEPS
    head = _rows(session, job_id, (MetricRow.step >= first) & (MetricRow.step < begin))
    if 2 * len(spans) < max_rows:
        known = _losses(session, job_id, first)
    else:
        known = _losses(session, job_id, first, begin)
        for span in spans:
            low, high = (span.low_step, span.low_loss), (span.high_step, span.high_loss)
            known += (low, high) if low < high else (high, low)
    kept = {first, last, *extremes(known, max_rows)}
    kept |= {head[i][STEP] for i in changes(METRIC_COLUMNS, head)}
    for span in spans:
        if span.changes:
            before = span.span * STEPS - 1
            rows = _rows(session, job_id, MetricRow.step.between(before, before + STEPS))
            kept |= {rows[i][STEP] for i in changes(METRIC_COLUMNS, rows)}
    evaluated = select(MetricRow.step).where(
        MetricRow.job_id == job_id, MetricRow.eval_loss.isnot(None)
    )
    return sorted(step for step in kept | set(session.scalars(evaluated)) if step >= first)


def _losses(
    session: Session, job_id: str, first: int, before: int | None = None
) -> list[tuple[int, float]]:
    query = select(MetricRow.step, MetricRow.loss).where(
        MetricRow.job_id == job_id, MetricRow.step >= first, MetricRow.loss.isnot(None)
    )
    if before is not None:
        query = query.where(MetricRow.step < before)
    found = session.execute(query.order_by(MetricRow.step))
    return [(step, loss) for step, loss in found if loss is not None]

"""Where the loss is lowest and highest in each span of steps, kept while the rows are written.

A chart of a million steps needs a few hundred of them, and which ones can only be said by looking at all. Looking at all
takes about a second on either database, so it is done once, as the steps arrive: a million rows then have sixteen
thousand spans. A span is made anew from its rows whenever one of them is written, so that steps which are trained again after a
crash leave nothing behind. The road not taken is a covering index over the loss: it is as large as the table, and
PostgreSQL still takes a quarter of a second to read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from jobs.models import MetricRow, MetricSpanRow

STEPS = 64


def span_of(step: int) -> int:
    """Which span a step lies in."""
    return step // STEPS


def summarise(session: Session, job_id: str, steps: Iterable[int]) -> None:
    """Make the spans of `steps` anew; their rows are written."""
    for span in sorted({span_of(step) for step in steps}):
        first = span * STEPS
        # One row more at the beginning: what the rates were before.
        query = (
            select(
                MetricRow.step,
                MetricRow.loss,
                MetricRow.omission_rate_mlp,
                MetricRow.omission_rate_attention,
            )
            .where(
                MetricRow.job_id == job_id,
                MetricRow.step >= first - 1,
                MetricRow.step < first + STEPS,
            )
            .order_by(MetricRow.step)
        )
        found = session.execute(query).all()
        session.execute(
            delete(MetricSpanRow).where(MetricSpanRow.job_id == job_id, MetricSpanRow.span == span)
        )
        made = span_row(job_id, span, found)
        if made is not None:
            session.add(made)


def span_row(job_id: str, span: int, rows: Sequence[Sequence[Any]]) -> MetricSpanRow | None:
    """The span of rows (step, loss, both omission rates), which begin one step before it; None where no loss is known."""
    known = [
        (loss, step) for step, loss, _, _ in rows if loss is not None and span_of(step) == span
    ]
    if not known:
        return None
    low, high = min(known), max(known)
    rates = {(mlp, attention) for _, _, mlp, attention in rows} - {(None, None)}
    return MetricSpanRow(
        job_id=job_id,
        span=span,
        low_step=low[1],
        low_loss=low[0],
        high_step=high[1],
        high_loss=high[0],
        changes=len(rates) > 1,
    )

"""Few rows of a long run, found without reading it, are those that reading it would find worth showing."""

from __future__ import annotations

from typing import Any

from jobs.measures import READ_WHOLE
from jobs.store import Store

from .test_store import add_job, step, training

STEPS = 2 * READ_WHOLE


def fall(number: int) -> float:
    return 0.5 if number < 2500 else 0.25


def loss(number: int) -> float:
    return 99.0 if number == 3001 else 2 + number % 7 / 100


def evaluation(number: int) -> dict[str, Any]:
    figures = {"eval_loss": 1.0, "eval_token_accuracy": 0.5, "tokens": 1}
    return {"seq": number, "time": 1.0, "kind": "evaluation", "step": number, **figures}


def test_a_long_run_keeps_its_spike_evaluations_fall_and_ends(store: Store) -> None:
    job = add_job(store)
    claim = training(store)
    for first in range(1, STEPS + 1, 500):
        lot = [
            step(n, loss=loss(n), omission_rate_mlp=fall(n))
            for n in range(first, min(first + 500, STEPS + 1))
        ]
        store.record(claim, lot, run="r", read_position=first)
    # A spike that a crash took back is not shown.
    store.record(claim, [step(700, loss=500.0)], run="r", read_position=1)
    store.record(
        claim, [step(700, loss=loss(700), omission_rate_mlp=0.5)], run="r", read_position=1
    )
    store.record(claim, [evaluation(n) for n in (0, 1111, STEPS)], run="r", read_position=1)

    columns, rows, measured = store.thinned_metrics("default", job.id, max_rows=100)
    at = columns.index("step")
    steps = [row[at] for row in rows]
    assert steps == sorted(set(steps))
    assert len(steps) < 120
    assert measured == STEPS + 1
    assert {0, 1111, 2499, 2500, 3001, STEPS} <= set(steps)
    assert max(row[columns.index("loss")] or 0 for row in rows) == 99.0

    _, rest, measured = store.thinned_metrics("default", job.id, after_step=1300, max_rows=100)
    assert (rest[0][at], rest[-1][at], measured) == (1301, STEPS, STEPS - 1300)
    _, few, measured = store.thinned_metrics("default", job.id, after_step=STEPS - 5, max_rows=100)
    assert ([row[at] for row in few], measured) == (list(range(STEPS - 4, STEPS + 1)), 5)
    assert store.thinned_metrics("default", job.id, after_step=STEPS, max_rows=9)[1:] == ([], 0)
    assert sum(len(lot) for lot in store.each_metric("default", job.id)) == STEPS + 1

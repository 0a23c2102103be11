"""Fewer rows for a chart, and nothing that a person looks for is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jobs.thinning import thin

COLUMNS = ("step", "loss", "eval_loss", "omission_rate_mlp", "omission_rate_attention")


def rows(losses: list[float | None]) -> list[tuple]:
    n = len(losses)
    return [
        (i, loss, 1.0 if i % 500 == 0 else None, 0.5 if i < n // 2 else 0.25, 0.0)
        for i, loss in enumerate(losses)
    ]


def test_ten_thousand_rows_keep_a_spike_the_evaluations_and_the_fall_of_the_rate():
    losses: list[float | None] = [2.0 + i % 7 / 100 for i in range(10_000)]
    losses[7321] = 99.0
    kept = thin(COLUMNS, rows(losses), 2000)
    steps = [row[0] for row in kept]
    assert len(kept) <= 2050
    assert steps == sorted(set(steps))
    assert {0, 7321, 4999, 5000, 9999, 9500} <= set(steps)


@given(
    st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=1, max_size=300), st.integers(2, 50)
)
def test_kept_rows_are_measured_rows_with_both_ends_and_extremes(losses, most):
    given_rows = rows(losses)
    kept = thin(COLUMNS, given_rows, most)
    assert set(kept) <= set(given_rows)
    assert (kept[0], kept[-1]) == (given_rows[0], given_rows[-1])
    known = [row[1] for row in given_rows if row[1] is not None]
    if known:
        found = [row[1] for row in kept if row[1] is not None]
        assert (min(found), max(found)) == (min(known), max(known))

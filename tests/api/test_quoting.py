"""Seconds and bytes from past runs: exact where a run repeats, wide where it does not, nothing where nothing is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from api.quoting import Rates, peak, phase_speedups, timed, whole_speedup
from jobs.quotes import PastRun, host_of

PHASES = [
    {"flops": 100, "dense_flops": 100, "omission_rate_mlp": 0.0, "omission_rate_attention": 0.0},
    {"flops": 60, "dense_flops": 100, "omission_rate_mlp": 0.5, "omission_rate_attention": 0.0},
]
CONFIG = {"shape": {"hidden": 8}, "batch_size": 4}
FIGURES = {"longest": 33}
# A configuration of another release cannot be read, so its FLOPs count alike: the rate is seconds over FLOPs.
RUN = PastRun(
    job_id="ftjob-1",
    config=CONFIG,
    figures=FIGURES,
    summary={"training_seconds": 16.0, "flops": 160, "dense_flops": 200, "steps": 10},
    host="here",
    memory_bytes=1000,
)


def result(**more: Any) -> dict[str, Any]:
    flops = {"sat": 160, "dense": 200, "probe": 0, "ratio": 0.8}
    quote = {"phases": PHASES, "flops": flops, "memory_bytes": {"peak": 500}}
    prepared = {"config": CONFIG, "figures": FIGURES, "quote": quote, "hardware": {"host": "here"}}
    return prepared | more


def took(seconds: float) -> PastRun:
    return replace(RUN, summary=RUN.summary | {"training_seconds": seconds})


def test_nothing_known_is_no_time():
    assert timed(result(), []).seconds is None
    assert timed(result(), [replace(RUN, host="there")]).seconds is None


def test_the_same_run_takes_as_long_as_it_took():
    found = timed(result(), [RUN])
    assert found.calibrated
    assert found.seconds == pytest.approx((16 / 1.5, 16, 16 * 1.5))
    assert found.errors == ()


def test_past_quotes_are_judged_by_the_runs_before_them():
    found = timed(result(), [took(20), took(16), took(16)])
    assert found.errors == pytest.approx((16 / 20 - 1, 0.0))
    low, expected, high = found.seconds or (0, 0, 0)
    assert (low, expected, high) == pytest.approx((16 / 1.15, 16, 20 * 1.15))


def test_another_shape_gives_a_wide_range():
    other = replace(RUN, config=CONFIG | {"batch_size": 8})
    found = timed(result(), [other])
    assert not found.calibrated
    assert found.seconds == pytest.approx((16 / 3, 16, 48))
    assert not timed(result(figures={"longest": 41}), [RUN]).calibrated
    assert timed(result(figures={"longest": 40}), [RUN]).calibrated, "padded to the same width"


def test_a_run_that_measured_nothing_is_left_out():
    assert timed(result(), [took(0)]).seconds is None


def test_a_speedup_is_said_only_where_both_rates_are_known():
    both = Rates(dense=1.0, sparse=1.25)
    assert phase_speedups(PHASES, both) == pytest.approx([1.0, 100 / 75])
    assert whole_speedup(PHASES, both) == pytest.approx(200 / 175)
    assert phase_speedups(PHASES, Rates(dense=1.0, sparse=None)) == [1.0, None]
    assert whole_speedup(PHASES, Rates(dense=1.0, sparse=None)) is None
    assert whole_speedup(PHASES, None) is None


def test_a_measured_peak_replaces_the_counted_one():
    assert peak(result(), []) == (False, pytest.approx((350, 500, 750)))
    assert peak(result(), [RUN]) == (True, pytest.approx((950, 1000, 1050)))
    assert peak(result(), [replace(RUN, memory_bytes=None)])[0] is False


def test_the_host_of_a_worker_may_hold_dashes():
    assert host_of("gpu-node-7-4242-abc123") == "gpu-node-7"

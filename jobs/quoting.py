"""From FLOPs to seconds and from counted bytes to a peak, by what past runs took.

A run is two rates: seconds per FLOP of its dense steps and of its sparse ones, which are slower, since what sleeps saves
products but no traffic around them. Beside them it takes some seconds once a phase, however long that is: to warm up, to
choose who is awake, to move weights. Runs of the same shape, width, batch and host give both; runs of other shapes on the
host give a wide range; without any there is no time at all, because a number from a data sheet would be taken for one.
What was said before a run is kept with it, so how good such quotes are is shown by what they came to.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.quotes import PastRun

SAME = (
    "shape",
    "batch_size",
    "micro_batch_size",
    "tuning",
    "precision",
    "optimizer",
    "gradient_checkpointing",
    "compile",
    "sharding",
)
# How far one run may be off the next, several of the same from each other, and other shapes from this one.
ONE_RUN, SEVERAL_RUNS, OTHER_SHAPES = 1.5, 1.15, 3.0
MEMORY_MEASURED, MEMORY_ANALYTIC = (0.95, 1.05), (0.7, 1.5)
# Fewer tell of the machine's moods rather than of sparse steps.
SPARSE_STEPS = 10

Span = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds per FLOP, and seconds that the beginning of a phase takes more than a step.

    `sparse` is None where a run had too few sparse steps that could be told apart.
    """

    dense: float
    sparse: float | None
    begin: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A time in seconds as (low, expected, high), and what it stands on."""

    calibrated: bool
    seconds: Span | None
    rates: Rates | None
    errors: tuple[float, ...]
    runs: int


def said(prepared: dict[str, Any], past: Sequence[PastRun]) -> dict[str, Any]:
    """What is kept with a job of what it was expected to take, as plain data; spans are (low, expected, high).

    `prepared` is what `prepare` left: its config, what it counted (`quote`) and the `hardware` of the host.
    """
    time = timed(prepared, past)
    measured, peak_bytes = peak(prepared, past)
    return {
        "calibrated": time.calibrated,
        "seconds": time.seconds,
        "joules": joules(prepared, past, time),
        "peak_bytes": peak_bytes,
        "peak_measured": measured,
    }


def timed(prepared: dict[str, Any], past: Sequence[PastRun]) -> Timed:
    """How long the training steps of a prepared run will take, by `past` runs, newest first."""
    here = [run for run in past if run.host == prepared["hardware"]["host"] and _measured(run)]
    same = _same(prepared, here)
    phases = prepared["quote"]["phases"]
    if same:
        found = [_rates(run) for run in same]
        rates = _typical(found)
        seconds = sorted(_seconds(phases, each) for each in found)
        slack = ONE_RUN if len(seconds) == 1 else SEVERAL_RUNS
        span = (seconds[0] / slack, _seconds(phases, rates), seconds[-1] * slack)
        return Timed(
            calibrated=True, seconds=span, rates=rates, errors=_errors(same), runs=len(same)
        )
    if not here:
        return Timed(calibrated=False, seconds=None, rates=None, errors=(), runs=0)
    flops = prepared["quote"]["flops"]["sat"]
    overall = sorted(flops * _overall(run) for run in here)
    span = (
        overall[0] / OTHER_SHAPES,
        statistics.geometric_mean(overall),
        overall[-1] * OTHER_SHAPES,
    )
    return Timed(calibrated=False, seconds=span, rates=None, errors=(), runs=len(here))


def peak(prepared: dict[str, Any], past: Sequence[PastRun]) -> tuple[bool, Span]:
    """Whether the peak was measured, and its (low, expected, high) in bytes."""
    here = [run for run in past if run.host == prepared["hardware"]["host"]]
    measured = [run.memory_bytes for run in _same(prepared, here) if run.memory_bytes]
    if measured:
        low, high = MEMORY_MEASURED
        return True, (min(measured) * low, statistics.median(measured), max(measured) * high)
    counted = prepared["quote"]["memory_bytes"]["peak"]
    low, high = MEMORY_ANALYTIC
    return False, (counted * low, counted, counted * high)


def joules(prepared: dict[str, Any], past: Sequence[PastRun], time: Timed) -> float | None:
    """What its GPUs will spend, at the power of the same runs before; None where no meter has told of any."""
    if not time.calibrated or time.seconds is None:
        return None
    here = [run for run in past if run.host == prepared["hardware"]["host"] and _measured(run)]
    watts = [
        run.energy_joules / run.summary["training_seconds"]
        for run in _same(prepared, here)
        if run.energy_joules is not None
    ]
    return statistics.median(watts) * time.seconds[1] if watts else None


def phase_speedups(phases: Sequence[dict[str, Any]], rates: Rates | None) -> list[float | None]:
    """What each phase is worth in time against the same steps dense, where runs have told both rates."""
    if rates is None:
        return [None] * len(phases)
    return [
        None
        if _sparse(p) and rates.sparse is None
        else _bounded([p], p["dense_flops"] * rates.dense / _steady_seconds([p], rates))
        for p in phases
    ]


def whole_speedup(phases: Sequence[dict[str, Any]], rates: Rates | None) -> float | None:
    """What the run is worth in time against the same run dense."""
    if None in phase_speedups(phases, rates) or rates is None:
        return None
    dense = float(sum(p["dense_flops"] for p in phases)) * rates.dense + rates.begin
    return _bounded(phases, dense / _seconds(phases, rates))


def _bounded(phases: Sequence[dict[str, Any]], speedup: float) -> float:
    """At most what the FLOPs allow, whatever a few steps of a busy machine have told."""
    dense, spent = (sum(p[name] for p in phases) for name in ("dense_flops", "flops"))
    return min(speedup, float(dense / spent))


def _same(prepared: dict[str, Any], runs: Sequence[PastRun]) -> list[PastRun]:
    """Those whose steps cost what a step of this one will, but for who is awake."""
    key = _key(prepared["config"], prepared["quote"])
    return [run for run in runs if _key(run.config, run.quote) == key]


def _key(config: dict[str, Any], quote: dict[str, Any]) -> tuple[Any, ...]:
    return (*(config.get(name) for name in SAME), quote["width"])


def _measured(run: PastRun) -> bool:
    return all((run.summary.get(name) or 0) > 0 for name in ("training_seconds", "flops", "steps"))


def _overall(run: PastRun) -> float:
    return float(run.summary["training_seconds"] / run.summary["flops"])


def _split(run: PastRun) -> tuple[float, float]:
    """FLOPs of the run's dense and of its sparse steps; a guard may have made fewer sparse than planned."""
    flops = float(run.summary["flops"])
    planned = sum(p["flops"] for p in run.quote["phases"] if not _sparse(p))
    of_dense = min(flops, float(planned))
    return of_dense, flops - of_dense


def _rates(run: PastRun) -> Rates:
    summary = run.summary
    seconds, dense_run = summary["training_seconds"], summary.get("dense_seconds_estimate")
    of_dense, of_sparse = _split(run)
    dense = dense_run / summary["dense_flops"] if dense_run else _overall(run)
    if not of_sparse:
        return Rates(dense=dense, sparse=None, begin=max(0.0, seconds - dense * of_dense))
    sparse = summary.get("sparse_seconds_per_flop")
    if not (dense_run and sparse and _sparse_steps(run) >= SPARSE_STEPS):
        return Rates(dense=_overall(run), sparse=None)
    once = seconds - dense * of_dense - sparse * of_sparse
    return Rates(dense=dense, sparse=sparse, begin=max(0.0, once) / len(run.quote["phases"]))


def _sparse_steps(run: PastRun) -> float:
    """Steps at its highest rates that its sparse ones come to; a guard may have ended them early."""
    found = [0.0]
    for kind in ("mlp", "attention"):
        highest = max(phase[f"omission_rate_{kind}"] for phase in run.quote["phases"])
        if highest:
            mean = run.summary.get(f"mean_omission_rate_{kind}") or 0.0
            found.append(run.summary["steps"] * mean / highest)
    return max(found)


def _typical(found: Sequence[Rates]) -> Rates:
    """The middle of each; sparse beside dense as the same run had them, since the next one's machine may have been slower."""
    dense = statistics.median(rates.dense for rates in found)
    ratios = [rates.sparse / rates.dense for rates in found if rates.sparse is not None]
    return Rates(
        dense=dense,
        sparse=dense * statistics.median(ratios) if ratios else None,
        begin=statistics.median(rates.begin for rates in found),
    )


def _sparse(phase: dict[str, Any]) -> bool:
    return bool(phase["omission_rate_mlp"] > 0 or phase["omission_rate_attention"] > 0)


def _seconds(phases: Sequence[dict[str, Any]], rates: Rates) -> float:
    return _steady_seconds(phases, rates) + len(phases) * rates.begin


def _steady_seconds(phases: Sequence[dict[str, Any]], rates: Rates) -> float:
    sparse = rates.dense if rates.sparse is None else rates.sparse
    return float(sum(p["flops"] * (sparse if _sparse(p) else rates.dense) for p in phases))


def _errors(same: Sequence[PastRun]) -> tuple[float, ...]:
    """How far off what was said of each was, newest first, as a share of what it took."""
    return tuple(
        run.quote["said"]["seconds"][1] / run.summary["training_seconds"] - 1
        for run in same
        if run.quote["said"]["calibrated"]
    )

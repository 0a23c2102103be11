"""An estimate for people: what a job would do and take, in a dozen lines."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

GIB = 2**30


def described(estimate: dict[str, Any]) -> Table:
    """The table of a ready estimate; what is not known is said to be so."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    data, flops, speedup = estimate["data"], estimate["flops"], estimate["speedup"]
    table.add_row("steps", f"{data['steps']:,} on {data['sequences']:,} sequences")
    table.add_row("tokens", f"{data['trained_tokens']:,} trained in all")
    if data["truncated_rows"]:
        cut = f"{data['truncated_rows']:,} of {data['rows']:,} rows, {data['truncated_tokens']:,} tokens"
        table.add_row("cut off", cut)
    table.add_row(
        "FLOPs", f"{flops['sat']:.3g}, {flops['ratio']:.1%} of {flops['dense']:.3g} dense"
    )
    expected = speedup["expected"]
    said = f"{expected:.2f}x expected" if expected else "not measured yet"
    table.add_row("speed-up", f"{said}, bound {speedup['flop_bound']:.2f}x")
    table.add_row("time", _time(estimate["time"]))
    if queue := estimate["time"]["queue_seconds"]:
        table.add_row(
            "wait", f"{queue['low']:,.0f} to {queue['high']:,.0f} s for a slot to train in"
        )
    table.add_row("memory", _memory(estimate["memory"]))
    if joules := estimate["energy"]["joules"]:
        table.add_row("energy", f"{joules / 3.6e6:.2f} kWh")
    for warning in estimate["warnings"]:
        table.add_row("warning", escape(warning))
    return table


def _time(time: dict[str, Any]) -> str:
    seconds = time["seconds"]
    if seconds is None:
        return "not known: nothing has been trained here yet"
    said = f"{seconds['expected']:,.0f} s ({seconds['low']:,.0f} to {seconds['high']:,.0f}), {time['basis']}"
    if error := time["past_error"]:
        said += f"; {error['quotes']} past quotes were off by {error['mean_absolute']:.0%}"
    return said


def _memory(memory: dict[str, Any]) -> str:
    peak = memory["peak"]
    words = {True: "fits", False: "does not fit", None: "may not fit"}[memory["fits"]]
    return f"{peak['expected'] / GIB:.2f} GiB ({peak['low'] / GIB:.2f} to {peak['high'] / GIB:.2f}), {words}"

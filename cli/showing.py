"""Events and metrics as lines: each stands by itself, so a pipe and a terminal get the same."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.markup import escape

METRIC_KEYS = (
    "step",
    "loss",
    "eval_loss",
    "learning_rate",
    "omission_rate_mlp",
    "omission_rate_attention",
    "tokens_per_second",
)
_LEVELS = {"info": "", "warn": "[yellow]warning[/] ", "error": "[red]error[/] "}
_WIDTH = 11
_SHORT = {
    "omission_rate_mlp": "mlp rate",
    "omission_rate_attention": "attn rate",
    "learning_rate": "learn rate",
    "tokens_per_second": "tokens/s",
}


def event_line(event: dict[str, Any]) -> str:
    """One event with the local time, in rich's markup."""
    at = datetime.fromtimestamp(event["created_at"]).astimezone()
    return f"[dim]{at:%Y-%m-%d %H:%M:%S}[/] {_LEVELS[event['level']]}{escape(event['message'])}"


def metric_header(columns: list[str]) -> str:
    """The names above the columns."""
    return " ".join(f"{_SHORT.get(name, name):>{_WIDTH}}" for name in columns)


def metric_line(row: dict[str, Any], columns: list[str]) -> str:
    """One row, right-aligned; what was not measured is a dash."""
    return " ".join(
        f"{_figure(row[name]):>{max(_WIDTH, len(_SHORT.get(name, name)))}}" for name in columns
    )


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else f"{value}"

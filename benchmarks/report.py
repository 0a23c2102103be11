"""What the benchmarks say and how: figures with their bars, the machine they are from, one table, one form of JSON.

A figure without the machine, the versions and the commit it is from says nothing, so `write` always adds them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and date of this run; `-dirty` marks sources that no commit holds."""
    import torch  # here, so that a benchmark that needs no torch can write its table without

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "system": f"{platform.system()} {platform.release()}",
        },
        "commit": (_git("rev-parse", "HEAD") or "unknown") + ("-dirty" if changed else ""),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def figure(
    name: str, value: float, unit: str, bar: float | None = None,
    better: Literal["higher", "lower"] = "higher", spread: tuple[float, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One measured number; `spread` is the smallest and the largest of what `value` is the median of."""
    met = None if bar is None else bool(value >= bar if better == "higher" else value <= bar)
    told = {"name": name, "value": value, "unit": unit, "bar": bar, "better": better, "met": met}
    return {**told, "spread": None if spread is None else list(spread)}


def median(name: str, values: Sequence[float], unit: str, bar: float | None = None, better: Literal["higher", "lower"] = "higher") -> dict[str, Any]:  # fmt: skip
    """The median as a figure, with its spread."""
    return figure(name, statistics.median(values), unit, bar, better, (min(values), max(values)))


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Markdown that reads well on a terminal, too."""
    head = ("figure", "measured", "spread", "bar", "met")
    rows = [head, *(_cells(f) for f in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]  # fmt: skip
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write(path: Path, name: str, figures: Sequence[dict[str, Any]], **more: Any) -> None:
    """Figures, environment and whatever is in `more`; `more["versions"]` is added to the versions."""
    found = environment()
    found["versions"] |= more.pop("versions", {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "figures": list(figures), **found, **more}, indent=1) + "\n")  # fmt: skip


class Rows:
    """Rows of a JSON Lines file, which long benchmarks add to as they go and never make twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def _cells(figure: dict[str, Any]) -> tuple[str, str, str, str, str]:
    unit, bar, spread = figure["unit"], figure["bar"], figure["spread"]
    sign = ">=" if figure["better"] == "higher" else "<="
    return (
        figure["name"],
        f"{_number(figure['value'])} {unit}".strip(),
        "" if spread is None else f"{_number(spread[0])} to {_number(spread[1])}",
        "" if bar is None else f"{sign} {_number(bar)}",
        {None: "", True: "yes", False: "NO"}[figure["met"]],
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    return found.stdout.strip() if found.returncode == 0 else ""


def _cpu_model() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())

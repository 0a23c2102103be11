"""The verdict on a file for people: what it holds, and every error by its place, in the form that editors jump to."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli.client import FAILED, USAGE

VERDICTS = {
    "valid": "[green]valid[/]",
    "valid_with_warnings": "[yellow]valid, with warnings[/]",
    "invalid": "[red]not usable[/]",
    "failed": "[red]could not be validated[/]",
}
# A file that would be refused ends like one that was; 1 says that nothing could be found out.
EXIT_CODES = {"valid": 0, "valid_with_warnings": 0, "invalid": USAGE, "failed": FAILED}


def show(report: dict[str, Any], name: str, out: Console) -> None:
    """Print a report that has an end."""
    out.print(f"{escape(name)}: {VERDICTS[report['status']]}", highlight=False, soft_wrap=True)
    out.print(_figures(report))
    for warning in report["warnings"]:
        out.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)
    for error in report["errors"]:
        place = f"{name}:{error['line']}" + (f" {error['pointer']}" if error["pointer"] else "")
        out.print(
            f"{escape(place)}: [red]{error['code']}[/] {escape(error['message'])}",
            highlight=False,
            soft_wrap=True,
        )
    if report["has_more"]:
        more = report["error_count"] - len(report["errors"])
        out.print(f"... and {more} more errors", highlight=False)
    if report["error"]:
        out.print(escape(report["error"]["message"]), highlight=False, soft_wrap=True)
    for suggestion in report["suggestions"] or []:
        out.print(escape(suggestion), style="dim", highlight=False, soft_wrap=True)


def _figures(report: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("rows", f"{report['rows'] or 0:,} of format {report['format']}")
    if report["duplicates"]:
        table.add_row("repetitions", f"{report['duplicates']:,}")
    if report["overlap_with"]:
        table.add_row("in both files", f"{report['overlap_with']['rows']:,}")
    if tokens := report["tokens"]:
        row = tokens["per_row"]
        table.add_row(
            "tokens", f"{tokens['total']:,}, of which {tokens['trained']:,} are trained on"
        )
        table.add_row(
            "in a row", f"{row['p50']:,} median, {row['p95']:,} p95, {row['max']:,} at most"
        )
        table.add_row(
            "cut off", f"{report['truncated_rows']:,} rows at {report['seq_len']:,} tokens"
        )
        table.add_row("left out", f"{report['empty_targets']:,} rows without a trained token")
    return table

"""Following a job on a terminal: one live line, then what came of it. Without a terminal, a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.client import Client
from cli.tailing import looks

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

# The clock beside the bar moves at least this often.
LOOK_S = 1.0
PLAIN_LINE_S = 10.0
# Columns of a terminal from which on a name and a clock fit beside the figures.
WIDE = 120


def follow(
    client: Client,
    job_id: str,
    console: Console,
    *,
    title: str | None = None,
    tend: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Show progress until the job ends; the job as it ended. `tend` is called at every look."""
    label = title or job_id
    figures_column = TextColumn("{task.fields[figures]}", markup=False)
    columns: tuple[ProgressColumn, ...] = (BarColumn(bar_width=8), figures_column)
    if console.width >= WIDE:
        name = TextColumn("[bold]{task.fields[label]}[/]")
        columns = (name, BarColumn(bar_width=24), figures_column, TimeElapsedColumn())
    job, spoken = dict[str, Any](), -PLAIN_LINE_S
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None, label=label, figures="")
        for job in looks(client, job_id, wait_s=LOOK_S):
            tend()
            figures = describe(job)
            if job["progress"] and job["progress"]["total_steps"]:
                progress.update(
                    task, total=job["progress"]["total_steps"], completed=job["progress"]["step"]
                )
            progress.update(task, figures=figures)
            if not console.is_terminal and time.monotonic() - spoken > PLAIN_LINE_S:
                spoken = time.monotonic()
                console.print(f"{label}: {figures}", markup=False, highlight=False)
    return job


def describe(job: dict[str, Any]) -> str:
    """What a job is doing, in one line."""
    progress = job["progress"]
    if job["status"] == "failed":
        return str(job["error"]["message"])
    if job["status"] != "running" or not progress or not progress["step"]:
        detail = job["status_detail"]
        return str(detail["message"] or detail["state"].replace("_", " "))
    parts = [f"step {progress['step']}/{progress['total_steps']}"]
    if progress["loss"] is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    rates = [progress["omission_rate_mlp"] or 0, progress["omission_rate_attention"] or 0]
    parts.append(f"omitted {rates[0]:.0%} MLP" + (f", {rates[1]:.0%} heads" if rates[1] else ""))
    if progress["tokens_per_second"]:
        parts.append(f"{progress['tokens_per_second']:,.0f} tokens/s")
    if progress["eta_seconds"] is not None:
        parts.append(f"{clock(progress['eta_seconds'])} left")
    return " · ".join(parts)


def report(job: dict[str, Any], console: Console) -> None:
    """What came of a job: the held-out loss, the price beside dense, the samples, where the model lies."""
    if job["status"] == "failed":
        console.print(
            f"[red]failed[/] {job['id']}: {escape(job['error']['message'])}", highlight=False
        )
        return
    found = job["report"]
    if job["status"] != "succeeded" or not found:
        console.print(f"{job['status']} {job['id']}", highlight=False)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    before, after = found["eval_loss_before"], found["eval_loss_after"]
    if before is not None and after is not None:
        table.add_row("held-out loss", f"{before:.3f} → [bold]{after:.3f}[/]")
        accuracy = found["eval_token_accuracy_before"], found["eval_token_accuracy_after"]
        table.add_row("token accuracy", f"{accuracy[0]:.1%} → {accuracy[1]:.1%}")
    rates = found["mean_omission_rate_mlp"], found["mean_omission_rate_attention"]
    table.add_row("mean omission rate", f"{rates[0]:.2f} MLP, {rates[1]:.2f} attention")
    dense = found["dense_seconds_estimate"]
    beside = (
        f" (dense, from its own dense steps: {dense:.1f} s, {dense / found['training_seconds']:.2f}x)"
        if dense
        else ""
    )
    table.add_row("training time", f"{found['training_seconds']:.1f} s{beside}")
    table.add_row(
        "FLOPs",
        f"{found['flops']:.3g} ({found['flops'] / found['dense_flops']:.0%} of dense {found['dense_flops']:.3g})",
    )
    table.add_row("trained on", f"{found['trained_tokens']:,} tokens in {found['steps']} steps")
    table.add_row("model", f"{job['fine_tuned_model']}")
    if found.get("model_path"):
        table.add_row("", str(found["model_path"]))
    console.print(table)
    for sample in found["samples"]:
        for name in ("prompt", "before", "after"):
            console.print(
                f"  {name:<7} {sample[name]!r}", markup=False, highlight=False, soft_wrap=True
            )


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Jobs that are there: list, show, watch, wait, pause, resume, cancel, logs, metrics."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cli import job_file
from cli.client import TERMINAL, USAGE, Client, CliError, Connection
from cli.console import emit, emit_line, err, leaving, out, say
from cli.options import HERE, DataDir, JobId, Json, JsonLines, known_jobs
from cli.showing import METRIC_KEYS, event_line, metric_header, metric_line
from cli.tailing import events, looks, metrics
from cli.watching import describe, follow, report

app = typer.Typer()

Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Go on until the job ends, with its exit code.")
]


@app.command("list")
def list_jobs(
    data_dir: DataDir = HERE,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many at most.")] = 20,
    status: Annotated[str | None, typer.Option(help="Only jobs of this status.")] = None,
    as_json: Json = False,
) -> None:
    """The newest jobs."""
    wanted = {"limit": limit, **({"status": status} if status else {})}
    jobs = Client(Connection.find(data_dir)).jobs(**wanted)
    if as_json:
        emit(jobs)
        return
    if not jobs:
        none = "No jobs yet. `satune submit --help` tells how to make one."
        say(f"No job is {status}." if status else none)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("job", "status", "model", "progress"):
        table.add_column(title, no_wrap=title in ("job", "status"))
    for job in jobs:
        table.add_row(job["id"], job["status"], escape(job["model"]), escape(describe(job)))
    out.print(table)


@app.command()
def show(
    job_id: JobId,
    config: Annotated[
        bool,
        typer.Option(
            "--config",
            help="Its create body as YAML, every default stated, as `submit` takes it; with --json also what it resolved.",
        ),
    ] = False,
    data_dir: DataDir = HERE,
    as_json: Json = False,
) -> None:
    """A job as it stands now."""
    client = Client(Connection.find(data_dir))
    if config:
        found = client.config(job_id)
        if as_json:
            emit(found)
        else:
            typer.echo(job_file.written(found["body"]), nl=False)
        return
    job = client.job(job_id)
    if as_json:
        emit(job)
        return
    _say_status(job)
    if job["status"] == "succeeded":
        report(job, out)


@app.command()
def watch(job_id: JobId, data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """Follow a job to its end.

    The exit code is the job's. Ctrl-C leaves it running.
    """
    watched(Client(Connection.find(data_dir)), job_id, as_json=as_json)


@app.command()
def wait(
    job_ids: Annotated[
        list[str], typer.Argument(metavar="JOB", help="Ids of jobs.", autocompletion=known_jobs)
    ],
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which to give up, with status 124.")
    ] = None,
    data_dir: DataDir = HERE,
    as_json: JsonLines = False,
) -> None:
    """Wait until jobs have ended.

    The exit code is that of the first that did not succeed. Ctrl-C leaves them running.
    """
    client = Client(Connection.find(data_dir))
    until = None if timeout is None else time.monotonic() + timeout
    codes = []
    with leaving():
        for job_id in job_ids:
            job = _ended(client, job_id, until)
            codes.append(TERMINAL[job["status"]])
            emit_line(job) if as_json else out.print(f"{job_id} {job['status']}", highlight=False)
    raise typer.Exit(next((code for code in codes if code), 0))


@app.command()
def logs(
    job_id: JobId,
    follow: Follow = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", min=1, max=100, help="Only the last of it.")
    ] = None,
    data_dir: DataDir = HERE,
    as_json: JsonLines = False,
) -> None:
    """What was told of a job, oldest first."""
    client = Client(Connection.find(data_dir))
    with leaving():
        for event in events(client, job_id, tail=tail, follow=follow):
            emit_line(event) if as_json else out.print(
                event_line(event), highlight=False, soft_wrap=True
            )
    _end(client, job_id, follow)


@app.command("metrics")
def show_metrics(
    job_id: JobId,
    follow: Follow = False,
    after: Annotated[int, typer.Option(min=-1, help="Only steps above this one.")] = -1,
    keys: Annotated[
        str | None, typer.Option(help="Columns, as in loss,eval_loss. JSON has all without it.")
    ] = None,
    data_dir: DataDir = HERE,
    as_json: JsonLines = False,
) -> None:
    """What was measured at each step.

    A table has a few columns, JSON all of them.
    """
    client = Client(Connection.find(data_dir))
    chosen = [key.strip() for key in keys.split(",")] if keys else None
    columns = chosen or list(METRIC_KEYS)
    began = False
    with leaving():
        for row in metrics(client, job_id, after=after, follow=follow):
            unknown = [key for key in columns if key not in row]
            if unknown:
                raise CliError(
                    f"There is no column {unknown[0]!r}; there are {', '.join(row)}.", USAGE
                )
            if as_json:
                emit_line({key: row[key] for key in chosen} if chosen else row)
                continue
            if not began:
                began = True
                typer.echo(metric_header(columns))
            typer.echo(metric_line(row, columns))
    if not began and not as_json:
        say("Nothing was measured.")
    _end(client, job_id, follow)


@app.command()
def pause(job_id: JobId, data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """Pause a job.

    It ends its current step and writes a checkpoint; its slot is free then.
    """
    _ask(job_id, "pause", data_dir, as_json=as_json)


@app.command()
def resume(job_id: JobId, data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """Let a paused job go on from its newest checkpoint."""
    _ask(job_id, "resume", data_dir, as_json=as_json)


@app.command()
def cancel(job_id: JobId, data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """End a job; what it has saved stays."""
    _ask(job_id, "cancel", data_dir, as_json=as_json)


def watched(client: Client, job_id: str, *, as_json: bool) -> None:
    """Follow a job, print what came of it, and end with its exit code."""
    with leaving(f"watch {job_id}"):
        job = follow(client, job_id, err)
    emit(job) if as_json else report(job, out)
    raise typer.Exit(TERMINAL[job["status"]])


def _ended(client: Client, job_id: str, until: float | None) -> dict[str, Any]:
    """The job, once it has ended; one that is paused does not end by itself, and that is said."""
    job: dict[str, Any] = {}
    for look in looks(client, job_id, until=until):
        if look["status"] == "paused" != job.get("status"):
            say(f"{job_id} is paused; `satune resume {job_id}` lets it go on.")
        job = look
    return job


def _end(client: Client, job_id: str, follow: bool) -> None:
    """The exit code of a job that was followed."""
    if follow:
        raise typer.Exit(TERMINAL[client.job(job_id)["status"]])


def _ask(job_id: str, wish: str, data_dir: DataDir, *, as_json: bool) -> None:
    job = Client(Connection.find(data_dir)).ask(job_id, wish)
    emit(job) if as_json else _say_status(job)


def _say_status(job: dict[str, Any]) -> None:
    line = f"{job['id']} {job['status']}: {describe(job)}"
    out.print(line, markup=False, highlight=False, soft_wrap=True)

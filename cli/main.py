"""The commands. Data goes to standard output, all else to standard error; --json prints what the API answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli import demo as demonstration
from cli import validating
from cli.client import FAILED, TERMINAL, USAGE, Client, CliError, Connection
from cli.doctor import examine
from cli.estimating import described
from cli.up import Service
from cli.watching import describe, follow, report

PIPE_COLUMNS = 160

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Managed sparse fine-tuning of language models.",
)
# A pipe has no width; the usual 80 columns would fold ids and paths that a script or a log wants whole.
err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPE_COLUMNS)
out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="SATUNE_DATA_DIR", help="The service's data folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="local/NAME, ORG/NAME of the hub, or a result ft:...")
]
DataSet = Annotated[
    Path, typer.Option("--dataset", "-d", help="JSON Lines, JSON array or text file.")
]
Held = Annotated[
    Path | None,
    typer.Option("--validation", help="Held-out file; else some rows are set aside."),
]
MlpRate = Annotated[
    float | None, typer.Option("--mlp", help="Omission rate of MLP channels, 0 to below 1.")
]
AttentionRate = Annotated[
    float | None, typer.Option("--attention", help="Omission rate of KV groups, 0 to below 1.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the body, as in sat.train.max_steps=200."),
]
HERE = Path("satune-data")


@app.command()
def up(
    data_dir: DataDir = HERE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
) -> None:
    """Run the service on this machine, with nothing to install beside Python."""
    with Service(data_dir, host=host, port=port, say=_say) as service:
        greet(service.start())
        service.watch()


@app.command()
def demo(
    data_dir: DataDir = HERE,
    start: Annotated[
        bool, typer.Option("--up", help="Start the service first, if none runs.")
    ] = False,
    port: Annotated[int, typer.Option(help="Port where --up starts one; 0 picks a free one.")] = 0,
) -> None:
    """Make a small model from Python's own documentation, and train it sparsely three times."""
    if not start:
        demonstration.run(Client(Connection.find(data_dir)), err)
        return
    with Service(data_dir, host="127.0.0.1", port=port, say=_say) as service:
        connection = service.start()
        greet(connection)
        demonstration.run(Client(connection), err, tend=service.tend)
        if sys.stdin.isatty() and err.is_terminal:
            err.print(
                f"\nStill serving at [link]{connection.dashboard_url}[/link]. Ctrl-C ends it.",
                soft_wrap=True,
            )
            service.watch()


@app.command()
def submit(
    model: Model,
    dataset: DataSet,
    validation: Held = None,
    mlp: MlpRate = None,
    attention: AttentionRate = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the result's name.")] = None,
    settings: Settings = None,
    data_dir: DataDir = HERE,
    watch_it: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Follow the job to its end.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Upload a data set, create a job, follow it."""
    client = Client(Connection.find(data_dir))
    body = _body(model, mlp, attention, settings)
    if suffix:
        body["suffix"] = suffix
    _upload(client, body, dataset, validation)
    job = client.create_job(body)
    if not watch_it:
        out.print_json(data=job) if as_json else out.print(job["id"], highlight=False)
        return
    err.print(
        f"{job['id']} on {client.connection.url}/jobs/{job['id']}", highlight=False, soft_wrap=True
    )
    _watch(client, job["id"], as_json=as_json)


@app.command()
def estimate(
    model: Model,
    dataset: DataSet,
    validation: Held = None,
    mlp: MlpRate = None,
    attention: AttentionRate = None,
    settings: Settings = None,
    data_dir: DataDir = HERE,
    as_json: Json = False,
) -> None:
    """Upload a data set and say what a job on it would do and take. No job is made; status 1 where it would fail."""
    client = Client(Connection.find(data_dir))
    body = _body(model, mlp, attention, settings)
    _upload(client, body, dataset, validation)
    found = client.estimate(body)
    if as_json:
        out.print_json(data=found)
    elif found["status"] == "ready":
        out.print(described(found))
    if found["status"] == "failed":
        raise CliError(found["error"]["message"], FAILED)


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="Data file.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Count what would be trained on, by this model's tokenizer."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="File to look for rows that stand in both.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="As sat.train.max_seq_len of a job.")
    ] = None,
    data_dir: DataDir = HERE,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a data file, and what of it would be trained on. Status 2 where it is not usable."""
    client = Client(Connection.find(data_dir))
    sent = []
    try:
        for path in (file, against):
            if path is not None:
                sent.append(client.upload(path, **{"sat[keep_invalid]": "true"})["id"])
        params = {"model": model, "max_seq_len": max_seq_len}
        given = {name: value for name, value in params.items() if value is not None}
        given |= {"against": sent[1]} if against else {}
        found = client.validation(sent[0], **given)
    finally:
        for file_id in sent:
            client.delete_file(file_id)
    out.print_json(data=found) if as_json else validating.show(found, str(file), out)
    raise typer.Exit(validating.EXIT_CODES[found["status"]])


@app.command()
def watch(job_id: str, data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """Follow a job to its end. Ctrl-C leaves the job running."""
    client = Client(Connection.find(data_dir))
    _watch(client, job_id, as_json=as_json)


@app.command("list")
def list_jobs(
    data_dir: DataDir = HERE,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: Json = False,
) -> None:
    """The newest jobs."""
    jobs = Client(Connection.find(data_dir)).jobs(limit)
    if as_json:
        out.print_json(data=jobs)
        return
    if not jobs:
        err.print("No jobs yet. `satune submit --help` tells how to make one.")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("job", "status", "model", "progress"):
        table.add_column(title, no_wrap=title in ("job", "status"))
    for job in jobs:
        table.add_row(job["id"], job["status"], escape(job["model"]), escape(describe(job)))
    out.print(table)


@app.command()
def cancel(job_id: str, data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """End a job; what it has saved stays."""
    job = Client(Connection.find(data_dir)).cancel(job_id)
    out.print_json(data=job) if as_json else out.print(
        f"{job['id']} {job['status']}", highlight=False
    )


@app.command()
def doctor(data_dir: DataDir = HERE, as_json: Json = False) -> None:
    """Say what this machine has, and whether a server answers."""
    checks = examine(data_dir)
    if as_json:
        out.print_json(data=[vars(check) for check in checks])
    else:
        for check in checks:
            out.print(
                f"{'[green]ok[/]  ' if check.ok else '[red]bad[/] '} {check.name}: {escape(check.found)}",
                highlight=False,
            )
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: errors become one line and an exit code."""
    try:
        app()
    except CliError as error:
        err.print(f"[red]error[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def greet(connection: Connection) -> None:
    """Say where the service is and how to sign in, as a notebook server does."""
    err.print(f"\nSatune is ready: {connection.url}/v1", highlight=False)
    err.print(f"key        {connection.api_key}", highlight=False, soft_wrap=True)
    err.print(f"dashboard  {connection.dashboard_url}\n", highlight=False, soft_wrap=True)


def _say(text: str) -> None:
    err.print(escape(text), style="dim", highlight=False, soft_wrap=True)


def _watch(client: Client, job_id: str, *, as_json: bool) -> None:
    try:
        job = follow(client, job_id, err)
    except KeyboardInterrupt:
        err.print(
            f"Left; the job goes on. `satune watch {job_id}` comes back to it.", highlight=False
        )
        raise typer.Exit(130) from None
    if as_json:
        out.print_json(data=job)
    else:
        report(job, out)
    raise typer.Exit(TERMINAL[job["status"]])


def _body(
    model: str, mlp: float | None, attention: float | None, settings: list[str] | None
) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model}
    for name, rate in (("mlp", mlp), ("attention", attention)):
        if rate is not None:
            _put(body, f"sat.omission_rate.{name}", rate)
    for item in settings or []:
        key, found, value = item.partition("=")
        if not found:
            raise CliError(
                f"--set {item!r} has no '='; write it as sat.train.max_steps=200.", USAGE
            )
        _put(body, key, _value(value))
    return body


def _upload(client: Client, body: dict[str, Any], dataset: Path, validation: Path | None) -> None:
    body["training_file"] = client.upload(dataset)["id"]
    if validation:
        body["validation_file"] = client.upload(validation)["id"]


def _put(body: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for name in path:
        body = body.setdefault(name, {})
        if not isinstance(body, dict):
            raise CliError(f"{dotted}: {name} already has a value.", USAGE)
    body[last] = value


def _value(text: str) -> Any:
    """A number, true, false, null or JSON where it reads as such, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()

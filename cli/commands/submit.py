"""Before a job and at its create: validate, estimate, submit, clone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import validating
from cli.body import apply_settings, placed_model, put, uploaded
from cli.client import FAILED, USAGE, Client, CliError, Connection
from cli.commands.jobs import watched
from cli.console import emit, err, out, warn
from cli.estimating import described
from cli.job_file import folder_of, read, written
from cli.options import (
    HERE,
    AttentionRate,
    DataDir,
    JobId,
    Json,
    MlpRate,
    Model,
    Settings,
    Watch,
)

app = typer.Typer()

JobFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE",
        help="The create body as YAML, or a file of Axolotl or LLaMA-Factory; - reads standard input.",
    ),
]
DataSet = Annotated[
    Path | None, typer.Option("--dataset", "-d", help="JSON Lines, JSON array or text file.")
]
Held = Annotated[
    Path | None,
    typer.Option("--validation", help="Held-out file; else some rows are set aside."),
]
Suffix = Annotated[str | None, typer.Option(help="Part of the result's name.")]
Lenient = Annotated[
    bool,
    typer.Option("--lenient", help="Leave out what another trainer's file says and Satune cannot."),
]


@app.command()
def submit(
    file: JobFile = None,
    model: Model = None,
    dataset: DataSet = None,
    validation: Held = None,
    mlp: MlpRate = None,
    attention: AttentionRate = None,
    suffix: Suffix = None,
    settings: Settings = None,
    lenient: Lenient = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the body as a job file; send nothing.")
    ] = False,
    data_dir: DataDir = HERE,
    watch_it: Watch = True,
    as_json: Json = False,
) -> None:
    """Upload data, create a job, follow it.

    FILE is the create body as YAML, or a file of Axolotl or LLaMA-Factory. Files and models it names are sent first. Options win over it.
    """
    body = _body(file, lenient, settings)
    _put_options(body, model=model, dataset=dataset, validation=validation, suffix=suffix)
    _put_rates(body, mlp, attention)
    if dry_run:
        emit(body) if as_json else typer.echo(written(body), nl=False)
        return
    _complete(body)
    client = Client(Connection.find(data_dir))
    with uploaded(client, body, _beside(file)) as asked:
        job = client.create_job(asked)
    _started(client, job, watch_it=watch_it, as_json=as_json)


@app.command()
def clone(
    job_id: JobId,
    dataset: DataSet = None,
    validation: Held = None,
    model: Model = None,
    mlp: MlpRate = None,
    attention: AttentionRate = None,
    suffix: Suffix = None,
    settings: Settings = None,
    data_dir: DataDir = HERE,
    watch_it: Watch = True,
    as_json: Json = False,
) -> None:
    """Start a job like another one, with changes.

    --set KEY=null takes a value back to its default.
    """
    client = Client(Connection.find(data_dir))
    changes: dict[str, Any] = {}
    apply_settings(changes, settings)
    _put_options(changes, model=model, dataset=dataset, validation=validation, suffix=suffix)
    _put_rates(changes, mlp, attention)
    with uploaded(client, changes, Path()) as asked:
        job = client.clone_job(job_id, asked)
    _started(client, job, watch_it=watch_it, as_json=as_json)


@app.command()
def estimate(
    file: JobFile = None,
    model: Model = None,
    dataset: DataSet = None,
    validation: Held = None,
    mlp: MlpRate = None,
    attention: AttentionRate = None,
    settings: Settings = None,
    lenient: Lenient = False,
    data_dir: DataDir = HERE,
    as_json: Json = False,
) -> None:
    """Say what a job would do and take.

    Takes what `submit` takes, and makes no job. The exit code is 1 where one would fail.
    """
    body = _body(file, lenient, settings)
    _put_options(body, model=model, dataset=dataset, validation=validation)
    _put_rates(body, mlp, attention)
    _complete(body)
    client = Client(Connection.find(data_dir))
    with (
        uploaded(client, body, _beside(file)) as asked,
        err.status("A worker counts and measures"),
    ):
        found = client.estimate(asked)
    if as_json:
        emit(found)
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
            "--model",
            "-m",
            help="Count what would be trained on, by this model's tokenizer; a name or a folder.",
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
    """Say what is wrong with a data file, and what of it would be trained on.

    The exit code is 2 where it is not usable.
    """
    client = Client(Connection.find(data_dir))
    if model is not None:
        model = placed_model(client.connection, model, Path())
    sent = []
    try:
        for path in (file, against):
            if path is not None:
                sent.append(client.upload(path, **{"sat[keep_invalid]": "true"})["id"])
        params = {"model": model, "max_seq_len": max_seq_len}
        given = {name: value for name, value in params.items() if value is not None}
        given |= {"against": sent[1]} if against else {}
        with err.status("A worker reads the rows"):
            found = client.validation(sent[0], **given)
    finally:
        for file_id in sent:
            client.delete_file(file_id)
    emit(found) if as_json else validating.show(found, str(file), out)
    raise typer.Exit(validating.EXIT_CODES[found["status"]])


def _body(file: Path | None, lenient: bool, settings: list[str] | None) -> dict[str, Any]:
    """What the job file says, changed by --set."""
    body: dict[str, Any] = {}
    if file is not None:
        body, warnings = read(file, lenient=lenient)
        for warning in warnings:
            warn(warning)
    apply_settings(body, settings)
    return body


def _put_options(
    body: dict[str, Any],
    *,
    model: str | None,
    dataset: Path | None,
    validation: Path | None,
    suffix: str | None = None,
) -> None:
    # A path that is typed is meant from here, not from beside the job file.
    paths = {"training_file": dataset, "validation_file": validation}
    given = {name: str(path.absolute()) for name, path in paths.items() if path is not None}
    named = {"model": model, "suffix": suffix}
    body |= given | {name: value for name, value in named.items() if value is not None}


def _put_rates(body: dict[str, Any], mlp: float | None, attention: float | None) -> None:
    for name, rate in (("mlp", mlp), ("attention", attention)):
        if rate is not None:
            put(body, f"sat.omission_rate.{name}", rate)


def _complete(body: dict[str, Any]) -> None:
    for name, option in (("model", "--model"), ("training_file", "--dataset")):
        if body.get(name) is None:
            raise CliError(f"{name} is missing: say it in the job file, or by {option}.", USAGE)


def _beside(file: Path | None) -> Path:
    return folder_of(file) if file is not None else Path()


def _started(client: Client, job: dict[str, Any], *, watch_it: bool, as_json: bool) -> None:
    if not watch_it:
        emit(job) if as_json else out.print(job["id"], highlight=False)
        return
    err.print(
        f"{job['id']} on {client.connection.url}/jobs/{job['id']}", highlight=False, soft_wrap=True
    )
    watched(client, job["id"], as_json=as_json)

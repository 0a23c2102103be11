"""Taking a model home."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

from cli.client import FAILED, NOT_NOW, Client, CliError, Connection
from cli.console import emit, err, leaving, out
from cli.downloading import fetch
from cli.options import HERE, DataDir, Json, known_jobs
from cli.tailing import patiently

app = typer.Typer()

POLL_S = 1.0


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="Id of a job, or the name of a model.", autocompletion=known_jobs
        ),
    ],
    form: Annotated[
        str, typer.Argument(metavar="FORMAT", help="safetensors, adapter or gguf.")
    ] = "safetensors",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File, or folder where there are several files."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    data_dir: DataDir = HERE,
    as_json: Json = False,
) -> None:
    """Bring a job's model home, in a form of choice.

    A download that was broken off goes on where it was; every file is checked by its hash.
    """
    client = Client(Connection.find(data_dir))
    body = {"model": model_of(client, source), "format": form, "dtype": dtype}
    with leaving():
        made = _made(client, body)
        paths = _paths(made, output)
        _fetch(client, made["id"], paths)
    if as_json:
        emit({**made, "files": [{**file, "path": str(path)} for file, path in paths]})
    else:
        for _, path in paths:
            out.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _made(client: Client, body: dict[str, str]) -> dict[str, Any]:
    """The export, once it has been made."""
    made = client.create_export(body)
    with err.status(f"{made['id']} is made"):
        while made["status"] not in ("succeeded", "failed"):
            time.sleep(POLL_S)
            made = patiently(partial(client.export, made["id"]))
    if made["status"] == "failed":
        raise CliError(made["error"]["message"], FAILED)
    return made


def _fetch(client: Client, export_id: str, paths: list[tuple[dict[str, Any], Path]]) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        for file, path in paths:
            task = progress.add_task(escape(file["name"]), total=file["bytes"])
            fetch(client, export_id, file, path, partial(_advance, progress, task))


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def model_of(client: Client, source: str) -> str:
    """The name of a model: the result of a job, or what was named. Raises CliError."""
    if not source.startswith("ftjob-"):
        return source
    job = client.job(source)
    if job["fine_tuned_model"] is None:
        raise CliError(f"{source} has no model: it is {job['status']}.", NOT_NOW)
    return str(job["fine_tuned_model"])


def _paths(made: dict[str, Any], output: Path | None) -> list[tuple[dict[str, Any], Path]]:
    """Each file and where it goes: into a folder, or alone under the name that was given."""
    files = made["files"]
    if len(files) == 1 and output is not None and not output.is_dir():
        return [(files[0], output)]
    folder = output or Path(made["id"])
    return [(file, folder / file["name"]) for file in files]

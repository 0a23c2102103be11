"""Arguments and options that several commands take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cli.client import Client, CliError, Connection

HERE = Path("satune-data")
DATA_DIR = "SATUNE_DATA_DIR"


def known_jobs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """The newest jobs, for the shell's completion; none where no server answers."""
    folder = ctx.params.get("data_dir") or os.environ.get(DATA_DIR) or HERE
    try:
        jobs = Client(Connection.find(Path(folder))).jobs(limit=100)
    except CliError:
        return []
    return [
        (job["id"], f"{job['status']} {job['model']}")
        for job in jobs
        if job["id"].startswith(incomplete)
    ]


DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar=DATA_DIR, help="The service's data folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, an object a line.")]
JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="Id of a job.", autocompletion=known_jobs)
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="local/NAME, ORG/NAME of the hub, a result ft:..., or a folder."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any field of the body: sat.train.max_steps=200."
    ),
]
MlpRate = Annotated[
    float | None, typer.Option("--mlp", help="Omission rate of MLP channels, 0 to below 1.")
]
AttentionRate = Annotated[
    float | None, typer.Option("--attention", help="Omission rate of KV groups, 0 to below 1.")
]
Watch = Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job to its end.")]

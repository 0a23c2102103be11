"""Where things are printed: data to standard output, all else to standard error."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from cli.client import INTERRUPTED

# A pipe has no width; the usual 80 columns would fold ids and paths that a script or a log wants whole.
PIPE_COLUMNS = 160

err = Console(stderr=True, width=None if sys.stderr.isatty() else PIPE_COLUMNS)
out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def say(text: str) -> None:
    """Tell the person what happens."""
    err.print(escape(text), style="dim", highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Tell the person what they may not expect."""
    err.print(f"[yellow]warning[/] {escape(text)}", highlight=False, soft_wrap=True)


def emit(data: Any) -> None:
    """One JSON document."""
    out.print_json(data=data)


def emit_line(data: Any) -> None:
    """One of several JSON documents, a line each."""
    typer.echo(json.dumps(data, ensure_ascii=False))


@contextmanager
def leaving(command: str | None = None) -> Iterator[None]:
    """Ctrl-C ends the looking, never what is looked at; says which command comes back to it, by default the same."""
    try:
        yield
    except KeyboardInterrupt:
        again = command or shlex.join(sys.argv[1:])
        say(f"Left; it goes on without you. `satune {again}` comes back to it.")
        raise typer.Exit(INTERRUPTED) from None

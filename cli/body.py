"""From what a person typed to a create body whose files are on the server."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.markup import escape

from cli.client import USAGE, Client, CliError, Connection
from cli.console import err, say

FILE_ID = re.compile(r"file-[0-9A-Za-z]+")
# A weight of a mixed file that makes both files be read once.
BY_ROWS = "auto"
LOCAL = "local/"


def put(body: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `sat.train.max_steps` and the like."""
    *path, last = dotted.split(".")
    for name in path:
        body = body.setdefault(name, {})
        if not isinstance(body, dict):
            raise CliError(f"{dotted}: {name} already has a value.", USAGE)
    body[last] = value


def apply_settings(body: dict[str, Any], settings: list[str] | None) -> None:
    """Put every KEY=VALUE of --set."""
    for item in settings or []:
        key, found, value = item.partition("=")
        if not found:
            raise CliError(
                f"--set {item!r} has no '='; write it as sat.train.max_steps=200.", USAGE
            )
        put(body, key, _value(value))


def _value(text: str) -> Any:
    """A number, true, false, null or JSON where it reads as such, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def uploaded(client: Client, body: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The body with ids for the files it names; what was uploaded is deleted where the block fails.

    A path is looked for in `folder`, then in the current one. A model that is a folder goes into the service's data
    folder, where that is on this machine.

    Raises:
        CliError: a file that is not there or is refused, a model's folder that the service cannot see.
    """
    body = copy.deepcopy(body)
    sent: dict[Path, dict[str, Any]] = {}
    try:
        if isinstance(body.get("model"), str):
            body["model"] = placed_model(client.connection, body["model"], folder)
        for place, name in _files(body):
            if FILE_ID.fullmatch(str(place[name])):
                continue
            path = _found(str(place[name]), folder)
            if path not in sent:
                with err.status(f"Sending {escape(str(path))}"):
                    sent[path] = file = client.upload(path)
                rows = "its rows" if file["rows"] is None else f"{file['rows']:,} rows"
                say(f"{path} uploaded: {rows} of format {file['format'] or 'not known yet'}")
            place[name] = sent[path]["id"]
        _weigh(body, {file["id"]: file for file in sent.values()})
        yield body
    except BaseException:
        for file in sent.values():
            # A job that was made all the same keeps its file, and a server that is away is already the news.
            with suppress(CliError):
                client.delete_file(file["id"])
        raise


def _files(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place in the body that names a file, as (mapping, key)."""
    for name in ("training_file", "validation_file"):
        if body.get(name) is not None:
            yield body, name
    for entry in _mix(body):
        if entry.get("file") is not None:
            yield entry, "file"


def _mix(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The mixed files, where they have the shape they should; if not, the server says what is wrong."""
    found: Any = body
    for name in ("sat", "data", "mix"):
        found = found.get(name) if isinstance(found, dict) else None
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _weigh(body: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    for entry in _mix(body):
        if entry.get("weight") != BY_ROWS:
            continue
        mixed, main = (
            files.get(str(name), {}).get("rows")
            for name in (entry.get("file"), body.get("training_file"))
        )
        if not mixed or not main:
            raise CliError(
                f"sat.data.mix: the rows of {entry.get('file')} or of the training file are not counted yet, so weight "
                f"{BY_ROWS!r} cannot be; give a number: rows of it for each row of the training file.",
                USAGE,
            )
        entry["weight"] = mixed / main


def _found(text: str, folder: Path) -> Path:
    given = Path(text).expanduser()
    for path in (folder / given, given):
        if path.is_file():
            return path
    raise CliError(
        f"{text} is neither a file here ({(folder / given).absolute()} is not there) nor the id of an uploaded one, "
        "as in file-abc123. Data sets of a hub have to be downloaded first.",
        USAGE,
    )


def placed_model(connection: Connection, name: str, folder: Path) -> str:
    """The name by which the service knows a model; a folder is copied to where the service finds it, once."""
    given = Path(name).expanduser()
    path = next((p for p in (folder / given, given) if (p / "config.json").is_file()), None)
    if name.startswith(LOCAL) or path is None:
        if not name.startswith((".", "/", "~")):
            return name
        raise CliError(f"model {name} is no folder of a model: it has no config.json.", USAGE)
    if connection.data_dir is None:
        raise CliError(
            f"model {name} is a folder of this machine, and {connection.url} may be another. Put it into a folder of "
            "SATUNE_MODEL_ROOTS where the service runs, and say --model local/NAME.",
            USAGE,
        )
    plain = path.resolve().name
    target = connection.data_dir / "models" / plain
    if not target.exists():
        partial = target.with_name(f".{plain}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(path, partial)
        partial.rename(target)
    elif _sizes(target) != _sizes(path):
        raise CliError(
            f"{target} is there already and holds another model; rename {path}, or say --model local/{plain} "
            "where that one is meant.",
            USAGE,
        )
    return LOCAL + plain


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

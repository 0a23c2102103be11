"""A job file: the create body as YAML, read by the rules of YAML 1.2, or a file of another trainer, translated.

PyYAML follows YAML 1.1, where `mode: off` is false and `2e-5` a text; both are traps in a file of training settings, so
the loader here has the scalars of YAML 1.2, and refuses a key that is given twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from cli.client import USAGE, CliError
from cli.translating import translated

STDIN = Path("-")
_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way to say it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping; two values of one key are an error, where PyYAML takes the last."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor(
    f"{_TAG}int", lambda loader, node: int(node.value, 0 if "x" in node.value else 10)
)


def written(body: dict[str, Any]) -> str:
    """A create body as a job file."""
    return str(yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def read(path: Path, *, lenient: bool) -> tuple[dict[str, Any], list[str]]:
    """The create body that a job file asks for, and warnings. Files in it are named as the file names them.

    Raises:
        CliError: where it cannot be read, is no YAML mapping, or is another trainer's and has what is refused.
    """
    found = _mapping(path)
    return translated(found, folder_of(path), lenient=lenient)


def folder_of(path: Path) -> Path:
    """Where the files that a job file names are looked for first."""
    return Path() if path == STDIN else path.parent


def _mapping(path: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if path == STDIN else path.read_text("utf-8")
        found = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror}.", USAGE) from error
    except UnicodeDecodeError as error:
        raise CliError(f"{path} is not UTF-8 text; a job file is YAML.", USAGE) from error
    except yaml.YAMLError as error:
        raise CliError(f"{path} is not a job file: {_where(error)}.", USAGE) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CliError(
            f"{path} is not a job file: it must be a YAML mapping, as in model: local/NAME.", USAGE
        )
    return found


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem

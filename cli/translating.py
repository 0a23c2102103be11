"""A file of Axolotl or LLaMA-Factory as a create body, with what could not be told in its words.

What a file does not say takes Satune's defaults, not the other trainer's. The road not taken is guessing: a run that is
silently another one costs a GPU-day.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli.axolotl import from_axolotl
from cli.client import USAGE, CliError
from cli.llama_factory import from_llama_factory


def translated(
    found: dict[str, Any], folder: Path, *, lenient: bool
) -> tuple[dict[str, Any], list[str]]:
    """The body of a file in any of the three forms, and warnings.

    Raises:
        CliError: naming every key that cannot be told, and what to do.
    """
    if "base_model" in found:
        name, told = "Axolotl", from_axolotl(found)
    elif "model_name_or_path" in found:
        name, told = "LLaMA-Factory", from_llama_factory(found, folder)
    else:
        return found, []
    if told.untold and not lenient:
        listed = "\n".join(f"  {key}: {advice}" for key, advice in told.untold.items())
        raise CliError(
            f"This {name} file has settings that mean nothing here; without them something else would be trained:\n"
            f"{listed}\nChange them, or leave them out with --lenient and say by --set what you want instead.",
            USAGE,
        )
    warnings = [f"{key}: {instead}" for key, instead in told.noted.items()]
    warnings += [f"{key}: left out" for key in told.untold]
    if told.not_needed:
        warnings.append(f"not needed here: {', '.join(told.not_needed)}")
    return told.body, warnings

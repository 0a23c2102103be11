"""A file of Axolotl or LLaMA-Factory as a create body, and what of it could not be translated.

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
        CliError: naming every key that is refused, and what to do.
    """
    if "base_model" in found:
        name, result = "Axolotl", from_axolotl(found)
    elif "model_name_or_path" in found:
        name, result = "LLaMA-Factory", from_llama_factory(found, folder)
    else:
        return found, []
    if result.refused and not lenient:
        listed = "\n".join(f"  {key}: {advice}" for key, advice in result.refused.items())
        raise CliError(
            f"This {name} file has settings that mean nothing here; without them something else would be trained:\n"
            f"{listed}\nChange them, or leave them out with --lenient and say by --set what you want instead.",
            USAGE,
        )
    warnings = [f"{key}: {instead}" for key, instead in result.noted.items()]
    warnings += [f"{key}: left out" for key in result.refused]
    if result.not_needed:
        warnings.append(f"not needed here: {', '.join(result.not_needed)}")
    return result.body, warnings

"""Everything that can be wrong with a plan, as one tree.

    PlanError (ValueError)      the caller's mistake; carries a code, the field, and a message that holds the fix
      ConfigError               a setting: unknown, of the wrong type, or out of range
      DataError                 a data file or a row
      ModelError                a model folder: missing, broken, or of a family that is not supported

Each takes plain strings, so it pickles and can be written to an event as it is. The message alone must be enough
for the reader: many clients show nothing else.
"""


class PlanError(ValueError):
    """A request that cannot be carried out, with `code` (stable, for programs) and `param` (dotted path or None)."""

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code or self.code

    def __str__(self) -> str:
        return self.message


class ConfigError(PlanError):
    """A setting that is unknown, of the wrong type, or out of range."""


class DataError(PlanError):
    """A data file that cannot be trained on."""

    code = "dataset_invalid"


class ModelError(PlanError):
    """A model folder that cannot be loaded, or whose family is not supported."""

    code = "model_unsupported"


def is_out_of_memory(error: Exception) -> bool:
    """Torch tells a lack of memory by a RuntimeError's words, on a CPU by nothing else."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )

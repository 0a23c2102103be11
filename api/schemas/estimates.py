"""An estimate on the wire."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel

Basis = Literal["analytic", "calibrated"]


class Range(BaseModel):
    """A number that is not known exactly."""

    low: float
    expected: float
    high: float

    @classmethod
    def of(cls, span: Sequence[float]) -> Self:
        """From (low, expected, high)."""
        low, expected, high = span
        return cls(low=low, expected=expected, high=high)


class EstimatedData(BaseModel):
    """What will be trained on. `trained_tokens` counts the labels of the whole run, `tokens` one pass over the data."""

    rows: int
    sequences: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    truncated_tokens: int
    untrained_rows: int
    duplicate_rows: int
    seq_len: int
    longest: int
    steps: int
    padding_share: float


class PastError(BaseModel):
    """How far quotes of this kind were off: each past run, quoted from the runs before it. Positive is too long."""

    quotes: int
    mean_absolute: float
    last: float


class Span(BaseModel):
    """Between these two."""

    low: float
    high: float


class EstimatedTime(BaseModel):
    """Seconds of training steps; evaluations, loading and saving come on top. Null seconds: nothing is known here.

    `queue_seconds`: how long a job that came now would wait for a slot to train in; null where that is not known.
    """

    basis: Basis
    seconds: Range | None
    queue_seconds: Span | None
    runs: int
    past_error: PastError | None


class Flops(BaseModel):
    """Of the whole run; `probe` is part of `sat`."""

    dense: int
    sat: int
    probe: int
    ratio: float


class PhaseSpeedup(BaseModel):
    """One phase of the ladder against the same steps dense; `expected` is null where no run has measured it."""

    first_step: int
    last_step: int
    steps: int
    state: str
    omission_rate_mlp: float
    omission_rate_attention: float
    ratio: float
    flop_bound: float
    expected: float | None


class Speedup(BaseModel):
    """Against the same run dense."""

    flop_bound: float
    expected: float | None
    by_phase: list[PhaseSpeedup]


class EstimatedMemory(BaseModel):
    """Bytes. `fits` is null where it may or may not, or where it is not known what there is."""

    basis: Basis
    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int
    peak: Range
    available: int | None
    fits: bool | None


class EstimatedEnergy(BaseModel):
    """Joules of the GPUs, at the power that they drew in runs of the same shape; null where no meter told of any."""

    joules: float | None


class EstimateError(BaseModel):
    """Why there is no estimate; a job with this body would fail alike."""

    code: str
    message: str
    param: str | None = None


class Estimate(BaseModel):
    """What a job would do and take. All but the first fields are null until it is `ready`."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    id: str
    created_at: int
    status: Literal["pending", "ready", "failed"]
    model: str
    training_file: str
    error: EstimateError | None = None
    hardware: str | None = None
    hyperparameters: dict[str, Any] | None = None
    data: EstimatedData | None = None
    flops: Flops | None = None
    speedup: Speedup | None = None
    time: EstimatedTime | None = None
    memory: EstimatedMemory | None = None
    energy: EstimatedEnergy | None = None
    warnings: list[str] = []

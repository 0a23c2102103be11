"""The plan of a ladder, and what this service can do, on the wire."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.schemas.bodies import Body

MAX_STEPS, MAX_TOKENS = 1_000_000, 1_048_576
DEFAULT_STEPS = 1000


_ONE_OF: Any = [
    {"required": [one], "properties": {one: {"type": kind}, other: {"type": "null"}}}
    for one, kind, other in (("model", "string", "config"), ("config", "object", "model"))
]


class PreviewBody(Body):
    """What to plan. Of `model` and `config` give one."""

    model_config = ConfigDict(json_schema_extra={"oneOf": _ONE_OF})

    model: Annotated[
        str | None,
        Field(max_length=512, description="A local model or a result, whose config.json is read."),
    ] = None
    config: Annotated[
        dict[str, Any] | None,
        Field(description="A Hugging Face config.json, for a model that is not here."),
    ] = None
    sat: Annotated[
        dict[str, Any] | None,
        Field(description="As in a job; the part that decides the ladder counts."),
    ] = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = DEFAULT_STEPS
    seq_len: Annotated[
        int | None,
        Field(ge=8, le=MAX_TOKENS, description="Tokens of a sequence; as a job's where absent."),
    ] = None
    device: Annotated[
        Literal["gpu", "cpu"], Field(description="What the widths are rounded for.")
    ] = "gpu"


class Rung(BaseModel):
    """One phase of the ladder; widths are means of a layer, `flops_share` is that of a dense step."""

    first_step: int
    last_step: int
    steps: int
    state: str
    omission_rate_mlp: float
    omission_rate_attention: float
    mlp_channels: float
    kv_groups: float
    query_heads: float
    flops_share: float
    speedup_bound: float


class SchedulePreview(BaseModel):
    """A ladder before it is run. Bounds come from FLOPs alone, probes left out."""

    object: Literal["sat.schedule.preview"] = "sat.schedule.preview"
    model: str | None
    num_parameters: int
    steps: int
    seq_len: int
    sparse: bool
    rungs: list[Rung]
    mean_omission_rate_mlp: float
    mean_omission_rate_attention: float
    flops_ratio: float
    speedup_bound: float
    warnings: list[str]


class PresetRates(BaseModel):
    """The omission rates of a preset."""

    mlp: float
    attention: float


class ServiceLimits(BaseModel):
    """What the service takes, whoever asks."""

    max_file_bytes: int
    max_body_bytes: int
    max_metadata: int
    max_metadata_key: int
    max_metadata_value: int
    max_suffix: int
    max_preview_steps: int
    streams_per_key: int


class WorkerSlots(BaseModel):
    """The slots of living workers, together."""

    workers: int
    slots: dict[str, int]
    slots_free: dict[str, int]


class Capabilities(BaseModel):
    """What may be asked of this service; `sat` is the JSON Schema of the object of that name."""

    object: Literal["sat.capabilities"] = "sat.capabilities"
    families: list[str]
    methods: list[str]
    metrics: list[str]
    selectors: list[str]
    schedules: list[str]
    allotments: list[str]
    attention_units: list[str]
    data_formats: list[str]
    presets: dict[str, PresetRates]
    sat: dict[str, Any]
    limits: ServiceLimits
    workers: WorkerSlots

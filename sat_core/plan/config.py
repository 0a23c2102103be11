"""The full configuration of a run: every number stated, nothing left to a default at run time.

`plan.resolve` makes a `TrainConfig` once from a request and a corpus; it is frozen with the job and is all that
`sat_core train` reads. The file names its format version; another version is refused, never guessed at. `SatConfig`, the
part that is the method, is also what a researcher's own loop gives to `sparsify`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sat_core.plan.checking import checked, limited
from sat_core.plan.errors import ConfigError
from sat_core.plan.families import ModelShape
from sat_core.plan.schedule import Ladder

TRAIN_FORMAT = "satune.train/1"
PREPARE_FORMAT = "satune.prepare/1"
PREPARED_FORMAT = "satune.prepared/1"

Metric = Literal[
    "activation", "fluctuation", "maxip", "wanda", "magnitude", "taylor", "fisher", "uniform"
]
# Metrics that need the gradient of a loss; the others see a forward, or only the weights.
GRADIENT_METRICS = ("fisher", "taylor")
WEIGHT_METRICS = ("magnitude", "uniform")
Selector = Literal["top_k", "sample", "mixed"]
Preset = Literal["safe", "balanced", "fast"]
# Omission rates of MLP channels and of KV groups.
PRESETS: dict[Preset, tuple[float, float]] = {
    "safe": (0.3, 0.0),
    "balanced": (0.5, 0.0),
    "fast": (0.65, 0.25),
}
Allotment = Literal["sensitivity", "exempt", "uniform"]
LadderType = Literal["ladder", "linear", "cosine"]
AttentionUnit = Literal["kv_group", "query_head"]
AsleepOn = Literal["device", "host"]
# What a setting may be, here and where a person asks for it (`plan.request`).
RATE, SHARE = {"ge": 0, "lt": 1}, {"ge": 0, "le": 1}
TEMPERATURE, RUNGS = {"gt": 0, "le": 1e6}, {"ge": 1, "le": 64}


@dataclass(frozen=True, kw_only=True)
class SatConfig:
    """Which units sleep, when, and how they are chosen.

    Attributes:
        total_steps: optimizer steps of the run.
        mlp_rate, attention_rate: omission rates in [0, 1), means over all layers.
        pooled: spend both as one budget of FLOPs, on either kind of unit wherever least is lost; needs sensitivity.
        schedule, dense_start, sparse_share, rungs: see `plan.schedule`.
        allotment: how a mean rate is spread over layers; see `sat_core.allotment`.
        exempt_layers: first and last layers that stay dense; None is none, or a sixteenth with the allotment `exempt`.
        metric: score of a unit; see `sat_core.importance`.
        selector, temperature, explore: how scores become a choice; see `sat_core.selection`.
        ema: weight in [0, 1) of the older scores at a refresh.
        refresh_every: steps between choices inside a stage of the ladder; 0 chooses when a stage begins only.
        attention_unit: whole KV groups, or one query head in every group.
        compensation: add the mean contribution of the sleepers as a fixed bias (FLAP, arXiv 2312.11983).
        asleep_on: where the rows of sleepers wait; "host" is pinned memory.
        max_gap: nats by which a sparse loss may exceed the dense one on the same batch before the ladder steps down
            for good; 0 is off, and then a metric of weights alone needs no probe.
        multiple: awake MLP channels are rounded to a multiple of this; None is 128 on a GPU, 8 on a CPU.
        seed: of random scores and of sampling.
    """

    total_steps: int = limited(ge=1)
    mlp_rate: float = limited(0.5, **RATE)
    attention_rate: float = limited(0.0, **RATE)
    pooled: bool = False
    schedule: LadderType = "ladder"
    dense_start: float = limited(0.05, **SHARE)
    sparse_share: float = limited(0.7, **SHARE)
    rungs: int = limited(4, **RUNGS)
    allotment: Allotment = "sensitivity"
    exempt_layers: int | None = limited(None, ge=0)
    metric: Metric = "activation"
    selector: Selector = "top_k"
    temperature: float = limited(1.0, **TEMPERATURE)
    explore: float = limited(0.3, **SHARE)
    ema: float = limited(0.0, **RATE)
    refresh_every: int = limited(0, ge=0)
    attention_unit: AttentionUnit = "kv_group"
    compensation: bool = False
    asleep_on: AsleepOn = "device"
    max_gap: float = limited(0.05, ge=0)
    multiple: int | None = limited(None, ge=1)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
        if self.pooled and self.allotment != "sensitivity":
            raise ConfigError(
                f"pooled is true, which needs allotment 'sensitivity'; it is {self.allotment!r}.",
                "pooled",
            )

    @property
    def ladder(self) -> Ladder:
        """The omission-rate schedule."""
        return Ladder(
            total_steps=self.total_steps,
            dense_start=self.dense_start,
            sparse_share=self.sparse_share,
            rungs=self.rungs,
            type=self.schedule,
        )

    @property
    def sparse(self) -> bool:
        """Whether any unit ever sleeps."""
        return self.mlp_rate > 0 or self.attention_rate > 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    `batch_size` counts sequences per optimizer step, over all micro-batches and ranks. `*_every` counts steps, 0 is off.
    `model_path` is None for a model of the hub. `resume_from` are folders of checkpoints, the newest first: the first one that
    is whole is gone on from.
    """

    model_name: str
    model_path: str | None
    model_revision: str | None
    shape: ModelShape
    corpus: str
    seed: int
    total_steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    precision: str
    sat: SatConfig
    optimizer: str
    tuning: str
    lora_rank: int
    lora_alpha: int
    gradient_checkpointing: bool
    compile: bool
    sharding: str
    eval_every: int
    forgetting_sequences: int
    prompts: tuple[str, ...]
    max_new_tokens: int
    checkpoint_every: int
    checkpoint_keep: int
    resume_from: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the format version."""
        return {"format": TRAIN_FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        """Read the JSON form.

        Raises:
            ConfigError: for another format version, or keys that are missing or unknown.
        """
        if data.get("format") != TRAIN_FORMAT:
            raise ConfigError(
                f"config.json has format {data.get('format')!r}; this program reads {TRAIN_FORMAT!r}.",
                "format",
            )
        values = {k: v for k, v in data.items() if k != "format"}
        try:
            values["shape"] = ModelShape(**values["shape"])
            values["sat"] = SatConfig(**values["sat"])
            values["prompts"] = tuple(values["prompts"])
            resume = values.get("resume_from") or ()
            values["resume_from"] = (resume,) if isinstance(resume, str) else tuple(resume)
            return cls(**values)
        except KeyError as error:
            raise ConfigError(f"config.json lacks {error}.", "config") from error
        except TypeError as error:
            raise ConfigError(f"config.json: {error}.", "config") from error

"""The full configuration of a run: every number stated, nothing left to a default at run time.

`plan.resolve` makes it once from a request and a corpus; it is frozen with the job and is all that `sat_core train`
reads. The file names its format version; another version is refused, never guessed at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sat_core.plan.errors import ConfigError
from sat_core.plan.families import ModelShape
from sat_core.plan.schedule import Ladder

TRAIN_FORMAT = "satune.train/1"
PREPARE_FORMAT = "satune.prepare/1"
PREPARED_FORMAT = "satune.prepared/1"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Rates are means over layers in [0, 1). `batch_size` counts sequences per optimizer step, over all
    micro-batches. `*_every` counts steps, 0 is off. `model_path` is None for a model of the hub.
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
    mlp_rate: float
    attention_rate: float
    allotment: str
    dense_start: float
    sparse_share: float
    rungs: int
    metric: str
    refresh_every: int
    eval_every: int
    prompts: tuple[str, ...]
    max_new_tokens: int
    checkpoint_every: int
    checkpoint_keep: int
    resume_from: str | None = None

    @property
    def ladder(self) -> Ladder:
        """The omission-rate schedule."""
        return Ladder(
            total_steps=self.total_steps,
            dense_start=self.dense_start,
            sparse_share=self.sparse_share,
            rungs=self.rungs,
        )

    @property
    def sparse(self) -> bool:
        """Whether any unit ever sleeps."""
        return self.mlp_rate > 0 or self.attention_rate > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the format version."""
        return {"format": TRAIN_FORMAT, **asdict(self), "prompts": list(self.prompts)}

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
        known = {f.name for f in fields(cls)}
        missing, unknown = known - values.keys() - {"resume_from"}, values.keys() - known
        if missing or unknown:
            raise ConfigError(
                f"config.json lacks {sorted(missing)} and has unknown keys {sorted(unknown)}.",
                "config",
            )
        values["shape"] = ModelShape(**values["shape"])
        values["prompts"] = tuple(values["prompts"])
        return cls(**values)

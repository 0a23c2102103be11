"""The commands `prepare`, `preview` and `validate`: from RUN_FOLDER/config.json to a corpus and train.json, or to a report.

config.json (format satune.prepare/1) holds `request`, `model` (name, path or null, revision), `corpora_dir`, and files as
`{"path", "filename"}`: `training_file`, `validation_file` (or null), and optionally `mix_files`, each with a `weight`. A
null path makes the file name that of a data set on the hub. `preview` takes `rows` beside these; `prepare` takes
`hardware` (`device` "gpu" or "cpu") where what the run will cost is wanted too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sat_core.plan.accounting import padded
from sat_core.plan.checking import build
from sat_core.plan.config import PREPARE_FORMAT, PREPARED_FORMAT
from sat_core.plan.errors import ConfigError
from sat_core.plan.families import ModelShape, shape_of
from sat_core.plan.memory import memory_bytes
from sat_core.plan.quote import quote
from sat_core.plan.request import MixFile, RunRequest
from sat_core.plan.resolve import check_mode, max_seq_len, resolve
from sat_core.tokenizer import load_tokenizer
from sat_io.base_model import hub_revision, model_config
from sat_io.costs import Costs
from sat_io.intake import Tokens
from sat_io.preparing import Preparation
from sat_io.preview import preview_rows
from sat_io.rendering import Renderer
from sat_io.sources import Source
from sat_io.validation import Validation

if TYPE_CHECKING:
    from sat_core.plan.config import TrainConfig

DEFAULT_PREVIEW_ROWS = 5


class Events(Protocol):
    """Where progress is told."""

    def state(self, state: str, message: str) -> None:
        """A new phase."""

    def emit(self, kind: str, **fields: Any) -> None:
        """Anything else."""


class _Job(NamedTuple):
    request: RunRequest
    path: str | None
    revision: str | None
    shape: ModelShape
    tokens: Tokens


def prepare(folder: Path, config: dict[str, Any], events: Events) -> None:
    """Make the corpus, or find it ready, and write train.json with every number stated.

    Raises:
        PlanError: for a setting, a model or data that cannot be used.
    """
    mixes = [_mixed(file, i) for i, file in enumerate(config.get("mix_files") or ())]
    job = _job(config, events)
    request, held = job.request, config["validation_file"]
    events.state("tokenizing", "Rendering, masking and tokenising")
    corpus, figures = Preparation(
        tokens=job.tokens,
        training=_source(config["training_file"]),
        validation=_source(held) if held else None,
        declared_format=request.sat.data.format,
        validation_split=request.sat.data.validation_split,
        progress=lambda rows: events.emit("progress", done=rows, total=None, unit="rows"),
        mixes=tuple(mixes),
        seed=request.seed or 0,
    ).run(Path(config["corpora_dir"]))
    resolved = resolve(
        request,
        job.shape,
        figures,
        model_path=job.path,
        revision=job.revision,
        corpus=str(corpus),
    )
    prepared = {
        "format": PREPARED_FORMAT,
        "config": resolved.config.to_dict(),
        "hyperparameters": resolved.hyperparameters,
        "total_steps": resolved.config.total_steps,
        "figures": figures,
        "warnings": [*resolved.warnings, *_repetitions(resolved.config.batch_size, figures)],
    }
    if hardware := config.get("hardware"):
        prepared["hardware"] = hardware
        prepared["quote"] = _quote(resolved.config, figures, gpu=hardware["device"] == "gpu")
    _put(folder / "train.json", prepared)


def _repetitions(batch_size: int, figures: dict[str, Any]) -> list[str]:
    sequences = int(figures["sequences"])
    if batch_size <= sequences:
        return []
    return [
        f"batch_size is {batch_size}, and the data give {sequences} sequences: every step trains on each of them "
        f"{batch_size / sequences:.3g} times."
    ]


def _quote(config: TrainConfig, figures: dict[str, Any], *, gpu: bool) -> dict[str, Any]:
    costs = Costs(config).by_phase()
    width = padded(int(figures["longest"]))
    return {
        **quote(config, costs, gpu=gpu),
        "tokens": sum(cost.steps.tokens for cost in costs),
        "labels": sum(cost.steps.labels for cost in costs),
        "memory_bytes": memory_bytes(config, width=width, gpu=gpu),
        "width": width,
    }


def preview(folder: Path, config: dict[str, Any], events: Events) -> None:
    """Write preview.json: what of the first rows of the training file will be trained on.

    Raises:
        PlanError: for a setting, a model or data that cannot be used.
    """
    job = _job(config, events)
    rows = preview_rows(
        _source(config["training_file"]),
        job.tokens,
        declared_format=job.request.sat.data.format,
        rows=config.get("rows", DEFAULT_PREVIEW_ROWS),
    )
    _put(folder / "preview.json", {"format": "satune.preview/1", "rows": rows})


def validate(folder: Path, config: dict[str, Any], events: Events) -> None:
    """Write validation.json: every fault of the training file, and with a request what of it would be trained on.

    config.json may hold a null `request`, which looks at rows alone, `declared_format` for that, and
    `validation_file` to be compared with.

    Raises:
        PlanError: for a setting or a model that cannot be used; what is wrong with the data stands in the report.
    """
    if config["request"] is None:
        tokens, declared = None, str(config["declared_format"])
    else:
        job = _job(config, events)
        tokens, declared = job.tokens, job.request.sat.data.format

    def judged(file: str) -> Validation:
        return Validation(
            source=_source(config[file]),
            tokens=tokens,
            declared=declared,
            progress=lambda rows: events.emit("progress", done=rows, total=None, unit="rows"),
        )

    against = judged("validation_file") if config["validation_file"] else None
    if against is not None:
        events.state("checking_dataset", "Reading the file to compare with")
        against.read()
    report = judged("training_file").run(against)
    _put(folder / "validation.json", {"format": "satune.validation/1", **report})


def _job(config: dict[str, Any], events: Events) -> _Job:
    if config.get("format") != PREPARE_FORMAT:
        raise ConfigError(
            f"config.json has format {config.get('format')!r}; this program reads {PREPARE_FORMAT!r}."
        )
    request = RunRequest.from_dict(config["request"])
    check_mode(request)
    model = config["model"]
    source = model["path"] or model["name"]
    revision = model["revision"] or (None if model["path"] else hub_revision(model["name"]))
    events.state("checking_dataset", f"Reading {config['training_file']['filename']}")
    shape = shape_of(model_config(source, revision=revision))
    tokenizer = load_tokenizer(source, revision=revision)
    tokens = Tokens(
        Renderer(tokenizer, train_on=request.sat.train.train_on),
        lambda packed: max_seq_len(request, shape, packed=packed),
        request.sat.data.packing,
    )
    return _Job(request, model["path"], revision, shape, tokens)


def _mixed(file: dict[str, Any], number: int) -> Source:
    asked = build(MixFile, {"weight": file.get("weight")}, f"mix_files.{number}")
    return _source(file, asked.weight)


def _source(file: dict[str, Any], weight: float | None = None) -> Source:
    path = None if file["path"] is None else Path(file["path"])
    return Source(path=path, filename=file["filename"], weight=weight)


def _put(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(content, indent=1), "utf-8")
    scratch.rename(path)

"""`/v1/sat`: what may be asked, and what a ladder would do, told without any work."""

from dataclasses import asdict
from typing import get_args

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.schemas import create
from api.schemas.bodies import described, read
from api.schemas.problems import answers
from api.schemas.sat import (
    MAX_STEPS,
    Capabilities,
    PresetRates,
    PreviewBody,
    SchedulePreview,
    ServiceLimits,
    WorkerSlots,
)
from api.shapes import model_folder, read_shape
from jobs.states import Stage
from sat_core.plan.config import (
    PRESETS,
    Allotment,
    AttentionUnit,
    LadderType,
    Metric,
    Selector,
)
from sat_core.plan.families import ModelShape, shape_of, supported_model_types
from sat_core.plan.quote import schedule_preview
from sat_core.plan.request import DataFormat, RunRequest, sat_json_schema
from sat_core.plan.resolve import max_seq_len, resolve_sat

router = APIRouter(prefix="/v1/sat", tags=["sat"], dependencies=[Depends(require_key)])

# A model that a stranger describes must not cost more than a real one.
MAX_LAYERS, MAX_NUMBER = 1024, 2**31


@router.get("/capabilities", operation_id="retrieveCapabilities", responses=answers())
def retrieve_capabilities(app: App) -> Capabilities:
    """Families, metrics, presets, every setting with its limits, and the workers that are alive."""
    seen, settings = app.queueing.snapshot(), app.settings
    busy = {stage: len(seen.lines[stage].left) for stage in Stage}
    return Capabilities(
        families=list(supported_model_types()),
        methods=["supervised"],
        metrics=list(get_args(Metric)),
        selectors=list(get_args(Selector)),
        schedules=list(get_args(LadderType)),
        allotments=list(get_args(Allotment)),
        attention_units=list(get_args(AttentionUnit)),
        data_formats=list(get_args(DataFormat)),
        presets={
            name: PresetRates(mlp=mlp, attention=attention)
            for name, (mlp, attention) in PRESETS.items()
        },
        sat=sat_json_schema(),
        limits=ServiceLimits(
            max_file_bytes=settings.max_file_bytes,
            max_body_bytes=create.MAX_BODY_BYTES,
            max_metadata=create.MAX_METADATA,
            max_metadata_key=create.MAX_METADATA_KEY,
            max_metadata_value=create.MAX_METADATA_VALUE,
            max_suffix=create.SUFFIX_CHARS,
            max_preview_steps=MAX_STEPS,
            streams_per_key=settings.streams_per_key,
        ),
        workers=WorkerSlots(
            workers=seen.workers,
            slots={stage.value: seen.slots[stage] for stage in Stage},
            slots_free={stage.value: max(0, seen.slots[stage] - busy[stage]) for stage in Stage},
        ),
    )


@router.post(
    "/schedules/preview",
    operation_id="previewSchedule",
    openapi_extra=described(PreviewBody),
    responses=answers("invalid_request", "model_unsupported", *create.SETTING_CODES),
)
async def preview_schedule(request: Request, app: App, key: Caller) -> SchedulePreview:
    """The ladder that a job with these settings would climb: phases, rates, widths, and what each is worth at most."""
    body, _ = await read(request, PreviewBody)
    return await run_in_threadpool(_planned, app, key.project, body)


def _planned(app: Services, project: str, body: PreviewBody) -> SchedulePreview:
    shape = _shape(app, project, body)
    run = RunRequest.from_dict({"model": body.model or "config", "sat": body.sat or {}})
    if body.seq_len is not None and body.seq_len > shape.context:
        raise ApiError(
            "invalid_value",
            f"seq_len is {body.seq_len}; the model's context is {shape.context}.",
            "seq_len",
        )
    seq_len = body.seq_len or max_seq_len(run, shape, packed=run.sat.data.format == "text")
    sat, warnings = resolve_sat(run, shape, body.steps, seq_len)
    planned = schedule_preview(shape, sat, gpu=body.device == "gpu", seq_len=seq_len)
    return SchedulePreview.model_validate(
        {
            "model": body.model,
            "num_parameters": shape.num_parameters,
            "steps": body.steps,
            "seq_len": seq_len,
            "sparse": sat.sparse,
            "warnings": warnings,
            **planned,
        }
    )


def _shape(app: Services, project: str, body: PreviewBody) -> ModelShape:
    if (body.model is None) == (body.config is None):
        code = "missing_required_parameter" if body.model is None else "conflicting_parameters"
        raise ApiError(code, "Give one of model and config.", "model")
    if body.config is not None:
        return _bounded(shape_of(body.config))
    name = body.model or ""
    folder = model_folder(app, project, name)
    if folder is None:
        known = ", ".join(app.artifacts.local_models()[:20]) or "none yet"
        raise ApiError(
            "unknown_model",
            f"model {name!r} is not on this machine. Local models: {known}. "
            "For a model of the hub send its config.json as `config`.",
            "model",
        )
    return read_shape(folder, name)


def _bounded(shape: ModelShape) -> ModelShape:
    limits = {"num_layers": MAX_LAYERS}
    for name, value in asdict(shape).items():
        most = limits.get(name, MAX_NUMBER)
        if isinstance(value, int) and value > most:
            raise ApiError(
                "invalid_value",
                f"config gives {name} = {value}; allowed is up to {most}.",
                "config",
            )
    return shape

"""What a worker finds out about a file, asked for and told: the report, the preview, and what follows for jobs.

Both are chores, named by everything that decides their result, so a second question costs nothing and a create can look
whether its question was already answered. The road not taken is to answer inside the request: a tokenizer and a chat
template are a stranger's program, and this process has no bounds to run one in.
"""

import asyncio
import hashlib
import time
from typing import Any

from fastapi.concurrency import run_in_threadpool

from api.deps import Services
from api.errors import ApiError
from api.named import data_file, model_exists
from api.schemas.create import CreateJob
from api.shapes import refuse_unfit
from jobs.spec import ChoreRecord, FileRecord
from sat_core.plan.request import RunRequest

ASK_SECONDS = 0.25
PREVIEW, VALIDATION = "preview", "validation"
ENDED = ("succeeded", "failed")
# Ends that need not be the file's doing: a worker that went, a busy machine, a full disk. Ten of them in a row are.
UNTOLD = ("worker_lost", "time_limit_exceeded", "internal_error")
MOST_TRIES = 10


def reading(run: RunRequest) -> dict[str, Any]:
    """The part of a run that decides how a file is read, as a request of its own."""
    sat = run.sat
    asked = RunRequest.from_dict(
        {
            "model": run.model,
            "sat": {
                "train": {
                    "max_seq_len": sat.train.max_seq_len,
                    "train_on": sat.train.train_on,
                },
                "data": {"format": sat.data.format, "packing": sat.data.packing},
            },
        }
    )
    return asked.to_dict()


def validation_params(
    app: Services, run: RunRequest | None, *, against: str | None = None, declared: str = "auto"
) -> dict[str, Any]:
    """All that decides a report besides the file."""
    return {
        "request": None if run is None else reading(run),
        "declared_format": declared if run is None else run.sat.data.format,
        "against": against,
        "model_version": None if run is None else model_version(app, run.model),
    }


def preview_params(app: Services, run: RunRequest, rows: int) -> dict[str, Any]:
    """All that decides a preview besides the file."""
    return {
        "request": reading(run),
        "rows": rows,
        "model_version": model_version(app, run.model),
    }


def model_version(app: Services, name: str) -> str | None:
    """Changes whenever the tokenizer or template of a local model may have; other models never change under a name."""
    folder = None if name.startswith("ft:") else app.artifacts.resolve_model(name)
    if folder is None:
        return None
    seen = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file()
    )
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


async def ask(
    app: Services, project: str, kind: str, subject: str, params: dict[str, Any], wait: float
) -> ChoreRecord:
    """The chore as it stands, after waiting for its end so long at the most."""
    until = time.monotonic() + wait
    chore = await run_in_threadpool(_asked, app, project, kind, subject, params)
    while chore.status not in ENDED and time.monotonic() < until:
        await asyncio.sleep(ASK_SECONDS)
        chore = await run_in_threadpool(app.store.get_chore, project, chore.id)
    return chore


def _asked(
    app: Services, project: str, kind: str, subject: str, params: dict[str, Any]
) -> ChoreRecord:
    chore = app.store.ask_chore(project, kind, subject, params)
    if chore.status == "waiting":
        app.bell.ring()
    return chore


def settled(app: Services, record: FileRecord) -> FileRecord:
    """A file that could not be judged while it arrived, with the verdict where a worker has one by now."""
    if record.status != "uploaded":
        return record
    params = validation_params(app, None)
    # To ask for one that failed long ago would try it again, though it may be the verdict.
    chore = app.store.find_chore(record.project, VALIDATION, record.id, params)
    if chore is None or _untold(chore):
        chore = _asked(app, record.project, VALIDATION, record.id, params)
    if chore.status not in ENDED or _untold(chore):
        return record
    if chore.result is None:
        error = chore.error or {}
        report = {**record.report, "status": "failed", "error": error}
        report["summary"] = str(error.get("message"))
        return app.store.settle_file(
            record.project, record.id, status="error", rows=record.rows, report=report
        )
    report = {**record.report, **plain_report(chore.result)}
    report["summary"] = f"{record.filename}: {report['rows']} rows of format {report['format']}."
    if report["errors"]:
        first = report["errors"][0]
        count = report["error_count"]
        report["summary"] = (
            f"{record.filename}: {count} unusable rows (first: line {first['line']}: {first['message']})"
        )
    return app.store.settle_file(
        record.project,
        record.id,
        status="error" if report["errors"] else "processed",
        rows=chore.result["rows"],
        report=report,
    )


def _untold(chore: ChoreRecord) -> bool:
    return (chore.error or {}).get("code") in UNTOLD and chore.attempt < MOST_TRIES


def plain_report(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a report that stands at the file itself."""
    bad = result["error_count"] > 0
    return {
        "status": "invalid" if bad else "valid_with_warnings" if result["warnings"] else "valid",
        "format": result["file_format"],
        "rows": result["rows"],
        "encoding": result["encoding"],
        "warnings": result["warnings"],
        "error_count": result["error_count"],
        "errors": result["errors"],
    }


def refuse_unusable(app: Services, project: str, create: CreateJob) -> None:
    """Refuse a body whose files or model are not there or known to be of no use, or whose settings do not fit.

    Raises:
        ApiError, ConfigError: naming the field.
    """
    files = {"training_file": create.training_file, "validation_file": create.validation_file}
    files |= {f"sat.data.mix.{i}.file": m.file for i, m in enumerate(create.run.sat.data.mix)}
    for param, file_id in files.items():
        if file_id is not None:
            refuse_invalid(app, data_file(app, project, file_id, param), create.run, param)
    model_exists(app, project, create.run.model)
    refuse_unfit(app, project, create.run)


def refuse_invalid(app: Services, record: FileRecord, run: RunRequest, param: str) -> None:
    """Refuse a file for a job where it is known that it cannot be trained on; what is not known yet, `prepare` finds.

    Raises:
        ApiError: with the first rows named.
    """
    if record.status == "error":
        raise _unusable(record.report["summary"], record.report["errors"], param)
    params = validation_params(app, run)
    chore = app.store.find_chore(record.project, VALIDATION, record.id, params)
    if chore is not None and chore.result is not None and chore.result["error_count"]:
        errors = chore.result["errors"]
        count, first = chore.result["error_count"], errors[0]
        summary = f"{record.filename}: {count} errors with model {run.model} (first: line {first['line']}: {first['message']})"
        raise _unusable(summary, errors, param)


def _unusable(summary: str, errors: list[dict[str, Any]], param: str) -> ApiError:
    return ApiError(
        "dataset_invalid",
        f"{param}: {summary}. GET /v1/files/FILE/validation tells all.",
        param,
        problems=errors,
    )

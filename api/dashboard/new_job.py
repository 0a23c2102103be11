"""`/new`: a job begun in the browser, or one begun again with changes.

The form is turned into the body of `POST /v1/fine_tuning/jobs` and goes on as that: the same checks, words of refusal and
quotas. What has no field of its own stands as JSON of `sat`, which wins over the method, so every setting can be given and a
job that is run again loses none. It is one plain form, read while its files arrive, and answered with a page: it works without
script, and keeps what was typed. The road not taken is a form that speaks to `/v1` by script: it would need a key in the
page, and a second copy of the checks to say what is wrong where.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from api import once
from api.auth import Caller, may, need, require_session
from api.dashboard.rendering import missing, render
from api.dashboard.words import ago, percent, size
from api.deps import App, Services
from api.drafts import PURPOSE, Draft, Terms, row_check, shown_name
from api.errors import ERRORS, ApiError, translate
from api.multipart import Form, read_form, receiving
from api.routes.after import create_body, merge_patch
from api.routes.estimates import estimate, estimate_again
from api.routes.files import keep_file
from api.routes.fine_tuning import start_job
from api.routes.models import list_models
from api.routes.uploads import too_large
from api.schemas.create import MAX_BODY_BYTES, CreateJob, check, json_body
from api.schemas.estimates import Estimate
from api.schemas.jobs import HYPERPARAMETERS, FineTuningJob
from jobs.errors import JobsError, NotFound
from jobs.spec import FileRecord, JobRecord, Key
from sat_core.plan.config import PRESETS
from sat_core.plan.errors import PlanError
from sat_core.plan.request import RunRequest

new_job = APIRouter(dependencies=[Depends(require_session)], include_in_schema=False)

FILES_SHOWN = 200
PROBLEMS_SHOWN = 10
VERDICTS = {"error": "not usable", "uploaded": "not checked yet"}
# Held back so long, an estimate that is known already comes with the page itself.
SOON_SECONDS, LATER_SECONDS = 0.5, 20.0
NAMES = ("model", "training_file", "validation_file", "suffix")
# A file that is sent along takes the place of the one that was chosen.
UPLOADS = {"training_upload": "training_file", "validation_upload": "validation_file"}
# What is shown at a field of its own; `again` is the job that the form was filled from.
SHOWN = (*NAMES, "method", *HYPERPARAMETERS, "seed", "sat")
SENT = (*SHOWN, "again", "token", "wish")
EMPTY = dict.fromkeys(SENT, "") | dict.fromkeys(HYPERPARAMETERS, "auto") | {"method": "balanced"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train, and the settings of `sat` that make it."""

    label: str
    words: str
    sat: dict[str, Any]


def _asleep(mlp: float, attention: float) -> str:
    heads = f" and {percent(attention)} of the attention heads" if attention else ""
    return f"{percent(mlp)} of the MLP channels{heads} sleep for most of the run"


METHODS = {
    name: Method(label=f"SAT {name}", words=_asleep(*rates), sat={"preset": name})
    for name, rates in PRESETS.items()
} | {
    "dense": Method(label="Dense", words="all weights, none asleep", sat={"mode": "off"}),
    "lora": Method(
        label="LoRA",
        words="low-rank adapters, none asleep",
        sat={"mode": "off", "train": {"tuning": "lora"}},
    ),
}


@new_job.get("/new")
def new_page(
    request: Request,
    app: App,
    key: Caller,
    again: Annotated[str | None, Query(alias="from")] = None,
) -> HTMLResponse:
    """The form, empty or filled from a job."""
    try:
        need(key, "jobs:write")
        values = filled(app.store.get_job(key.project, again)) if again else {}
    except ApiError as error:
        return render(request, "new_refused.html", status=403, why=error.message)
    except NotFound:
        return missing(request, f"There is no job {again} in this project.")
    return _page(request, app, key, values)


@new_job.post("/new")
async def send_form(request: Request, app: App, key: Caller) -> Response:
    """Start the job, once however often the form comes; or say what it would do and take."""
    limit = app.settings.max_file_bytes
    values: dict[str, str] = {}

    def refuse() -> ApiError:
        return too_large(limit, next(reversed(form.filenames), "training_upload"))

    def opener(filename: str, _: Mapping[str, str]) -> Draft:
        check = row_check(shown_name(filename), "auto")
        return Draft(app.artifacts.files, limit, refuse, check)

    try:
        form = Form(
            request.headers.get("content-type", ""),
            stored=tuple(UPLOADS),
            fields=SENT,
            opener=opener,
            field_bytes=MAX_BODY_BYTES,
        )
        values = form.fields
        with receiving(form):
            await read_form(request, form, refuse, len(UPLOADS) * limit)
            # After the form, so that whoever has to wait need not type again.
            await run_in_threadpool(app.limiter.count, key)
            for part in form.drafts:
                # A browser sends a part without a name where no file was chosen.
                if form.filenames[part]:
                    values[UPLOADS[part]] = await _kept(request, app, key, form, part)
        create = check(await run_in_threadpool(_body, app, key.project, values))
        if values.get("wish") == "estimate":
            plan = await estimate(app, key.project, create, SOON_SECONDS)
            return await run_in_threadpool(_page, request, app, key, values, plan=plan)
        return await _started(request, app, key, values, create)
    except (ApiError, PlanError, JobsError) as error:
        return await run_in_threadpool(_page, request, app, key, values, error=translate(error))


@new_job.get("/new/estimates/{estimate_id}")
async def plan_page(estimate_id: str, request: Request, app: App, key: Caller) -> HTMLResponse:
    """An estimate as soon as a worker has it; the page asks for it again until then."""
    plan = await estimate_again(app, key.project, estimate_id, LATER_SECONDS)
    workers = await run_in_threadpool(_workers, app)
    return render(request, "new_plan.html", plan=plan, workers=workers)


async def _kept(request: Request, app: Services, key: Key, form: Form, part: str) -> str:
    """The id of a file that came along."""
    need(key, "files")
    draft, name = form.drafts[part], shown_name(form.filenames[part])
    # Another file in the same copy of the form is another file.
    what = once.fingerprint([name, await run_in_threadpool(draft.finish)])
    creating = _once(request, app, key, form.fields, f"{part}-{what}")
    try:
        answer = await keep_file(app, key, draft, name, Terms(), creating)
    except ApiError as error:
        raise ApiError(error.code, error.message, part, problems=error.problems) from error
    return _id(answer)


async def _started(
    request: Request, app: Services, key: Key, values: Mapping[str, str], create: CreateJob
) -> RedirectResponse:
    # Whoever goes back and changes something wants another job; whoever sends the same does not.
    creating = _once(request, app, key, values, create.fingerprint)
    answer = await creating.run(
        create.fingerprint,
        lambda receipt: start_job(app, key.project, create, receipt),
        FineTuningJob.of,
        location="/jobs",
        then=app.bell.ring,
    )
    where = f"/jobs/{_id(answer)}"
    return RedirectResponse(where, status_code=303, background=answer.background)


def _once(
    request: Request, app: Services, key: Key, values: Mapping[str, str], what: str
) -> once.Once:
    """The right to make one thing by one copy of the form."""
    token = values.get("token", "")
    if not re.fullmatch(r"[0-9a-f]{32}", token):
        token = secrets.token_hex(16)
    return once.Once(request, app, key, idempotency_key=f"{token}-{what}")


def _id(answer: Response) -> str:
    return answer.headers["location"].rpartition("/")[2]


def _body(app: Services, project: str, values: Mapping[str, str]) -> dict[str, Any]:
    """The body of a create. Raises ApiError where the JSON of `sat` or the method is none."""
    typed = {name: values.get(name, "").strip() for name in SENT}
    body: dict[str, Any] = {name: typed[name] for name in NAMES if typed[name]}
    numbers = {name: _number(typed[name]) for name in (*HYPERPARAMETERS, "seed")}
    known = {name: value for name, value in numbers.items() if value not in ("", "auto")}
    if "seed" in known:
        body["seed"] = known.pop("seed")
    body["hyperparameters"] = known
    if typed["method"] not in METHODS:
        raise ApiError(
            "invalid_value",
            f"method is {typed['method']!r}; allowed: {', '.join(METHODS)}.",
            "method",
        )
    try:
        given = json.loads(typed["sat"] or "{}")
        body["sat"] = merge_patch(METHODS[typed["method"]].sat, {} if given is None else given)
    except (ValueError, RecursionError) as error:
        raise ApiError("invalid_value", f"sat is not valid JSON: {error}.", "sat") from error
    if typed["again"]:
        before = create_body(app.store.get_job(project, typed["again"]), by_method=False)
        body |= {name: before[name] for name in ("metadata", "integrations")}
    return json_body(json.dumps(body).encode())


def _number(text: str) -> int | float | str:
    """A number where it is one; what is none is refused by whoever knows the limits."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def filled(job: JobRecord) -> dict[str, str]:
    """What would have to be typed to get a job's own request again."""
    body = create_body(job, by_method=False)
    hyper, sat = body["hyperparameters"] or {}, body.get("sat") or {}
    values = {name: str(body[name]) for name in (*NAMES, "seed") if body.get(name) is not None}
    values |= {name: str(value) for name, value in hyper.items() if value is not None}
    values |= {"again": job.id, "method": method_of(sat)}
    usual = RunRequest.from_dict({"model": job.model, "sat": METHODS[values["method"]].sat})
    rest = changes(usual.to_dict()["sat"], sat)
    return values | {"sat": json.dumps(rest, indent=2) if rest else ""}


def method_of(sat: Mapping[str, Any]) -> str:
    """The method that comes nearest to these settings."""
    if sat.get("train", {}).get("tuning") == "lora":
        return "lora"
    return "dense" if sat.get("mode") == "off" else str(sat.get("preset", "balanced"))


def changes(base: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be merged into `base` to get `wanted`."""
    return {
        name: changes(base[name], value)
        if isinstance(value, dict) and isinstance(base.get(name), dict)
        else value
        for name, value in wanted.items()
        if base.get(name) != value
    }


def _page(
    request: Request,
    app: Services,
    key: Key,
    values: dict[str, str],
    *,
    plan: Estimate | None = None,
    error: ApiError | None = None,
) -> HTMLResponse:
    """The form with what was typed, and beside it what came of it."""
    at, status = None, 200
    if error:
        at = _place(error.param)
        # What a field says of another thing is no fault of this address.
        status = 400 if at else ERRORS[error.code].status
    # A copy of the form makes one job; what is shown next is another copy.
    shown = EMPTY | values | {"token": secrets.token_hex(16)}
    return render(
        request,
        "new.html",
        status=status,
        values=shown,
        methods=METHODS,
        models=[model.id for model in list_models(app, key).data] if may(key, "models") else [],
        files=_files(app, key.project, shown) if may(key, "files") else None,
        max_bytes=app.settings.max_file_bytes,
        plan=plan,
        workers=_workers(app),
        error=error,
        at=at,
        problems=error.problems[:PROBLEMS_SHOWN] if error else (),
    )


def _place(param: str | None) -> str | None:
    """The field that a refusal speaks of; None where it is about all of it."""
    name = (param or "").removeprefix("hyperparameters.")
    if name.startswith("sat."):
        return "sat"
    return name if name in (*SHOWN, *UPLOADS) else None


def _workers(app: Services) -> int:
    return app.queueing.snapshot().workers


def _files(app: Services, project: str, values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The newest data sets, and those that are chosen."""
    page = app.store.list_files(project, limit=FILES_SHOWN, purpose=PURPOSE)
    found = {file.id: _choice(file) for file in page.items}
    for name in ("training_file", "validation_file"):
        if values[name] and values[name] not in found:
            try:
                found[values[name]] = _choice(app.store.get_file(project, values[name]))
            except NotFound:
                gone = {"id": values[name], "label": f"{values[name]} (deleted)", "bad": True}
                found[values[name]] = gone
    return list(found.values())


def _choice(file: FileRecord) -> dict[str, Any]:
    rows = "" if file.rows is None else f"{file.rows:,} rows, "
    verdict = VERDICTS.get(file.status, "with warnings" if file.report.get("warnings") else "good")
    label = f"{file.filename}: {rows}{size(file.bytes)}, {verdict}, {ago(file.created_at)}"
    return {"id": file.id, "label": label, "bad": file.status == "error"}

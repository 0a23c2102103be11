"""`/v1/webhook_endpoints` and `/v1/webhook_event_types`: who is told of what, and what became of it.

Sending is the workers' (`worker.postman`); only a test is sent from here, since its answer is the answer.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool

from api import once
from api.auth import Caller, require_key
from api.deps import App, Services
from api.errors import ApiError
from api.schemas.bodies import described, read
from api.schemas.lists import After, Deleted, ListOf
from api.schemas.problems import answers
from api.schemas.webhooks import (
    NewWebhook,
    Rotation,
    TestBody,
    WebhookChanges,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEventTypes,
    WebhookTestResult,
    WebhookWithSecret,
    known_types,
)
from jobs.courier import Courier, UrlNotAllowedError, check_url
from jobs.outbox import EVENT_TYPES

router = APIRouter(prefix="/v1", tags=["webhooks"], dependencies=[Depends(require_key)])

ENDPOINTS = "/webhook_endpoints"
ENDPOINT = ENDPOINTS + "/{webhook_endpoint_id}"
BODY = ("invalid_value", "missing_required_parameter", "unknown_parameter", "request_too_large")
NOT_FOUND = "webhook_endpoint_not_found"
Limit = Annotated[int, Query(ge=1, le=100)]


@router.get("/webhook_event_types", operation_id="listWebhookEventTypes", responses=answers())
def list_event_types() -> WebhookEventTypes:
    """What can be asked for."""
    return WebhookEventTypes(data=list(EVENT_TYPES))


@router.post(
    ENDPOINTS,
    operation_id="createWebhookEndpoint",
    openapi_extra=described(NewWebhook),
    response_model=WebhookWithSecret,
    responses=answers("url_not_allowed", *BODY, *once.CODES),
)
async def create_webhook(request: Request, app: App, key: Caller, creating: once.Creating) -> Any:
    """A new address. Its signing secret is in this answer only."""
    body, raw = await read(request, NewWebhook)
    types = known_types(body.event_types)
    _allowed(app, body.url)
    return await creating.run(
        once.fingerprint(raw),
        lambda receipt: app.store.create_webhook(
            key.project, name=body.name, url=body.url, event_types=types, receipt=receipt
        ),
        WebhookWithSecret.new,
        location=router.prefix + ENDPOINTS,
    )


@router.get(
    ENDPOINTS,
    operation_id="listWebhookEndpoints",
    responses=answers("invalid_value", "invalid_cursor"),
)
def list_webhooks(
    app: App, key: Caller, after: After = None, limit: Limit = 20
) -> ListOf[WebhookEndpoint]:
    """Addresses of this project, newest first."""
    page = app.store.list_webhooks(key.project, after=after, limit=limit)
    items = [WebhookEndpoint.of(w) for w in page.items]
    return ListOf[WebhookEndpoint].of(items, has_more=page.has_more)


@router.get(ENDPOINT, operation_id="retrieveWebhookEndpoint", responses=answers(NOT_FOUND))
def retrieve_webhook(webhook_endpoint_id: str, app: App, key: Caller) -> WebhookEndpoint:
    """One address."""
    return WebhookEndpoint.of(app.store.get_webhook(key.project, webhook_endpoint_id))


@router.post(
    ENDPOINT,
    operation_id="updateWebhookEndpoint",
    openapi_extra=described(WebhookChanges, required=False),
    responses=answers(NOT_FOUND, "url_not_allowed", *BODY),
)
async def update_webhook(
    webhook_endpoint_id: str, request: Request, app: App, key: Caller
) -> WebhookEndpoint:
    """Change what is named."""
    body, _ = await read(request, WebhookChanges)
    changes = {name: value for name, value in body.model_dump().items() if value is not None}
    if body.event_types is not None:
        changes["event_types"] = known_types(body.event_types)
    if body.url is not None:
        _allowed(app, body.url)
    change = app.store.change_webhook
    return WebhookEndpoint.of(
        await run_in_threadpool(change, key.project, webhook_endpoint_id, changes)
    )


@router.delete(ENDPOINT, operation_id="deleteWebhookEndpoint", responses=answers(NOT_FOUND))
def delete_webhook(webhook_endpoint_id: str, app: App, key: Caller) -> Deleted:
    """Forget an address and its deliveries."""
    app.store.delete_webhook(key.project, webhook_endpoint_id)
    return Deleted(id=webhook_endpoint_id, object="webhook_endpoint.deleted")


@router.post(
    ENDPOINT + "/rotate_secret",
    operation_id="rotateWebhookEndpointSecret",
    openapi_extra=described(Rotation, required=False),
    responses=answers(NOT_FOUND, *BODY),
)
async def rotate_secret(
    webhook_endpoint_id: str, request: Request, app: App, key: Caller
) -> WebhookWithSecret:
    """A new signing secret, in this answer only."""
    body, _ = await read(request, Rotation)
    record = await run_in_threadpool(
        app.store.rotate_webhook_secret,
        key.project,
        webhook_endpoint_id,
        keep_old=body.keep_old_secret_active_for_24_hours,
    )
    return WebhookWithSecret.new(record)


@router.post(
    ENDPOINT + "/test",
    operation_id="testWebhookEndpoint",
    openapi_extra=described(TestBody),
    responses=answers(NOT_FOUND, "webhook_unreachable", *BODY),
)
async def test_webhook(
    webhook_endpoint_id: str, request: Request, app: App, key: Caller
) -> WebhookTestResult:
    """Send a sample event now, and say what the receiver answered."""
    body, _ = await read(request, TestBody)
    known_types([body.event_type], "event_type")
    return await run_in_threadpool(
        _send_test, app, key.project, webhook_endpoint_id, body.event_type
    )


def _send_test(app: Services, project: str, endpoint: str, event_type: str) -> WebhookTestResult:
    delivery = app.store.add_test_delivery(project, endpoint, event_type)
    found = app.store.address_of(delivery)
    if found is None:
        raise ApiError("webhook_unreachable", f"{endpoint} was deleted meanwhile.")
    courier = Courier(app.settings.webhook_networks)
    outcome = courier.send(*found, delivery.event_id, delivery.body)
    app.store.end_test_delivery(delivery, outcome.status, outcome.error)
    if outcome.status is None:
        raise ApiError("webhook_unreachable", f"{found[0]} was not reached: {outcome.error}.")
    return WebhookTestResult(
        webhook_endpoint_id=endpoint, event_type=event_type, status_code=outcome.status
    )


@router.get(
    ENDPOINT + "/deliveries",
    operation_id="listWebhookDeliveries",
    responses=answers(NOT_FOUND, "invalid_value", "invalid_cursor"),
)
def list_deliveries(
    webhook_endpoint_id: str,
    app: App,
    key: Caller,
    after: After = None,
    limit: Limit = 20,
    status: Annotated[Literal["pending", "delivered", "failed"] | None, Query()] = None,
) -> ListOf[WebhookDelivery]:
    """What was sent, newest first; kept for 30 days."""
    page = app.store.list_deliveries(
        key.project, webhook_endpoint_id, after=after, limit=limit, status=status
    )
    items = [WebhookDelivery.of(d) for d in page.items]
    return ListOf[WebhookDelivery].of(items, has_more=page.has_more)


@router.post(
    ENDPOINT + "/deliveries/{delivery_id}/redeliver",
    operation_id="redeliverWebhook",
    responses=answers(NOT_FOUND, "webhook_delivery_not_found"),
)
def redeliver(webhook_endpoint_id: str, delivery_id: str, app: App, key: Caller) -> WebhookDelivery:
    """Send an event again, under the same id."""
    record = app.store.redeliver(key.project, webhook_endpoint_id, delivery_id)
    return WebhookDelivery.of(record)


def _allowed(app: Services, url: str) -> None:
    try:
        check_url(url, app.settings.webhook_networks)
    except UrlNotAllowedError as error:
        raise ApiError("url_not_allowed", f"{error}.", "url") from error

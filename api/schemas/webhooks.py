"""OpenAI's webhook objects; `status` and deliveries are ours."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field

from api.errors import ApiError
from api.schemas.bodies import Body
from api.schemas.organization import Name
from jobs.outbox import EVENT_TYPES
from jobs.spec import DeliveryRecord, WebhookRecord

Url = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2048,
        json_schema_extra={"pattern": "^https?://"},
        description="A public address.",
    ),
]
# Described as a choice, and refused by `known_types`, whose message says what there is.
EventType = Annotated[str, Field(json_schema_extra={"enum": list(EVENT_TYPES)})]
Types = Annotated[list[EventType], Field(min_length=1, max_length=100)]


class NewWebhook(Body):
    """An address and what it is to be told."""

    name: Name
    url: Url
    event_types: Types


class WebhookChanges(Body):
    """What may change; `enabled` switches it on or off."""

    name: Name | None = None
    url: Url | None = None
    event_types: Types | None = None
    enabled: bool | None = None


class Rotation(Body):
    """Whether the old secret still signs for a day."""

    keep_old_secret_active_for_24_hours: bool = False


class TestBody(Body):
    """Which event to send as a sample."""

    event_type: EventType


def known_types(types: list[str], param: str = "event_types") -> list[str]:
    """The types, each once and in order; refuses what does not exist."""
    for name in types:
        if name not in EVENT_TYPES:
            raise ApiError(
                "invalid_value",
                f"{name!r} is no event of this service; allowed: {', '.join(EVENT_TYPES)}.",
                param,
            )
    return sorted(set(types))


class WebhookEndpoint(BaseModel):
    """An address that is told of events."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: list[str]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    status: Literal["enabled", "disabled"]

    @classmethod
    def of(cls, record: WebhookRecord) -> Self:
        """The address as a client sees it."""
        return cls(
            id=record.id,
            name=record.name,
            url=record.url,
            event_types=record.event_types,
            created_at=int(record.created_at),
            updated_at=int(record.updated_at),
            signing_secret_hint=f"whsec_...{record.secret[-4:]}",
            status="enabled" if record.disabled_at is None else "disabled",
        )


class WebhookWithSecret(WebhookEndpoint):
    """An address whose secret was just made: shown once."""

    signing_secret: str

    @classmethod
    def new(cls, record: WebhookRecord) -> Self:
        """The address with its secret."""
        shown = WebhookEndpoint.of(record)
        return cls(**shown.model_dump(), signing_secret=record.secret)


class WebhookTestResult(BaseModel):
    """The receiver answered."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    success: Literal[True] = True
    status_code: int


class WebhookEventTypes(BaseModel):
    """What can be asked for."""

    object: Literal["list"] = "list"
    data: list[str]


class WebhookDelivery(BaseModel):
    """An event on its way; `failed` is given up, until it is redelivered."""

    id: str
    object: Literal["webhook_delivery"] = "webhook_delivery"
    webhook_endpoint_id: str
    event_id: str
    event_type: str
    payload: str
    status: str
    tries: int
    created_at: int
    last_try_at: int | None
    next_try_at: int | None
    response_status: int | None
    error: str | None

    @classmethod
    def of(cls, record: DeliveryRecord) -> Self:
        """The delivery as a client sees it."""
        return cls(
            id=record.id,
            webhook_endpoint_id=record.endpoint_id,
            event_id=record.event_id,
            event_type=record.event_type,
            payload=record.body,
            status=record.status,
            tries=record.tries,
            created_at=int(record.created_at),
            last_try_at=None if record.tried_at is None else int(record.tried_at),
            next_try_at=int(record.next_at) if record.status == "pending" else None,
            response_status=record.response_status,
            error=record.error,
        )

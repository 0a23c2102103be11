"""Webhook endpoints over HTTP, with OpenAI's own client."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import openai
import pytest

from api.app import create_app
from tests.worker.test_postman import (
    LOOPBACK,
    Receiver,
    receiver,  # noqa: F401 - a fixture
    trickling,
)

from .conftest import KEY, create, upload
from .serving import served

if TYPE_CHECKING:
    from jobs.settings import Settings

PATH = "/v1/webhook_endpoints"
BODY = {"name": "w", "url": "https://example.com/h", "event_types": ["fine_tuning.job.cancelled"]}


def test_the_client_of_openai_manages_endpoints(
    settings: Settings,
    receiver: Receiver,  # noqa: F811
) -> None:
    app = create_app(settings.model_copy(update={"webhook_networks": LOOPBACK}))
    with (
        served(app) as address,
        openai.OpenAI(
            base_url=f"{address}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
        ) as sdk,
    ):
        types = sdk.webhooks.event_types.list().data
        assert "fine_tuning.job.checkpoint" in types
        made = sdk.webhooks.create(
            name="w", url=receiver.url, event_types=["fine_tuning.job.succeeded"]
        )
        assert made.signing_secret.startswith("whsec_")
        shown = sdk.webhooks.retrieve(made.id)
        assert shown.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
        assert not hasattr(shown, "signing_secret")
        changed = sdk.webhooks.update(made.id, event_types=["fine_tuning.job.failed"])
        assert (changed.event_types, changed.name) == (["fine_tuning.job.failed"], "w")
        assert [e.id for e in sdk.webhooks.list()] == [made.id]
        result = sdk.webhooks.test(made.id, event_type="fine_tuning.job.failed")
        assert (result.success, result.status_code) == (True, 200)
        headers, body = receiver.got[0]
        event = sdk.webhooks.unwrap(body, headers, secret=made.signing_secret)
        assert event.type == "fine_tuning.job.failed"
        assert sdk.webhooks.rotate_secret(made.id).signing_secret != made.signing_secret
        receiver.server.shutdown()
        receiver.server.server_close()
        with pytest.raises(openai.BadRequestError, match="was not reached") as away:
            sdk.webhooks.test(made.id, event_type="fine_tuning.job.failed")
        assert away.value.code == "webhook_unreachable"
        assert sdk.webhooks.delete(made.id).deleted


def test_a_test_of_a_receiver_that_trickles_ends(settings: Settings, monkeypatch) -> None:
    monkeypatch.setattr("jobs.courier.TOTAL_SECONDS", 0.5)
    app = create_app(settings.model_copy(update={"webhook_networks": LOOPBACK}))
    with (
        served(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as sdk,
        trickling(b"HTTP/1.1 200 OK\r\nx: ") as url,
    ):
        made = sdk.webhooks.create(name="w", url=url, event_types=["fine_tuning.job.failed"])
        began = time.monotonic()
        with pytest.raises(openai.BadRequestError, match=r"did not answer within 0\.5 s"):
            sdk.webhooks.test(made.id, event_type="fine_tuning.job.failed")
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"url": "http://127.0.0.1/"}, "url_not_allowed"),
        ({"url": "gopher://example.com"}, "url_not_allowed"),
        ({"event_types": ["batch.completed"]}, "invalid_value"),
        ({"event_types": []}, "invalid_value"),
        ({"name": None}, "invalid_value"),
        ({"secret": "x"}, "unknown_parameter"),
    ],
)
def test_what_cannot_be_is_refused(client, change, code):
    refused = client.post(PATH, json=BODY | change)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)


def test_deliveries_are_listed_and_sent_again(client):
    endpoint = client.post(PATH, json=BODY).json()["id"]
    file = upload(client, b'{"text": "a"}\n').json()["id"]
    job = create(client, file).json()["id"]
    client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    path = f"{PATH}/{endpoint}/deliveries"
    (waiting,) = client.get(path, params={"status": "pending"}).json()["data"]
    assert job in waiting["payload"]
    assert client.get(path, params={"status": "failed"}).json()["data"] == []
    again = client.post(f"{path}/{waiting['id']}/redeliver").json()
    assert (again["id"], again["status"], again["tries"]) == (waiting["id"], "pending", 0)
    assert client.post(f"{path}/whd_none/redeliver").status_code == 404

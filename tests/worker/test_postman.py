"""Webhooks, from the change of a job to a real receiver, on both databases."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from sqlalchemy import update

from jobs.courier import Courier, UrlNotAllowedError, check_url
from jobs.outbox import EVENT_TYPES
from jobs.settings import Settings
from jobs.spec import DeliveryRecord, WebhookRecord
from jobs.states import Stage
from jobs.store import Store
from jobs.tenant_models import DeliveryRow
from jobs.webhooks import BACK_OFF
from tests.jobs.test_store import LIMITS, add_job, step, training
from worker.postman import Postman

LOOPBACK = ("127.0.0.0/8",)
CHECKPOINT = {
    "seq": 2, "time": 1.0, "kind": "checkpoint", "step": 5, "path": "c/5", "size_bytes": 1,
    "metrics": {},
}  # fmt: skip


class Receiver:
    """An HTTP server that keeps what it gets and answers what it is told to."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.status, self.headers = 200, {}  # type: tuple[int, dict[str, str]]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.server.shutdown()
    found.server.server_close()
    found.thread.join()


@contextmanager
def trickling(head: bytes) -> Iterator[str]:
    """The address of a receiver that answers `head` at once and then a byte now and then, for some seconds."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            for _ in range(60):
                connection.sendall(b"x")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        thread.join()


@pytest.fixture
def postman(quick: Settings, store: Store) -> Postman:
    settings = quick.model_copy(update={"webhook_networks": LOOPBACK})
    return Postman(settings, store, threading.Event())


def register(
    store: Store, receiver: Receiver, *types: str, project: str = "default"
) -> WebhookRecord:
    return store.create_webhook(
        project, name="w", url=receiver.url, event_types=list(types or EVENT_TYPES)
    )


def deliveries(store: Store, endpoint: WebhookRecord) -> list[DeliveryRecord]:
    return list(store.list_deliveries("default", endpoint.id, limit=50).items)


def due_now(store: Store) -> None:
    with store.writing() as session:
        session.execute(update(DeliveryRow).values(next_at=time.time() - 1))


def cancelled(store: Store) -> str:
    job = add_job(store)
    store.cancel_job("default", job.id)
    return job.id


def test_a_job_is_told_from_queue_to_success_and_openais_client_believes_it(
    store: Store, receiver: Receiver, postman: Postman
) -> None:
    endpoint = register(store, receiver)
    register(store, receiver, project="elsewhere")
    job = add_job(store)
    claim = training(store)
    store.record(claim, [step(1), CHECKPOINT], run="r", read_position=1)
    store.finish_train(claim, model="ft:m", path="p", summary={})
    assert postman.round() == 4
    client = openai.OpenAI(api_key="x", webhook_secret=endpoint.secret)
    events = [client.webhooks.unwrap(body, headers) for headers, body in receiver.got]
    names = ["checkpoint", "queued", "started", "succeeded"]
    assert sorted(e.type for e in events) == [f"fine_tuning.job.{n}" for n in names]
    assert {e.data.id for e in events} == {job.id}
    assert {h["webhook-id"] for h, _ in receiver.got} == {e.id for e in events}
    assert {d.status for d in deliveries(store, endpoint)} == {"delivered"}
    assert postman.round() == 0
    headers, body = receiver.got[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)


def test_only_what_was_asked_for_is_told(store: Store, receiver: Receiver) -> None:
    endpoint = register(store, receiver, "fine_tuning.job.failed")
    cancelled(store)
    assert not deliveries(store, endpoint)
    add_job(store)
    claim = training(store)
    # A lost worker is no news until it is one too many.
    for _ in range(LIMITS["max_failures"]):
        (lease,) = store.leases()
        store.expire(lease, **LIMITS)
        again = store.claim("w", Stage.TRAIN)
        claim = again or claim
    (told,) = deliveries(store, endpoint)
    assert claim.job_id in told.body


def test_a_failed_delivery_is_tried_again_given_up_and_replayed(
    store: Store, receiver: Receiver, postman: Postman
) -> None:
    endpoint = register(store, receiver)
    cancelled(store)
    receiver.status = 500
    for number in range(len(BACK_OFF) + 1):
        assert postman.round() == 1
        (delivery,) = deliveries(store, endpoint)
        assert (delivery.tries, delivery.response_status) == (number + 1, 500)
        if number < len(BACK_OFF):
            wait = delivery.next_at - (delivery.tried_at or 0)
            assert BACK_OFF[number] <= wait <= BACK_OFF[number] * 1.1 + 1
            assert postman.round() == 0
            due_now(store)
    assert delivery.status == "failed"
    assert "500" in (delivery.error or "")
    due_now(store)
    assert postman.round() == 0
    receiver.status = 204
    store.redeliver("default", endpoint.id, delivery.id)
    assert postman.round() == 1
    assert deliveries(store, endpoint)[0].status == "delivered"
    # One event has one id, however often it is sent.
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_gone_switches_the_address_off(store: Store, receiver: Receiver, postman: Postman) -> None:
    endpoint = register(store, receiver)
    cancelled(store)
    receiver.status = 410
    postman.round()
    assert store.get_webhook("default", endpoint.id).disabled_at
    cancelled(store)
    assert len(deliveries(store, endpoint)) == 1
    store.change_webhook("default", endpoint.id, {"enabled": True})
    cancelled(store)
    assert len(deliveries(store, endpoint)) == 2


def test_a_redirect_is_a_failure_and_waiting_is_honoured(
    store: Store, receiver: Receiver, postman: Postman
) -> None:
    endpoint = register(store, receiver)
    cancelled(store)
    receiver.status = 302
    receiver.headers = {"location": receiver.url, "retry-after": "1000"}
    postman.round()
    (delivery,) = deliveries(store, endpoint)
    assert delivery.response_status == 302
    assert len(receiver.got) == 1
    assert delivery.next_at - (delivery.tried_at or 0) == pytest.approx(1000, abs=2)


def test_a_wait_that_is_no_number_is_not_honoured(
    store: Store, receiver: Receiver, postman: Postman
) -> None:
    endpoint = register(store, receiver)
    cancelled(store)
    receiver.status = 503
    receiver.headers = {"retry-after": "\xb2"}
    postman.round()
    (delivery,) = deliveries(store, endpoint)
    assert (delivery.response_status, delivery.status) == (503, "pending")


@pytest.mark.parametrize(
    ("head", "status", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nx: ", None, "did not answer within 0.5 s"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 99\r\n\r\n", 500, "answered 500"),
    ],
    ids=["in its headers", "in its body"],
)
def test_a_receiver_that_trickles_has_no_more_time_than_others(
    store: Store,
    postman: Postman,
    monkeypatch: pytest.MonkeyPatch,
    head: bytes,
    status: int | None,
    said: str,
) -> None:
    monkeypatch.setattr("jobs.courier.TOTAL_SECONDS", 0.5)
    with trickling(head) as url:
        endpoint = store.create_webhook("default", name="w", url=url, event_types=list(EVENT_TYPES))
        cancelled(store)
        began = time.monotonic()
        assert postman.round() == 1
        assert time.monotonic() - began < 3
    (delivery,) = deliveries(store, endpoint)
    assert (delivery.response_status, delivery.status) == (status, "pending")
    assert said in (delivery.error or "")


def test_two_senders_send_once(store: Store, receiver: Receiver, postman: Postman) -> None:
    register(store, receiver)
    cancelled(store)
    assert len(store.due_deliveries(8)) == 1
    assert postman.round() == 0


def test_after_a_rotation_the_old_secret_is_good_for_a_day_where_asked(
    store: Store, receiver: Receiver, postman: Postman
) -> None:
    old = register(store, receiver)
    new = store.rotate_webhook_secret("default", old.id, keep_old=True)
    cancelled(store)
    postman.round()
    headers, body = receiver.got[0]
    for secret in (old.secret, new.secret):
        openai.OpenAI(api_key="x", webhook_secret=secret).webhooks.unwrap(body, headers)
    store.rotate_webhook_secret("default", old.id, keep_old=False)
    cancelled(store)
    postman.round()
    headers, body = receiver.got[1]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="x", webhook_secret=new.secret).webhooks.unwrap(body, headers)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "10.0.0.1",
        "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "[fd00::1]", "[fe80::1]",
        "224.0.0.1", "255.255.255.255",
    ],
)  # fmt: skip
def test_no_address_of_the_inside_is_sent_to(receiver: Receiver, host: str) -> None:
    port = receiver.server.server_port
    courier = Courier()
    outcome = courier.send(f"http://{host}:{port}/", ["whsec_" + "A" * 32], "evt_1", "{}")
    assert outcome.status is None
    assert "not a public address" in (outcome.error or "")
    assert not receiver.got


def test_what_is_no_web_address_is_refused_at_once() -> None:
    for url in (
        "ftp://example.com",
        "file:///etc/passwd",
        "https://",
        "x",
        "http://u:p@example.com",
    ):
        with pytest.raises(UrlNotAllowedError):
            check_url(url)
    with pytest.raises(UrlNotAllowedError, match="SATUNE_WEBHOOK_NETWORKS"):
        check_url("http://169.254.169.254/latest")
    for url in ("https://.", "https://a..b/", f"https://{'a' * 64}.com/"):
        with pytest.raises(UrlNotAllowedError, match="no host name"):
            check_url(url)
    check_url("http://10.1.2.3/", ("10.0.0.0/8",))
    check_url("https://example.com/hook")


def test_a_name_that_does_not_resolve_and_a_closed_port_are_outcomes(receiver: Receiver) -> None:
    courier = Courier(LOOPBACK)
    secret = ["whsec_" + "A" * 32]
    assert courier.send("http://none.invalid/", secret, "e", "{}").error
    assert courier.send("http://127.0.0.1:1/", secret, "e", "{}").error

"""Sending one webhook: signed by the Standard Webhooks scheme, and never to where the service itself lives.

A URL is a user's, so it may name the database, the cloud's metadata service or another machine behind the firewall. The
name is resolved here, every address is judged, and the connection goes to the very address that was judged, so that a
name which resolves differently a moment later changes nothing; the certificate is still checked against the name. No
redirect is followed, no proxy of the environment is used, little of the answer is read and none of it is kept. The road
not taken is a check when the URL is registered: what a name resolves to is known only when it is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
from standardwebhooks import Webhook

# From connecting to the end of the answer; how long a name is looked up is the resolver's to bound.
TOTAL_SECONDS = 15.0
READ_BYTES = 16 * 1024
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Prefixes whose last 32 bits are an IPv4 address that the packet ends at.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class UrlNotAllowedError(ValueError):
    """The service does not send there; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one try; `error` is None where the receiver took it."""

    status: int | None
    error: str | None
    retry_after_seconds: float = 0.0


def check_url(url: str, networks: Sequence[str] = ()) -> None:
    """Refuse what can never be sent to. Raises UrlNotAllowedError."""
    host = _parsed(url).host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    _judge(address, networks)


class Courier:
    """Sends events; `networks` are private networks that are allowed all the same."""

    def __init__(self, networks: Sequence[str] = ()) -> None:
        self._networks = tuple(networks)
        self._tls = httpx.create_ssl_context(trust_env=False)

    def send(self, url: str, secrets: Sequence[str], event_id: str, body: str) -> Outcome:
        """One try; never raises for what the receiver does."""
        try:
            address = self._resolve(url)
        except (UrlNotAllowedError, OSError) as error:
            return Outcome(status=None, error=f"{error}"[:500])
        headers = _signed(secrets, event_id, body)
        try:
            # A blocking client's limits begin anew at each byte, so a receiver that sends one now and then would keep it;
            # what is awaited can be ended.
            return asyncio.run(self._post(url, address, headers, body))
        except httpx.HTTPError as error:
            return Outcome(status=None, error=f"{type(error).__name__}: {error}"[:500])

    async def _post(
        self, url: str, address: Address, headers: dict[str, str], body: str
    ) -> Outcome:
        parsed = httpx.URL(url)
        host = parsed.netloc.decode("ascii").rpartition("@")[2]
        outcome, read = None, 0
        try:
            async with (
                asyncio.timeout(TOTAL_SECONDS),
                # One for each delivery: a connection is known by its address, so one kept open would carry another
                # host's events past the check of its certificate; and receivers of several projects share no cookies.
                httpx.AsyncClient(
                    follow_redirects=False,
                    trust_env=False,
                    verify=self._tls,
                    timeout=httpx.Timeout(10, connect=5),
                    headers={"user-agent": "Satune-Webhooks/1"},
                ) as http,
                http.stream(
                    "POST",
                    parsed.copy_with(host=str(address)),
                    content=body.encode(),
                    headers={"host": host, "content-type": "application/json", **headers},
                    extensions={"sni_hostname": parsed.host},
                ) as response,
            ):
                outcome = _judged(response)
                async for chunk in response.aiter_raw():
                    read += len(chunk)
                    if read > READ_BYTES:
                        break
        except TimeoutError:
            late = f"The receiver did not answer within {TOTAL_SECONDS:g} s"
            return outcome or Outcome(status=None, error=late)
        except httpx.HTTPError:
            if outcome is None:  # what it said is known, whatever came of the rest
                raise
        return outcome

    def _resolve(self, url: str) -> Address:
        """The address to connect to. One that is not allowed refuses them all."""
        parsed = _parsed(url)
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        found = socket.getaddrinfo(parsed.host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in found]
        for address in addresses:
            _judge(address, self._networks)
        return addresses[0]


def _parsed(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UrlNotAllowedError(f"{url!r} is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UrlNotAllowedError(
            f"{url!r} is not allowed; webhooks go to http:// and https:// URLs"
        )
    if parsed.userinfo:
        raise UrlNotAllowedError("A webhook URL must not hold a name or password")
    try:
        parsed.host.encode("idna")  # as whoever looks it up does
    except UnicodeError as error:
        raise UrlNotAllowedError(f"{parsed.host!r} is no host name: {error}") from error
    return parsed


def _judge(address: Address, networks: Sequence[str]) -> None:
    """Raises UrlNotAllowedError for what is not a public address, written in whichever way."""
    meant = _meant(address)
    for network in map(ipaddress.ip_network, networks):
        if meant.version == network.version and meant in network:
            return
    if not meant.is_global or meant.is_multicast or meant.is_reserved:
        raise UrlNotAllowedError(
            f"{meant} is not a public address; an operator can allow its network in SATUNE_WEBHOOK_NETWORKS"
        )


def _meant(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, where there is one."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _judged(response: httpx.Response) -> Outcome:
    if response.is_success:
        return Outcome(status=response.status_code, error=None)
    wait = response.headers.get("retry-after", "")
    return Outcome(
        status=response.status_code,
        error=f"The receiver answered {response.status_code}",
        # isdigit alone also holds for digits such as a superscript two, which are no number.
        retry_after_seconds=float(wait) if wait.isascii() and wait.isdigit() else 0.0,
    )


def _signed(secrets: Sequence[str], event_id: str, body: str) -> dict[str, str]:
    # `sign` reads the naive or aware fields as UTC.
    now = datetime.now(tz=UTC)
    signatures = [Webhook(secret).sign(event_id, now, body) for secret in secrets]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }

"""Speaking to a Satune server: where it is, with which key, and what its errors mean for an exit code.

The server's address comes from SATUNE_URL and SATUNE_API_KEY, else from the connection.json that `satune up` leaves in its
data folder. Whatever is sent may be sent again, since every create carries an idempotency key: a lost answer costs a second
and makes nothing twice. Exit codes are stable; docs/cli.md has their table. The road not taken is OpenAI's client: half of
what is asked here lies beyond it.
"""

from __future__ import annotations

import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

FAILED, USAGE, CANCELLED, NOT_FOUND, NOT_ALLOWED, UNREACHABLE, NOT_NOW = 1, 2, 3, 4, 5, 6, 7
TIMED_OUT, INTERRUPTED = 124, 130
TERMINAL = {"succeeded": 0, "failed": FAILED, "cancelled": CANCELLED}
CONNECTION = "connection.json"
JOBS = "/v1/fine_tuning/jobs"
CHAT = "/v1/chat/completions"
# Below the time after which an answer is no longer waited for.
WAIT_SECONDS = 20
# Seconds before something is sent again; a server that asks for more patience than the last is not waited for.
PAUSES = (0.5, 1, 2, 5)
MAX_PAUSE = 30
# A model may have to be loaded, and reads a long prompt before it says its first word.
ANSWER_SECONDS = 600
_LOST = (httpx.ReadError, httpx.WriteError, httpx.ReadTimeout, httpx.RemoteProtocolError)
_STATUSES = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: NOT_FOUND, 409: NOT_NOW, 429: NOT_NOW}
# Errors that say more than their status.
_CODES = {"unknown_model": NOT_FOUND, "gpu_busy": NOT_NOW, "model_loading": NOT_NOW}


class CliError(Exception):
    """A message for the person at the terminal, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.message, self.exit_code = message, exit_code


@dataclass(frozen=True, kw_only=True)
class Connection:
    """How to reach a server. `data_dir` is known only for a server on this machine."""

    url: str
    api_key: str
    data_dir: Path | None = None

    @property
    def dashboard_url(self) -> str:
        """A link that signs in, as a notebook server prints it."""
        return f"{self.url}/login?key={self.api_key}"

    @classmethod
    def find(cls, data_dir: Path) -> Connection:
        """From the environment, else from `data_dir`/connection.json; a key of the environment goes before the one there.

        Raises:
            CliError: where there is neither, or a server without a key, saying how to get it.
        """
        url, key = os.environ.get("SATUNE_URL"), os.environ.get("SATUNE_API_KEY")
        if url and key:
            return cls(url=url.rstrip("/").removesuffix("/v1"), api_key=key)
        if url:
            # Another server than the one that was named must not be asked.
            raise CliError(
                "SATUNE_URL is set, but SATUNE_API_KEY is not: set both or neither.", USAGE
            )
        path = data_dir / CONNECTION
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(
                url=found["url"],
                api_key=key or found["api_key"],
                data_dir=Path(found["data_dir"]),
            )
        except (OSError, ValueError, KeyError) as error:
            raise CliError(
                f"No server is known: {path} is not there. Start one with `satune up`, name its folder with --data-dir, "
                "or set SATUNE_URL and SATUNE_API_KEY.",
                UNREACHABLE,
            ) from error


class Client:
    """The REST API as a person's commands need it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._http = httpx.Client(
            base_url=connection.url,
            headers={"Authorization": f"Bearer {connection.api_key}"},
            timeout=httpx.Timeout(30, connect=5),
            transport=httpx.HTTPTransport(retries=2),
        )

    def upload(self, path: Path, **fields: str) -> dict[str, Any]:
        """POST a data file; the file object, with its row count."""
        try:
            with path.open("rb") as file:
                return self._create(
                    "/v1/files",
                    data={"purpose": "fine-tune", **fields},
                    files={"file": (path.name, file)},
                    timeout=600,
                )
        except OSError as error:
            raise CliError(f"{path} cannot be read: {error.strerror}.", USAGE) from error

    def validation(self, file_id: str, **params: Any) -> dict[str, Any]:
        """The report on a file, once a worker has made it."""
        return self._answer(f"/v1/files/{file_id}/validation", **params)

    def _answer(self, path: str, **params: Any) -> dict[str, Any]:
        """What a worker makes of a question, or soon the news that none lives; one may be starting."""
        waits, absent = itertools.chain([2, 8], itertools.repeat(WAIT_SECONDS)), 0
        while True:
            found = self._send("GET", path, params={"wait": next(waits), **params})
            if found["status"] != "pending":
                return found
            alive = self._send("GET", "/v1/sat/capabilities")["workers"]["slots"]["prepare"]
            absent = 0 if alive else absent + 1
            if absent == 2:
                raise CliError("No worker of this service is alive to answer that.", NOT_NOW)
            # Not every answer is held back so long as was asked for.
            time.sleep(PAUSES[0])

    def delete_file(self, file_id: str) -> None:
        """Forget a file; one that is gone is no error, since an earlier try may have done it."""
        try:
            self._send("DELETE", f"/v1/files/{file_id}")
        except CliError as error:
            if error.exit_code != NOT_FOUND:
                raise

    def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST a job."""
        return self._create(JOBS, json=body)

    def clone_job(self, job_id: str, changes: dict[str, Any]) -> dict[str, Any]:
        """POST a job like another one, with changes as a JSON Merge Patch."""
        return self._create(f"{JOBS}/{job_id}/clone", json=changes)

    def estimate(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a job of this body would do and take, once it is ready or has failed."""
        path = "/v1/fine_tuning/estimates"
        found = self._create(path, json=body)
        return self._answer(f"{path}/{found['id']}") if found["status"] == "pending" else found

    def job(self, job_id: str, **params: Any) -> dict[str, Any]:
        """One job as it stands; with `wait` and `version` as soon as it is of another version."""
        return self._send("GET", f"{JOBS}/{job_id}", params=params)

    def config(self, job_id: str) -> dict[str, Any]:
        """What a job was told and what it resolved."""
        return self._send("GET", f"{JOBS}/{job_id}/config")

    def jobs(self, **params: Any) -> list[dict[str, Any]]:
        """The newest jobs."""
        return list(self._send("GET", JOBS, params=params)["data"])

    def events(self, job_id: str, **params: Any) -> dict[str, Any]:
        """A page of what was told of a job."""
        return self._send("GET", f"{JOBS}/{job_id}/events", params=params)

    def metrics(self, job_id: str, **params: Any) -> dict[str, Any]:
        """Columns and rows of what was measured."""
        return self._send("GET", f"{JOBS}/{job_id}/metrics", params=params)

    def ask(self, job_id: str, wish: str) -> dict[str, Any]:
        """Cancel, pause or resume a job."""
        return self._send("POST", f"{JOBS}/{job_id}/{wish}")

    def create_export(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask for a model in another form; the same again is the same export."""
        return self._create("/v1/exports", json=body)

    def export(self, export_id: str) -> dict[str, Any]:
        """One export as it stands."""
        return self._send("GET", f"/v1/exports/{export_id}")

    @contextmanager
    def download(
        self, export_id: str, name: str, sha256: str, first: int
    ) -> Iterator[httpx.Response]:
        """A file of an export from byte `first` on; raises httpx.TransportError where the connection breaks."""
        path = f"/v1/exports/{export_id}/content"
        headers = {"Range": f"bytes={first}-", "If-Range": f'"{sha256}"'} if first else {}
        with self._http.stream("GET", path, params={"file": name}, headers=headers) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            yield response

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A model's whole answer, once it is loaded."""
        return self._send("POST", CHAT, json=body, timeout=ANSWER_SECONDS)

    def pieces(self, body: dict[str, Any]) -> Iterator[str]:
        """The text of a model's answer, as it is written."""
        try:
            with self._stream(CHAT, {**body, "stream": True}) as response:
                for line in response.iter_lines():
                    kind, _, data = line.partition(": ")
                    if kind != "data" or data == "[DONE]":
                        continue
                    piece = json.loads(data)
                    if "error" in piece:
                        raise CliError(piece["error"]["message"], NOT_NOW)
                    yield piece["choices"][0]["delta"].get("content") or ""
        except httpx.HTTPError as error:
            raise self._away(error) from error

    def ready(self) -> bool:
        """Whether the server answers and its database does."""
        try:
            return self._http.get("/readyz", timeout=3).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    @contextmanager
    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[httpx.Response]:
        for pause in (*PAUSES, None):
            with self._http.stream("POST", path, json=body, timeout=ANSWER_SECONDS) as response:
                if response.is_success:
                    yield response
                    return
                response.read()
                asked = _patience(response)
                if pause is None or asked is None:
                    raise _refusal(response)
            time.sleep(max(pause, asked))

    def _create(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._send("POST", path, headers={"Idempotency-Key": str(uuid.uuid4())}, **kwargs)

    def _send(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        for pause in (*PAUSES, None):
            try:
                response = self._http.request(method, path, **kwargs)
            except httpx.HTTPError as error:
                if pause is None or not isinstance(error, _LOST):
                    raise self._away(error) from error
            else:
                if response.is_success:
                    return self._object(response)
                asked = _patience(response)
                if pause is None or asked is None:
                    raise _refusal(response)
                pause = max(pause, asked)
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _away(self, error: httpx.HTTPError) -> CliError:
        message = f"{self.connection.url} does not answer ({error}). Is `satune up` running?"
        return CliError(message, UNREACHABLE)

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        try:
            return dict(response.json())
        except (ValueError, TypeError) as error:
            raise CliError(
                f"{self.connection.url} answers, but is no Satune server.", UNREACHABLE
            ) from error


def _patience(response: httpx.Response) -> float | None:
    """Seconds after which the same may be sent again; None where that is of no use."""
    said = response.headers.get("retry-after", "0")
    asked = float(said) if said.isdigit() else 0.0
    temporary = response.status_code in (409, 429, 502, 503, 504)
    refused = response.headers.get("x-should-retry") == "false"
    return asked if temporary and not refused and asked <= MAX_PAUSE else None


def _refusal(response: httpx.Response) -> CliError:
    by_status = UNREACHABLE if response.status_code >= 500 else USAGE
    exit_code = _CODES.get(_error_code(response)) or _STATUSES.get(response.status_code, by_status)
    return CliError(_message(response), exit_code)


def _error_code(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        lines = [str(error["message"])]
        rows = [problem for problem in error.get("problems") or [] if "line" in problem]
        for row in rows[:10]:
            lines.append(f"  line {row['line']}{row.get('pointer') or ''}: {row['message']}")
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return f"The server answered {response.status_code}: {response.text[:200]}"

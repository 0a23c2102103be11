"""Speaking to a Satune server: where it is, with which key, and what its errors mean for an exit code.

The server's address comes from SATUNE_URL and SATUNE_API_KEY, else from the connection.json that `satune up` leaves in its
data folder. Exit codes are stable: 0 done, 1 the job failed, 2 wrong usage or refused input, 3 cancelled, 4 not found,
5 not allowed, 6 server not reachable, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

FAILED, USAGE, CANCELLED, NOT_FOUND, NOT_ALLOWED, UNREACHABLE = 1, 2, 3, 4, 5, 6
TERMINAL = {"succeeded": 0, "failed": FAILED, "cancelled": CANCELLED}
CONNECTION = "connection.json"
# Below the time after which an answer is no longer waited for.
WAIT_SECONDS = 20


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
        """From the environment, else from `data_dir`/connection.json.

        Raises:
            CliError: where there is neither, saying how to get one.
        """
        url, key = os.environ.get("SATUNE_URL"), os.environ.get("SATUNE_API_KEY")
        if url and key:
            return cls(url=url.rstrip("/").removesuffix("/v1"), api_key=key)
        path = data_dir / CONNECTION
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(url=found["url"], api_key=found["api_key"], data_dir=Path(found["data_dir"]))
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
                return self._send(
                    "POST",
                    "/v1/files",
                    data={"purpose": "fine-tune", **fields},
                    files={"file": (path.name, file)},
                    timeout=600,
                )
        except OSError as error:
            raise CliError(f"{path} cannot be read: {error.strerror}.", USAGE) from error

    def validation(self, file_id: str, **params: Any) -> dict[str, Any]:
        """The report on a file, once a worker has made it."""
        while True:
            asked = {"wait": WAIT_SECONDS, **params}
            found = self._send("GET", f"/v1/files/{file_id}/validation", params=asked)
            if found["status"] != "pending":
                return found

    def delete_file(self, file_id: str) -> None:
        """Forget a file."""
        self._send("DELETE", f"/v1/files/{file_id}")

    def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """POST a job. The idempotency key makes one call one job, even where it must be sent twice."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        return self._send("POST", "/v1/fine_tuning/jobs", json=body, headers=headers)

    def estimate(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a job of this body would do and take, once it is ready or has failed."""
        path, wait = "/v1/fine_tuning/estimates", {"params": {"wait": WAIT_SECONDS}}
        found = self._send("POST", path, json=body)
        while found["status"] == "pending":
            found = self._send("GET", f"{path}/{found['id']}", **wait)
        return found

    def job(self, job_id: str) -> dict[str, Any]:
        """One job as it stands."""
        return self._send("GET", f"/v1/fine_tuning/jobs/{job_id}")

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest jobs."""
        return list(self._send("GET", "/v1/fine_tuning/jobs", params={"limit": limit})["data"])

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for a job to end; it keeps its checkpoints."""
        return self._send("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")

    def ready(self) -> bool:
        """Whether the server answers and its database does."""
        try:
            return self._http.get("/readyz", timeout=3).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _send(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise CliError(
                f"{self.connection.url} does not answer ({error}). Is `satune up` running?",
                UNREACHABLE,
            ) from error
        if response.is_success:
            return dict(response.json())
        code = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 404: NOT_FOUND}.get(response.status_code, USAGE)
        raise CliError(_message(response), UNREACHABLE if response.status_code >= 500 else code)


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        lines = [str(error["message"])]
        for problem in (error.get("problems") or [])[:10]:
            lines.append(
                f"  line {problem['line']}{problem.get('pointer') or ''}: {problem['message']}"
            )
        return "\n".join(lines)
    except (ValueError, KeyError, TypeError):
        return f"The server answered {response.status_code}: {response.text[:200]}"

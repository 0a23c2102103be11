"""Models come home whole: over connections that break, from where an earlier try ended, checked by their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.cli.running import Up, satune
from tests.sat_core.tiny import write_text
from tests.sat_io.test_export import byte_model

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def job(service: Up, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job whose model every form can hold."""
    folder = tmp_path_factory.mktemp("export")
    byte_model(folder / "bytes")
    text = write_text(folder / "text.jsonl")
    made = service.run(
        "submit", "-m", str(folder / "bytes"), "-d", str(text), "--set", "sat.train.max_steps=2",
        "--set", "sat.train.max_seq_len=32", "--json",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


@contextlib.contextmanager
def breaking(address: str, after: int) -> Iterator[tuple[str, list[int]]]:
    """A proxy whose connections break once `after` bytes came back over them; and how many broke."""
    target, broken = (urlsplit(address).hostname, urlsplit(address).port), []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                inward, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=pass_on, args=(inward,), daemon=True).start()

    def pass_on(inward: socket.socket) -> None:
        with inward, socket.create_connection(target) as outward:
            threading.Thread(target=upward, args=(inward, outward), daemon=True).start()
            left = after
            while left and (bytes_ := outward.recv(min(left, 1 << 16))):
                inward.sendall(bytes_)
                left -= len(bytes_)
            if not left:
                broken.append(after)
            for end in (inward, outward):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def upward(inward: socket.socket, outward: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while bytes_ := inward.recv(1 << 16):
                outward.sendall(bytes_)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", broken
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_model_comes_home_over_connections_that_break(
    service: Up, job: dict[str, Any], tmp_path: Path
) -> None:
    with breaking(service.connection["url"], after=40_000) as (proxied, broken):
        done = satune(
            "export", job["id"], "--output", str(tmp_path / "model"), "--json",
            SATUNE_URL=proxied, SATUNE_API_KEY=service.connection["api_key"],
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(broken) > 2
    assert {f["name"]: f["sha256"] for f in made["files"]} == hashes(tmp_path / "model")
    assert made["files"][0]["path"].startswith(str(tmp_path / "model"))


def test_an_earlier_try_is_gone_on_from_and_never_trusted(
    service: Up, job: dict[str, Any], tmp_path: Path
) -> None:
    first = service.run("export", job["id"], "--output", str(tmp_path))
    assert first.returncode == 0, first.stderr
    whole, name = hashes(tmp_path), "model.safetensors"
    assert sorted(first.stdout.split()) == sorted(str(tmp_path / file) for file in whole)
    content = (tmp_path / name).read_bytes()
    partial = tmp_path / f".{name}.{whole[name][:12]}.part"
    (tmp_path / name).unlink()
    partial.write_bytes(content[:50_000])
    assert service.run("export", job["id"], "-o", str(tmp_path)).returncode == 0
    assert hashes(tmp_path) == whole
    (tmp_path / name).write_bytes(b"another file")
    partial.write_bytes(b"x" * 50_000)
    spoilt = service.run("export", job["id"], "-o", str(tmp_path))
    assert (spoilt.returncode, spoilt.stdout) == (1, "")
    assert "other bytes" in spoilt.stderr
    assert service.run("export", job["id"], "-o", str(tmp_path)).returncode == 0
    assert hashes(tmp_path) == whole


def test_a_form_of_one_file_goes_where_it_is_told(
    service: Up, job: dict[str, Any], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "mine.gguf"
    done = service.run(
        "export", job["fine_tuned_model"], "gguf", "-o", str(target), "--dtype", "float16"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{target}\n"
    assert target.read_bytes()[:4] == b"GGUF"


def test_what_cannot_be_exported_is_refused(
    service: Up, job: dict[str, Any], tmp_path: Path
) -> None:
    for options, code, named in (
        ((job["id"], "adapter"), 2, "lora"),
        ((job["id"], "zip"), 2, "safetensors"),
        (("ft:none",), 4, "ft:none"),
        (("ftjob-none",), 4, "ftjob-none"),
    ):
        refused = service.run("export", *options, "-o", str(tmp_path))
        assert (refused.returncode, refused.stdout) == (code, "")
        assert named in refused.stderr
    (tmp_path / "file").touch()
    refused = service.run("export", job["id"], "-o", str(tmp_path / "file" / "below"))
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr

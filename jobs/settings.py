"""Everything the environment may say, read once at the top of a process and passed down.

One Settings for API, worker and migrations, because they must agree on the database, the broker and the data folder.
The road not taken is a settings file: twelve variables do not need one, and containers set variables anyway.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Each field is read from `SATUNE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="SATUNE_", frozen=True, extra="ignore")

    data_dir: Path = Field(
        Path("satune-data"), description="Folder of files, runs, models and results."
    )
    database_url: str = Field(
        "", description="SQLAlchemy URL; empty is SQLite in the data folder.", repr=False
    )
    broker_url: str | None = Field(
        None,
        description="Redis URL (redis://, redis+socket://); none: workers poll alone.",
        repr=False,
    )
    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders whose subfolders are the models local/NAME, separated as PATH is."
    )
    api_key: str | None = Field(
        None, description="Key made valid for project `default` at start.", repr=False
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        ("localhost", "127.0.0.1", "[::1]"),
        description="Host headers the API answers, comma-separated.",
    )
    max_file_bytes: int = Field(512 * MIB, ge=1, description="Largest upload.")

    streams_per_key: int = Field(20, ge=1, description="Event streams a key may hold open.")

    webhook_networks: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Private networks that webhooks may be sent to, as 10.0.0.0/8, comma-separated.",
    )

    lease_seconds: float = Field(
        15, gt=0, description="A heartbeat that stands still this long is a lost worker."
    )
    heartbeat_seconds: float = Field(
        2, gt=0, description="Between heartbeats; a cancel is seen within one."
    )
    sweep_seconds: float = Field(2, gt=0, description="Between looks for forgotten and lost jobs.")
    grace_seconds: float = Field(
        30, gt=0, description="Time a child has to write its checkpoint after SIGTERM."
    )
    stall_seconds: float = Field(
        3600,
        gt=0,
        description="A child silent for so long is taken for hung, ended and tried again.",
    )
    retry_seconds: float = Field(
        1, ge=0, description="Wait before a crashed job is tried again; doubles each time."
    )
    cpu_slots: int = Field(1, ge=1, description="Jobs prepared at the same time.")
    chat_host: str = Field(
        "127.0.0.1",
        description="Address on which models that answer listen; 0.0.0.0 where the API runs on another host, "
        "which then reaches them by this host's name.",
    )
    chat_idle_seconds: float = Field(
        300, gt=0, description="A model that nobody asks for so long is unloaded."
    )
    max_failures: int = Field(
        3, ge=1, description="Crashes and lost workers after which a job fails."
    )

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        return tuple(p for p in value.split(os.pathsep) if p) if isinstance(value, str) else value

    @field_validator("allowed_hosts", "webhook_networks", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("webhook_networks", mode="after")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            ipaddress.ip_network(network)
        return value

    @field_validator("data_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # Children run in other folders, so a relative path would mean something else there.
        return value.expanduser().absolute()

    @property
    def url(self) -> str:
        """The database URL in the form SQLAlchemy wants, with the psycopg 3 driver."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir / 'satune.db'}"
        scheme, _, rest = self.database_url.partition("://")
        if scheme in ("postgres", "postgresql"):
            return f"postgresql+psycopg://{rest}"
        return self.database_url

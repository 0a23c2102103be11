"""The report on a run that has ended: what it cost, what sparsity saved, and what became of the model.

Every figure is one that the run measured, or null where it did not; nothing is computed from a guess but
`dense_seconds_estimate`, whose name says so. What was `quoted` was kept with the job before its first step; it is null
where the job never came so far, and the time also where nothing had run on that host yet.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel

from api.schemas.estimates import Range
from api.schemas.jobs import JobFailure
from jobs.reports import AttemptRecord, RunRecord
from jobs.spec import FileRecord
from jobs.states import Stage


class DataHash(BaseModel):
    """A file that a job reads, with the hash of its bytes; null where it was deleted since."""

    id: str
    filename: str | None
    sha256: str | None


class JobConfig(BaseModel):
    """Everything a job was told and everything it resolved.

    `body` is the create body with every default stated: sent to `/v1/fine_tuning/jobs`, or as a file to `satune submit`, it
    starts the same run once more. `resolved` is what the files made of it, the `config.json` that `python -m sat_core train`
    reads, frozen before the first step (an attempt that lacked memory is followed by one with smaller micro-batches; the
    job's events say so); `hardware` is what it was resolved for. Both are null until the files were read.
    """

    id: str
    object: Literal["fine_tuning.job.config"] = "fine_tuning.job.config"
    body: dict[str, Any]
    files: list[DataHash]
    resolved: dict[str, Any] | None
    hardware: dict[str, Any] | None

    @classmethod
    def of(cls, run: RunRecord, body: dict[str, Any], files: dict[str, FileRecord | None]) -> Self:
        """The configuration as a client sees it; `files` by id."""
        found = [
            DataHash(id=id, filename=file and file.filename, sha256=file and file.sha256)
            for id, file in files.items()
        ]
        hardware = (run.quote or {}).get("hardware")
        return cls(
            id=run.job.id, body=body, files=found, resolved=run.job.config, hardware=hardware
        )


class TimeReport(BaseModel):
    """Seconds. `training_seconds` are those of the steps; `dense_seconds_estimate` is a dense step times the steps.

    `queue_seconds` went by before the first training attempt while nobody worked on the job, pauses included.
    """

    quoted_seconds: Range | None
    training_seconds: float | None
    wall_seconds: float | None
    queue_seconds: float | None
    dense_seconds_estimate: float | None
    speed_up: float | None


class FlopsReport(BaseModel):
    """Floating-point operations; `probe` are those spent on choosing units, and part of `spent`."""

    quoted: int | None
    spent: float | None
    dense: float | None
    probe: float | None
    saved: float | None
    share_of_dense: float | None


class MemoryReport(BaseModel):
    """The most memory that a step was seen to use."""

    quoted_bytes: Range | None
    peak_bytes: int | None


class EnergyReport(BaseModel):
    """Joules that the run's GPUs spent, by their own meters; null where there is none, as on a CPU."""

    quoted_joules: float | None
    joules: float | None


class Sparsity(BaseModel):
    """Mean omission rates over the steps."""

    mean_omission_rate_mlp: float | None
    mean_omission_rate_attention: float | None


class Change(BaseModel):
    """One measure before and after training."""

    before: float | None
    after: float | None


class DenseGap(BaseModel):
    """Loss of the sparse model above that of the dense one, where a stage of the ladder began."""

    step: int
    share: float
    dense_loss: float | None
    sparse_loss: float | None
    gap: float | None


class Coverage(BaseModel):
    """Share of units that were ever trained, over the blocks of a kind."""

    kind: str
    blocks: int
    mean: float
    least: float


class AttemptReport(BaseModel):
    """One claim of the job by a worker."""

    attempt: int
    stage: str
    started_at: float
    ended_at: float | None
    seconds: float | None
    outcome: str | None

    @classmethod
    def of(cls, record: AttemptRecord) -> Self:
        """The attempt as a client sees it; which worker it was is the operator's matter."""
        ended = record.ended_at
        return cls(
            attempt=record.attempt,
            stage=record.stage,
            started_at=record.started_at,
            ended_at=ended,
            seconds=None if ended is None else ended - record.started_at,
            outcome=record.outcome,
        )


class JobReport(BaseModel):
    """The report on a job that has ended, whatever its end."""

    object: Literal["fine_tuning.job.report"] = "fine_tuning.job.report"
    job_id: str
    status: str
    error: JobFailure | None
    model: str
    fine_tuned_model: str | None
    steps: int | None
    skipped_steps: int | None
    trained_tokens: int | None
    time: TimeReport
    flops: FlopsReport
    memory: MemoryReport
    energy: EnergyReport
    sparsity: Sparsity
    held_out_loss: Change
    held_out_token_accuracy: Change
    forgetting_loss: Change
    dense_gaps: list[DenseGap]
    coverage: list[Coverage]
    samples: list[dict[str, Any]]
    attempts: list[AttemptReport]
    warnings: list[str]

    @classmethod
    def of(cls, run: RunRecord) -> Self:
        """The report, from what the job's rows hold."""
        job, summary = run.job, run.job.summary or {}
        error = job.error and {k: job.error.get(k) for k in JobFailure.model_fields}
        return cls(
            job_id=job.id,
            status=job.status,
            error=JobFailure.model_validate(error) if error else None,
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            steps=summary.get("steps", job.progress_step),
            skipped_steps=summary.get("skipped_steps"),
            trained_tokens=summary.get("trained_tokens", job.trained_tokens),
            time=_time(run, summary),
            flops=_flops(run, summary),
            memory=MemoryReport(
                quoted_bytes=_said(run, "peak_bytes"), peak_bytes=run.measured.memory_bytes
            ),
            energy=_energy(run),
            sparsity=Sparsity(**{name: summary.get(name) for name in Sparsity.model_fields}),
            held_out_loss=_change(summary, "eval_loss"),
            held_out_token_accuracy=_change(summary, "eval_token_accuracy"),
            forgetting_loss=_change(summary, "forgetting_loss"),
            dense_gaps=[
                DenseGap(**{name: chosen.get(name) for name in DenseGap.model_fields})
                for chosen in run.selections
                if chosen.get("gap") is not None
            ],
            coverage=_coverage(run),
            samples=summary.get("samples") or [],
            attempts=[AttemptReport.of(record) for record in run.attempts],
            warnings=list(job.warnings),
        )


def _time(run: RunRecord, summary: dict[str, Any]) -> TimeReport:
    job = run.job
    spent = summary.get("training_seconds", run.measured.seconds)
    dense = summary.get("dense_seconds_estimate")
    both = job.started_at is not None and job.finished_at is not None
    return TimeReport(
        quoted_seconds=_said(run, "seconds"),
        training_seconds=spent,
        wall_seconds=(job.finished_at or 0.0) - (job.started_at or 0.0) if both else None,
        queue_seconds=_queue_seconds(run),
        dense_seconds_estimate=dense,
        speed_up=dense / spent if dense and spent else None,
    )


def _said(run: RunRecord, name: str) -> Range | None:
    span = run.quote["said"][name] if run.quote else None
    return Range.of(span) if span else None


def _queue_seconds(run: RunRecord) -> float | None:
    """From when it was accepted to its first step, less what the attempts to prepare it took."""
    began = next((a.started_at for a in run.attempts if a.stage == Stage.TRAIN), None)
    if began is None:
        return None
    preparing = (a.ended_at - a.started_at for a in run.attempts if a.stage == Stage.PREPARE and a.ended_at)  # fmt: skip
    return max(0.0, began - run.job.created_at - sum(preparing))


def _energy(run: RunRecord) -> EnergyReport:
    spent = [a.energy_joules for a in run.attempts if a.stage == Stage.TRAIN]
    known = [joules for joules in spent if joules is not None]
    return EnergyReport(
        quoted_joules=run.quote["said"]["joules"] if run.quote else None,
        # One attempt that ended without a word of its meter, and the sum is not known.
        joules=sum(known) if known and len(known) == len(spent) else None,
    )


def _flops(run: RunRecord, summary: dict[str, Any]) -> FlopsReport:
    spent, dense = summary.get("flops", run.measured.flops), summary.get("dense_flops")
    return FlopsReport(
        quoted=run.quote["flops"]["sat"] if run.quote else None,
        spent=spent,
        dense=dense,
        probe=summary.get("probe_flops"),
        saved=dense - spent if dense and spent is not None else None,
        share_of_dense=spent / dense if dense and spent is not None else None,
    )


def _change(summary: dict[str, Any], name: str) -> Change:
    return Change(before=summary.get(f"{name}_before"), after=summary.get(f"{name}_after"))


def _coverage(run: RunRecord) -> list[Coverage]:
    """As the last choice left it; the dense end of the ladder trains every unit, which no choice tells of."""
    if not run.selections:
        return []
    shares: dict[str, list[float]] = {}
    for block in run.selections[-1].get("blocks", []):
        shares.setdefault(block["kind"], []).append(block["coverage"])
    return [
        Coverage(kind=kind, blocks=len(found), mean=sum(found) / len(found), least=min(found))
        for kind, found in sorted(shares.items())
    ]

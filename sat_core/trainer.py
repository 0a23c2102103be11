"""One training run, from a run folder to a model folder.

The loop is a person's loop: take a batch, maybe choose anew which units are awake, forward, backward, check, step, say
what happened. A Trainer of another library was not taken: what happens between two optimizer steps is the method.

Everything that decides the next step is in the checkpoint, so a run that was stopped, or killed, ends with the same bytes as
one that was not (on a CPU; on a GPU up to the kernels' own order of summation).
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sat_core import checkpoint
from sat_core.card import model_card
from sat_core.data.corpus import IGNORED_LABEL, Batch, Corpus
from sat_core.data.rendering import Renderer
from sat_core.evaluation import HeldOut, evaluate, sample
from sat_core.model import Sparsity, load_model, token_loss
from sat_core.optim import build_optimizer
from sat_core.plan.accounting import Widths, awake_parameters, step_flops
from sat_core.plan.errors import PlanError
from sat_core.plan.schedule import learning_rate_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sat_core.events import EventLog
    from sat_core.plan.config import TrainConfig

MAX_BAD_STEPS = 5
PROBE_TOKENS = 4096


class Stopped(Exception):
    """The run was asked to stop and has written what it needs to go on."""


@dataclass
class Counters:
    """What a run has done so far; part of every checkpoint.

    Seconds are of training steps only. `dense_seconds` over `dense_steps` is the measured price of a dense step; the first
    step of a process, which pays for warming up, is left out.
    """

    step: int = 0
    tokens: int = 0
    flops: int = 0
    dense_flops: int = 0
    seconds: float = 0.0
    dense_seconds: float = 0.0
    dense_steps: int = 0
    bad_steps: int = 0
    share: float = 0.0
    mlp_rate_sum: float = 0.0
    attention_rate_sum: float = 0.0


@dataclass
class StepResult:
    """Figures of one optimizer step; `loss` is the mean over labels, `grad_norm` before clipping."""

    loss: float
    token_accuracy: float
    grad_norm: float
    tokens: int
    flops: int
    dense_flops: int


class Run:
    """A run in progress."""

    def __init__(
        self, folder: Path, config: TrainConfig, events: EventLog, stopping: Callable[[], bool]
    ) -> None:
        """Load model, corpus and, where the config names one, the checkpoint to go on from.

        Args:
            folder: the run folder, the only place written to.
            config: every number stated.
            events: where to tell of progress.
            stopping: asked between steps; true means finish this step, write a checkpoint and leave.

        Raises:
            PlanError: where the model or the corpus cannot be used.
        """
        self.folder, self.config, self.events, self.stopping = folder, config, events, stopping
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(config.seed)
        events.state("loading_model", f"Loading {config.model_name}")
        resume = self._resume_point()
        source = str(resume / "model") if resume else (config.model_path or config.model_name)
        revision = None if resume or config.model_path else config.model_revision
        self.model, self.tokenizer = load_model(source, revision=revision, device=self.device)
        self.train_corpus = Corpus(Path(config.corpus), "train")
        self.held_corpus = Corpus(Path(config.corpus), "validation")
        figures = self.train_corpus.meta["figures"]
        self.chat = figures["format"] in ("messages", "alpaca")
        if self.chat:
            Renderer(self.tokenizer)
        optimizer = build_optimizer(
            self.model, learning_rate=config.learning_rate, weight_decay=config.weight_decay
        )
        self.optimizer = optimizer
        self.sparsity = Sparsity(
            self.model, optimizer, multiple=128 if self.device == "cuda" else 8
        )
        self.counters = Counters()
        self.first_eval: HeldOut | None = None
        self.last_eval: HeldOut | None = None
        self.last_loss: float | None = None
        self.samples: list[dict[str, str]] = []
        self._warm = False
        if resume:
            self._restore(resume)

    def train(self) -> None:
        """Run to the end, or until asked to stop.

        Raises:
            Stopped: after the checkpoint was written.
            PlanError: with code loss_not_finite, after several bad steps in a row.
        """
        if self.counters.step == 0:
            self._measure_before()
        phase_state = ""
        while self.counters.step < self.config.total_steps:
            self._leave_if_asked()
            phase = self.config.ladder.phase_at(self.counters.step)
            if phase.state != phase_state:
                phase_state = phase.state
                self.events.state(phase_state, self._phase_message(phase.share))
            self._step()
            self._after_step()
        self._finish()

    def _phase_message(self, share: float) -> str:
        if share == 0:
            return "Training dense"
        return f"Training at {share:.0%} of the full omission rate"

    def _step(self) -> None:
        started = time.perf_counter()
        config, counters = self.config, self.counters
        indices = self.train_corpus.indices_at(counters.step, config.batch_size, config.seed)
        size = config.micro_batch_size
        batches = [
            self.train_corpus.batch(indices[i : i + size], self.device)
            for i in range(0, len(indices), size)
        ]
        self._select(batches[0])
        rate = learning_rate_at(
            counters.step,
            peak=config.learning_rate,
            total_steps=config.total_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self._update(batches)
        seconds = time.perf_counter() - started
        self._count(result, seconds)
        self._report(result, seconds, rate)

    def _select(self, batch: Batch) -> None:
        """Choose which units are awake, where a rung begins or a refresh is due."""
        config, counters = self.config, self.counters
        if not config.sparse:
            return
        phase = config.ladder.phase_at(counters.step)
        age = counters.step - phase.first_step
        due = bool(config.refresh_every and age % config.refresh_every == 0 and phase.share > 0)
        if phase.share == counters.share and not due:
            return
        if phase.share == 0:
            self.sparsity.wake_all()
        else:
            rows = max(1, PROBE_TOKENS // batch.input_ids_BT.shape[1])
            with self._autocast():
                self.sparsity.select(
                    mlp_rate=config.mlp_rate,
                    attention_rate=config.attention_rate,
                    share=phase.share,
                    batch=Batch(*(tensor[:rows] for tensor in batch)),
                    step=counters.step,
                    allotment=config.allotment,
                    metric=config.metric,
                    seed=config.seed,
                )
        counters.share = phase.share

    def _update(self, batches: list[Batch]) -> StepResult:
        labels = sum(int((b.labels_BT[:, 1:] != IGNORED_LABEL).sum()) for b in batches)
        total, correct, positions = 0.0, 0, 0
        for batch in batches:
            with self._autocast():
                found = token_loss(self.model, batch)
            torch.autograd.backward(found.total / labels)
            total, correct = total + float(found.total.detach()), correct + int(found.correct)
            positions += found.positions
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        loss = total / labels
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.counters.bad_steps = 0
        else:
            self._bad_step(loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        shape = self.sparsity.shape
        cost: dict[str, int] = {
            "tokens": sum(b.input_ids_BT.numel() for b in batches),
            "attended_pairs": sum(
                b.input_ids_BT.numel() * (b.input_ids_BT.shape[1] + 1) // 2 for b in batches
            ),
            "labels": positions,
        }
        return StepResult(
            loss=loss,
            token_accuracy=correct / labels,
            grad_norm=norm,
            tokens=sum(int(b.lengths_B.sum()) for b in batches),
            flops=step_flops(shape, self.sparsity.widths, **cost),
            dense_flops=step_flops(shape, Widths.dense(shape), **cost),
        )

    def _bad_step(self, loss: float, norm: float) -> None:
        """NaN or infinity never reaches the optimizer: the step is skipped and counted."""
        self.counters.bad_steps += 1
        step = self.counters.step + 1
        self.events.message(
            "warn", f"Step {step} skipped: loss {loss}, gradient norm {norm}", step=step
        )
        if self.counters.bad_steps >= MAX_BAD_STEPS:
            raise PlanError(
                f"The loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step {step}. "
                "A lower learning rate is the usual cure.",
                code="loss_not_finite",
            )

    def _count(self, result: StepResult, seconds: float) -> None:
        counters = self.counters
        mlp, attention = self.sparsity.realised_rates()
        self.last_loss = result.loss
        counters.step += 1
        counters.tokens += result.tokens
        counters.flops += result.flops
        counters.dense_flops += result.dense_flops
        counters.seconds += seconds
        counters.mlp_rate_sum += mlp
        counters.attention_rate_sum += attention
        if self._warm and result.flops == result.dense_flops:
            counters.dense_seconds += seconds
            counters.dense_steps += 1
        self._warm = True

    def _report(self, result: StepResult, seconds: float, rate: float) -> None:
        mlp, attention = self.sparsity.realised_rates()
        shape = self.sparsity.shape
        self.events.emit(
            "metrics",
            step=self.counters.step,
            total_steps=self.config.total_steps,
            tokens=self.counters.tokens,
            loss=result.loss,
            token_accuracy=result.token_accuracy,
            learning_rate=rate,
            grad_norm=result.grad_norm,
            omission_rate_mlp=mlp,
            omission_rate_attention=attention,
            awake_share=awake_parameters(shape, self.sparsity.widths) / shape.num_parameters,
            tokens_per_second=result.tokens / seconds,
            flops=self.counters.flops,
            memory_bytes=self._peak_memory(),
            step_seconds=seconds,
        )

    def _after_step(self) -> None:
        config, step = self.config, self.counters.step
        if step == config.total_steps:
            return
        if config.eval_every and step % config.eval_every == 0:
            self.last_eval = self._evaluate() or self.last_eval
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            self._save()

    def _measure_before(self) -> None:
        self.first_eval = self._evaluate()
        self.samples = [
            {"prompt": p, "before": self._sample(p), "after": ""} for p in self.config.prompts
        ]

    def _evaluate(self) -> HeldOut | None:
        """Held-out loss of the dense model, told as an event; None where nothing is held out."""
        if len(self.held_corpus) == 0:
            return None
        self.events.state("evaluating", f"Evaluating on {len(self.held_corpus)} held-out sequences")
        with self._autocast():
            found = evaluate(
                self.sparsity,
                self.held_corpus,
                batch_size=self.config.micro_batch_size,
                device=self.device,
                alive=lambda: not self.stopping(),
            )
        self._leave_if_asked()
        if found:
            self.events.emit(
                "evaluation",
                step=self.counters.step,
                eval_loss=found.loss,
                eval_token_accuracy=found.token_accuracy,
                tokens=found.tokens,
            )
        return found

    def _sample(self, prompt: str) -> str:
        with self._autocast():
            text = sample(
                self.sparsity,
                self.tokenizer,
                prompt,
                max_new_tokens=self.config.max_new_tokens,
                chat=self.chat,
            )
        self.events.emit("sample", step=self.counters.step, prompt=prompt, text=text)
        return text

    def _finish(self) -> None:
        self.sparsity.wake_all()
        self.last_eval = self._evaluate() or self.last_eval
        self.samples = [{**s, "after": self._sample(s["prompt"])} for s in self.samples]
        self.events.state("saving", "Writing the model")
        saved = self._save()
        model = self.folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(saved / "model", model, copy_function=os.link)
        summary = self._summary()
        (model / "README.md").write_text(model_card(self.config, summary), "utf-8")
        self.events.emit("result", path="model", summary=summary)

    def _summary(self) -> dict[str, Any]:
        counters, steps = self.counters, self.counters.step
        dense_step = counters.dense_seconds / counters.dense_steps if counters.dense_steps else None
        before, after = self.first_eval, self.last_eval
        return {
            "eval_loss_before": before.loss if before else None,
            "eval_loss_after": after.loss if after else None,
            "eval_token_accuracy_before": before.token_accuracy if before else None,
            "eval_token_accuracy_after": after.token_accuracy if after else None,
            "steps": steps,
            "trained_tokens": counters.tokens,
            "training_seconds": counters.seconds,
            "dense_seconds_estimate": dense_step * steps if dense_step else None,
            "flops": counters.flops,
            "dense_flops": counters.dense_flops,
            "mean_omission_rate_mlp": counters.mlp_rate_sum / steps,
            "mean_omission_rate_attention": counters.attention_rate_sum / steps,
            "samples": self.samples,
        }

    def _save(self) -> Path:
        folder = self.folder / "checkpoints"
        state = {
            **asdict(self.counters),
            "first_eval": asdict(self.first_eval) if self.first_eval else None,
            "last_eval": asdict(self.last_eval) if self.last_eval else None,
            "samples": self.samples,
        }
        saved = checkpoint.save(folder, self.sparsity, self.tokenizer, state)
        size = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
        self.events.emit(
            "checkpoint",
            step=self.counters.step,
            path=f"checkpoints/{saved.name}",
            size_bytes=size,
            metrics=self._last_figures(),
        )
        self.events.sync()
        for old in sorted(folder.glob("step-*"))[: -self.config.checkpoint_keep]:
            shutil.rmtree(old)
            self.events.emit(
                "checkpoint_deleted", step=int(old.name[5:]), path=f"checkpoints/{old.name}"
            )
        return saved

    def _last_figures(self) -> dict[str, float]:
        figures = {"loss": self.last_loss} if self.last_loss is not None else {}
        if self.last_eval:
            figures |= {
                "eval_loss": self.last_eval.loss,
                "eval_token_accuracy": self.last_eval.token_accuracy,
            }
        return figures

    def _leave_if_asked(self) -> None:
        if not self.stopping():
            return
        if self.counters.step:
            self._save()
        raise Stopped

    def _resume_point(self) -> Path | None:
        if not self.config.resume_from:
            return None
        found, wrong = checkpoint.newest_good(Path(self.config.resume_from))
        for message in wrong:
            self.events.message("warn", f"A checkpoint was passed over: {message}")
        where = found.name if found else "the start, for no checkpoint is whole"
        self.events.message("info", f"Going on from {where}")
        return found

    def _restore(self, folder: Path) -> None:
        state = checkpoint.verify(folder)
        checkpoint.restore(folder, self.sparsity)
        self.counters = Counters(**{k: state[k] for k in asdict(self.counters)})
        self.first_eval = HeldOut(**state["first_eval"]) if state["first_eval"] else None
        self.last_eval = HeldOut(**state["last_eval"]) if state["last_eval"] else None
        self.samples = state["samples"]

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.config.precision
        half = precision == "bf16" or (precision == "auto" and self.device == "cuda")
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=half)

    def _peak_memory(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(
    folder: Path, config: TrainConfig, events: EventLog, stopping: Callable[[], bool]
) -> None:
    """Run `config` to the end in `folder`.

    Raises:
        Stopped: where `stopping` turned true; a checkpoint was written.
        PlanError: for what the person who asked can mend.
    """
    Run(folder, config, events, stopping).train()

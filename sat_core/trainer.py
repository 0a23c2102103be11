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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sat_core import checkpoint, progress
from sat_core.card import model_card
from sat_core.data.corpus import IGNORED_LABEL, Batch, Corpus
from sat_core.data.rendering import Renderer
from sat_core.evaluation import (
    HeldOut,
    Measures,
    evaluate,
    own_text_loss,
    sample,
    write_own_text,
)
from sat_core.loss import token_loss
from sat_core.model import compile_layers, load_model, with_adapters
from sat_core.optim import build_optimizer
from sat_core.plan.accounting import Cost, Widths, forward_flops, step_flops
from sat_core.plan.errors import ConfigError, PlanError
from sat_core.plan.schedule import learning_rate_at
from sat_core.progress import Counters, StepResult
from sat_core.sharding import Sharding
from sat_core.sparsity import Sparsity

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sat_core.events import EventLog
    from sat_core.parallel import Parallel
    from sat_core.plan.config import TrainConfig
    from sat_core.sparsity import Refresh

MAX_BAD_STEPS = 5
PROBE_TOKENS = 4096


class Stopped(Exception):
    """The run was asked to stop and has written what it needs to go on."""


class Run:
    """A run in progress."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        events: EventLog,
        stopping: Callable[[], bool],
        parallel: Parallel,
    ) -> None:
        """Load model, corpus and, where the config names one, the checkpoint to go on from.

        Args:
            folder: the run folder, the only place written to.
            config: every number stated.
            events: where to tell of progress; only the first rank's are written.
            stopping: asked between steps; true means finish this step, write a checkpoint and leave.
            parallel: the ranks of this run.

        Raises:
            PlanError: where the model or the corpus cannot be used.
        """
        self.folder, self.config, self.events, self.stopping = folder, config, events, stopping
        self.parallel, self.device = parallel, parallel.device
        if config.batch_size < parallel.world:
            raise ConfigError(
                f"batch_size is {config.batch_size}; with {parallel.world} processes it must be at least that many.",
                "hyperparameters.batch_size",
            )
        torch.manual_seed(config.seed)
        events.state("loading_model", f"Loading {config.model_name}")
        resume = self._resume_point()
        model, self.tokenizer = self._load(resume)
        self.train_corpus = Corpus(Path(config.corpus), "train")
        self.held_corpus = Corpus(Path(config.corpus), "validation")
        self.chat = self.train_corpus.meta["figures"]["format"] not in ("text", "prompt_completion")
        if self.chat:
            Renderer(self.tokenizer)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.tuning == "lora":
            model = with_adapters(
                model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed
            )
        self.model = model
        self.optimizer = build_optimizer(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            kind=config.optimizer,
        )
        self.sparsity = Sparsity(model, self.optimizer, config.sat, parallel)
        self.sharding = self._shard() if self._shared else None
        self.counters, self.measures = Counters(), Measures()
        self.last_loss: float | None = None
        self._warm = False
        if resume:
            self._restore(resume)
        if config.compile:
            compile_layers(self.sparsity.layers)

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
            phase = self.config.sat.ladder.phase_at(self.counters.step)
            if phase.state != phase_state:
                phase_state = phase.state
                words = (
                    f"at {phase.share:.0%} of the full omission rate" if phase.share else "dense"
                )
                self.events.state(phase_state, f"Training {words}")
            self._step()
            self._after_step()
        self._finish()

    def _step(self) -> None:
        started = time.perf_counter()
        config, counters = self.config, self.counters
        batches = self._micro_batches()
        probe_rows = max(1, PROBE_TOKENS // batches[0].input_ids_BT.shape[1])
        with self._autocast():
            refresh = self.sparsity.begin_step(counters.step, batches[0].rows(0, probe_rows))
        chosen_in = time.perf_counter() - started
        if refresh is not None and refresh.dense_loss is not None:
            batches = _apart(batches, probe_rows)
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
        if result is None:
            return
        if refresh is not None:
            self._count_probe(refresh, result, batches[0])
        seconds = time.perf_counter() - started
        progress.count(counters, result, self.sparsity, seconds)
        if self._warm and result.flops == result.dense_flops:
            counters.dense_seconds += seconds
            counters.dense_steps += 1
        self._warm = True
        self.last_loss = result.loss
        if refresh is not None:
            self._report_selection(refresh, result, chosen_in)
        self.events.emit(
            "metrics",
            **progress.metrics(config, counters, self.sparsity, result),
            learning_rate=rate,
            tokens_per_second=result.tokens / seconds,
            memory_bytes=self._peak_memory(),
            step_seconds=seconds,
        )

    def _micro_batches(self) -> list[Batch]:
        """This rank's part of the step's sequences, a micro-batch at a time."""
        config, counters = self.config, self.counters
        indices = self.train_corpus.indices_at(counters.step, config.batch_size, config.seed)
        mine = self.parallel.share(indices)
        size = counters.micro_batch_size or config.micro_batch_size
        return [
            self.train_corpus.batch(mine[i : i + size], self.device)
            for i in range(0, len(mine), size)
        ]

    def _update(self, batches: list[Batch]) -> StepResult | None:
        """Gradients, check and update; None where memory ran out and the step is to be tried again, smaller."""
        try:
            result = self._gradients(batches)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not self._halve_micro_batch():
                raise
            return None
        if math.isfinite(result.grad_norm) and math.isfinite(result.loss):
            self.optimizer.step()
            self.counters.bad_steps = 0
        else:
            self._bad_step(result.loss, result.grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _gradients(self, batches: list[Batch]) -> StepResult:
        """Forward and backward of all micro-batches, summed over ranks and clipped."""
        parallel = self.parallel
        if self.sharding:
            self.sharding.settle()
            # Every rank takes part in every layer's forward; who has fewer micro-batches makes one without labels.
            unlabelled = torch.full_like(batches[-1].labels_BT, IGNORED_LABEL)
            extra = parallel.most(len(batches)) - len(batches)
            batches = batches + extra * [batches[-1]._replace(labels_BT=unlabelled)]
        per_batch = [int((b.labels_BT[:, 1:] != IGNORED_LABEL).sum()) for b in batches]
        labels = int(parallel.sum(torch.tensor(sum(per_batch))))
        totals, correct = [], 0
        for batch in batches:
            with self._autocast():
                found = token_loss(self.model, batch)
            torch.autograd.backward(found.total / labels)
            totals.append(float(found.total.detach()))
            correct += int(found.correct)
        limit = self.config.max_grad_norm or float("inf")
        if self.sharding:
            norm = self.sharding.collect_gradients(limit)
        else:
            parallel.sum_gradients(self.model.parameters())
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        sums = torch.tensor([sum(totals), correct], dtype=torch.float64)
        loss, accuracy = (parallel.sum(sums) / labels).tolist()
        cost = Cost(
            tokens=sum(b.input_ids_BT.numel() for b in batches),
            attended_pairs=sum(_pairs(b) for b in batches),
            labels=sum(per_batch),
        )
        shape = self.sparsity.shape
        counted = [
            sum(int(b.lengths_B.sum()) for b in batches),
            step_flops(shape, self.sparsity.widths, cost),
            step_flops(shape, Widths.dense(shape), cost),
        ]
        tokens, flops, dense_flops = parallel.sum(torch.tensor(counted)).tolist()
        return StepResult(
            loss=loss,
            token_accuracy=accuracy,
            grad_norm=norm,
            tokens=tokens,
            flops=flops,
            dense_flops=dense_flops,
            probed_loss=totals[0] / per_batch[0] if per_batch[0] else None,
        )

    def _halve_micro_batch(self) -> bool:
        """Go on with half as many sequences in a forward and as many in a step; false where it cannot be less.

        Gradients were lost, weights were not touched, so the step is simply made again.
        """
        size = self.counters.micro_batch_size or self.config.micro_batch_size
        if size == 1 or self.parallel.world > 1:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        if self.device != "cpu":
            torch.cuda.empty_cache()
        self.counters.micro_batch_size = size // 2
        self.events.message(
            "warn",
            f"Memory did not hold a micro-batch of {size} sequences; going on with {size // 2}, "
            f"{self.config.batch_size} sequences a step as before",
            step=self.counters.step + 1,
        )
        return True

    def _bad_step(self, loss: float, norm: float) -> None:
        """NaN or infinity never reaches the optimizer: the step is skipped and counted; the rest of the run is dense."""
        self.counters.bad_steps += 1
        self.counters.skipped_steps += 1
        self.sparsity.finish_dense()
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

    def _count_probe(self, refresh: Refresh, result: StepResult, batch: Batch) -> None:
        if not refresh.probed:
            return
        tokens = batch.input_ids_BT.numel()
        cost = Cost(tokens=tokens, attended_pairs=_pairs(batch), labels=tokens)
        shape = self.sparsity.shape
        flops = self.parallel.world * forward_flops(shape, Widths.dense(shape), cost)
        if self.config.sat.metric == "taylor":
            flops *= 4
        result.flops += flops
        self.counters.probe_flops += flops

    def _report_selection(self, refresh: Refresh, result: StepResult, seconds: float) -> None:
        sparse_loss = result.probed_loss if refresh.dense_loss is not None else None
        fields = progress.selection(refresh, self.sparsity, sparse_loss, seconds)
        self.events.emit("selection", step=self.counters.step, **fields)
        if not refresh.probed:
            return
        # A rank whose sequences carry no label knows no gap, but takes part in the mean of those that do.
        gap, known = fields["gap"], fields["gap"] is not None
        total, ranks = self.parallel.sum(torch.tensor([gap or 0.0, float(known)])).tolist()
        gap = total / ranks if ranks else 0.0
        if self.sparsity.note_gap(gap):
            self.events.message(
                "warn",
                f"The sparse loss is {gap:.3f} above the dense one, more than sat.guard.max_gap "
                f"{self.config.sat.max_gap:g}: the ladder steps down to {self.sparsity.cap:.0%} of the full rate",
                step=self.counters.step,
            )

    def _after_step(self) -> None:
        config, step = self.config, self.counters.step
        if step == config.total_steps:
            return
        if config.eval_every and step % config.eval_every == 0:
            self.measures.last = self._evaluate() or self.measures.last
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            self._save()

    def _measure_before(self) -> None:
        config, measures = self.config, self.measures
        measures.first = self._evaluate()
        with self._autocast():
            measures.own_text = write_own_text(
                self.sparsity,
                self.tokenizer,
                sequences=config.forgetting_sequences,
                seed=config.seed,
                device=self.device,
            )
        measures.forgetting_before = self._forgetting()
        measures.samples = [
            {"prompt": p, "before": self._sample(p), "after": ""} for p in config.prompts
        ]

    def _forgetting(self) -> float | None:
        if not self.measures.own_text:
            return None
        with self._autocast():
            return own_text_loss(self.sparsity, self.measures.own_text, self.device)

    def _evaluate(self) -> HeldOut | None:
        """Held-out loss of the dense model, told as an event; None where nothing is held out."""
        if len(self.held_corpus) == 0:
            return None
        self.events.state("evaluating", f"Evaluating on {len(self.held_corpus)} held-out sequences")
        alone = self.parallel.world == 1
        with self._autocast():
            found = evaluate(
                self.sparsity,
                self.held_corpus,
                batch_size=self.counters.micro_batch_size or self.config.micro_batch_size,
                device=self.device,
                alive=lambda: not (alone and self.stopping()),
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
        measures = self.measures
        measures.last = self._evaluate() or measures.last
        measures.forgetting_after = self._forgetting()
        measures.samples = [{**s, "after": self._sample(s["prompt"])} for s in measures.samples]
        self.events.state("saving", "Writing the model")
        saved = self._save()
        if not self.parallel.first:
            return
        model = self.folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(saved / "model", model, copy_function=os.link)
        summary = {**progress.summary(self.counters), **measures.summary()}
        card = model_card(self.config, summary, self.train_corpus.meta["figures"])
        (model / "README.md").write_text(card, "utf-8")
        self.events.emit("result", path="model", summary=summary)

    def _save(self) -> Path:
        folder = self.folder / "checkpoints"
        saved = folder / checkpoint.name_of(self.counters.step)
        if self.parallel.first or self.sharding:
            state = {**asdict(self.counters), "measures": self.measures.to_dict()}
            checkpoint.save(folder, self.sparsity, self.tokenizer, state)
        if self.parallel.first:
            self._tell_checkpoint(folder, saved)
        self.parallel.wait()
        return saved

    def _tell_checkpoint(self, folder: Path, saved: Path) -> None:
        size = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
        figures = {"loss": self.last_loss} if self.last_loss is not None else {}
        if last := self.measures.last:
            figures |= {"eval_loss": last.loss, "eval_token_accuracy": last.token_accuracy}
        self.events.emit(
            "checkpoint",
            step=self.counters.step,
            path=f"checkpoints/{saved.name}",
            size_bytes=size,
            metrics=figures,
        )
        self.events.sync()
        for old in sorted(folder.glob("step-*"))[: -self.config.checkpoint_keep]:
            shutil.rmtree(old)
            self.events.emit(
                "checkpoint_deleted", step=int(old.name[5:]), path=f"checkpoints/{old.name}"
            )

    def _leave_if_asked(self) -> None:
        if not self.parallel.any(self.stopping()):
            return
        if self.counters.step:
            self._save()
        raise Stopped

    def _load(self, resume: Path | None) -> tuple[Any, Any]:
        """The base model; with full tuning that of the checkpoint, where there is one."""
        config = self.config
        device = "cpu" if self._shared else self.device
        if resume and config.tuning == "full":
            return load_model(str(resume / "model"), device=device)
        revision = None if config.model_path else config.model_revision
        source = config.model_path or config.model_name
        return load_model(source, revision=revision, device=device)

    @property
    def _shared(self) -> bool:
        """Whether each rank is to hold a slice of the layers."""
        return self.config.sharding == "fsdp" and self.parallel.world > 1

    def _shard(self) -> Sharding:
        sparsity = self.sparsity
        layers: Any = sparsity.core.get_submodule(sparsity.family.layers)
        return Sharding(self.model, layers, sparsity.blocks, self.parallel, half=self._half)

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
        self.measures = Measures.from_dict(state["measures"])

    @property
    def _half(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        precision = self.config.precision
        return precision == "bf16" or (precision == "auto" and self.device != "cpu")

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.device.partition(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self._half)

    def _peak_memory(self) -> int:
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(
    folder: Path,
    config: TrainConfig,
    events: EventLog,
    stopping: Callable[[], bool],
    parallel: Parallel,
) -> None:
    """Run `config` to the end in `folder`.

    Raises:
        Stopped: where `stopping` turned true; a checkpoint was written.
        PlanError: for what the person who asked can mend.
    """
    Run(folder, config, events, stopping, parallel).train()


def _apart(batches: list[Batch], rows: int) -> list[Batch]:
    """The probe's sequences as a micro-batch of their own, so that their sparse loss is known without another pass."""
    first, *others = batches
    if len(first.input_ids_BT) <= rows:
        return batches
    return [first.rows(0, rows), first.rows(rows, len(first.input_ids_BT)), *others]


def _pairs(batch: Batch) -> int:
    """Query-key pairs of one head under the causal mask, padding included."""
    return batch.input_ids_BT.numel() * (batch.input_ids_BT.shape[1] + 1) // 2


def is_out_of_memory(error: Exception) -> bool:
    """Torch tells a CPU's lack of memory by a RuntimeError's words alone."""
    return not isinstance(error, RuntimeError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )

"""One training run, from a run folder to a model folder.

The loop is a person's loop: take a batch, maybe choose anew which units are awake, forward, backward, check, step, say
what happened. A Trainer of another library was not taken: what happens between two optimizer steps is the method.

Everything that decides the next step is in the checkpoint, so a run that was stopped, or killed, ends with the same bytes as
one that was not (on a CPU; on a GPU up to the kernels' own order of summation).
"""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from sat_core import checkpoint, progress
from sat_core.assembly import assemble
from sat_core.card import model_card
from sat_core.chat_template import ChatTemplate
from sat_core.corpus import Corpus
from sat_core.evaluation import Judge, Measures
from sat_core.progress import Counters
from sat_core.step import Stepper

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_core.events import EventLog
    from sat_core.parallel import Parallel
    from sat_core.plan.config import TrainConfig
    from sat_core.sparsity import Refresh
    from sat_core.step import Made


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
        self.parallel = parallel
        events.state("loading_model", f"Loading {config.model_name}")
        resume = self._resume_point()
        self.parts = assemble(config, parallel, resume)
        self.sparsity = self.parts.sparsity
        # A compiled graph is for one width.
        train = Corpus(Path(config.corpus), "train", even=config.compile)
        held = Corpus(Path(config.corpus), "validation")
        self.figures = train.meta["figures"]
        # A corpus of an earlier release did not count conversations.
        plain = self.figures["format"] in ("text", "prompt_completion")
        chat = self.figures.get("conversations", not plain)
        template = ChatTemplate(self.parts.tokenizer) if chat else None
        self.counters, measures = Counters(), Measures()
        self.last_loss: float | None = None
        if resume:
            state = checkpoint.restore(resume, self.sparsity)
            # A checkpoint of an earlier release counted less.
            known = {k: state[k] for k in asdict(self.counters) if k in state}
            self.counters = Counters(**known)
            measures = Measures.from_dict(state["measures"])
            self.last_loss = state.get("loss")
        self.stepper = Stepper(self.parts, config, train, self.counters, events)
        self.judge = Judge(self.parts, config, held, measures, events, template)
        self._saved_step, self._state, self._evaluated = 0, "", False

    def train(self) -> None:
        """Run to the end, or until asked to stop.

        Raises:
            Stopped: after the checkpoint was written.
            PlanError: with code loss_not_finite, after several bad steps in a row.
        """
        if self.counters.step == 0:
            self._evaluate()
            self.judge.begin()
        elif self._evaluation_due and self.judge.measures.last_step != self.counters.step:
            # The run was stopped in the middle of it.
            self._after_step()
        while self.counters.step < self.config.total_steps:
            self._leave_if_asked()
            self.advance()
        self._finish()

    def advance(self) -> None:
        """Make one step and say what happened; no step is made where memory ran out and it is to be tried again."""
        state, words = self._phase()
        if state != self._state or self._evaluated:
            self.events.state(state, f"Training {words}", again=state == self._state)
            self._state, self._evaluated = state, False
        made = self.stepper.step()
        if made is not None:
            self._report(made)
            self._after_step()

    def _phase(self) -> tuple[str, str]:
        """Name and words of what the next step is part of; guards may have brought the ladder lower than planned."""
        sat = self.config.sat
        if not sat.sparse:
            return "training_dense", "dense"
        phase = sat.ladder.phase_at(self.counters.step)
        share = min(phase.share, self.sparsity.cap)
        if share == 0:
            dense = phase.state if phase.share == 0 else "training_dense_finish"
            return dense, "dense"
        state = phase.state if share == phase.share else "training_ladder"
        return state, f"at {share:.0%} of the full omission rate"

    def _report(self, made: Made) -> None:
        self.last_loss = made.result.loss
        if made.refresh is not None:
            self._report_selection(made, made.refresh)
        self.events.emit(
            "metrics",
            **progress.metrics(self.config, self.counters, self.sparsity, made.result),
            learning_rate=made.learning_rate,
            tokens_per_second=made.result.tokens / made.seconds,
            memory_bytes=self._peak_memory(),
            step_seconds=made.seconds,
        )

    def _report_selection(self, made: Made, refresh: Refresh) -> None:
        sparse_loss = made.result.probed_loss if refresh.dense_loss is not None else None
        fields = progress.selection(refresh, self.sparsity, sparse_loss, made.choice_seconds)
        self.events.emit("selection", step=self.counters.step, **fields)
        if not refresh.passes:
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

    @property
    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        return every > 0 and self.counters.step % every == 0

    def _after_step(self) -> None:
        config, step = self.config, self.counters.step
        if step == config.total_steps:
            return
        if self._evaluation_due:
            self._evaluate()
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            self._save(needed=False)

    def _evaluate(self) -> None:
        # Ranks evaluate alike and must leave alike, so that only a run alone may leave in the middle.
        alone = self.parallel.world == 1
        self.judge.evaluate(self.counters, alive=lambda: not (alone and self.stopping()))
        self._evaluated = True
        self._leave_if_asked()

    def _finish(self) -> None:
        self.sparsity.wake_all()
        self._evaluate()
        self.judge.end(self.counters.step)
        self.events.state("saving", "Writing the model")
        saved = self._save()
        if not self.parallel.first:
            return
        model = self.folder / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(saved / "model", model, copy_function=os.link)
        summary = {**progress.summary(self.counters), **self.judge.measures.summary()}
        card = model_card(self.config, summary, self.figures)
        (model / "README.md").write_text(card, "utf-8")
        self.events.emit("result", path="model", summary=summary)

    def _save(self, *, needed: bool = True) -> Path:
        """Write a checkpoint; one that is not `needed` and that the disk does not hold costs the run nothing."""
        folder = self.folder / "checkpoints"
        saved = folder / checkpoint.name_of(self.counters.step)
        if self.parallel.first or self.parts.sharding:
            state = {
                **asdict(self.counters),
                "measures": asdict(self.judge.measures),
                "loss": self.last_loss,
            }
            try:
                checkpoint.save(folder, self.sparsity, self.parts.tokenizer, state)
            except (OSError, SafetensorError) as error:
                # Of ranks the others would wait for this one.
                if needed or self.parallel.world > 1:
                    raise
                step = self.counters.step
                self.events.message("warn", f"No checkpoint at step {step}: {error}", step=step)
                return saved
        if self.parallel.first:
            self._tell_checkpoint(folder, saved)
        self.parallel.wait()
        self._saved_step = self.counters.step
        return saved

    def _tell_checkpoint(self, folder: Path, saved: Path) -> None:
        size = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
        figures = {"loss": self.last_loss} if self.last_loss is not None else {}
        if last := self.judge.measures.last:
            figures |= {"eval_loss": last.loss, "eval_token_accuracy": last.token_accuracy}
        self.events.emit(
            "checkpoint",
            step=self.counters.step,
            path=f"checkpoints/{saved.name}",
            size_bytes=size,
            metrics=figures,
        )
        self.events.sync()
        for old in checkpoint.in_order(folder)[: -self.config.checkpoint_keep]:
            shutil.rmtree(old)
            step = checkpoint.step_of(old)
            self.events.emit("checkpoint_deleted", step=step, path=f"checkpoints/{old.name}")

    def _leave_if_asked(self) -> None:
        if not self.parallel.any(self.stopping()):
            return
        if self.counters.step and self.counters.step != self._saved_step:
            self._save()
        raise Stopped

    def _resume_point(self) -> Path | None:
        if not self.config.resume_from:
            return None
        found, wrong = checkpoint.first_whole(map(Path, self.config.resume_from))
        for message in wrong:
            self.events.message("warn", f"A checkpoint was passed over: {message}")
        where = found.name if found else "the start, for no checkpoint is whole"
        self.events.message("info", f"Going on from {where}")
        return found

    def _peak_memory(self) -> int:
        if self.parts.device != "cpu":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

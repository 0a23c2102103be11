"""One optimizer step: choose who is awake, forward, backward, check, update.

What cannot be is left undone: a loss that is not a number never reaches the weights, and a step for which memory did not
suffice is made again in smaller pieces, for nothing of it had been kept. Where memory ran out while units moved, the run ends.
"""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from sat_core import progress
from sat_core.corpus import IGNORED_LABEL, Batch
from sat_core.loss import token_loss
from sat_core.optim import clip
from sat_core.plan.accounting import Cost, Widths, forward_flops, step_flops
from sat_core.plan.errors import PlanError, is_out_of_memory
from sat_core.plan.quote import probe_rows
from sat_core.plan.schedule import learning_rate_at
from sat_core.progress import StepResult

if TYPE_CHECKING:
    from sat_core.assembly import Assembly
    from sat_core.corpus import Corpus
    from sat_core.events import EventLog
    from sat_core.plan.config import TrainConfig
    from sat_core.progress import Counters
    from sat_core.sparsity import Refresh

MAX_BAD_STEPS = 5


class Made(NamedTuple):
    """A finished step: its figures, what was chosen anew if anything, and seconds for the choice and for all."""

    result: StepResult
    refresh: Refresh | None
    learning_rate: float
    choice_seconds: float
    seconds: float


class Stepper:
    """Makes the steps of a run, in order, and counts them."""

    def __init__(
        self,
        parts: Assembly,
        config: TrainConfig,
        corpus: Corpus,
        counters: Counters,
        events: EventLog,
    ) -> None:
        self.parts, self.config, self.corpus = parts, config, corpus
        self.counters, self.events = counters, events
        self._warm = False
        self._chosen: tuple[int, Refresh | None] | None = None

    def step(self) -> Made | None:
        """The next step; None where memory ran out and it is to be tried again, smaller.

        Raises:
            PlanError: with code loss_not_finite, after several bad steps in a row.
        """
        started = time.perf_counter()
        self.parts.parallel.reseed(self.config.seed, self.counters.step)
        try:
            batches, config = self._micro_batches(), self.config
            width, world = batches[0].input_ids_BT.shape[1], self.parts.parallel.world
            rows = probe_rows(config.sat, config.batch_size, width, world)
            refresh = self._choose(batches[0].rows(0, rows))
            choice_seconds = time.perf_counter() - started
            probed = refresh is not None and refresh.dense_loss is not None
            pieces = _apart(batches.pop(0), rows) if probed else []
            batches = pieces + batches
            result = self._gradients(batches, eager=len(pieces))
            if refresh is not None:
                self._count_probe(refresh, result, batches[0])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lack = str(error)
        else:
            return self._make(refresh, result, choice_seconds, started)
        # Out here the failed forward's frames, and with them its activations, are gone.
        self._halve_micro_batch(lack)
        return None

    def _choose(self, batch: Batch) -> Refresh | None:
        """Who is awake; once a step, however often it is tried."""
        step = self.counters.step
        if self._chosen is not None and self._chosen[0] == step:
            refresh = self._chosen[1]
            # The pieces are smaller now, so the probe's loss has no twin.
            return refresh and dataclasses.replace(refresh, dense_loss=None)
        with self.parts.autocast():
            refresh = self.parts.sparsity.begin_step(step, batch)
        self._chosen = (step, refresh)
        return refresh

    def _make(
        self, refresh: Refresh | None, result: StepResult, choice_seconds: float, started: float
    ) -> Made:
        """Update and count."""
        config, counters = self.config, self.counters
        rate = learning_rate_at(
            counters.step,
            peak=config.learning_rate,
            total_steps=config.total_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.lr_schedule,
        )
        self._update(result, rate)
        seconds = time.perf_counter() - started
        progress.count(counters, result, seconds)
        begins = refresh is not None and refresh.stage_begins
        # New widths are compiled now, or, where all of this step is a probe's, in the next.
        compiles = config.compile and begins
        if self._warm and not compiles and result.flops == result.dense_flops:
            counters.dense_seconds += seconds
            counters.dense_steps += 1
        elif self._warm and not begins:
            counters.sparse_seconds += seconds
            counters.sparse_flops += result.flops
        self._warm = not compiles
        return Made(result, refresh, rate, choice_seconds, seconds)

    def _micro_batches(self) -> list[Batch]:
        """This rank's part of the step's sequences, a micro-batch at a time."""
        config, counters = self.config, self.counters
        indices = self.corpus.indices_at(counters.step, config.batch_size, config.seed)
        mine = self.parts.parallel.share(indices)
        size = counters.fitting(config.micro_batch_size)
        device = self.parts.device
        return [self.corpus.batch(mine[i : i + size], device) for i in range(0, len(mine), size)]

    def _gradients(self, batches: list[Batch], *, eager: int) -> StepResult:
        """Forward and backward of all micro-batches, summed over ranks and clipped.

        The first `eager` of them were one, of which a probe saw the first: it meets what the probe met, so that dropout is
        not taken for a gap. The rest has a size of its own, for which nothing is worth compiling.
        """
        parts, parallel = self.parts, self.parts.parallel
        if parts.sharding:
            parts.sharding.settle()
            # Every rank takes part in every layer's forward; who has fewer micro-batches makes one without labels.
            unlabelled = torch.full_like(batches[-1].labels_BT, IGNORED_LABEL)
            extra = parallel.most(len(batches)) - len(batches)
            batches = batches + extra * [batches[-1]._replace(labels_BT=unlabelled)]
        costs = [_cost(batch) for batch in batches]
        cost = Cost.sum(costs)
        labels = max(1, int(parallel.sum(torch.tensor(cost.labels))))
        totals, correct = [], 0
        modes = [parts.sparsity.as_probed(), parts.sparsity.eager_layers(quiet=False)][:eager]
        for batch in batches:
            with parts.autocast(), modes.pop(0) if modes else nullcontext():
                found = token_loss(parts.model, batch)
            torch.autograd.backward(found.total / labels)
            totals.append(float(found.total.detach()))
            correct += int(found.correct)
        limit = self.config.max_grad_norm or float("inf")
        if parts.sharding:
            norm = parts.sharding.collect_gradients(limit)
        else:
            parallel.sum_gradients(parts.model.parameters())
            trained = [p for p in parts.model.parameters() if p.grad is not None]
            norm = clip(trained, limit, torch.nn.utils.get_total_norm(p.grad for p in trained))
        sums = torch.tensor([sum(totals), correct], dtype=torch.float64)
        loss, accuracy = (parallel.sum(sums) / labels).tolist()
        tokens, flops, dense_flops = parallel.sum(self._counted(batches, cost)).tolist()
        mlp_rate, attention_rate = parts.sparsity.realised_rates()
        return StepResult(
            mlp_rate=mlp_rate,
            attention_rate=attention_rate,
            loss=loss,
            token_accuracy=accuracy,
            grad_norm=norm,
            tokens=tokens,
            flops=flops,
            dense_flops=dense_flops,
            probed_loss=totals[0] / costs[0].labels if costs[0].labels else None,
        )

    def _counted(self, batches: list[Batch], cost: Cost) -> torch.Tensor:
        """Tokens, FLOPs and dense FLOPs of this rank, int64 [3]."""
        shape, widths = self.parts.sparsity.shape, self.parts.sparsity.widths
        tokens = sum(int(b.lengths_B.sum()) for b in batches)
        flops = [step_flops(shape, w, cost) for w in (widths, Widths.dense(shape))]
        return torch.tensor([tokens, *flops])

    def _update(self, result: StepResult, rate: float) -> None:
        """The optimizer's step, unless loss or gradient is not finite: then it is skipped and the rest of the run dense."""
        optimizer = self.parts.optimizer
        if math.isfinite(result.grad_norm) and math.isfinite(result.loss):
            for group in optimizer.param_groups:
                stays = isinstance(group["lr"], torch.Tensor)  # torchao's refuses a number
                group["lr"] = group["lr"].fill_(rate) if stays else rate
            optimizer.step()
            self.counters.bad_steps = 0
        else:
            self._bad_step(result.loss, result.grad_norm)
        optimizer.zero_grad(set_to_none=True)

    def _bad_step(self, loss: float, norm: float) -> None:
        self.counters.bad_steps += 1
        self.counters.skipped_steps += 1
        self.parts.sparsity.finish_dense()
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

    def _halve_micro_batch(self, lack: str) -> None:
        """Go on with half as many sequences in a forward and as many in a step.

        Raises:
            PlanError: with code out_of_memory, where it cannot be less.
        """
        size = self.counters.fitting(self.config.micro_batch_size)
        if size == 1:
            raise PlanError(
                f"Memory does not hold a micro-batch of {size}: {lack}. "
                "Lower sat.train.max_seq_len, or set sat.train.gradient_checkpointing.",
                "sat.train.max_seq_len",
                "out_of_memory",
            )
        if self.parts.parallel.world > 1:
            # The other ranks are in the middle of the step that this one cannot make.
            raise PlanError(
                f"Memory does not hold a micro-batch of {size} on every rank: {lack}.",
                "sat.train.micro_batch_size",
                "out_of_memory",
            )
        self.parts.optimizer.zero_grad(set_to_none=True)
        if self.parts.device != "cpu":
            torch.cuda.empty_cache()
        self.counters.micro_batch_size = size // 2
        self.events.message(
            "warn",
            f"Memory did not hold a micro-batch of {size} sequences; going on with {size // 2}, "
            f"{self.config.batch_size} sequences a step as before",
            step=self.counters.step + 1,
        )

    def _count_probe(self, refresh: Refresh, result: StepResult, batch: Batch) -> None:
        shape = self.parts.sparsity.shape
        forward = forward_flops(shape, Widths.dense(shape), _cost(batch))
        flops = self.parts.parallel.world * refresh.passes * forward
        result.flops += flops
        self.counters.probe_flops += flops


def _apart(batch: Batch, rows: int) -> list[Batch]:
    """The probe's sequences as a micro-batch of their own, so that their sparse loss is known without another pass."""
    size = len(batch.input_ids_BT)
    return [batch.rows(a, b) for a, b in ((0, rows), (rows, size)) if a < size]


def _cost(batch: Batch) -> Cost:
    """What the batch asks of a forward, padding included."""
    tokens, width = batch.input_ids_BT.numel(), batch.input_ids_BT.shape[1]
    return Cost(tokens=tokens, attended_pairs=tokens * (width + 1) // 2, labels=batch.num_labels)

"""SAT inside Hugging Face's `Trainer` and TRL's `SFTTrainer`, as a callback.

It narrows at the beginning of a step and widens before the Trainer looks at the model: to save, to evaluate, at the end.
The Trainer prepares the optimizer, so the callback meets it when training begins.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from sat_core.plan.config import SatConfig
from sat_core.plan.errors import ConfigError
from sat_core.sparsity import Sparsity, sparsify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sat_core.slicing import SlicedBlock


class SatCallback(TrainerCallback):
    """Sparsity-Accelerated Training for a Trainer.

        probe = next(iter(trainer.get_train_dataloader()))
        trainer.add_callback(SatCallback(SatConfig(total_steps=1, mlp_rate=0.5), probe))

    Args of the constructor: `config`, whose `total_steps` is replaced by the Trainer's own, and `probe_inputs`, a batch as
    the model takes it, on which units are scored; it is moved to the model's device. `sparsity` is there once training
    has begun.
    """

    def __init__(self, config: SatConfig, probe_inputs: Mapping[str, Any]) -> None:
        self.config, self.probe_inputs = config, probe_inputs
        self.sparsity: Sparsity | None = None
        self._asleep_soon: list[tuple[SlicedBlock, torch.Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet model and optimizer.

        Raises:
            ConfigError: in one of several processes, which would each choose by itself.
        """
        if args.world_size > 1:
            raise ConfigError(
                f"SatCallback trains in one process, not in {args.world_size}; on several GPUs use sat_core's own trainer: "
                "torchrun -m sat_core train RUN_FOLDER.",
                code="conflicting_parameters",
            )
        self._widen()
        self._asleep_soon.clear()
        optimizer = kwargs["optimizer"]
        config = dataclasses.replace(self.config, total_steps=state.max_steps)
        self.sparsity = sparsify(
            kwargs["model"], getattr(optimizer, "optimizer", optimizer), config
        )
        device = kwargs["model"].device
        self.probe_inputs = send_to_device(self.probe_inputs, device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow the ladder; narrow again what was widened to be saved or evaluated."""
        if self.sparsity is None:
            return
        for block, awake_K in self._asleep_soon:
            block.refresh(awake_K, self.sparsity.optimizer, stepped=False)
        self._asleep_soon.clear()
        made = self.sparsity.begin_step(state.global_step, self.probe_inputs)
        if self.config.max_gap and made is not None and made.dense_loss is not None:
            with torch.no_grad(), self.sparsity.as_probed():
                sparse_loss = float(kwargs["model"](**self.probe_inputs).loss)
            self.sparsity.note_gap(sparse_loss - made.dense_loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Widen where the Trainer is about to save, to evaluate or to stop."""
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._widen()

    # The same at the end of an epoch.
    on_epoch_end = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a dense model."""
        self._widen()
        self._asleep_soon.clear()

    def _widen(self) -> None:
        if self.sparsity is None or self._asleep_soon:
            return
        narrow = [b for b in self.sparsity.blocks if b.num_awake < b.num_units]
        self._asleep_soon = [(block, block.awake_K) for block in narrow]
        for block in narrow:
            block.wake(self.sparsity.optimizer)

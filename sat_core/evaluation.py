"""What a run is judged by, always on the merged dense model: what a person takes home is what is measured.

Held-out loss tells what was learned. What was forgotten is told by the loss on text that the base model itself wrote before
the run: its rise is an estimate of the KL divergence from the base model, in any language and for any model, with no data
set to choose. Samples are for the eye.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from sat_core.corpus import Batch
from sat_core.loss import token_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from sat_core.assembly import Assembly
    from sat_core.chat_template import ChatTemplate
    from sat_core.corpus import Corpus
    from sat_core.events import EventLog
    from sat_core.plan.config import TrainConfig
    from sat_core.progress import Counters
    from sat_core.sparsity import Sparsity

OWN_TEXT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Mean loss (nats a token) and share of tokens predicted right, over `tokens` labels."""

    loss: float
    token_accuracy: float
    tokens: int


@dataclass
class Measures:
    """Before and after, as far as they are known; part of every checkpoint.

    `own_text` is what the base model wrote, token ids of equal length; its losses are in nats a token. `last_step` is
    the step after which all that is held out was last gone through.
    """

    first: HeldOut | None = None
    last: HeldOut | None = None
    last_step: int | None = None
    own_text: list[list[int]] = field(default_factory=list)
    forgetting_before: float | None = None
    forgetting_after: float | None = None
    samples: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Measures:
        """From `asdict`."""
        held = {k: HeldOut(**state[k]) if state[k] else None for k in ("first", "last")}
        return cls(**{**state, **held})

    def summary(self) -> dict[str, Any]:
        """The measured part of a result."""
        return {
            "eval_loss_before": self.first.loss if self.first else None,
            "eval_loss_after": self.last.loss if self.last else None,
            "eval_token_accuracy_before": self.first.token_accuracy if self.first else None,
            "eval_token_accuracy_after": self.last.token_accuracy if self.last else None,
            "forgetting_loss_before": self.forgetting_before,
            "forgetting_loss_after": self.forgetting_after,
            "samples": self.samples,
        }


class Judge:
    """Measures a run before, during and after."""

    def __init__(
        self,
        parts: Assembly,
        config: TrainConfig,
        held: Corpus,
        measures: Measures,
        events: EventLog,
        template: ChatTemplate | None,
    ) -> None:
        """`template` makes a prompt a user's turn, as fits a run that is supervised on messages; None continues it as text."""
        self.parts, self.config, self.held = parts, config, held
        self.measures, self.events, self.template = measures, events, template

    def begin(self) -> None:
        """What can only be measured before the first step: the base model's own text and its samples."""
        measures = self.measures
        measures.own_text = self._write_own_text()
        measures.forgetting_before = self._forgetting()
        measures.samples = [
            {"prompt": p, "before": self._sample(p, 0), "after": ""} for p in self.config.prompts
        ]

    def end(self, step: int) -> None:
        """The same after the last step, when all are awake."""
        measures = self.measures
        measures.forgetting_after = self._forgetting()
        for sample in measures.samples:
            sample["after"] = self._sample(sample["prompt"], step)

    def evaluate(self, counters: Counters, *, alive: Callable[[], bool]) -> None:
        """Held-out loss of the dense model, told as an event; nothing where nothing is held out or `alive` turns false."""
        if len(self.held) == 0:
            self.measures.last_step = counters.step
            return
        self.events.state("evaluating", f"Evaluating on {len(self.held)} held-out sequences")
        found = self._held_out(counters.fitting(self.config.micro_batch_size), alive)
        if found is None:
            return
        self.measures.first = self.measures.first or found
        self.measures.last, self.measures.last_step = found, counters.step
        self.events.emit(
            "evaluation",
            step=counters.step,
            eval_loss=found.loss,
            eval_token_accuracy=found.token_accuracy,
            tokens=found.tokens,
        )

    @torch.no_grad()
    def _held_out(self, batch_size: int, alive: Callable[[], bool]) -> HeldOut | None:
        parts = self.parts
        total, correct, labels = 0.0, 0, 0
        with parts.autocast(), parts.sparsity.dense_forward():
            for indices in self.held.in_order(batch_size):
                if not alive():
                    return None
                found = token_loss(parts.model, self.held.batch(indices, parts.device))
                total, correct = total + float(found.total), correct + int(found.correct)
                labels += found.labels
        if not labels:
            return None
        return HeldOut(loss=total / labels, token_accuracy=correct / labels, tokens=labels)

    @property
    def _start(self) -> int | None:
        """The token that text begins with."""
        tokenizer = self.parts.tokenizer
        bos: int | None = tokenizer.bos_token_id
        return tokenizer.eos_token_id if bos is None else bos

    def _write_own_text(self) -> list[list[int]]:
        """Token ids that the model draws from its own distribution, of equal length, the same for the same seed."""
        device = self.parts.device
        number = self.config.forgetting_sequences
        start = self._start
        if start is None or number == 0:
            return []
        length = min(OWN_TEXT_TOKENS, self.parts.sparsity.shape.context - 1)
        with torch.random.fork_rng([device] if device.startswith("cuda") else []):
            torch.manual_seed(self.config.seed)
            settings = {"max_new_tokens": length, "min_new_tokens": length, "top_k": 0}
            return self._generate([[start]] * number, do_sample=True, **settings)

    def _forgetting(self) -> float | None:
        if not self.measures.own_text:
            return None
        with self.parts.autocast():
            return own_text_loss(self.parts.sparsity, self.measures.own_text, self.parts.device)

    def _sample(self, prompt: str, step: int) -> str:
        """Greedy continuation of `prompt`."""
        tokenizer = self.parts.tokenizer
        if self.template:
            ids = self.template.prompt([{"role": "user", "content": prompt}])
        else:
            ids = tokenizer(prompt)["input_ids"]
        # Where positions are learned there are none beyond the context. A prompt may have no token that is known.
        context = self.parts.sparsity.shape.context
        ids = ids[1 - context :] or [self._start or 0]
        most = min(self.config.max_new_tokens, context - len(ids))
        (written,) = self._generate([ids], max_new_tokens=most, do_sample=False)
        said = str(tokenizer.decode(written[len(ids) :], skip_special_tokens=True))
        self.events.emit("sample", step=step, prompt=prompt, text=said)
        return said

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
        """Token ids of the prompts, which are equally long, each with what the dense model adds."""
        sparsity, core = self.parts.sparsity, self.parts.sparsity.core
        own, ids_BT = core.generation_config, torch.tensor(prompts, device=self.parts.device)
        # The model's own would fill in what is not said here: a temperature, penalties, all that bends its distribution.
        core.generation_config = type(own)(eos_token_id=own.eos_token_id)
        try:
            with self.parts.autocast(), sparsity.dense_forward():
                out_BT = core.generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    use_cache=True,
                    # Ranks that share the layers all take part until the last one has ended.
                    synced_gpus=not sparsity.whole,
                    **settings,
                )
        finally:
            core.generation_config = own
        return cast("list[list[int]]", out_BT.tolist())


@torch.no_grad()
def own_text_loss(sparsity: Sparsity, text: list[list[int]], device: str) -> float:
    """Mean loss on the base model's own text, nats a token."""
    ids_BT = torch.tensor(text, device=device)
    lengths_B = torch.full((len(text),), ids_BT.shape[1], device=device)
    with sparsity.dense_forward():
        found = token_loss(sparsity.model, Batch(ids_BT, ids_BT, lengths_B))
    return float(found.total) / found.labels

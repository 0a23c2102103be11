"""FSDP2 over the decoder layers of a model that narrows: every rank holds a slice of every unit.

A matrix is cut along the dimension that does *not* narrow (gate and up by their inputs, down by its outputs), so a unit's
rows lie in every rank's slice and `slicing` moves weights, moments and sleepers on each rank as it does alone; nothing is
sent for it, and no number of units has to divide by the ranks. The road not taken cuts along the units, as FSDP does by
itself: the choice would have to be stratified by rank.

A cut matrix has two faces on one memory. `SlicedParameter.parameter` is the rank's slice, a plain Parameter: it alone is
known to AdamW and to `slicing`. Its module carries FSDP's DTensor: it alone is known to forward and backward. FSDP fixes
shapes when it wraps and never unwraps, so new widths mean new wraps: a layer's module object is made anew around the same
submodules. Filling the whole matrix that FSDP wants to see needs this rank's slice alone, for FSDP keeps no other.

What does not narrow (embeddings, head, norms) or has one dimension (biases) is whole on every rank, and its gradients are
summed by `Parallel`. That is a seventh of an 8B model with a vocabulary of 128k; cutting the head as well would need the
loss inside a wrapped module.

The probe and evaluations gather a block's dense slices while its forward runs, and put them in the module's place.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor, Shard

from sat_core.optim import clip
from sat_core.plan.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from sat_core.parallel import Parallel
    from sat_core.slicing import SlicedBlock, SlicedParameter


class Sharding:
    """The ranks' slices of a model's layers, and the FSDP modules that compute with them."""

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        blocks: list[SlicedBlock],
        parallel: Parallel,
        *,
        half: bool,
    ) -> None:
        """Keep this rank's slices of a model that is whole on every rank, and wrap its layers.

        Args:
            model: on any device; it is on the rank's own afterwards.
            layers: where the decoder layers are; the wrapped ones take their places.
            blocks: all awake, without gradients or moments.
            parallel: at least two ranks.
            half: whether forward and backward are in bfloat16; slices and sums of gradients stay float32.

        Raises:
            ConfigError: where no matrix can be cut evenly.
        """
        self.model, self.layers, self.blocks, self.parallel = model, layers, blocks, parallel
        self.mesh = init_device_mesh(parallel.device.partition(":")[0], (parallel.world,))
        self._policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            # The residual stream stays as autocast has it on one device.
            cast_forward_inputs=False,
        )
        self._cuts = {
            part.name: dim
            for block in blocks
            for part in block.parts
            if (dim := _cut_dim(part)) is not None
            and part.parameter.shape[dim] % parallel.world == 0
        }
        if not self._cuts:
            raise ConfigError(
                f"sat.train.sharding is 'fsdp', but the model's hidden size does not divide by {parallel.world} processes.",
                "sat.train.sharding",
            )
        self._parts = {p.name: p for b in blocks for p in b.parts if p.name in self._cuts}
        self._layer_of = {p.name: b.layer for b in blocks for p in b.parts}
        self._shown: dict[str, Any] = {}
        for part in self._parts.values():
            part.parameter.data = self.cut(part, part.parameter.data).to(parallel.device)
        model.to(parallel.device)
        for block in blocks:
            block.shards = self
            block.awake_K = block.awake_K.to(parallel.device)
            block.trained_U = block.trained_U.to(parallel.device)
        self._plain = [_shell(layer) for layer in layers]
        self._hooks = {
            name: [dict(hooks) for hooks in _state_dict_hooks(p.owner)]
            for name, p in self._parts.items()
        }
        self._wrap()

    def settle(self) -> None:
        """Let FSDP's faces follow what `slicing` did; before a forward of the narrow model."""
        for layer in cast("Any", self.layers):
            layer.reshard()
        faces = {name: self._face(part) for name, part in self._parts.items()}
        if any(faces[n].shape[p.dim] != p.parameter.shape[p.dim] for n, p in self._parts.items()):
            self._wrap()
            return
        for name, part in self._parts.items():
            local = faces[name].to_local().detach()
            if local.data_ptr() != part.parameter.data_ptr():
                local.copy_(part.parameter.data)
                part.parameter.data = local

    def collect_gradients(self, limit: float) -> float:
        """After the last backward: give the optimizer's Parameters their gradients, clipped to `limit`; the global norm."""
        cut = [part.parameter for part in self._parts.values() if part.parameter.requires_grad]
        for part in self._parts.values():
            face = self._face(part)
            if face.requires_grad:
                grad: Any = torch.zeros_like(face) if face.grad is None else face.grad
                part.parameter.grad, face.grad = grad.to_local(), None
        whole = [
            p for p in self.model.parameters() if p.requires_grad and not isinstance(p, DTensor)
        ]
        self.parallel.sum_gradients(whole)
        square = self.parallel.sum(_norm(cut) ** 2) + _norm(whole) ** 2
        norm = square.sqrt()
        return clip([*cut, *whole], limit, norm)

    def cut(self, part: SlicedParameter, full: Tensor) -> Tensor:
        """This rank's slice of a whole tensor, copied."""
        if part.name not in self._cuts:
            return full
        mine = full.chunk(self.parallel.world, self._cuts[part.name])[self.parallel.rank]
        return mine.clone(memory_format=torch.contiguous_format)

    def spread(self, part: SlicedParameter, local: Tensor) -> Tensor:
        """This rank's slice as a part of the whole, for checkpoints; as it is where the parameter is not cut."""
        if part.name not in self._cuts:
            return local
        placement = [Shard(self._cuts[part.name])]
        return DTensor.from_local(local.contiguous(), self.mesh, placement, run_check=False)

    @torch.no_grad()
    def gather(self, part: SlicedParameter, local: Tensor) -> Tensor:
        """The whole tensor from every rank's slice; all ranks must ask."""
        spread = self.spread(part, local)
        return spread.full_tensor() if isinstance(spread, DTensor) else spread

    def kept(self, full: Tensor) -> Tensor:
        """In memory of the host on the rank that writes; nothing on others."""
        return full.cpu() if self.parallel.first else full.new_empty(0)

    def show(self, block: SlicedBlock) -> None:
        """Put the optimizer's face, whole for the moment, in the place of FSDP's; `hide` undoes it."""
        for part in block.parts:
            if part.name in self._cuts:
                self._shown[part.name] = self._face(part)
                setattr(part.owner, _leaf(part), part.parameter)

    def hide(self, block: SlicedBlock) -> None:
        """Put FSDP's face back."""
        for part in block.parts:
            if part.name in self._cuts:
                setattr(part.owner, _leaf(part), self._shown.pop(part.name))

    def _wrap(self) -> None:
        """Give all layers to FSDP, as wide as their parts now are."""
        for name, part in self._parts.items():
            for hooks, before in zip(_state_dict_hooks(part.owner), self._hooks[name], strict=True):
                hooks.clear()
                hooks.update(before)
        for i, plain in enumerate(self._plain):
            self.layers[i] = layer = _shell(plain)
            self._wrap_layer(layer, [p for n, p in self._parts.items() if self._layer_of[n] == i])
        share_comm_ctx(list(cast("Any", self.layers)))
        for block in self.blocks:
            block.tell_width()

    def _wrap_layer(self, layer: nn.Module, parts: list[SlicedParameter]) -> None:
        placements: dict[nn.Parameter, Shard] = {}
        for part in parts:
            trained = part.parameter.requires_grad
            whole = nn.Parameter(self._frame(part), requires_grad=trained)
            setattr(part.owner, _leaf(part), whole)
            placements[whole] = Shard(self._cuts[part.name])
        wrapped = fully_shard(
            layer,
            mesh=self.mesh,
            reshard_after_forward=True,
            shard_placement_fn=placements.__getitem__,
            mp_policy=self._policy,
            ignored_params={p for p in layer.parameters() if p not in placements},
        )
        # The loss is divided by the labels of all ranks already, so gradients are summed.
        wrapped.set_gradient_divide_factor(1.0)
        wrapped.set_force_sum_reduction_for_comms(True)
        for part in parts:
            part.parameter.data = self._face(part).to_local().detach()

    def _frame(self, part: SlicedParameter) -> Tensor:
        """A tensor of the whole parameter's size with this rank's slice in its place and nothing elsewhere."""
        local, dim = part.parameter.data, self._cuts[part.name]
        size = list(local.shape)
        size[dim] *= self.parallel.world
        frame = local.new_zeros(size)
        frame.chunk(self.parallel.world, dim)[self.parallel.rank].copy_(local)
        return frame

    def _face(self, part: SlicedParameter) -> Any:
        return getattr(part.owner, _leaf(part))


def save_moments(folder: Path, moments: dict[str, Tensor]) -> None:
    """Write every rank's slices by torch.distributed.checkpoint; all ranks call it.

    Raises:
        OSError: where a rank could not write.
    """
    try:
        save(moments, checkpoint_id=folder)
    except CheckpointException as error:
        raise OSError(f"The optimizer's state could not be written: {error}") from error


def load_moments(folder: Path, slices: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read what `save_moments` wrote, by however many ranks.

    torch keeps the list of tensors as a pickle, so only a folder whose every byte is known may come here.

    Args:
        folder: verified against its manifest.
        slices: of what this rank wants a slice only, a DTensor to fill, by name; of the rest it gets the whole.
    """
    found: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {
        name: slices[name]
        if name in slices
        else torch.zeros(meta.size, dtype=meta.properties.dtype)
        for name, meta in found.items()
    }
    load(wanted, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())
    return {n: t.to_local() if isinstance(t, DTensor) else t for n, t in wanted.items()}


def _cut_dim(part: SlicedParameter) -> int | None:
    """The dimension that neither narrows nor counts experts; None for vectors."""
    free = set(range(part.parameter.dim())) - {part.dim}
    if part.experts > 1:
        free.discard(0)
    return free.pop() if len(free) == 1 else None


def _shell(layer: nn.Module) -> nn.Module:
    """A module object of its own, with hooks and children of its own, around the same submodules and parameters."""
    shell = layer.__class__.__new__(layer.__class__)
    shell.__dict__.update(
        {k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
    )
    return shell


def _state_dict_hooks(owner: Any) -> list[dict[int, Any]]:
    """FSDP leaves hooks here, and in them whole generations of tensors."""
    return [owner._state_dict_pre_hooks, owner._load_state_dict_pre_hooks]


def _leaf(part: SlicedParameter) -> str:
    return part.name.rpartition(".")[2]


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)

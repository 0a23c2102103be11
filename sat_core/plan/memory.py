"""Peak memory of a run, from its configuration: what is kept, and what a forward leaves for its backward.

Every ladder has dense steps, so the peak is that of a dense one. Weights, gradients and moments are exact up to norms and
biases; activations are the tensors that autograd keeps of a stock layer, counted in values a token; allocators and
libraries are not in it, which is why measured peaks of past runs correct it where there are any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sat_core.plan.config import TrainConfig
    from sat_core.plan.families import ModelShape

# A CPU run is measured as the resident size of the whole process: interpreter, torch and transformers are in it, some
# 450 MiB with the CPU build of torch 2.13 (docs/evidence/estimates.md says what that comes to).
CPU_RUNTIME_BYTES = 460 * 2**20
FP32 = 4
# Values of a residual-stream width that a layer keeps: the inputs of two norms, of the projections, of the MLP, and sums.
KEPT_HIDDEN = 8
# The loss makes no more logits at a time than these.
CHUNK_ELEMENTS = 2**25
# Logits and their softmax in single precision, and one of the two still of the chunk before.
LOGIT_COPIES = 3
# Capped attention is eager and keeps of a query-key pair the logit and its softmax: 4 + 4 bytes, or 2 + 4 and a copy of 2.
PAIR_BYTES = {"gemma2": 8}


def memory_bytes(config: TrainConfig, *, width: int, gpu: bool) -> dict[str, int]:
    """Bytes by what they are for, and their `peak`.

    Args:
        config: of the run.
        width: tokens of the longest sequence, padding included.
        gpu: whether the run has one; what its process holds besides is not counted there.
    """
    shape = config.shape
    trained = shape.num_parameters
    weights = FP32 * trained
    if config.tuning == "lora":
        trained = _adapter_parameters(shape, config.lora_rank)
        weights += FP32 * trained
    moments = 2 * trained * (1 if config.optimizer == "adamw_8bit" else FP32)
    found = {
        "weights": weights,
        "gradients": FP32 * trained,
        "optimizer": moments,
        "activations": _activations(config, width, gpu=gpu),
        "runtime": 0 if gpu else CPU_RUNTIME_BYTES,
    }
    return {**found, "peak": sum(found.values())}


def _activations(config: TrainConfig, width: int, *, gpu: bool) -> int:
    shape = config.shape
    half = config.precision == "bf16" or (config.precision == "auto" and gpu)
    tokens = config.micro_batch_size * width
    heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    mlp = (shape.mlp_matrices + 1) * shape.intermediate * shape.active_experts
    value = 2 if half else FP32
    pairs = PAIR_BYTES.get(shape.model_type, 0) * shape.num_heads * width
    layer = value * (KEPT_HIDDEN * shape.hidden + heads + mlp) + pairs
    kept = tokens * layer
    if half and config.sharding != "fsdp":
        # Autocast's copy of each weight stays until its backward; of layers that ranks share there is none.
        kept += value * shape.layer_parameters
    layers = shape.num_layers * kept
    if config.gradient_checkpointing:
        layers = tokens * value * shape.num_layers * shape.hidden + kept
    return layers + LOGIT_COPIES * FP32 * min(tokens * shape.vocab, CHUNK_ELEMENTS)


def _adapter_parameters(shape: ModelShape, rank: int) -> int:
    attention = shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads) + 4 * shape.hidden
    mlp = shape.mlp_matrices * (shape.hidden + shape.intermediate) * shape.experts
    return shape.num_layers * rank * (attention + mlp)

"""A stock model, loaded with suspicion: safetensors only, no remote code, every tensor there, of its shape and finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sat_core.allotment import GRID
from sat_core.plan.errors import ModelError
from sat_core.plan.families import shape_of
from sat_core.tokenizer import load_tokenizer

LORA_TARGETS = "all-linear"


def load_model(path: str, *, revision: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """Model (float32, train mode) and tokenizer.

    Attention is torch's SDPA, but for models that cap attention logits (Gemma 2), which only the eager one computes right.

    Raises:
        ModelError: where the folder or the hub name cannot be loaded whole: no tensor missing, misshapen or not finite.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        shape_of(config.to_dict())
        tokenizer = load_tokenizer(path, revision=revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention_implementation(config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"The model {path} cannot be loaded: {type(error).__name__}: {error}", "model"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"The model's weights lack {', '.join(missing[:3])} ({len(missing)} in all).", "model"
        )
    broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if broken:
        raise ModelError(
            f"The model's weights hold NaN or infinity in {', '.join(broken[:3])}.", "model"
        )
    model.config.use_cache = False
    return model.to(device).train(), tokenizer


def attention_implementation(config: Any) -> str:
    """The attention that computes what the architecture says."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def compile_layers(layers: list[nn.Module], backend: str = "inductor") -> None:
    """torch.compile each decoder layer; one graph serves all layers of one width.

    A stage of the ladder brings new widths and so new graphs, at most the grid's for both kinds of units; inside a stage
    nothing is compiled again. Where torch would give up and go on uncompiled with a warning, it fails instead.
    """
    # Loaded here, for it takes as long as torch itself, and what does not compile has no use for it.
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 4 * (len(GRID) + 2) ** 2
    )
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in layers:
        layer.compile(dynamic=False, backend=backend)


def with_adapters(model: Any, *, rank: int, alpha: int, seed: int) -> Any:
    """The model with LoRA adapters (Hu et al. 2021) on every linear projection of its layers, its own weights frozen.

    Raises:
        ModelError: where peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError(
            "sat.train.tuning is 'lora', which needs the peft library: pip install peft.",
            "sat.train.tuning",
            "missing_dependency",
        ) from error
    torch.manual_seed(seed)
    config = LoraConfig(
        fan_in_fan_out=any(hasattr(m, "nf") for m in model.modules()),
        r=rank,
        lora_alpha=alpha,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)

"""Which units stay awake, from their scores. Deterministic given scores, seed and step: ties are broken by index.

`top_k` keeps the best. `sample` draws without replacement in proportion to score^(1 / temperature) by the Gumbel top-k
trick (Kool et al. 2019, arXiv 1903.06059): near temperature 0 it is `top_k`, at a large one a uniform draw. `mixed` keeps
the best for one part and draws the other, so that nobody sleeps for ever. Units are chosen per stretch (a KV group's query
heads, an expert's channels), equally many in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCORE = 1e-30


def select(
    scores_U: Tensor,
    num_awake: int,
    *,
    selector: str = "top_k",
    temperature: float = 1.0,
    explore: float = 0.3,
    stretches: int = 1,
    random: torch.Generator | None = None,
) -> Tensor:
    """`num_awake` units, ascending, int64 [K].

    Args:
        scores_U: finite scores, not negative.
        num_awake: K, a multiple of `stretches`.
        selector: "top_k", "sample" or "mixed".
        temperature: of the draw, above 0.
        explore: share of K that "mixed" draws.
        stretches: equal stretches of units, each of which gets K / stretches.
        random: source of the draw; a CPU generator.

    Raises:
        ValueError: where `num_awake` is not in [1, U] or does not divide, or a score is not finite.
    """
    if not 1 <= num_awake <= len(scores_U) or num_awake % stretches:
        raise ValueError(
            f"num_awake is {num_awake}; allowed is 1 to {len(scores_U)}, a multiple of {stretches}"
        )
    if not bool(scores_U.isfinite().all()):
        raise ValueError(
            "a score is not finite: the model's activations or weights hold NaN or infinity"
        )
    scores_SU = scores_U.detach().float().cpu().view(stretches, -1)
    wanted = num_awake // stretches
    best = wanted if selector == "top_k" else 0
    if selector == "mixed":
        best = wanted - round(explore * wanted)
    ranks_SU = scores_SU.clone()
    if best < wanted:
        noise_SU = -torch.empty_like(scores_SU).exponential_(generator=random).log()
        drawn_SU = scores_SU.clamp_min(SMALLEST_SCORE).log() / temperature + noise_SU
        ranks_SU = drawn_SU
        if best:
            kept = scores_SU.argsort(dim=1, descending=True, stable=True)[:, :best]
            ranks_SU = drawn_SU.scatter(1, kept, torch.inf)
    chosen_SK = ranks_SU.argsort(dim=1, descending=True, stable=True)[:, :wanted]
    first_S1 = torch.arange(stretches)[:, None] * scores_SU.shape[1]
    return (chosen_SK + first_S1).flatten().sort().values

"""Which units stay awake, from their scores. Deterministic: equal scores are broken by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def top_k(scores_U: Tensor, num_awake: int) -> Tensor:
    """The `num_awake` units with the highest scores, ascending, int64 [K].

    Raises:
        ValueError: where `num_awake` is not in [1, U] or a score is not finite.
    """
    if not 1 <= num_awake <= len(scores_U):
        raise ValueError(f"num_awake is {num_awake}; allowed is 1 to {len(scores_U)}")
    if not bool(scores_U.isfinite().all()):
        raise ValueError(
            "a score is not finite: the model's activations or weights hold NaN or infinity"
        )
    order = scores_U.argsort(descending=True, stable=True)
    return order[:num_awake].sort().values

"""Sparsity-Accelerated Training: train only the neurons that matter now, end with the dense model.

    from sat_core import SatConfig, sparsify       # your own loop
    python -P -m sat_core train RUN_FOLDER         # a whole run, from a folder that holds config.json

Names are exported lazily (PEP 562): importing `sat_core.plan` must not load torch, because the web service does so.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "SatCallback": "sat_core.callback",
    "SatConfig": "sat_core.plan.config",
    "Sparsity": "sat_core.sparsity",
    "build_optimizer": "sat_core.optim",
    "load_model": "sat_core.model",
    "sparsify": "sat_core.sparsity",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sat_core' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

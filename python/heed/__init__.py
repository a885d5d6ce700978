"""heed: attention mechanisms as plans of tiles, on CPUs.

    o = heed.attend(q, k, v, "moba", block=64, top_k=8)       # NumPy arrays or torch tensors, gradients for torch
    heed.plan(q, k, "hip", budget=512).density                # who would attend to whom
    heed.mechanisms(); print(heed.describe("hip"))
    with heed.sdpa("streaming", window=512): model(x)         # torch's scaled_dot_product_attention, answered by heed
    heed.transformers.register()                              # attn_implementation="heed:moba" in Hugging Face
    heed.flex_attention(q, k, v, mask_mod=lambda b, h, i, j: i >= j)
    heed.Model("model.gguf").generate("Why is the sky blue?", mechanism="moba", block=64, top_k=8)

Bad input raises heed.Error, a ValueError of one line: the culprit, its value, what was expected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._attention import Gradients, attend, attend_backward
from ._built import version as __version__
from ._core import Error, isa, set_threads, threads
from ._model import Comparison, Model, Sampling, Session
from ._plan import Picture, Plan, plan
from ._registry import ExtraTensor, Mechanism, Parameter, describe, mechanisms

if TYPE_CHECKING:
    from . import transformers
    from ._flex import create_block_mask, flex_attention
    from ._sdpa import sdpa

__all__ = [
    "Comparison",
    "Error",
    "ExtraTensor",
    "Gradients",
    "Mechanism",
    "Model",
    "Parameter",
    "Picture",
    "Plan",
    "Sampling",
    "Session",
    "__version__",
    "attend",
    "attend_backward",
    "create_block_mask",
    "describe",
    "flex_attention",
    "isa",
    "mechanisms",
    "plan",
    "sdpa",
    "set_threads",
    "threads",
    "transformers",
]

# What needs torch is imported when it is asked for, so that NumPy's users need not have it.
_LATER = {
    "sdpa": ("heed._sdpa", "sdpa"),
    "create_block_mask": ("heed._flex", "create_block_mask"),
    "flex_attention": ("heed._flex", "flex_attention"),
    "transformers": ("heed.transformers", ""),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'heed' has no attribute '{name}'")
    from importlib import import_module

    module, attribute = _LATER[name]
    found = import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value

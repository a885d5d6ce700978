"""torch's scaled_dot_product_attention, answered by heed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ._attention import attend
from ._call import take_apart
from ._core import Error
from ._masks import Visible, read_mask, require
from ._registry import describe


class sdpa(TorchFunctionMode):
    """Inside ``with heed.sdpa("streaming", window=512):`` every call of
    torch.nn.functional.scaled_dot_product_attention in this thread is answered by a mechanism of heed, gradients
    included.

    Args:
        mechanism, params: as in ``heed.attend``.

    attn_mask may be causal, padding (for mechanisms that read ``key_mask``) or, for dense, anything. A mechanism that
    is causal by definition answers causal calls and single queries only. The result has the query's dtype.

    Raises heed.Error, when the call is made, for what the mechanism cannot honour and for dropout_p > 0; and as
    ``heed.attend`` does.
    """

    def __init__(self, mechanism: str = "dense", **params: Any) -> None:
        super().__init__()
        self.call, self.extra = take_apart(mechanism, params)
        self.about = describe(self.call.partition(":")[0])
        self.names = {e.name for e in self.about.extras}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.answer(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """As torch.nn.functional.scaled_dot_product_attention."""
        if dropout_p > 0:
            raise Error(f"dropout_p = {dropout_p}, expected 0: heed drops nothing")
        if not enable_gqa and query.dim() > 2 and query.shape[-3] != key.shape[-3]:
            raise Error(f"key: {key.shape[-3]} heads, expected {query.shape[-3]}, or enable_gqa = True")
        n, m = query.shape[-2], key.shape[-2]
        lead = query.shape[:-2]
        q, k, v = (_four_axes(x) for x in (query, key, value))
        if attn_mask is not None:
            if is_causal:
                raise Error("is_causal = True, expected False beside attn_mask")
            visible = read_mask(_four_axes(attn_mask.expand(*attn_mask.shape[:-2], n, m)), q.shape[0], n, m)
        elif is_causal and n != m:
            # torch aligns the diagonal at the first key, heed at the last.
            if n > m:
                raise Error(f"is_causal: {n} queries and {m} keys, expected at least as many keys")
            k, v, visible = k[:, :, :n], v[:, :, :n], Visible(True, {})
        else:
            visible = Visible(is_causal, {})
        if n == 1 and not visible.extra and self.about.causal != "refused":
            visible = Visible(True, {})  # nothing comes after the last position
        argument = "is_causal" if attn_mask is None else "attn_mask"
        require(self.about.name, visible, self.about.causal, self.names, argument)
        o = attend(q, k, v, self.call, causal=visible.causal, scale=scale, **self.extra, **visible.extra)
        return o.reshape(*lead, n, v.shape[-1]).to(query.dtype)


def _four_axes(x: torch.Tensor) -> torch.Tensor:
    """[N, D], [H, N, D], [B, H, N, D] and more batches as [B, H, N, D]."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x.flatten(0, -4) if x.dim() > 4 else x

"""heed inside Hugging Face transformers: attn_implementation="heed", "heed:moba", ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from . import _core
from ._attention import attend
from ._call import take_apart
from ._core import Error
from ._masks import Visible, read_mask, require
from ._registry import describe, mechanisms


def register(mechanism: str | None = None, *, name: str | None = None, **params: Any) -> list[str]:
    """Makes mechanisms known to transformers as attention implementations; returns their names.

    ``register()`` registers "heed" (dense) and "heed:NAME", with default parameters, for every mechanism that can stand
    in a language model. ``register("moba", block=64, top_k=8)`` registers "heed:moba" with these parameters, or under
    another `name`. Names with "flash" in them are taken by transformers, so flash-moba needs a name of its own.

    Layers with a sliding window of their own keep it, whatever the mechanism. Mechanisms that need the whole prompt at
    once (``describe(m).square``) leave steps of decoding to dense attention, unless they have a rule for them. Padding
    is honoured by mechanisms that read a ``key_mask`` (dense, streaming) and is an error for others; so are masks that
    are not causal, but for dense.

    >>> heed.transformers.register("moba", block=64, top_k=8)
    >>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="heed:moba")
    """
    if mechanism is None:
        if name is not None or params:
            raise Error("mechanism: missing, expected one beside name or parameters")
        able = [m for m in mechanisms() if describe(m).on_models and "flash" not in m]
        return register("dense", name="heed") + [added for m in able for added in register(m)]
    call, extra = take_apart(mechanism, params)
    if extra:
        raise Error(f"{next(iter(extra))}: a tensor, expected none: every layer would read the same")
    about = describe(call.partition(":")[0])
    if not about.on_models:
        raise Error(f"mechanism = {about.name}, expected one for language models: {about.not_on_models}")
    name = name or "heed:" + about.name
    if "flash" in name:
        raise Error(f"name = {name}, expected one without flash: transformers would look for flash attention")
    AttentionInterface.register(name, _attention(call))
    AttentionMaskInterface.register(name, _mask)
    return [name]


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """Nothing where causality and the layer's window say all, [B, M] where keys are padding, else [B, 1, N, M]."""
    ends_alike = not isinstance(q_offset, torch.Tensor) and q_offset + q_length == kv_offset + kv_length
    bidirectional = options.get("allow_is_bidirectional_skip", False)
    if (allow_is_causal_skip or bidirectional) and ends_alike and not options.get("use_vmap", False):
        if attention_mask is None or bool(attention_mask.all()):
            return None
        return attention_mask[:, -kv_length:]
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        allow_is_causal_skip=False, **options,
    )  # fmt: skip


def _attention(call: str) -> Callable[..., tuple[torch.Tensor, None]]:
    chosen = describe(call.partition(":")[0])
    step = (chosen, call) if _core.decodes(call) else (describe("dense"), "dense")

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [B, Hq, N, D], key and value [B, Hk, M, D]; gives [B, N, Hq, Dv] in the query's dtype."""
        if dropout > 0:
            raise Error(f"dropout = {dropout}, expected 0: heed drops nothing (attention_dropout of the config)")
        if softcap is not None or s_aux is not None:
            raise Error(f"{'softcap' if s_aux is None else 's_aux'}: given, expected none")
        batch, n, m = query.shape[0], query.shape[2], key.shape[2]
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        about, text = step if n == 1 < m else (chosen, call)
        if attention_mask is None or attention_mask.dim() == 2:
            visible = Visible(bool(causal) or (n == 1 and about.causal == "implied"), {})
            if attention_mask is not None:
                visible.extra["key_mask"] = attention_mask.to(torch.uint8)
            if sliding_window is not None and sliding_window < m:
                about, text = describe("streaming"), f"streaming:sink=0,window={sliding_window}"
        else:
            visible = read_mask(attention_mask[..., :m], batch, n, m)
            if sliding_window is not None and visible.extra.keys() == {"bias"}:
                about, text = describe("dense"), "dense"  # the window is in the mask
        require(about.name, visible, about.causal, {e.name for e in about.extras}, "attention_mask")
        o = attend(query, key, value, text, causal=visible.causal, scale=scaling, **visible.extra)
        return o.to(query.dtype).transpose(1, 2), None

    return forward

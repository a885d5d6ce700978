"""Attention by name, on NumPy arrays and torch tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _core
from ._call import for_core, is_torch, take_apart
from ._core import Error


def attend(
    q: Any,
    k: Any,
    v: Any,
    mechanism: str = "dense",
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: str | None = None,
    return_lse: bool = False,
    return_extra: bool = False,
    **options: Any,
) -> Any:
    """Attention of queries over keys and values under any mechanism of ``heed.mechanisms()``.

    Tensors are torch's, NumPy's or anyone's who speaks DLPack; f32, f16 or bf16, any strides, and are not copied. In a
    torch graph gradients reach q, k, v and the extra tensors that ``heed.describe(mechanism)`` calls differentiable;
    what a mechanism selects is taken as constant.

    Args:
        q: queries ``[B, Hq, N, D]``, the last N of M positions.
        k: keys ``[B, Hk, M, D]``; query head h reads KV head ``h // (Hq // Hk)``. D is at most 512.
        v: values ``[B, Hk, M, Dv]``.
        mechanism: a name such as ``"moba"``, also with parameters: ``"moba:block=64,top_k=8"``. The mechanism's paper
            stands in ``heed.describe(mechanism).paper``, e.g. arXiv:2502.13189 for moba.
        causal: key j is hidden from queries before it. Mechanisms that are causal by definition need not be told.
        scale: factor of the scores, ``D ** -0.5`` by default.
        dtype: the arithmetic, ``"f32"`` or ``"bf16"`` (f32 tensors are rounded first). By default bf16 when q, k and v
            are, else f32.
        return_lse: return ``(o, lse)``.
        return_extra: return a dict of what else the mechanism computes, as the last item (blockrank's ``scores``); on
            arrays only.
        options: the mechanism's parameters (``block=64``) and its extra tensors (``doc=...``), by name.

    Returns:
        o ``[B, Hq, N, Dv]``, f32, of the kind that q is (NumPy where q is of a third kind); with ``return_lse`` also
        lse ``[B, Hq, N]``, f32, the natural log of the sum of exp(score) over the keys attended. A row without keys
        gives zeros and -inf. lse is None for mechanisms that have none, and carries no gradient.

    Raises:
        heed.Error: a ValueError of one line that names the argument, its value and what was expected.

    >>> o = heed.attend(q, k, v, "moba", block=64, top_k=8)
    """
    call, extra = take_apart(mechanism, options)
    if is_torch(q):
        if return_extra:
            raise Error("return_extra = True, expected False for torch tensors")
        from . import _torch

        o, lse = _torch.attend(q, k, v, extra, call, causal, scale, dtype)
        if not return_lse:
            return o
        return o, (lse if lse.dim() > 1 else None)

    o, lse, more = _core.attend(
        for_core("q", q), for_core("k", k), for_core("v", v), {n: for_core(n, x) for n, x in extra.items()},
        call, causal, scale, dtype,
    )  # fmt: skip
    result = (o,) + ((lse,) if return_lse else ()) + ((more,) if return_extra else ())
    return result if len(result) > 1 else o


class Gradients(NamedTuple):
    """Gradients of ``sum(o * do)``, shaped as what they belong to; f32 arrays, or tensors of their tensors' types."""

    dq: Any
    dk: Any
    dv: Any
    extra: dict[str, Any]  # of the differentiable extra tensors that were given


def attend_backward(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    mechanism: str = "dense",
    *,
    causal: bool = False,
    scale: float | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Gradients:
    """Gradients of ``sum(o * do)`` where ``o, lse = heed.attend(q, k, v, mechanism, return_lse=True, ...)``, for those
    who have no autograd. Arguments beside do ``[B, Hq, N, Dv]``, o and lse are those of ``heed.attend``.

    Memory is O(N·D): nothing N×N is made. The same bits for any number of threads.

    Raises:
        heed.Error: as ``heed.attend``.
    """
    call, extra = take_apart(mechanism, options)
    if is_torch(q):
        from . import _torch

        return Gradients(*_torch.attend_backward(do, q, k, v, o, lse, extra, call, causal, scale, dtype))
    return Gradients(
        *_core.attend_backward(
            for_core("do", do), for_core("q", q), for_core("k", k), for_core("v", v),
            {n: for_core(n, x) for n, x in extra.items()}, for_core("o", o), for_core("lse", lse),
            call, causal, scale, dtype,
        )
    )  # fmt: skip

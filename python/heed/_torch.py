"""torch.ops.heed.*: loads the operators, which C++ registers (heed/torch/attend.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import _built, _core
from ._core import Error
from ._registry import describe


def _load() -> str:
    """Loads the operators; returns "" or why there are none."""
    if not _built.torch_version:
        return "heed was built without torch, expected a build with it (install torch, then heed again)"
    running = torch.__version__.split("+")[0]
    if running != _built.torch_version:
        return f"torch = {running}, expected {_built.torch_version}, which heed was built for (install heed again)"
    torch.ops.load_library(str(Path(__file__).parent / "libheed_torch.so"))
    return ""


_missing = _load()


def _check(x: dict[str, Any]) -> None:
    for name, tensor in x.items():
        if not isinstance(tensor, torch.Tensor):
            raise Error(f"{name}: a {type(tensor).__name__}, expected a torch tensor, as q is")
        if tensor.device.type not in ("cpu", "meta"):
            raise Error(f"{name}: device = {tensor.device}, expected cpu")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: dict[str, torch.Tensor],
    call: str,
    causal: bool,
    scale: float | None,
    dtype: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = {"q": q, "k": k, "v": v, **extra}
    _check(tensors)
    if _missing:
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
            raise Error(f"gradients: {_missing}")
        read = {name: x.detach() for name, x in tensors.items()}
        o, lse, _ = _core.attend(read.pop("q"), read.pop("k"), read.pop("v"), read, call, causal, scale, dtype)
        return torch.from_numpy(o), torch.empty(0) if lse is None else torch.from_numpy(lse)
    try:
        return torch.ops.heed.attend(q, k, v, list(extra.values()), call, list(extra), causal, scale, dtype)
    except ValueError as e:
        raise Error(str(e)) from None


def attend_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    extra: dict[str, torch.Tensor],
    call: str,
    causal: bool,
    scale: float | None,
    dtype: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    _check({"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, **extra})
    if _missing:
        raise Error(f"attend_backward: {_missing}, or give arrays")
    names = {e.name for e in describe(call.partition(":")[0]).extras if e.differentiable}
    try:
        dq, dk, dv, others = torch.ops.heed.attend_backward(
            do, q, k, v, list(extra.values()), o, lse, call, list(extra), causal, scale, dtype
        )
    except ValueError as e:
        raise Error(str(e)) from None
    return dq, dk, dv, dict(zip((n for n in extra if n in names), others, strict=True))

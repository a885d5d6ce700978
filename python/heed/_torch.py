"""torch.ops.heed.*: loads the operators, which C++ registers (heed/torch/attend.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import _built
from ._core import Error


def _load() -> str:
    """Loads the operators; returns "" or why there are none."""
    if not _built.torch_version:
        return "heed was built without torch, expected a build with it: install torch, then heed again"
    running = torch.__version__.split("+")[0]
    if running != _built.torch_version:
        return f"torch = {running}, expected {_built.torch_version}, which heed was built for: install heed again"
    torch.ops.load_library(str(Path(__file__).parent / "libheed_torch.so"))
    return ""


_missing = _load()


def _check(x: dict[str, Any]) -> None:
    if _missing:
        raise Error(_missing)
    for name, tensor in x.items():
        if not isinstance(tensor, torch.Tensor):
            raise Error(f"{name}: a {type(tensor).__name__}, expected a torch tensor, as q is")
        if tensor.device.type not in ("cpu", "meta"):
            raise Error(f"{name}: device = {tensor.device}, expected cpu")


def attend(q, k, v, extra, call, causal, scale, dtype):
    _check({"q": q, "k": k, "v": v, **extra})
    try:
        return torch.ops.heed.attend(q, k, v, list(extra.values()), call, list(extra), causal, scale, dtype)
    except ValueError as e:
        raise Error(str(e)) from None


def attend_backward(do, q, k, v, o, lse, extra, call, causal, scale, dtype):
    _check({"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, **extra})
    from ._registry import describe

    names = {e.name for e in describe(call.partition(":")[0]).extras if e.differentiable}
    try:
        dq, dk, dv, others = torch.ops.heed.attend_backward(
            do, q, k, v, list(extra.values()), o, lse, call, list(extra), causal, scale, dtype
        )
    except ValueError as e:
        raise Error(str(e)) from None
    return dq, dk, dv, dict(zip((n for n in extra if n in names), others, strict=True))

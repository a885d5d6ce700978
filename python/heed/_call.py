"""From Python's arguments to heed's: a mechanism's call as text, its extra tensors by name."""

from __future__ import annotations

import numbers
from typing import Any

from ._core import Error


def is_torch(x: Any) -> bool:
    """Whether x is a torch tensor, found out without importing torch."""
    return hasattr(x, "requires_grad") and hasattr(x, "detach")


def is_array(x: Any) -> bool:
    return hasattr(x, "__dlpack__") or hasattr(x, "__array_interface__")


def _spelled(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "x".join(_spelled(name, v) for v in value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    kind = type(value).__name__
    raise Error(f"{name}: a {kind}, expected a number, a boolean, a text, a list of numbers or a tensor")


def take_apart(mechanism: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """("moba", {"block": 64, "doc": tensor}) becomes ("moba:block=64", {"doc": tensor})."""
    if not isinstance(mechanism, str):
        raise Error(f'mechanism: a {type(mechanism).__name__}, expected a name such as "moba"')
    params, extra = [], {}
    for name, value in options.items():
        if value is None:
            continue
        if is_array(value):
            extra[name] = value
        else:
            params.append(f"{name}={_spelled(name, value)}")
    if params:
        mechanism += ("," if ":" in mechanism else ":") + ",".join(params)
    return mechanism, extra


def for_core(name: str, x: Any) -> Any:
    """x as heed._core takes it: no part of a graph, on the CPU."""
    if is_torch(x):
        if x.device.type != "cpu":
            raise Error(f"{name}: device = {x.device}, expected cpu")
        return x.detach()
    if not is_array(x):
        raise Error(f"{name}: a {type(x).__name__}, expected an array or a tensor")
    return x

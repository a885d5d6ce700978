"""What the registry says of its mechanisms."""

from __future__ import annotations

from dataclasses import dataclass

from . import _core


@dataclass(frozen=True)
class Parameter:
    """A parameter of a mechanism. `default` is spelled as on the command line; None: there is none."""

    name: str
    kind: str  # integer, number, boolean, choice, list or levels
    default: str | None
    required: bool
    least: float | None
    most: float | None
    above_least: bool  # `least` itself is excluded
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor that a mechanism reads beside q, k and v. Axes are sizes by name (B Hq Hk N M D Dv), numbers or "*"."""

    name: str
    shape: tuple[str, ...]
    required: bool
    differentiable: bool  # attend's gradient reaches it
    help: str


@dataclass(frozen=True)
class Mechanism:
    """One mechanism: where it comes from, what it does, what it takes. str() gives a page of text."""

    name: str
    title: str
    paper: str  # "arXiv:2502.13189"
    arxiv: str  # "2502.13189", or ""
    year: int
    stage: str
    training: str  # none, continued or required
    causal: str  # either: as the call says; implied; refused
    square: bool  # as many queries as keys
    on_models: bool
    not_on_models: str  # why not
    idea: str
    equations: str
    cost: str
    params: tuple[Parameter, ...]
    extras: tuple[ExtraTensor, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}", f"  {self.paper}, {self.year}", "", self.idea, "", self.equations, ""]
        for p in self.params:
            default = "required" if p.required else f"default {p.default}" if p.default is not None else "no default"
            lines.append(f"  {p.name} ({default}): {p.help}")
        for e in self.extras:
            lines.append(f"  tensor {e.name} [{', '.join(e.shape)}]{' (required)' if e.required else ''}: {e.help}")
        lines += ["", f"cost: {self.cost}", f"training: {self.training}; causal: {self.causal}"]
        return "\n".join(lines)


def mechanisms() -> list[str]:
    """The names of all mechanisms, in the order of the documentation."""
    return _core.mechanisms()


def describe(name: str) -> Mechanism:
    """What the registry says of a mechanism: paper, idea, equations, parameters with defaults, extra tensors.

    Raises heed.Error for an unknown name, with the nearest known ones.
    """
    d = _core.describe(name)
    d["params"] = tuple(Parameter(**{**p, "choices": tuple(p["choices"])}) for p in d["params"])
    d["extras"] = tuple(ExtraTensor(**{**e, "shape": tuple(e["shape"])}) for e in d["extras"])
    return Mechanism(**d)

"""Plans: who attends to whom, and what it costs, without attending."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from ._call import for_core, take_apart


@dataclass(frozen=True)
class Picture:
    """A picture of one head's plan: queries downwards, keys to the right. Notebooks show it."""

    share: np.ndarray  # [height, width]: pairs attended / pairs of dense attention; NaN where that has none
    cell: int  # tokens along a pixel's side
    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png


class Plan:
    """What a mechanism decided for some queries and keys; made by ``heed.plan``."""

    def __init__(self, core: _core.Plan) -> None:
        self._core = core

    @property
    def call(self) -> str:
        """The mechanism with its parameters."""
        return self._core.call

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hq, N, M)."""
        return self._core.shape

    @property
    def causal(self) -> bool:
        return self._core.causal

    @property
    def pairs(self) -> int:
        """(query, key) pairs that would be attended, summed over heads. A pooled column counts once."""
        return self._core.pairs

    @property
    def density(self) -> float:
        """pairs / those of dense attention with the same causality."""
        return self._core.density

    @property
    def flops(self) -> int:
        """Of both products over the pairs attended: 2 · (D + Dv) · pairs."""
        return self._core.flops

    @property
    def tiles(self) -> int:
        """Rectangles of rows and columns that the plan consists of."""
        return self._core.tiles

    def to_mask(self) -> np.ndarray:
        """bool [B, Hq, N, M]: whether a query's output holds a key's value, through whatever column (a pooled one
        stands for all its tokens). Read from the plan's own tiles. Raises heed.Error above 2^28 elements."""
        return self._core.mask().view(np.bool_)

    def plot(self, path: str | Path | None = None, *, batch: int = 0, head: int = 0, max_pixels: int = 1024) -> Picture:
        """A true picture of one query head at any length; written as a PNG file where `path` is given."""
        share, cell = self._core.picture(batch, head, max_pixels)
        picture = Picture(share, cell, self._core.png(batch, head, max_pixels))
        if path is not None:
            Path(path).write_bytes(picture.png)
        return picture

    def __repr__(self) -> str:
        _, heads, n, m = self.shape
        return f"<heed.Plan {self.call}: {n} queries, {m} keys, {heads} heads, density {self.density:.4g}>"


def plan(
    q: Any,
    k: Any,
    mechanism: str = "dense",
    *,
    v: Any = None,
    causal: bool = False,
    scale: float | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Plan:
    """The plan of ``heed.attend(q, k, v, mechanism, ...)``: what would be attended, counted without attending.

    Arguments are those of ``heed.attend``. Values decide nothing in most mechanisms, so v may be left out; k then
    stands in for it (dma reads it). The plan keeps q and k alive.

    >>> heed.plan(q, k, "hip", budget=512).density
    """
    call, extra = take_apart(mechanism, options)
    return Plan(
        _core.Plan(
            for_core("q", q), for_core("k", k), None if v is None else for_core("v", v),
            {n: for_core(n, x) for n, x in extra.items()}, call, causal, scale, dtype,
        )
    )  # fmt: skip

"""Masks that callers hand over as tensors, said as heed says them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._core import Error


class Visible(NamedTuple):
    """What a mask says: causal (queries are the last N of M positions), keys hidden by padding, or any bias."""

    causal: bool
    extra: dict[str, torch.Tensor]


def causal_mask(n: int, m: int) -> torch.Tensor:
    """bool [N, M]: query t stands at M - N + t and sees the keys up to there."""
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def read_mask(mask: torch.Tensor, batch: int, n: int, m: int) -> Visible:
    """Reads a mask [B|1, Hq|1, N, M], bool (True: seen) or added to the scores.

    Causal ones and padding are recognised; everything else becomes a bias, which only dense attention takes.
    """
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if mask.requires_grad or not bool(((mask == 0) | hidden).all()):
            return Visible(False, {"bias": mask})
        mask = ~hidden
    seen = mask
    if seen.shape[1] != 1 and bool((seen == seen[:, :1]).all()):
        seen = seen[:, :1]
    if seen.shape[1] == 1:
        rows = seen[:, 0]
        for causal in (False, True) if n <= m else (False,):
            allowed = causal_mask(n, m) if causal else torch.ones(n, m, dtype=torch.bool)
            # The last query sees every key that padding does not hide.
            keys = rows[:, -1]
            if bool((rows == (allowed & keys[:, None])).all()):
                if bool(keys.all()):
                    return Visible(causal, {})
                return Visible(causal, {"key_mask": keys.to(torch.uint8).expand(batch, m)})
    return Visible(False, {"bias": torch.where(mask, 0.0, float("-inf"))})


def require(mechanism: str, visible: Visible, causal_kind: str, names: set[str], argument: str) -> None:
    """Raises heed.Error where a mechanism cannot honour what a mask says."""
    for name in visible.extra:
        if name not in names:
            what = "padding" if name == "key_mask" else "a mask that is neither causal nor padding"
            raise Error(f"{argument}: holds {what}, expected what {mechanism} takes: it decides itself who meets whom")
    if causal_kind == "implied" and not visible.causal:
        raise Error(f"{argument}: not causal, expected a causal call: {mechanism} is causal by definition")
    if causal_kind == "refused" and visible.causal:
        raise Error(f"{argument}: causal, expected a call that is not: {mechanism} is never causal")

"""FlexAttention's masks and score functions, carried out by heed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._attention import attend
from ._core import Error

#: mask_mod(b, h, q_idx, kv_idx) and score_mod(score, b, h, q_idx, kv_idx), as torch's flex_attention takes them.
MaskMod = Callable[..., Any]
ScoreMod = Callable[..., Any]

MOST_BIAS = 2**28  # elements


class BlockMask:
    """A mask in blocks, made once and used in many calls: ``heed.flex_attention(..., block_mask=mask)``.

    blocks: i32 [B or 1, H or 1, ceil(N / block), ceil(M / block)]; 0: nothing is seen, 1: everything, n: cells[n - 2].
    cells: u8 [*, block, block], each kept once.
    """

    def __init__(self, blocks: torch.Tensor, cells: torch.Tensor, n: int, m: int, block: int) -> None:
        self.blocks, self.cells, self.n, self.m, self.block = blocks, cells, n, m, block

    def __repr__(self) -> str:
        empty = float((self.blocks == 0).float().mean())
        size = f"{self.n} x {self.m}, block {self.block}"
        return f"<heed BlockMask {size}: {100 * empty:.1f} % empty, {len(self.cells)} cells>"


def create_block_mask(
    mask_mod: MaskMod, B: int | None, H: int | None, N: int, M: int, *, block: int = 128
) -> BlockMask:
    """The blocks of a mask function; B or H is None where it looks at no batch or head.

    mask_mod(b, h, q_idx, kv_idx) is called through torch.vmap, as torch's create_block_mask does, for one strip of
    `block` queries at a time: nothing N×M is made.
    """
    for name, size in (("N", N), ("M", M), ("block", block)):
        if size < 1:
            raise Error(f"{name} = {size}, expected >= 1")
    cells = _Cells(block)
    mod = _over_axes(mask_mod, 0)
    b, h, kv = torch.arange(B or 1), torch.arange(H or 1), torch.arange(M)
    strips = []
    for first in range(0, N, block):
        rows = torch.arange(first, min(N, first + block))
        seen = torch.as_tensor(mod(b, h, rows, kv))
        if seen.dtype != torch.bool:
            raise Error(f"mask_mod: gives {seen.dtype}, expected bool")
        strips.append(cells.states(seen.expand(len(b), len(h), len(rows), M)))
    blocks = torch.stack(strips, dim=2)
    return BlockMask(_collapsed(blocks), cells.tensor(), N, M, block)


class _Cells:
    """The distinct masks of partial blocks: those along a diagonal are alike, and are kept once."""

    def __init__(self, block: int) -> None:
        self.block, self.index, self.list = block, {}, []

    def states(self, seen: torch.Tensor) -> torch.Tensor:
        """seen [B, H, rows, M] of one strip, as states [B, H, blocks of M]."""
        rows, m = seen.shape[2:]
        cut = torch.nn.functional.pad(seen, (0, -m % self.block)).unflatten(3, (-1, self.block)).transpose(2, 3)
        number = cut.sum((3, 4))
        wide = torch.full((cut.shape[2],), self.block)
        wide[-1] = m - (cut.shape[2] - 1) * self.block
        states = (number == rows * wide).int()
        for place in ((number > 0) & (states == 0)).nonzero().tolist():
            states[tuple(place)] = self.number_of(cut[tuple(place)])
        return states

    def number_of(self, cell: torch.Tensor) -> int:
        key = (cell.shape[0], cell.numpy().tobytes())
        if key not in self.index:
            self.index[key] = len(self.list) + 2
            full = torch.zeros(self.block, self.block, dtype=torch.uint8)
            full[: cell.shape[0]] = cell
            self.list.append(full)
        return self.index[key]

    def tensor(self) -> torch.Tensor:
        return torch.stack(self.list) if self.list else torch.zeros(0, self.block, self.block, dtype=torch.uint8)


def _over_axes(mod: Callable[..., Any], scores: int) -> Callable[..., Any]:
    """mod on index vectors b, h, q_idx, kv_idx (before them `scores` arguments [B, H, N, M]), giving [B, H, N, M]."""
    for axis in (3, 2, 1, 0):
        indices = tuple(0 if i == axis else None for i in range(4))
        mod = torch.vmap(mod, in_dims=(0,) * scores + indices, out_dims=0)
    return mod


def _collapsed(blocks: torch.Tensor) -> torch.Tensor:
    """One batch and head where all are alike: heads then share tiles."""
    for axis in (0, 1):
        first = blocks.narrow(axis, 0, 1)
        if blocks.shape[axis] > 1 and torch.equal(blocks, first.expand_as(blocks)):
            blocks = first
    return blocks.contiguous()


def _from_torch(mask: Any, n: int, m: int) -> BlockMask:
    """torch's BlockMask: full blocks are taken as they are listed, partial ones are filled in by its mask_mod."""
    block, other = mask.BLOCK_SIZE
    if block != other:
        raise Error(f"block_mask: BLOCK_SIZE = {mask.BLOCK_SIZE}, expected as many queries as keys")
    rows, columns = -(-n // block), -(-m // block)
    if mask.kv_indices.shape[2] < rows or mask.kv_indices.shape[3] < columns:
        raise Error(f"block_mask: {mask.shape[-2:]}, expected one over {n} queries and {m} keys")
    cells = _Cells(block)
    mod = _over_axes(mask.mask_mod, 0)
    batches, heads = mask.kv_num_blocks.shape[:2]
    blocks = torch.zeros(batches, heads, rows, columns, dtype=torch.int32)
    for b, h, i in torch.cartesian_prod(torch.arange(batches), torch.arange(heads), torch.arange(rows)).tolist():
        if mask.full_kv_num_blocks is not None:
            count = int(mask.full_kv_num_blocks[b, h, i])
            blocks[b, h, i, mask.full_kv_indices[b, h, i, :count].long()] = 1
        q = torch.arange(i * block, min(n, (i + 1) * block))
        for j in mask.kv_indices[b, h, i, : int(mask.kv_num_blocks[b, h, i])].tolist():
            kv = torch.arange(j * block, min(m, (j + 1) * block))
            seen = torch.as_tensor(mod(torch.tensor([b]), torch.tensor([h]), q, kv)).expand(1, 1, len(q), len(kv))
            blocks[b, h, i, j] = cells.states(seen)[0, 0, 0]
    return BlockMask(_collapsed(blocks), cells.tensor(), n, m, block)


def _read_score_mod(mod: ScoreMod, q: torch.Tensor, m: int, scale: float) -> tuple[float, torch.Tensor | None]:
    """(scale, bias) where mod(s, ...) is a·s + bias(b, h, i, j) with one a; else heed.Error."""
    batches, heads, n = q.shape[:3]
    if batches * heads * n * m > MOST_BIAS:
        raise Error(f"score_mod: a bias of {batches}·{heads}·{n}·{m} elements, expected at most {MOST_BIAS}")
    over, b, h, kv = _over_axes(mod, 1), torch.arange(batches), torch.arange(heads), torch.arange(m)
    factor, strips = None, []
    for first in range(0, n, 128):
        rows = torch.arange(first, min(n, first + 128))
        at = [over(torch.full((batches, heads, len(rows), m), s), b, h, rows, kv) for s in (0.0, 1.0, -3.0)]
        bias = at[0]
        seen = bias.isfinite()
        slope, far = (at[1] - bias)[seen], (at[2] - bias)[seen]
        if factor is None and slope.numel() > 0:
            factor = float(slope[0])
        close = dict(rtol=1e-4, atol=1e-4 * max(1.0, float(bias[seen].abs().max()) if slope.numel() else 1.0))
        if slope.numel() > 0 and not (
            torch.allclose(slope, torch.full_like(slope, factor), **close) and torch.allclose(far, -3 * slope, **close)
        ):
            raise Error("score_mod: not of the form a·score + bias(b, h, q_idx, kv_idx), expected one that is")
        strips.append(bias)
    bias = _collapsed(torch.cat(strips, dim=2))
    return scale * (1.0 if factor is None else factor), bias if bool((bias != 0).any()) else None


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: ScoreMod | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    *,
    mask_mod: MaskMod | None = None,
) -> Any:
    """torch.nn.attention.flex_attention, by heed ("Flex Attention", arXiv:2412.05496), with gradients.

    Args:
        query, key, value: [B, Hq, N, D], [B, Hk, M, D], [B, Hk, M, Dv]; Hq > Hk asks for enable_gqa.
        score_mod: score_mod(score, b, h, q_idx, kv_idx) of the form a·score + bias(b, h, q_idx, kv_idx), bias -inf
            where a pair is hidden: ALiBi, relative positions, scales. The bias becomes a tensor (of at most 2^28
            elements); gradients do not go into what the function holds.
        block_mask: torch's BlockMask, or what ``heed.create_block_mask`` made.
        scale: D ** -0.5 by default.
        return_lse: return (o, lse), lse [B, Hq, N] f32, natural log.
        mask_mod: a predicate mask_mod(b, h, q_idx, kv_idx) instead of a block_mask.

    Returns o [B, Hq, N, Dv] in the query's dtype; a query that sees nothing gives zeros. There is no implied
    causality: the query's index is its place in `query`.

    Raises heed.Error for a score_mod of another form, and as ``heed.attend`` does.
    """
    batches, heads, n, d = query.shape
    m = key.shape[2]
    if heads != key.shape[1] and not enable_gqa:
        raise Error(f"key: {key.shape[1]} heads, expected {heads}, or enable_gqa = True")
    if mask_mod is not None and block_mask is not None:
        raise Error("mask_mod: given, expected none beside block_mask")
    scale = d**-0.5 if scale is None else scale
    bias = None
    if score_mod is not None:
        scale, bias = _read_score_mod(score_mod, query, m, scale)
    if mask_mod is not None:
        mask = create_block_mask(mask_mod, batches, heads, n, m)
    elif block_mask is None or isinstance(block_mask, BlockMask):
        mask = block_mask
    else:
        mask = _from_torch(block_mask, n, m)
    if mask is None:
        o, lse = attend(query, key, value, "dense", scale=scale, bias=bias, return_lse=True)
    else:
        if (mask.n, mask.m) != (n, m):
            raise Error(f"block_mask: {mask.n} queries and {mask.m} keys, expected {n} and {m}")
        o, lse = attend(
            query, key, value, "flex", scale=scale, block=mask.block, blocks=mask.blocks, bias=bias,
            cells=mask.cells if len(mask.cells) else None, return_lse=True,
        )  # fmt: skip
    o = o.to(query.dtype)
    return (o, lse) if return_lse else o

"""Attention and its masks from their definitions, in f64: what the tests compare with. Nothing here uses heed."""

import numpy as np


def attention(q, k, v, sees, scale=None, bias=None):
    """(o, lse) of NumPy arrays; sees [.., N, M], bool. A query that sees nothing gives zeros and -inf."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = np.einsum("bhnd,bhmd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias
    s = np.where(sees, s, -np.inf)
    most = s.max(-1, keepdims=True)
    most = np.where(np.isfinite(most), most, 0)
    p = np.exp(s - most)
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + most)[..., 0]
    return np.einsum("bhnm,bhmd->bhnd", p / np.where(total == 0, 1, total), v), lse


def torch_attention(q, k, v, sees, scale=None, bias=None):
    """The same in f64 torch operators, for gradients."""

    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = q.double() @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias.double()
    p = s.masked_fill(~sees, -1e300).softmax(-1) * sees
    return p @ v


def positions(n, m):
    """(position of every query, of every key): queries are the last n of m."""
    return np.arange(m - n, m)[:, None], np.arange(m)[None, :]


def causal(n, m):
    i, j = positions(n, m)
    return j <= i


def streaming(n, m, sink, window):
    i, j = positions(n, m)
    return (j <= i) & ((j < sink) | (j > i - window))


def power(n, m, block, window_blocks, sink_blocks):
    i, j = positions(n, m)
    distance = i // block - j // block
    far = (distance > 0) & ((distance & np.maximum(distance - 1, 0)) == 0)
    return (j <= i) & ((distance < window_blocks) | far | (j // block < sink_blocks))


def moba(q, k, block, top_k):
    """[B, Hq, N, M]: own block, and the top_k - 1 past blocks whose mean key the query likes best."""
    b, hq, n, _ = q.shape
    m, group = k.shape[2], hq // k.shape[1]
    keys = np.repeat(np.asarray(k, np.float64), group, 1)
    i, j = positions(n, m)
    sees = np.broadcast_to((j <= i) & (j // block == i // block), (b, hq, n, m)).copy()
    for at in np.ndindex(b, hq, n):
        own = (m - n + at[2]) // block
        scores = [keys[at[0], at[1], c * block : (c + 1) * block].mean(0) @ q[at] for c in range(own)]
        for c in sorted(range(own), key=lambda c: (-scores[c], c))[: top_k - 1]:
            sees[at][c * block : (c + 1) * block] = True
    return sees


def worst(got, want):
    """The largest difference, in units of the largest number wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape}, expected {want.shape}"
    assert np.isfinite(got).all()
    return np.abs(got - want).max() / np.abs(want).max()

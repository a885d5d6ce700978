"""FlexAttention's masks and score functions, against torch's flex_attention and a naive f64 softmax."""

import naive
import numpy as np
import pytest

import heed

torch = pytest.importorskip("torch")
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention  # noqa: E402

B, HQ, HK, N, D = 2, 4, 2, 300, 16
DOCUMENTS = torch.tensor([[0] * 70 + [1] * 130 + [2] * 100, [0] * 299 + [1]])
NOISE = torch.rand(N, N, generator=torch.Generator().manual_seed(2))


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return (q >= kv) & (q - kv < 90)


def document(b, h, q, kv):
    return (q >= kv) & (DOCUMENTS[b, q] == DOCUMENTS[b, kv])


def prefix(b, h, q, kv):
    return (q >= kv) | (kv < 50 + 10 * h)


def image(b, h, q, kv):
    return ((q // 20 - kv // 20).abs() <= 3) & ((q % 20 - kv % 20).abs() <= 2)


def scattered(b, h, q, kv):
    return (NOISE[q, kv] < 0.3) & (q != 17)  # query 17 sees nothing


MASKS = [causal, window, document, prefix, image, scattered]


def inputs(hk=HK):
    random = torch.Generator().manual_seed(9)
    return [torch.randn(B, h, N, D, generator=random).requires_grad_() for h in (HQ, hk, hk)]


def check(o, want, of):
    assert naive.worst(o.detach(), want.detach()) < 2e-5
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(4))
    for a, b in zip(
        torch.autograd.grad(o, of, do), torch.autograd.grad(want, of, do.to(want.dtype), retain_graph=True)
    ):
        assert naive.worst(a, b) < 1e-4


@pytest.mark.parametrize("mask_mod", MASKS, ids=lambda m: m.__name__)
def test_masks_as_functions_and_in_blocks(mask_mod):
    q, k, v = inputs()
    sees = create_mask(mask_mod, B, HQ, N, N, device="cpu")
    want = naive.torch_attention(q, k, v, sees)
    check(heed.flex_attention(q, k, v, mask_mod=mask_mod, enable_gqa=True), want, (q, k, v))
    blocks = create_block_mask(mask_mod, B, HQ, N, N, device="cpu")
    check(heed.flex_attention(q, k, v, block_mask=blocks, enable_gqa=True), want, (q, k, v))
    theirs = flex_attention(q.detach(), k.detach(), v.detach(), block_mask=blocks, enable_gqa=True)
    assert naive.worst(want.detach(), theirs) < 2e-5


def test_a_mask_made_once_is_small_and_skips_what_is_empty():
    mask = heed.create_block_mask(causal, None, None, 4096, 4096)
    assert mask.blocks.shape == (1, 1, 32, 32)
    assert len(mask.cells) == 1  # all blocks on the diagonal are alike
    x = torch.randn(1, 2, 4096, 8)
    plan = heed.plan(x, x, "flex", block=mask.block, blocks=mask.blocks, cells=mask.cells)
    assert plan.pairs == 2 * 4096 * 4097 // 2
    assert naive.worst(heed.flex_attention(x, x, x, block_mask=mask), heed.attend(x, x, x, causal=True)) < 2e-5


def test_more_keys_than_queries_and_other_block_sizes():
    random = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, 2, n, 8, generator=random).requires_grad_() for n in (70, 130))
    for block in (1, 16, 50, 64, 256):
        mask = heed.create_block_mask(lambda b, h, q, kv: kv <= q + 60, None, None, 70, 130, block=block)
        want = naive.torch_attention(q, k, k, torch.from_numpy(naive.causal(70, 130)))
        check(heed.flex_attention(q, k, k, block_mask=mask), want, (q, k))


def alibi(score, b, h, q, kv):
    return score + (kv - q) * 0.5 ** (h + 1)


def relative(score, b, h, q, kv):
    return score + 0.2 * torch.sin((q - kv).float())


def scaled(score, b, h, q, kv):
    return score * 1.7


def hidden(score, b, h, q, kv):
    return torch.where(q >= kv, score, -float("inf"))


@pytest.mark.parametrize("score_mod", [alibi, relative, scaled, hidden], ids=lambda m: m.__name__)
def test_score_functions(score_mod):
    q, k, v = inputs(HQ)
    blocks = create_block_mask(causal, None, None, N, N, device="cpu")
    for mask in (None, blocks):
        want = flex_attention(q.detach(), k.detach(), v.detach(), score_mod=score_mod, block_mask=mask)
        got = heed.flex_attention(q, k, v, score_mod=score_mod, block_mask=mask)
        assert naive.worst(got.detach(), want) < 2e-5
    assert torch.autograd.grad(got.sum(), q)[0].isfinite().all()


def test_lse_and_dtypes():
    q, k, v = inputs()
    o, lse = heed.flex_attention(q, k, v, mask_mod=scattered, enable_gqa=True, return_lse=True)
    sees = create_mask(scattered, B, HQ, N, N, device="cpu").numpy()
    want, want_lse = naive.attention(*(x.detach().numpy() for x in (q, k, v)), sees)
    assert (lse[:, :, 17] == -np.inf).all() and (o[:, :, 17] == 0).all()
    kept = np.arange(N) != 17
    assert np.abs(lse.detach().numpy()[:, :, kept] - want_lse[:, :, kept]).max() < 1e-4
    halves = heed.flex_attention(*(x.bfloat16() for x in (q, k, v)), mask_mod=causal, enable_gqa=True)
    assert halves.dtype == torch.bfloat16


def test_refusals():
    q, k, v = (x.detach() for x in inputs())
    with pytest.raises(heed.Error, match=r"score_mod: not of the form a·score \+ bias"):
        heed.flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s), enable_gqa=True)
    with pytest.raises(heed.Error, match="mask_mod: gives torch.float32, expected bool"):
        heed.flex_attention(q, k, v, mask_mod=lambda b, h, i, j: (i - j) * 1.0, enable_gqa=True)
    with pytest.raises(heed.Error, match="key: 2 heads, expected 4, or enable_gqa = True"):
        heed.flex_attention(q, k, v)
    with pytest.raises(heed.Error, match="block_mask: 5 queries and 300 keys, expected 300 and 300"):
        heed.flex_attention(q, k, v, block_mask=heed.create_block_mask(causal, None, None, 5, N), enable_gqa=True)

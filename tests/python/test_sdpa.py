"""torch's scaled_dot_product_attention answered by heed."""

import naive
import pytest

import heed

torch = pytest.importorskip("torch")
from torch.nn.functional import scaled_dot_product_attention as attention  # noqa: E402


def inputs(*shapes):
    random = torch.Generator().manual_seed(5)
    return [torch.randn(*s, generator=random).requires_grad_() for s in shapes]


def both(*args, mechanism="dense", tolerance=2e-5, **kwargs):
    """heed's answer, checked against torch's."""
    want = attention(*args, **kwargs)
    with heed.sdpa(mechanism):
        got = attention(*args, **kwargs)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert naive.worst(got.detach().float(), want.detach().float()) < tolerance
    return got, want


def test_dense_answers_as_torch_does():
    x = inputs((2, 4, 33, 16), (2, 4, 33, 16), (2, 4, 33, 24))
    both(*x)
    both(*x, is_causal=True)
    both(*x, scale=0.3)
    both(*(y.squeeze(0) for y in inputs((1, 4, 9, 8), (1, 4, 12, 8), (1, 4, 12, 8))))
    both(*inputs((3, 2, 4, 9, 8), (3, 2, 4, 12, 8), (3, 2, 4, 12, 8)))
    both(*inputs((2, 6, 9, 8), (2, 2, 12, 8), (2, 2, 12, 8)), enable_gqa=True)
    both(
        *inputs((1, 2, 9, 8), (1, 2, 12, 8), (1, 2, 12, 8)), is_causal=True
    )  # torch's diagonal begins at the first key
    both(*(y.bfloat16() for y in x), tolerance=2e-2)


def test_masks_mean_what_they_mean_to_torch():
    x = inputs((2, 4, 20, 8), (2, 4, 31, 8), (2, 4, 31, 8))
    padded = torch.ones(2, 1, 1, 31, dtype=torch.bool)
    padded[1, :, :, :4] = False
    causal = torch.from_numpy(naive.causal(20, 31))
    odd = torch.rand(20, 31) < 0.5
    odd[:, 0] = True
    for mask in (causal, padded, causal & padded, odd, torch.randn(4, 20, 31), torch.randn(2, 1, 20, 31)):
        got, want = both(*x, attn_mask=mask)
    learned = torch.randn(1, 4, 20, 31).requires_grad_()
    got, want = both(*x, attn_mask=learned)
    do = torch.randn(got.shape)
    for a, b in zip(torch.autograd.grad(got, (*x, learned), do), torch.autograd.grad(want, (*x, learned), do)):
        assert naive.worst(a, b) < 1e-4


def test_a_mechanism_takes_the_place_of_causal_attention():
    q, k, v = inputs((1, 4, 65, 16), (1, 4, 65, 16), (1, 4, 65, 16))
    want = heed.attend(q, k, v, "streaming", sink=2, window=9)
    masked = torch.from_numpy(naive.causal(65, 65))
    with heed.sdpa("streaming", sink=2, window=9):
        assert torch.equal(attention(q, k, v, is_causal=True), want)
        assert torch.equal(attention(q, k, v, attn_mask=masked), want)
        assert torch.equal(attention(q[:, :, -1:], k, v), want[:, :, -1:])  # a step of decoding
        attention(q, k, v, is_causal=True).sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().max() > 0
    assert not torch.equal(attention(q, k, v, is_causal=True), want)  # outside torch answers again


def test_a_whole_layer_of_torch():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 19, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(19)
    want = layer(x, src_mask=mask, is_causal=True)
    with heed.sdpa("dense"):
        assert naive.worst(layer(x, src_mask=mask, is_causal=True).detach(), want.detach()) < 2e-5


def test_compiled_functions_are_answered_too():
    (x,) = inputs((1, 2, 40, 8))

    def layer(x):
        return attention(x * 2, x, x, is_causal=True) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with heed.sdpa("streaming", sink=0, window=5):
        near = layer(x)
        assert torch.equal(compiled(x), near)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6) and not torch.allclose(near, layer(x), atol=1e-2)


@pytest.mark.parametrize(
    "mechanism, kwargs, line",
    [
        ("dense", dict(dropout_p=0.1), "dropout_p = 0.1, expected 0"),
        ("streaming", dict(), "is_causal: not causal, expected a causal call: streaming is causal by definition"),
        ("moba", dict(attn_mask=torch.eye(20, dtype=torch.bool)), "attn_mask: holds a mask that is neither"),
        ("vmoba:chunk=4", dict(is_causal=True), "is_causal: causal, expected a call that is not"),
        (
            "dense",
            dict(attn_mask=torch.ones(20, 20, dtype=torch.bool), is_causal=True),
            "is_causal = True, expected False",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(mechanism, kwargs, line):
    x = torch.randn(1, 2, 20, 8)
    with heed.sdpa(mechanism), pytest.raises(heed.Error) as error:
        attention(x, x, x, **kwargs)
    assert str(error.value).startswith(line)


def test_unknown_mechanisms_are_refused_at_once():
    with pytest.raises(heed.Error, match="streming"):
        heed.sdpa("streming")

"""heed on torch tensors: gradients, the operators, torch.compile."""

import naive
import numpy as np
import pytest

import heed

torch = pytest.importorskip("torch")

SIZES = [(1, 1, 1, 2, 2, 8, 8), (2, 4, 2, 65, 65, 16, 24), (1, 6, 2, 33, 130, 40, 8)]


def inputs(b, hq, hk, n, m, d, dv, dtype=torch.float32, seed=3):
    random = torch.Generator().manual_seed(seed)
    shapes = (b, hq, n, d), (b, hk, m, d), (b, hk, m, dv)
    return [torch.randn(*s, generator=random).to(dtype).requires_grad_() for s in shapes]


def gradients(o, do, of):
    return torch.autograd.grad(o, of, do.to(o.dtype))


def check(got, want):
    for name, a, b in zip(("dq", "dk", "dv", "dextra"), got, want):
        assert naive.worst(a, b) < 1e-4, name


# Each with what it sees, from its definition.
CALLS = {
    "dense": lambda q, k, n, m: np.ones((n, m), bool),
    "streaming:sink=3,window=17": lambda q, k, n, m: naive.streaming(n, m, 3, 17),
    "power:block=8,window_blocks=2,sink_blocks=1": lambda q, k, n, m: naive.power(n, m, 8, 2, 1),
    "moba:block=16,top_k=3": lambda q, k, n, m: naive.moba(q, k, 16, 3),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_those_of_a_naive_masked_softmax(call, sizes):
    q, k, v = inputs(*sizes)
    sees = torch.from_numpy(np.array(CALLS[call](q.detach().numpy(), k.detach().numpy(), *sizes[3:5])))
    o, lse = heed.attend(q, k, v, call, return_lse=True)
    want = naive.torch_attention(q, k, v, sees)
    assert o.dtype == lse.dtype == torch.float32 and not lse.requires_grad
    assert naive.worst(o.detach(), want.detach()) < 2e-5
    do = torch.randn(o.shape)
    check(gradients(o, do, (q, k, v)), gradients(want, do, (q, k, v)))


# What they select, their plans say; what they compute of it is checked here.
PLANNED = [
    ("hip", dict(budget=32, query_block=16, window=32, sink=4), False),
    ("s2", dict(block=16, local_blocks=2, stride_blocks=2), False),
    ("proxy-attn", dict(min_budget=32, block=16, mass=0.6), False),
    ("vmoba", dict(chunk=16, mass=0.3), False),
    ("natten", dict(grid=(9, 11), kernel_size=(3, 5)), False),
    ("natten", dict(kernel_size=21), True),
]


@pytest.mark.parametrize("name, params, causal", PLANNED, ids=str)
def test_gradients_of_what_plans_select(name, params, causal):
    q, k, v = inputs(1, 4, 2, 99, 99, 16, 24)
    sees = torch.from_numpy(heed.plan(q, k, name, causal=causal, **params).to_mask())
    assert 0.02 < sees.float().mean() < 0.9
    o = heed.attend(q, k, v, name, causal=causal, **params)
    want = naive.torch_attention(q, k, v, sees)
    assert naive.worst(o.detach(), want.detach()) < 2e-5
    do = torch.randn(o.shape)
    check(gradients(o, do, (q, k, v)), gradients(want, do, (q, k, v)))


def test_gradients_of_extra_tensors():
    q, k, v = inputs(2, 4, 2, 20, 31, 8, 8)
    bias = torch.randn(1, 4, 20, 31).requires_grad_()
    do = torch.randn(2, 4, 20, 8)
    o = heed.attend(q, k, v, causal=True, bias=bias)
    want = naive.torch_attention(q, k, v, torch.from_numpy(naive.causal(20, 31)), bias=bias)
    check(gradients(o, do, (q, k, v, bias)), gradients(want, do, (q, k, v, bias)))

    q, k, v = inputs(1, 2, 1, 20, 20, 8, 8)
    more = [torch.randn(1, 1, 5, 8).requires_grad_() for _ in range(2)]
    o = heed.attend(q, k, v, "natten", kernel_size=7, k_extra=more[0], v_extra=more[1])
    near = torch.from_numpy(heed.plan(q, k, "natten", kernel_size=7).to_mask())
    sees = torch.cat([near, torch.ones(1, 2, 20, 5, dtype=torch.bool)], -1)
    want = naive.torch_attention(q, torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2), sees)
    do = torch.randn(1, 2, 20, 8)
    for a, b in zip(gradients(o, do, (q, *more)), gradients(want, do, (q, *more))):
        assert naive.worst(a, b) < 1e-4


def test_bf16_in_and_bf16_gradients():
    q, k, v = inputs(1, 2, 1, 70, 70, 32, 32, torch.bfloat16)
    o = heed.attend(q, k, v, causal=True)
    want = naive.torch_attention(q, k, v, torch.from_numpy(naive.causal(70, 70)))
    assert o.dtype == torch.float32 and naive.worst(o.detach(), want.detach()) < 2e-2
    do = torch.randn(o.shape)
    for a, b in zip(gradients(o, do, (q, k, v)), gradients(want, do, (q, k, v))):
        assert a.dtype == torch.bfloat16
        assert naive.worst(a.float(), b.float()) < 2e-2


def test_views_are_read_where_they_are():
    tokens_first = torch.randn(2, 50, 4, 16)
    q = tokens_first.transpose(1, 2)
    k = torch.randn(2, 1, 50, 16).expand(2, 4, 50, 16)
    assert torch.equal(heed.attend(q, k, k), heed.attend(q.contiguous(), k.contiguous(), k.contiguous()))


def test_attend_backward_without_autograd():
    q, k, v = (x.detach() for x in inputs(1, 4, 2, 33, 33, 8, 8))
    bias = torch.randn(1, 1, 33, 33)
    o, lse = heed.attend(q, k, v, causal=True, bias=bias, return_lse=True)
    do = torch.randn(o.shape)
    got = heed.attend_backward(do, q, k, v, o, lse, causal=True, bias=bias)
    want = heed.attend_backward(
        do.numpy(), q.numpy(), k.numpy(), v.numpy(), o.numpy(), lse.numpy(), causal=True, bias=bias.numpy()
    )
    for name in ("dq", "dk", "dv"):
        assert (getattr(got, name).numpy() == getattr(want, name)).all()
    assert (got.extra["bias"].numpy() == want.extra["bias"]).all()


def test_errors_are_heeds():
    q, k, v = inputs(1, 2, 1, 20, 20, 8, 8)
    for options, line in [
        (dict(mechanism="moba", top_k=0), "moba: top_k = 0, expected >= 1"),
        (dict(bias=np.zeros((1, 1, 20, 20), np.float32)), "bias: a ndarray, expected a torch tensor, as q is"),
        (dict(bias=torch.zeros(1, 1, 20, 19)), "bias: shape = [1, 1, 20, 19], expected [B|1, Hq|1, N, M]"),
        (dict(return_extra=True), "return_extra = True, expected False for torch tensors"),
    ]:
        with pytest.raises(heed.Error) as error:
            heed.attend(q, k, v, **options)
        assert str(error.value) == line
    with pytest.raises(heed.Error, match="q: dtype = Double"):
        heed.attend(q.double(), k, v)


def test_a_build_without_operators_reads_tensors_all_the_same(monkeypatch):
    from heed import _torch

    q, k, v = inputs(1, 2, 1, 20, 20, 8, 8)
    want, want_lse = heed.attend(q, k, v, "moba", block=8, top_k=2, return_lse=True)
    monkeypatch.setattr(_torch, "_missing", "no operators")
    with pytest.raises(heed.Error, match="gradients: no operators"):
        heed.attend(q, k, v)
    with torch.no_grad():
        o, lse = heed.attend(q, k, v, "moba", block=8, top_k=2, return_lse=True)
    assert torch.equal(o, want) and torch.equal(lse, want_lse)


def test_plans_of_tensors():
    q, k, _ = inputs(1, 4, 2, 65, 65, 16, 16, torch.bfloat16)
    plan = heed.plan(q, k, "moba", block=16, top_k=3)
    assert (plan.to_mask() == naive.moba(q.detach().float().numpy(), k.detach().float().numpy(), 16, 3)).all()


def test_no_second_derivatives():
    q, k, v = inputs(1, 1, 1, 5, 5, 4, 4)
    (dq,) = torch.autograd.grad(heed.attend(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="heed::attend_backward"):
        dq.sum().backward()


OPERATOR_CALLS = [
    ("dense", [], [], True),
    ("moba:block=16,top_k=2", [], [], False),
    ("dense", [torch.randn(1, 4, 40, 40).requires_grad_()], ["bias"], True),
    ("dense", [(torch.arange(40) // 15).int().repeat(2, 1)], ["doc"], True),
    ("davit:kind=channel,grid=5x8", [], [], False),
]


@pytest.mark.parametrize("call, extra, names, causal", OPERATOR_CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck(call, extra, names, causal):
    heed.attend(*(torch.ones(1, 1, 1, 1),) * 3)  # loads the operators
    q, k, v = inputs(2, 4, 4, 40, 40, 8, 8)
    torch.library.opcheck(torch.ops.heed.attend, (q, k, v, extra, call, names, causal))
    q, k, v, *extra = (x.detach() for x in (q, k, v, *extra))
    o, lse = torch.ops.heed.attend(q, k, v, extra, call, names, causal)
    torch.library.opcheck(
        torch.ops.heed.attend_backward, (torch.randn(o.shape), q, k, v, extra, o, lse, call, names, causal)
    )


def test_compiled_functions_keep_results_and_gradients():
    q, k, v = inputs(1, 4, 2, 65, 65, 16, 16)

    def layer(q, k, v):
        return heed.attend(q * 2, k, v, "moba", block=16, top_k=3).sin()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (65, 40):
        short = [x[:, :, :n] for x in (q, k, v)]
        want, got = layer(*short), compiled(*short)
        assert torch.equal(want, got)
        do = torch.randn(got.shape)
        for a, b in zip(gradients(got, do, (q, k, v)), gradients(want, do, (q, k, v))):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_inductor_compiles_around_it():
    q, k, v = inputs(1, 2, 1, 33, 33, 8, 8)
    layer = torch.compile(lambda q, k, v: heed.attend(q + 1, k, v, causal=True) * 2, fullgraph=True)
    assert torch.allclose(layer(q, k, v), heed.attend(q + 1, k, v, causal=True) * 2, atol=1e-6)

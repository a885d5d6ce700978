"""heed on NumPy arrays, without torch."""

import subprocess
import sys

import naive
import numpy as np
import pytest

import heed

SIZES = [(1, 1, 1, 1, 1, 8, 8), (2, 4, 2, 65, 65, 16, 24), (1, 6, 2, 33, 130, 40, 8)]


def inputs(normals, b, hq, hk, n, m, d, dv):
    return normals(b, hq, n, d), normals(b, hk, m, d), normals(b, hk, m, dv)


@pytest.mark.parametrize("sizes", SIZES)
def test_attend_equals_its_definition(normals, sizes):
    q, k, v = inputs(normals, *sizes)
    n, m = sizes[3:5]
    calls = [
        (dict(), np.ones((n, m), bool)),
        (dict(causal=True), naive.causal(n, m)),
        (dict(mechanism="streaming", sink=3, window=17), naive.streaming(n, m, 3, 17)),
        (dict(mechanism="power:block=8", window_blocks=2, sink_blocks=1), naive.power(n, m, 8, 2, 1)),
        (dict(mechanism="moba", block=16, top_k=3), naive.moba(q, k, 16, 3)),
    ]
    for options, sees in calls:
        o, lse = heed.attend(q, k, v, return_lse=True, **options)
        want, want_lse = naive.attention(q, k, v, sees)
        assert o.dtype == lse.dtype == np.float32
        assert naive.worst(o, want) < 2e-5, options
        assert np.abs(lse - want_lse).max() < 2e-5 * max(1, np.abs(want_lse).max()), options


def test_any_strides_and_read_only_arrays(normals):
    tokens_first = normals(2, 50, 4, 16)
    q = tokens_first.transpose(0, 2, 1, 3)[:, :, ::-1, ::2]
    k = q[:, :2].copy()
    k.flags.writeable = False
    want, _ = naive.attention(q, k, k, np.ones((50, 50), bool))
    assert naive.worst(heed.attend(q, k, k), want) < 2e-5
    halves = q.astype(np.float16)
    assert naive.worst(heed.attend(halves, k, k), want) < 2e-3


def test_rows_without_keys_give_zeros(normals):
    q, k, v = inputs(normals, 1, 2, 2, 9, 9, 8, 8)
    mask = np.ones((1, 9), np.uint8)
    mask[0, :3] = 0
    o, lse = heed.attend(q, k, v, causal=True, key_mask=mask, return_lse=True)
    assert (o[:, :, :3] == 0).all() and (lse[:, :, :3] == -np.inf).all()
    assert np.isfinite(lse[:, :, 3:]).all()


def test_bf16_arithmetic_rounds_first(normals):
    q, k, v = inputs(normals, 1, 2, 1, 40, 40, 32, 32)
    rounded = heed.attend(q, k, v, dtype="bf16")
    want, _ = naive.attention(q, k, v, np.ones((40, 40), bool))
    assert 1e-4 < naive.worst(rounded, want) < 2e-2


def test_gradients_are_finite_differences(normals):
    q, k, v = inputs(normals, 1, 4, 2, 13, 21, 8, 6)
    bias = normals(1, 1, 13, 21)
    do = normals(1, 4, 13, 6)
    sees = naive.causal(13, 21)
    o, lse = heed.attend(q, k, v, causal=True, bias=bias, return_lse=True)
    got = heed.attend_backward(do, q, k, v, o, lse, causal=True, bias=bias)
    assert set(got.extra) == {"bias"}

    def loss(q, k, v, bias):
        return (naive.attention(q, k, v, sees, bias=bias)[0] * do).sum()

    rng, step = np.random.default_rng(1), 1e-6
    arrays = [x.astype(np.float64) for x in (q, k, v, bias)]
    for i, gradient in enumerate([got.dq, got.dk, got.dv, got.extra["bias"]]):
        assert gradient.shape == arrays[i].shape
        for _ in range(12):
            at = tuple(rng.integers(0, extent) for extent in gradient.shape)
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[i][at] += sign * step
                ends.append(loss(*moved))
            assert abs((ends[0] - ends[1]) / (2 * step) - gradient[at]) < 1e-4 * np.abs(gradient).max()


def test_the_same_bits_for_any_number_of_threads(normals):
    q, k, v = inputs(normals, 1, 4, 2, 300, 300, 32, 32)
    before = heed.threads()
    try:
        results = []
        for n in (1, 2, 3):
            heed.set_threads(n)
            results.append(heed.attend(q, k, v, "moba", block=32, top_k=3))
    finally:
        heed.set_threads(before)
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_extra_outputs(normals):
    q, k, v = inputs(normals, 1, 2, 2, 30, 30, 8, 8)
    lengths = np.array([4, 12, 10, 4], np.int32)
    o, extra = heed.attend(q, k, v, "blockrank", seg_lens=lengths, return_extra=True)
    assert o.shape == q.shape and extra["scores"].shape == (1, 2)


def test_no_lse_where_no_softmax_stands_behind_a_row(normals):
    x = normals(1, 2, 16, 8)
    assert heed.attend(x, x, x, "davit", kind="channel", grid=(4, 4), return_lse=True)[1] is None


ERRORS = [
    (dict(mechanism="moba", top_k=0), "moba: top_k = 0, expected >= 1"),
    (dict(mechanism="moba", tie="upper"), "moba: tie = upper, expected one of lower, higher"),
    (dict(mechanism="mobo"), "mobo"),
    (dict(dtype="f16"), "dtype = f16, expected f32 or bf16"),
    (dict(bais=np.zeros((1, 1, 20, 20), np.float32)), "dense: tensor bais is not one it reads"),
    (dict(bias=np.zeros((1, 1, 20, 19), np.float32)), "bias: shape = [1, 1, 20, 19]"),
    (dict(mechanism="moba", block=object()), "block: a object, expected a number"),
    (dict(mechanism="davit", causal=True, grid=(4, 5)), "davit: causal = true, expected false"),
]


@pytest.mark.parametrize("options, line", ERRORS, ids=lambda x: x[:20] if isinstance(x, str) else "")
def test_errors_name_the_argument(normals, options, line):
    x = normals(1, 2, 20, 8)
    with pytest.raises(heed.Error) as error:
        heed.attend(x, x, x, **options)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


def test_errors_of_tensors(normals):
    x = normals(1, 2, 20, 8)
    for bad, line in [
        (x.astype(np.float64), "q: elements of 64 bits of kind float, expected f32, f16, bf16, i32 or u8"),
        (x[0], "q: shape = [2, 20, 8], expected [B, Hq, N, D]"),
        ([[1.0]], "q: a list, expected an array or a tensor"),
        (np.full_like(x, np.nan), "q: holds nan, expected finite values"),
    ]:
        with pytest.raises(heed.Error, match="^" + line.replace("[", r"\[").replace("]", r"\]")):
            heed.attend(bad, x, x)


def test_the_registry_speaks(normals):
    names = heed.mechanisms()
    assert names[0] == "dense" and len(set(names)) == len(names)
    for name in names:
        about = heed.describe(name)
        assert about.name == name and about.arxiv and about.paper == "arXiv:" + about.arxiv
        assert about.title in str(about) and all(p.name in str(about) for p in about.params)
    moba = heed.describe("moba")
    assert {p.name: p.default for p in moba.params}["top_k"] == "3"
    assert moba.params[0].least == 1 and moba.params[0].kind == "integer"
    assert {e.name: e.differentiable for e in heed.describe("dense").extras} == {
        "bias": True,
        "doc": False,
        "key_mask": False,
    }
    with pytest.raises(heed.Error, match="hop"):
        heed.describe("hop")


def test_plans_count_and_draw_what_attend_does(normals, tmp_path):
    q, k = normals(2, 4, 70, 16), normals(2, 2, 100, 16)
    for mechanism, options, sees in [
        ("dense", dict(causal=True), naive.causal(70, 100)),
        ("streaming", dict(sink=3, window=17), naive.streaming(70, 100, 3, 17)),
        ("moba", dict(block=16, top_k=3), naive.moba(q, k, 16, 3)),
    ]:
        plan = heed.plan(q, k, mechanism, **options)
        sees = np.broadcast_to(sees, (2, 4, 70, 100))
        assert plan.shape == (2, 4, 70, 100)
        assert (plan.to_mask() == sees).all(), mechanism
        assert plan.pairs == sees.sum()
        assert plan.density == sees.sum() / (8 * naive.causal(70, 100).sum())
        assert plan.flops == 4 * 16 * plan.pairs
        assert plan.tiles > 0
        assert mechanism in repr(plan)
        picture = plan.plot(tmp_path / "plan.png", head=3)
        assert (tmp_path / "plan.png").read_bytes() == picture._repr_png_()
        assert picture.png.startswith(b"\x89PNG") and picture.cell == 1
        assert (np.nan_to_num(picture.share) == sees[0, 3]).all()


def test_pooled_columns_stand_for_their_tokens(normals):
    q, k = normals(1, 1, 64, 8), normals(1, 1, 64, 8)
    plan = heed.plan(q, k, "llsa", block=4, top_k=2, levels=1)
    # Nothing is left out altogether: what is not chosen is seen through means.
    assert plan.to_mask().all() and plan.density < 1


def test_masks_that_nobody_would_look_at_are_refused(normals):
    x = normals(1, 1, 20_000, 4)
    plan = heed.plan(x, x, "streaming")
    with pytest.raises(heed.Error, match=r"to_mask: shape = \[1, 1, 20000, 20000\].*plot\(\)"):
        plan.to_mask()
    assert plan.plot(max_pixels=100).share.shape == (100, 100)


def test_torch_is_not_needed(normals):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, heed\n"
        "x = np.ones((1, 1, 4, 8), np.float32)\n"
        "assert heed.attend(x, x, x).shape == x.shape\n"
        "print('alone')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "alone\n"

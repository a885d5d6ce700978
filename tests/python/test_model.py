"""Real models in Python: what `heed run` and `heed compare` say, Model says too."""

import math

import conftest
import numpy as np
import pytest

import heed


@pytest.fixture(scope="module")
def model():
    return heed.Model(conftest.cached("smollm2-135m-instruct-q4_1.gguf"))


@pytest.fixture(scope="module")
def text():
    return conftest.cached("bible-kjv.txt").read_text()[:20_000]


def test_what_it_is(model):
    assert model.info["architecture"] == "llama" and model.info["layers"] == 30
    ids = model.tokenize("In the beginning", bos=True)
    assert model.detokenize(ids[-3:]).endswith("beginning")


def test_generate(model):
    options = dict(n=12, layers="0,5-9", sink=64)
    written = model.generate("What is the capital of France?", n=12)
    assert "Paris" in written
    assert "".join(model.stream("What is the capital of France?", n=12)) == written
    # All blocks of so short a prompt are chosen.
    assert model.generate("What is the capital of France?", "moba", block=64, top_k=8, **options) == written
    drawn = heed.Sampling(temperature=1.5, seed=3)
    assert model.generate("Tell me", n=12, sampling=drawn) == model.generate("Tell me", n=12, sampling=drawn)


def test_sessions(model):
    ids = model.tokenize("The quick brown fox jumps over the lazy", bos=True)
    session = model.session(context=64)
    logits = session.prefill(ids)
    assert logits.shape == (model.info["vocabulary"],) and session.size == len(ids)
    assert model.detokenize([int(logits.argmax())]).strip() == "dog"
    session.truncate(len(ids) - 1)
    assert int(session.decode(ids[-1]).argmax()) == int(logits.argmax())
    nll = model.session(context=64).score(ids)
    assert nll.shape == (len(ids) - 1,) and (nll > 0).all()


def test_compare_and_perplexity_agree(model, text):
    rows = model.compare(text, ["dense", "streaming:sink=4,window=64"], tokens=300)
    assert [r.mechanism for r in rows] == ["dense", "streaming:sink=4,window=64"]
    dense, near = rows
    assert dense.density == 1 and near.density < 0.5 and near.nll > dense.nll
    assert math.isclose(dense.ppl, model.perplexity(text, tokens=300), rel_tol=1e-6)
    assert math.isclose(near.ppl, model.perplexity(text, "streaming", tokens=300, sink=4, window=64), rel_tol=1e-6)


def test_refusals(model, text, tmp_path):
    with pytest.raises(heed.Error, match="phase = never, expected prefill, decode or both"):
        model.session(phase="never")
    with pytest.raises(heed.Error, match="layers"):
        model.session("moba", layers="99")
    with pytest.raises(heed.Error, match="vmoba"):
        model.session("vmoba")
    with pytest.raises(heed.Error, match="text: .* tokens, expected at least tokens = 99999"):
        model.compare(text, tokens=99999)
    with pytest.raises(heed.Error, match="tasks: speed"):
        model.compare(text, tokens=20, tasks=["speed"])
    with pytest.raises(heed.Error, match="bias: a tensor, expected none"):
        model.session(bias=np.zeros(3))
    (tmp_path / "no.gguf").write_bytes(b"GGUFnot")
    with pytest.raises(heed.Error):
        heed.Model(tmp_path / "no.gguf")

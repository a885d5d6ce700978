"""heed inside Hugging Face transformers: a Llama with random weights."""

import naive
import pytest

import heed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def registered():
    return heed.transformers.register()


def llama(implementation, **config):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config}))
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def tokens(n, batch=2):
    return torch.randint(0, 97, (batch, n), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_are_those_of_eager_attention():
    ids = tokens(70)
    results = []
    for implementation in ("eager", "heed"):
        model = llama(implementation)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        results.append((out.logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (want, want_grads), (got, got_grads) = results
    assert (got - want).abs().max() < 1e-4
    for name, gradient in want_grads.items():
        assert naive.worst(got_grads[name], gradient) < 1e-4, name


def test_padding_and_decoding():
    ids, mask = tokens(40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0  # padded on the left
    want = llama("eager")(input_ids=ids, attention_mask=mask).logits
    got = llama("heed")(input_ids=ids, attention_mask=mask).logits
    assert (got - want)[mask.bool()].abs().max() < 1e-4
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(llama("heed").generate(ids, **options), llama("eager").generate(ids, **options))
    static = llama("heed").generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, llama("eager").generate(ids, **options))


def test_moba_is_dense_where_it_chooses_all_and_is_not_elsewhere():
    ids = tokens(80)
    want = llama("eager")(input_ids=ids).logits
    heed.transformers.register("moba", block=16, top_k=5)
    assert (llama("heed:moba")(input_ids=ids).logits - want).abs().max() < 1e-4
    heed.transformers.register("moba", block=16, top_k=2)
    sparse = llama("heed:moba")
    out = sparse(input_ids=ids, labels=ids)
    assert (out.logits[:, :32] - want[:, :32]).abs().max() < 1e-4  # two blocks are all there is
    assert (out.logits - want).abs().max() > 1e-2
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in sparse.parameters())
    # A model read at once and step by step.
    assert torch.equal(
        sparse.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0),
        sparse.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False),
    )


def test_mechanisms_of_whole_prompts_leave_decoding_to_dense_attention():
    ids = tokens(64)
    assert heed.describe("psa").square
    heed.transformers.register("psa", query_block=32, block=8, fold=8, ratios="1:1")
    # Every block is met in full: psa is dense attention, and a step has no rule of its own.
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(llama("heed:psa").generate(ids, **options), llama("eager").generate(ids, **options))


def test_layers_with_windows_of_their_own_keep_them():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=11, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    ids = tokens(50)
    results = {}
    for implementation in ("eager", "heed", "heed:power"):
        model.set_attn_implementation(implementation)
        results[implementation] = model(input_ids=ids).logits
    assert (results["heed"] - results["eager"]).abs().max() < 1e-4
    assert (results["heed:power"] - results["eager"]).abs().max() < 1e-4


def test_names_and_refusals(registered):
    assert registered[0] == "heed" and "heed:moba" in registered and "heed:vmoba" not in registered
    assert heed.transformers.register("streaming", name="heed:near", window=8) == ["heed:near"]
    with pytest.raises(heed.Error, match="mechanism = vmoba, expected one for language models"):
        heed.transformers.register("vmoba")
    with pytest.raises(heed.Error, match="name = heed:flash-moba, expected one without flash"):
        heed.transformers.register("flash-moba")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :7] = 0
    with pytest.raises(heed.Error, match="attention_mask: holds padding, expected what power takes"):
        llama("heed:power")(input_ids=tokens(40), attention_mask=mask)
    with pytest.raises(heed.Error, match="dropout = 0.1"):
        llama("heed", attention_dropout=0.1).train()(input_ids=tokens(10))

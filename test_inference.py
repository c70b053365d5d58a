"""Tests of inference.py: it draws what model.py draws, in every variant.

python -m pytest test_inference.py
"""

import math
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import inference as inference_file
from inference import (
    Inference,
    SparseToken,
    evenly_spaced,
    linear,
    sparse_pays,
    sparse_tokens,
)
from model import Cache, FeedForward, ModelConfig, ParallelEncoderDecoder, apply_mask
from test_model import SMALL, all_logits, build, every_variant, random_ids

torch.set_num_threads(1)


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Weights are read as those of small models are, and as those of large ones."""
    if request.param == "large":
        monkeypatch.setattr(inference_file, "LARGE", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return request.param


@every_variant
def test_logits_and_text_are_those_of_the_model(fields, size):
    model, text = build(fields), random_ids(10, 16)
    fast, expected = Inference(model), all_logits(model, text)
    with torch.inference_mode():
        for batch in (1, 10):
            cache = Cache(batch, 16)
            for start, end in [(0, 5), *((t, t + 1) for t in range(5, 16))] * 2:
                if start == 0:
                    cache.length = 0  # as when the window moves: old entries are still there
                logits = fast(text[:batch, start:end], cache=cache).logits[:, 0]
                wanted = expected[:batch, end - 1]
                torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    how = dict(max_new_tokens=30, temperature=0)  # twice past the block
    expected = model.generate(text[:, :5], **how, use_cache=False)
    for batch in (1, 10):
        assert torch.equal(fast.generate(text[:batch, :5], **how), expected[:batch])


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile makes the graph, checked as it was asked for, and runs it as it is."""

    def compile(*args, options, **how):
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        return torch_compile(*args, backend="eager", options=guards, **how)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)


@torch.inference_mode()
def compare_compiled(fields, batch, lengths=(5, 7, 5)):
    """Logits of one and the same Inference for several texts, past the block of 16."""
    model = build(fields)
    fast, how = Inference(model, compile=True), dict(max_new_tokens=30, temperature=0)
    for length in lengths:
        text = random_ids(batch, length)
        assert torch.equal(fast.generate(text, **how), model.generate(text, **how))
    assert {shape[1] for shape in fast.compiled} == {1, 9}  # a step; a window that has moved
    text, cache = random_ids(batch, 16), Cache(batch, 16)
    expected = all_logits(model, text)
    for start, end in [(0, 5), *((t, t + 1) for t in range(5, 16))]:
        logits = fast(text[:, start:end], cache=cache).logits[:, 0]
        torch.testing.assert_close(logits, expected[:, end - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_expert": 8, "lateral": True, "cross_first": True},
        {"n_expert": 8, "router_input": "embedding", "expert_site": "output", "bias": True},
        {"arch": "decoder_only", "n_expert": 8, "next_position": "add"},
        {"decoder_self_attention": False, "next_position": "subtract", "n_cross_head": 4},
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_compiled_draws_are_those_of_the_model(fields, large, eager_backend, monkeypatch):
    """Two models and sizes in one process, as the code is not checked to fit."""
    if large:
        monkeypatch.setattr(inference_file, "LARGE", 1)
    compare_compiled(fields, batch=1)
    compare_compiled(fields | {"n_layer": 1}, batch=3)


def test_what_is_compiled_is_compared_with_the_model(monkeypatch):
    monkeypatch.setattr(Tensor, "index_copy_", lambda self, *_: self)
    with pytest.raises(ValueError, match="other logits than model.py, by "):
        Inference(build(), compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_by_inductor():
    compare_compiled({"n_layer": 1, "n_expert": 8}, batch=2, lengths=(5,))


def test_one_prompt_for_all_rows_and_draws_of_their_own():
    model, prompt = build({"n_expert": 8}), random_ids(1, 5).expand(4, -1)
    texts = [
        read.generate(prompt, 40, generator=torch.Generator().manual_seed(0))
        for read in (Inference(model), model)
    ]
    assert torch.equal(*texts) and not torch.equal(texts[0][0], texts[0][1])


def test_the_mode_of_the_model_stays():
    model = build({"dropout": 0.5, "n_expert": 8}).train()
    fast, text = Inference(model), random_ids(2, 4)
    assert model.training
    assert torch.equal(
        fast.generate(text, 9, temperature=0), model.generate(text, 9, temperature=0)
    )
    assert model.training


def test_a_changed_model_is_refused(monkeypatch):
    model = build()
    forward = type(model.decoder[0]).forward
    with monkeypatch.context() as patch:
        patch.setattr(
            type(model.decoder[0]),
            "forward",
            lambda self, x, e, *rest: forward(self, x, e if e is None else e.flip(-1), *rest),
        )
        with pytest.raises(ValueError, match="other logits than model.py, by "):
            Inference(model)
    del model.decoder[0].ln_memory
    with pytest.raises(ValueError, match="inference.py does not fit model.py: .*ln_memory"):
        Inference(model)


@torch.no_grad()
def test_the_cache_is_allocated_once():
    fast, cache = Inference(build({"n_expert": 8, "n_layer": 1})), Cache(3, 16)
    fast(random_ids(3, 7), cache)
    places = [buffer.data_ptr() for buffer, *_ in cache.buffers.values()]
    shapes = sorted(tuple(buffer.shape) for buffer, *_ in cache.buffers.values())
    assert shapes == [(3, 16, 24)] * 2 + [(3, 16, 48)] * 3  # of two routers, 16 + 8; 24 + 24
    while cache.length < 16:
        fast(random_ids(3, 1), cache)
    assert [buffer.data_ptr() for buffer, *_ in cache.buffers.values()] == places


# ---- experts that are off ---------------------------------------------------


SPARSE = [(SparseToken, 1)] + [(lambda ff: partial(sparse_tokens, ff), n) for n in (1, 10, 32)]
every_sparse_way = pytest.mark.parametrize("sparse, tokens", SPARSE)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@every_sparse_way
@torch.no_grad()
def test_sparse_experts_equal_the_masked_product(sparse, tokens, share, bias):
    torch.manual_seed(0)
    ff = FeedForward(ModelConfig(**SMALL, n_expert=16, bias=bias)).eval()
    for p in ff.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    for _ in range(20):
        x, on = torch.randn(tokens, 24), (torch.rand(tokens, 16) < share).float()
        dense = ff.w2(apply_mask(F.gelu(ff.w1(x))[None], on[None]))[0]
        torch.testing.assert_close(sparse(ff)(x, on), dense, atol=1e-5, rtol=1e-5)


@every_sparse_way
@torch.no_grad()
def test_the_weights_of_experts_that_are_off_are_not_read(sparse, tokens):
    ff = FeedForward(ModelConfig(**SMALL, n_expert=4)).eval()
    x, on = torch.randn(tokens, 24), torch.tensor([[1.0, 0, 0, 1]]).expand(tokens, 4)
    expected = sparse(ff)(x, on)
    ff.w1.weight[24:72] = ff.w2.weight[:, 24:72] = math.nan  # experts 1 and 2
    assert torch.equal(sparse(ff)(x, on), expected)


@torch.no_grad()
def test_sparse_experts_under_autocast():
    """They are as close to float32 as the masked product is."""
    torch.manual_seed(0)
    ff = FeedForward(ModelConfig(**SMALL, n_expert=4)).eval()
    for tokens in (1, 10):
        x, on = torch.randn(tokens, 24), (torch.rand(tokens, 4) < 0.5).float()
        dense = lambda x=x, on=on: ff.w2(apply_mask(F.gelu(ff.w1(x))[None], on[None]))[0]  # noqa: E731
        expected = dense()
        with torch.autocast("cpu", torch.bfloat16):
            ways = [partial(sparse_tokens, ff)] + [SparseToken(ff)] * (tokens == 1)
            found, of_dense = [way(x, on) for way in ways], dense()
        allowed = 2 * (of_dense - expected).abs().max()
        assert allowed > 0 and all((y - expected).abs().max() < allowed for y in found)


def test_when_sparse_pays():
    """By hand: for one token n (1.15 w + 240,000) < 16 w, with w = 294,912 weights an expert where
    C = 768; for 512 tokens 512 n 1.15 w + 16 * 9e6 < 512 * 16 w."""
    sizes = [dict(n_embd=64, n_head=1), dict(n_embd=768), dict(n_embd=768, expert_site="output")]
    small, large, output = (FeedForward(ModelConfig(**fields, n_expert=16)) for fields in sizes)

    def pays(ff, tokens):
        masks = [(torch.arange(16) < n).float().expand(tokens, 16) for n in range(17)]
        return [n for n, r in enumerate(masks) if sparse_pays(ff, r)]

    assert not pays(small, 1) and pays(small, 512) == [0] and not pays(output, 512)
    assert pays(large, 1) == list(range(9)) and pays(large, 512) == list(range(14))
    assert pays(large, 10) == [0]


@pytest.mark.parametrize(
    "fields", [{}, {"arch": "decoder_only", "bias": True}, {"router_input": "embedding"}]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_sparse_experts_equal_the_dense_ones(fields, batch, size, monkeypatch):
    model, text = build({"n_expert": 16, **fields}), random_ids(batch, 16)
    assert 0.1 < model.expert_masks(text).mean() < 0.9
    how, shapes = dict(max_new_tokens=20, temperature=0), []
    monkeypatch.setattr(inference_file, "sparse_pays", lambda *_: False)
    fast = Inference(model)
    with torch.no_grad():
        dense, logits = fast.generate(text, **how), fast(text, Cache(batch, 16)).logits
    monkeypatch.setattr(inference_file, "sparse_pays", lambda *_: True)
    for owner, name in ((SparseToken, "__call__"), (inference_file, "sparse_tokens")):
        spied = getattr(owner, name)
        spy = lambda it, x, r, f=spied: shapes.append(tuple(x.shape)) or f(it, x, r)  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    fast = Inference(model)
    shapes.clear()
    blocks = model.config.n_layer * (2 if model.config.arch == "parallel" else 1)
    with torch.no_grad():
        sparse_logits = fast(text, Cache(batch, 16)).logits
    torch.testing.assert_close(sparse_logits, logits, atol=1e-5, rtol=1e-5)
    assert len(shapes) == (blocks if size == "large" else 0)  # in prefill, each block
    assert torch.equal(fast.generate(text, **how), dense)
    if size == "large":  # and in decoding
        assert shapes.count((batch, 24)) > 10 * blocks
    else:
        assert not shapes


@torch.no_grad()
def test_large_matrices_and_bfloat16():
    """Where one row is multiplied piece by piece, and experts are skipped by the rule."""
    sizes = dict(block_size=8, vocab_size=1003, n_layer=1, n_head=6, n_embd=768, n_expert=16)
    torch.manual_seed(0)
    model, text = ParallelEncoderDecoder(ModelConfig(**sizes)).eval(), torch.tensor([[1, 2, 3]])
    for layer in (*model.encoder, *model.decoder):
        layer.ff.router.shift.copy_(torch.arange(16) % 4 * math.pi / 3)  # half of the experts on
    cached, whole = Inference(model), model.generate(text, 8, temperature=0, use_cache=False)
    assert torch.equal(cached.generate(text, 8, temperature=0), whole)
    model.bfloat16()
    fast, cache = Inference(model), Cache(1, 8)
    fast(text, cache)
    logits = fast(torch.tensor([[4]]), cache).logits
    expected = model(torch.tensor([[1, 2, 3, 4]])).logits
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.05)


@torch.no_grad()
def test_one_row_by_pieces_of_a_large_weight(monkeypatch):
    called, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: called.append(1) or bmm(*args))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for rows, out, pieces in ((1, 512, True), (2, 512, False), (1, 511, True), (1, 2, False)):
        x, weight, bias = torch.randn(rows, 384), torch.randn(out, 384), torch.randn(out)
        called.clear()
        for b in (None, bias):
            expected = F.linear(x, weight, b)
            torch.testing.assert_close(linear(x, weight, b), expected, atol=1e-4, rtol=1e-5)
        assert bool(called) == pieces


def test_evenly_spaced_by_hand():
    assert list(evenly_spaced([])) == []
    assert list(evenly_spaced([5])) == [slice(5, 6, 1)]
    assert list(evenly_spaced([0, 2, 5, 6])) == [slice(0, 3, 2), slice(5, 7, 1)]
    assert list(evenly_spaced([1, 4, 7, 8])) == [slice(1, 8, 3), slice(8, 9, 1)]

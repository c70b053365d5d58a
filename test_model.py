"""Tests of model.py: against torch.nn's layers, GPT-2, a second writing of the equations, numbers.

python -m pytest test_model.py
"""

import ast
import copy
import inspect
import itertools
import math
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import model as model_file
from model import (
    Cache,
    Context,
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    KeyValueProjection,
    Mask,
    ModelConfig,
    ParallelEncoderDecoder,
    apply_mask,
    attend,
    compile_step,
    entropy,
    mask_statistics,
    round_mask,
    sample_token,
    window_start,
)

torch.set_num_threads(1)  # the tensors are small, and the cores may be shared
SMALL = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=24)
LEAN = dict(lateral=True, decoder_self_attention=False, shared_kv=True)
NEW = dict(position_embedding="rotary", qk_norm=True, token_shift=True)
GPT = dict(arch="decoder_only")

# Every value of every field beside the defaults, and what is worth trying together.
VARIANTS = [
    {},
    GPT,
    {"bias": True},
    {"position_embedding": "rotary"},
    {"qk_norm": True},
    {"token_shift": True},
    {"lateral": True},
    {"decoder_self_attention": False},
    {"shared_kv": True},
    LEAN,
    LEAN | NEW | {"bias": True, "n_layer": 3},
    NEW | {"shared_kv": True, "n_head": 4, "n_layer": 1},
    NEW | {"lateral": True, "bias": True},
    GPT | NEW | {"bias": True},
]
# The same for learned dropout: every value of every field of its table.
EXPERTS = [
    {"n_expert": 8, "l1_weight": 0.1, "entropy_weight": 0.05},
    GPT | {"n_expert": 96, "l1_weight": 0.1, "l1_norm": "squared"},
    {"n_expert": 1, "bias": True},
    {"n_expert": 24, "expert_site": "output", "entropy_weight": 0.5},
    {"n_expert": 8, "router_input": "encoder", "l1_weight": 0.1},
    {"n_expert": 8, "router_n_head": 2, "router_head_dim": 5},
    {"n_expert": 8, "shift_init": math.pi},
    {"n_expert": 8, "expert_site": "output", "bias": True, "lateral": True},
    LEAN | {"n_expert": 8, "l1_weight": 0.1},
    LEAN | {"n_expert": 12, "expert_site": "output"},
    LEAN | NEW | {"n_expert": 8, "router_input": "encoder", "shift_init": 1.5, "n_layer": 3},
    LEAN | {"n_expert": 8, "router_input": "encoder", "expert_site": "output", "bias": True},
    NEW | {"n_expert": 8, "router_input": "encoder", "shared_kv": True},
    GPT | NEW | {"n_expert": 8, "router_input": "encoder", "router_n_head": 4},
    GPT | {"n_expert": 8, "expert_site": "output"},
]
VARIANTS += EXPERTS


def variant_name(fields):
    return " ".join(f"{name}={value}" for name, value in fields.items()) or "default"


every_expert_variant = pytest.mark.parametrize("fields", EXPERTS, ids=variant_name)
every_variant = pytest.mark.parametrize("fields", VARIANTS, ids=variant_name)


def build(fields=None, seed=0, spread=True):
    """A small model; `spread` makes its weights large, so that an error in one of them shows."""
    torch.manual_seed(seed)
    model = ParallelEncoderDecoder(ModelConfig(**{**SMALL, **(fields or {})}))
    if spread:
        with torch.no_grad():
            for name, p in model.named_parameters():
                of_router = name.endswith(
                    ("router.shift", "router.query_key_value.weight", "token_shift")
                )
                p.add_(torch.randn_like(p) * (1.0 if of_router else 0.2))
    return model.eval()


def random_ids(*shape, seed=1, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx):
    """The logits of every position."""
    return model(idx, idx).logits


# ---- independent references -------------------------------------------------


def copy_linear(target, source, rows=slice(None)):
    target.weight[rows] = source.weight
    if source.bias is not None:
        target.bias[rows] = source.bias


def copy_attention(target, attention, key_value):
    """Our Attention, and what makes its keys and values, into torch.nn.MultiheadAttention."""
    parts = [attention.query, key_value.linear]
    target.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    target.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    copy_linear(target.out_proj, attention.proj)


def reference_layer(cls):
    return cls(24, 2, 96, dropout=0.0, activation=F.gelu, norm_first=True, batch_first=True).eval()


def spread_weights(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module.eval()


@torch.no_grad()
def test_encoder_layer_equals_torch():
    ours = spread_weights(EncoderLayer(ModelConfig(**SMALL, bias=True)))
    theirs = reference_layer(torch.nn.TransformerEncoderLayer)
    copy_attention(theirs.self_attn, ours.attention, ours.attention.key_value)
    for a, b in [("norm1", "ln_attention"), ("norm2", "ln_ff")]:
        copy_linear(getattr(theirs, a), getattr(ours, b))
    copy_linear(theirs.linear1, ours.ff.w1)
    copy_linear(theirs.linear2, ours.ff.w2)
    x = torch.randn(3, 16, 24)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    y, _ = ours(x, None, Context())
    torch.testing.assert_close(y, theirs(x, src_mask=mask), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoder_layer_equals_torch():
    config = ModelConfig(**SMALL, bias=True)
    ours, key_value = spread_weights(DecoderLayer(config)), KeyValueProjection(config)
    theirs = reference_layer(torch.nn.TransformerDecoderLayer)
    copy_attention(theirs.self_attn, ours.attention, ours.attention.key_value)
    copy_attention(theirs.multihead_attn, ours.cross_attention, key_value)
    for a, b in [("norm1", "ln_attention"), ("norm2", "ln_cross"), ("norm3", "ln_ff")]:
        copy_linear(getattr(theirs, a), getattr(ours, b))
    copy_linear(theirs.linear1, ours.ff.w1)
    copy_linear(theirs.linear2, ours.ff.w2)
    d, memory = torch.randn(3, 16, 24), torch.randn(3, 16, 24)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    expected = theirs(d, memory, tgt_mask=mask, memory_mask=mask)
    y, _ = ours(d, memory, key_value(memory, Context()), Context())
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoder_only_equals_gpt2():
    transformers = pytest.importorskip("transformers")
    ours = build({"arch": "decoder_only", "bias": True})
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=31, n_positions=16, n_embd=24, n_layer=2, n_head=2,
            activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).eval()  # fmt: skip
    gpt = theirs.transformer
    gpt.wte.weight.copy_(ours.tok_emb.weight)
    gpt.wpe.weight.copy_(ours.pos_emb.weight)
    copy_linear(gpt.ln_f, ours.ln_out)
    for block, layer in zip(gpt.h, ours.decoder, strict=True):
        copy_linear(block.ln_1, layer.ln_attention)
        copy_linear(block.ln_2, layer.ln_ff)
        attention = layer.attention
        for conv, *modules in (  # GPT-2's Conv1D holds its weight transposed
            (block.attn.c_attn, attention.query, attention.key_value.linear),
            (block.attn.c_proj, attention.proj),
            (block.mlp.c_fc, layer.ff.w1),
            (block.mlp.c_proj, layer.ff.w2),
        ):
            conv.weight.copy_(torch.cat([module.weight for module in modules]).T)
            conv.bias.copy_(torch.cat([module.bias for module in modules]))
    idx = random_ids(3, 16)
    torch.testing.assert_close(all_logits(ours, idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def reference_forward(model, idx):
    """The equations once more, in einsums over the parameters' names; (B, T, V)."""
    w, c = dict(model.named_parameters()), model.config
    T, parallel = idx.size(1), c.arch == "parallel"

    def linear(name, x):
        y = torch.einsum("btc,dc->btd", x, w[f"{name}.weight"])
        return y + w[f"{name}.bias"] if c.bias else y

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return x + w[f"{name}.bias"] if c.bias else x

    def attention(q, k, v, n_head, placed):
        """Each (B, T, D); `placed`: qk_norm and rotary positions apply."""
        q, k, v = (t.reshape(*t.shape[:2], n_head, -1) for t in (q, k, v))
        if placed and c.qk_norm:
            eps = torch.finfo(q.dtype).eps
            q, k = (t / (t.pow(2).mean(-1, keepdim=True) + eps).sqrt() for t in (q, k))
        if placed and c.position_embedding == "rotary":  # a pair is a complex number
            half = q.size(-1) // 2
            turns = [t * 10_000 ** (-i / half) for t in range(T) for i in range(half)]
            turns = torch.tensor(turns, dtype=q.dtype).view(T, 1, half)
            turn = torch.polar(torch.ones_like(turns), turns)
            q, k = (torch.complex(t[..., :half], t[..., half:]) * turn for t in (q, k))
            q, k = (torch.cat([t.real, t.imag], -1) for t in (q, k))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
        future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)

    def attend_to(name, x, key_value, memory):
        q, (k, v) = linear(f"{name}.query", x), linear(f"{key_value}.linear", memory).chunk(2, -1)
        return linear(f"{name}.proj", attention(q, k, v, c.n_head, placed=True))

    def self_attend(layer, x):
        x_norm = norm(f"{layer}.ln_attention", x)
        key_value, memory = f"{layer}.attention.key_value", x_norm
        if layer.startswith("encoder") and c.shared_kv:  # of this state, e_{l-1}
            state = f"e{layer.split('.')[1]}"
            key_value, memory = f"key_value.{state}", norm(f"ln_memory.{state}", x)
        return attend_to(f"{layer}.attention", x_norm, key_value, memory)

    def route(router, x):
        """The rounded masks (B, T, G)."""
        keys = c.router_n_head * c.router_head_dim
        q, k, v = linear(f"{router}.query_key_value", x).tensor_split([keys, 2 * keys], -1)
        A = attention(q, k, v, c.router_n_head, placed=False)
        return ((torch.cos(A + w[f"{router}.shift"]) + 1) / 2).round()  # where no m is 0.5

    def feed_forward(layer, x, memory):
        x = norm(f"{layer}.ln_ff", x)
        h = linear(f"{layer}.ff.w1", x)
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        if c.n_expert == 0:
            return linear(f"{layer}.ff.w2", h)
        from_encoder = c.router_input == "encoder" and memory is not None
        if c.expert_site == "hidden":
            r = route(f"{layer}.ff.router", memory if from_encoder else x)
            return linear(f"{layer}.ff.w2", h * r.repeat_interleave(h.size(-1) // c.n_expert, -1))
        y = linear(f"{layer}.ff.w2", h)
        r = route(f"{layer}.ff.router", memory if from_encoder else y)
        return y * r.repeat_interleave(y.size(-1) // c.n_expert, -1)

    emb = w["tok_emb.weight"][idx]
    if c.token_shift:
        before = torch.cat([torch.zeros_like(emb[:, :1]), emb[:, :-1]], 1)
        emb = emb + w["token_shift"] * before
    if c.position_embedding == "learned":
        emb = emb + w["pos_emb.weight"][:T]
    e = emb
    p = linear("w_in", emb) if parallel and not c.lateral else emb  # the decoder without e_l
    p = torch.zeros_like(emb) if parallel and c.lateral else p
    for i in range(c.n_layer):
        enc, dec, memory = f"encoder.{i}", f"decoder.{i}", None
        if parallel:
            e = e + self_attend(enc, e)
            e = e + feed_forward(enc, e, None)
            memory = norm(f"ln_memory.e{i + 1}", e)
        below = e if parallel and c.lateral else 0.0
        if not parallel or c.decoder_self_attention:
            p = p + self_attend(dec, below + p)
        if parallel:
            query, key_value = norm(f"{dec}.ln_cross", below + p), f"key_value.e{i + 1}"
            p = p + attend_to(f"{dec}.cross_attention", query, key_value, memory)
        p = p + feed_forward(dec, below + p, memory)
    out = norm("ln_out", p + e if parallel and c.lateral else p)
    return torch.einsum("btc,vc->btv", out, w["tok_emb.weight"])


@every_variant
@torch.no_grad()
def test_forward_equals_the_equations(fields):
    model, idx = build(fields).double(), random_ids(3, 16)
    targets = random_ids(3, 16, seed=2)
    targets[:, :3], targets[0, 3] = -1, -100
    expected = reference_forward(model, idx)
    output = model(idx, targets)
    torch.testing.assert_close(output.logits, expected, atol=1e-11, rtol=0)
    single = all_logits(build(fields), idx)
    torch.testing.assert_close(single, expected.float(), atol=1e-4, rtol=1e-4)
    picked = expected.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    cross_entropy = -picked[targets >= 0].mean()
    torch.testing.assert_close(output.metrics["cross_entropy"], cross_entropy)
    penalties = {"entropy": model.config.entropy_weight, "l1": model.config.l1_weight}
    extra = sum(weight * output.metrics.get(name, 0.0) for name, weight in penalties.items())
    torch.testing.assert_close(output.loss, cross_entropy + extra)

    last = model(idx)
    assert last.loss is None and last.metrics == {} and last.logits.shape == (3, 1, 31)
    torch.testing.assert_close(last.logits[:, 0], output.logits[:, -1])


def test_rotary_by_hand():
    """One head of width 4: two pairs, (0, 2) and (1, 3), at the angles t and t / 100."""
    config = ModelConfig(position_embedding="rotary", n_head=1, n_embd=4, vocab_size=3, n_layer=1)
    model = ParallelEncoderDecoder(config).double()
    assert not hasattr(model, "pos_emb") and not list(model.buffers())
    _, rotation = model.embed(torch.zeros(1, 5, dtype=torch.long), None)
    assert rotation.dtype == torch.float64
    x = np.random.default_rng(0).normal(size=(5, 4))
    got = model_file.heads(torch.tensor(x)[None], 1, rotation=rotation)[0, 0].numpy()
    for t, (a, b, c, d) in enumerate(x):
        for pair, (u, v), angle in ((0, (a, c), t), (1, (b, d), t / 100)):
            turned = (
                (complex(u, v) * np.exp(1j * angle)).real,
                (complex(u, v) * np.exp(1j * angle)).imag,
            )
            assert got[t, [pair, pair + 2]] == pytest.approx(turned, abs=1e-12)
    bf16 = ParallelEncoderDecoder(config).bfloat16()
    assert bf16.embed(torch.zeros(1, 5, dtype=torch.long), None)[1].dtype == torch.float32
    later = model_file.heads(torch.tensor(x)[None, -2:], 1, rotation=rotation)[0, 0].numpy()
    assert later == pytest.approx(got[-2:])  # a shorter x has the last positions


def test_rotary_attention_knows_distances_alone():
    """The same tokens behind another beginning: rotated scores depend on the distance."""
    q, k = torch.randn(2, 1, 1, 9, 8, dtype=torch.float64)
    model = ParallelEncoderDecoder(
        ModelConfig(position_embedding="rotary", n_head=1, n_embd=8, n_layer=1, vocab_size=3)
    ).double()
    scores = []
    for past in (0, 7):
        cache = Cache(model, 1, 20)
        cache.length = past
        _, rotation = model.embed(torch.zeros(1, 9, dtype=torch.long), cache)
        turned = (
            model_file.heads(x.transpose(1, 2).flatten(2), 1, rotation=rotation) for x in (q, k)
        )
        a, b = turned
        scores.append(a @ b.mT)
    torch.testing.assert_close(*scores, atol=1e-12, rtol=0)


# ---- properties of every variant --------------------------------------------


@every_variant
def test_causality(fields):
    """Changing token t changes no logit before t, and does change the one at t."""
    model, idx = build(fields), random_ids(2, 16)
    before = all_logits(model, idx)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        after = all_logits(model, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@every_variant
@pytest.mark.parametrize("vocab_size", [65, 5000])
def test_initial_loss_is_that_of_guessing(fields, vocab_size):
    sizes = dict(vocab_size=vocab_size, block_size=64, n_embd=120)
    model = build({**fields, **sizes}, spread=False)
    idx = random_ids(8, 65, vocab_size=vocab_size)
    loss = model(idx[:, :-1], idx[:, 1:]).metrics["cross_entropy"]
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.02)


@every_variant
def test_every_parameter_gets_a_gradient(fields):
    model, idx = build(fields).train(), random_ids(2, 16)
    model(idx, random_ids(2, 16, seed=2)).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@every_variant
def test_learns_one_batch_by_heart(fields):
    model = build(fields, spread=False).train()
    idx, targets = random_ids(2, 16), random_ids(2, 16, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=60)
    for _ in range(60):
        output = model(idx, targets)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
    # The penalties end near 0.05; guessing is 4.2.
    assert model.eval()(idx, targets).metrics["cross_entropy"] < 0.1


@every_variant
def test_parameter_count(fields):
    model = build(fields)
    c = model.config
    C, V, L, b = c.n_embd, c.vocab_size, c.n_layer, int(c.bias)
    norm, linear = C + b * C, C * C + b * C
    ff, G, keys = 8 * C * C + b * 5 * C, c.n_expert, c.router_n_head * c.router_head_dim
    router = (C + b) * (2 * keys + G) + G if G else 0
    gpt = 2 * norm + 4 * linear + ff + router
    decoder = (norm + 4 * linear) * c.decoder_self_attention + norm + 2 * linear  # cross-attention
    decoder += norm + ff + router
    memories = L + 1 if c.shared_kv else L  # each a norm, keys and values
    encoder = gpt - 2 * linear * c.shared_kv
    parallel = L * (encoder + decoder) + memories * (norm + 2 * linear) + linear * (not c.lateral)
    body = parallel if c.arch == "parallel" else L * gpt
    assert model.num_params() == V * C + body + norm + C * c.token_shift
    positions = c.block_size * (c.position_embedding == "learned")
    assert sum(p.numel() for p in model.parameters()) == model.num_params() + positions * C


@every_variant
def test_dropout_acts_in_training_alone(fields):
    model, idx = build({**fields, "dropout": 0.5}), random_ids(2, 16)
    assert torch.equal(all_logits(model, idx), all_logits(model, idx))
    model.train()
    assert not torch.equal(all_logits(model, idx), all_logits(model, idx))


def test_shape_of_short_and_single_texts():
    model = build()
    for B, T in itertools.product((1, 3), (1, 7, 16)):
        assert all_logits(model, random_ids(B, T)).shape == (B, T, 31)


@every_variant
@torch.no_grad()
def test_stacks_are_every_state_of_both_streams(fields):
    model, idx = build(fields), random_ids(2, 16)
    c, (e, d, masks) = model.config, model.stacks(idx)
    stacks = 2 if c.arch == "parallel" else 1
    assert len(d) == c.n_layer + 1 and len(e) == (c.n_layer + 1 if stacks == 2 else 0)
    assert len(masks) == (c.n_layer * stacks if c.n_expert else 0)
    assert all(x.shape == (2, 16, 24) for x in (*e, *d))
    logits = F.linear(model.ln_out(d[-1]), model.tok_emb.weight)
    assert torch.equal(logits, all_logits(model, idx))
    if c.lateral:
        assert torch.equal(d[0], e[0])
    seen = []
    for layer in (*getattr(model, "encoder", ()), *model.decoder):
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    model(idx, idx)
    assert all(any(torch.equal(x, y) for y in seen) for x in (*e[1:], *d[1:]))


# ---- the idea: who reads what -----------------------------------------------

READERS = [  # and whether a later position reads a latent of the decoder
    ({"decoder_self_attention": False}, False),
    ({"decoder_self_attention": False, "shared_kv": True}, False),
    ({"decoder_self_attention": False} | NEW, False),
    (LEAN, False),
    (LEAN | NEW, False),
    (LEAN | {"n_expert": 8, "router_input": "encoder"}, False),
    (LEAN | {"n_expert": 8, "router_input": "encoder", "expert_site": "output"}, False),
    (
        NEW
        | {"decoder_self_attention": False, "n_expert": 8, "router_input": "encoder"}
        | {"expert_site": "output"},
        False,
    ),
    (LEAN | {"n_expert": 8}, True),
    (LEAN | {"n_expert": 8, "expert_site": "output"}, True),
    ({"decoder_self_attention": False, "n_expert": 8, "expert_site": "output"}, True),
    ({}, True),
    ({"lateral": True, "shared_kv": True}, True),
    ({"n_expert": 8, "router_input": "encoder"}, True),
]


@pytest.mark.parametrize("fields, read", READERS, ids=str)
def test_whether_a_latent_of_the_decoder_is_context(fields, read):
    """The gradient of the last position's logits with respect to every latent of the decoder:
    outputs of its layers, and d_0 where W_in makes it. In training, with dr/dm = 1."""
    model, idx = build(fields | {"n_layer": 3}).double().train(), random_ids(2, 16)
    latents = []
    makers = [*model.decoder, *([model.w_in] if hasattr(model, "w_in") else [])]
    for module in makers:

        def retain(_, __, out):
            x = out[0] if isinstance(out, tuple) else out
            x.retain_grad()
            latents.append(x)

        module.register_forward_hook(retain)
    torch.manual_seed(0)
    model(idx, idx).logits[:, -1].square().sum().backward()
    assert len(latents) == len(makers) == 3 + (not model.config.lateral)
    assert all(x.shape == (2, 16, 24) for x in latents)
    assert all(x.grad[:, -1].abs().max() > 0 for x in latents)
    earlier = [x.grad[:, :-1].abs().max().item() for x in latents]
    assert earlier.pop() == 0.0  # of the last layer's output the same position alone is read
    assert (max(earlier) > 0) is read and (read or set(earlier) == {0.0})


@every_variant
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_the_short_prefill_equals_the_full_forward(fields, dtype, atol):
    model = build(fields).to(dtype)
    for T in (1, 2, 9, 16):
        idx = random_ids(3, T)
        full, cache = all_logits(model, idx)[:, -1:], Cache(model, 3, 16)
        for logits in (model(idx).logits, model.step(idx), model.step(idx, cache)):
            assert logits.shape == (3, 1, 31) and logits.dtype == dtype
            assert (logits - full).abs().max().item() <= atol


def rows_computed(model, idx):
    """How many positions each layer of the decoder, its feed-forward block and its attentions'
    queries see when a prompt is read."""
    seen = {}
    for name, module in model.named_modules():
        if name.startswith("decoder") and re.search(r"(query|w1|proj|key_value.linear)$", name):
            module.register_forward_hook(
                lambda _, args, __, name=name: seen.__setitem__(name, args[0].size(1))
            )
    model(idx)
    return seen


@pytest.mark.parametrize(
    "fields, expected",
    [
        (LEAN, {"decoder.*": 1}),
        (LEAN | {"n_expert": 8, "router_input": "encoder"}, {"decoder.*": 1}),
        (
            {"decoder_self_attention": False, "n_expert": 8},
            {"decoder.0.*": 9, r"decoder.1.cross\w+.*": 9, "decoder.1.ff.w1": 1},
        ),
        ({}, {"decoder.0.*": 9, "decoder.1.attention.key_value.*": 9, "decoder.1.*": 1}),
        (GPT, {"decoder.0.*": 9, "decoder.1.attention.key_value.*": 9, "decoder.1.*": 1}),
        (
            GPT | {"n_expert": 8},
            {"decoder.0.*": 9, "decoder.1.attention.*": 9, "decoder.1.ff.w1": 1},
        ),
        (GPT | {"n_expert": 8, "expert_site": "output"}, {"decoder.*": 9}),
        (
            {"n_expert": 8, "router_input": "encoder", "expert_site": "output"},
            {"decoder.0.*": 9, "decoder.1.attention.key_value.*": 9, "decoder.1.*": 1},
        ),
    ],
    ids=str,
)
def test_a_prefill_computes_what_somebody_reads_alone(fields, expected):
    model = build(fields)
    found = rows_computed(model, random_ids(2, 9))
    c = model.config
    per_layer = 3 if c.arch == "decoder_only" else 3 + 2 * c.decoder_self_attention
    assert len(found) == 2 * (per_layer + (c.arch == "decoder_only" or c.decoder_self_attention))
    for name, rows in found.items():
        assert rows == next(n for p, n in expected.items() if re.match(p, name)), name


# ---- the parts, against numbers ---------------------------------------------


def test_w_in_starts_as_the_identity():
    assert torch.equal(build(spread=False).w_in.weight, torch.eye(24))


def test_lateral_and_rotary_need_fewer_parameters():
    names = {n for n, _ in build(LEAN | NEW).named_parameters()}
    assert not any("w_in" in n or "pos_emb" in n or "lateral" in n for n in names)


def test_token_shift_starts_at_0_and_no_window_has_a_token_before_its_first():
    model, idx = build({"token_shift": True}, spread=False), random_ids(2, 5)
    assert torch.equal(model.token_shift, torch.zeros(24))
    torch.nn.init.constant_(model.token_shift, 0.5)
    emb, _ = model.embed(idx, None)
    expected = model.tok_emb(idx) + model.pos_emb.weight[:5]
    expected[:, 1:] += 0.5 * model.tok_emb(idx)[:, :-1]
    torch.testing.assert_close(emb, expected)


def test_attend_sees_the_past_and_one_token_may_ask_twice():
    q, k, v = torch.randn(3, 2, 2, 6, 4)
    whole = attend(q, (k, v, None))
    torch.testing.assert_close(attend(q[:, :, -3:], (k, v, None)), whole[:, -3:])
    torch.testing.assert_close(attend(q[:, :, -1:], (k, v, None)), whole[:, -1:])
    pair = attend(q[:, :, -2:], (k, v, None), causal=False)  # both at the last position
    torch.testing.assert_close(pair[:, 1], whole[:, -1])
    alone = attend(q[:, :, -2:-1], (k, v, None))
    torch.testing.assert_close(pair[:, 0], alone[:, 0])


# ---- learned dropout --------------------------------------------------------


def test_penalties_by_hand():
    m = torch.tensor([0.0, 0.25, 0.5, 1 / math.e, 1.0])
    bits = [0.0, 0.5, 0.5, math.log2(math.e) / math.e, 0.0]
    assert entropy(m).tolist() == pytest.approx(bits) and entropy(m)[0] == 0 == entropy(m)[4]
    assert entropy(m).argmax() == 3  # the largest at 1 / e
    each = Mask(m.view(5, 1, 1, 1), m.view(5, 1, 1, 1))
    squares = [0.0, 1 / 32, 1 / 8, 0.5 / math.e**2, 0.5]
    assert mask_statistics(each, "linear")["l1"].tolist() == pytest.approx(m.tolist())
    assert mask_statistics(each, "squared")["l1"].tolist() == pytest.approx(squares)


def test_statistics_by_hand():
    m = torch.tensor([[[0.05, 0.95], [0.5, 0.92]]])  # B 1, T 2, G 2
    stats = mask_statistics(Mask(m, m.round()), "squared")
    assert stats["experts_on"] == 0.5 and stats["near_one"] == 0.5 and stats["near_zero"] == 0.25
    bits = sum(-p * math.log2(p) for p in (0.05, 0.95, 0.5, 0.92))
    assert stats["entropy"].item() == pytest.approx(bits / 4)
    squares = 0.05**2 + 0.95**2 + 0.5**2 + 0.92**2
    assert stats["l1"].item() == pytest.approx(squares / 8)


def test_rounding_by_hand():
    m = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.75, 1.0])
    assert round_mask(m, training=False).tolist() == [0, 0, 0, 1, 1, 1]
    torch.manual_seed(0)
    drawn = round_mask(m.expand(20000, -1), training=True)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}  # exactly, so that off is nothing at all
    assert drawn.mean(0).tolist() == pytest.approx(m.tolist(), abs=0.02)
    assert drawn[:, 0].max() == 0 and drawn[:, -1].min() == 1


def test_stochastic_rounding_is_straight_through():
    """The slope dr/dm is 1 everywhere, also where m was rounded to 0."""
    torch.manual_seed(0)
    m = torch.rand(3, 5, 8, requires_grad=True)
    r = round_mask(m, training=True)
    slope = torch.randn_like(m)
    (r * slope).sum().backward()
    assert (r == 0).any() and torch.equal(m.grad, slope)


@pytest.mark.parametrize("site", ["hidden", "output"])
def test_the_router_learns_through_the_rounded_mask(site):
    """Its gradient is dL/dr, at the r that was drawn, times dm of the router."""
    torch.manual_seed(0)
    ff = FeedForward(ModelConfig(**SMALL, n_expert=8, expert_site=site)).train()
    torch.nn.init.constant_(ff.router.shift, 1.5)
    x, upstream = torch.randn(2, 16, 24), torch.randn(2, 16, 24)
    y, mask = ff(x)
    y.backward(upstream)
    got = ff.router.shift.grad
    r = mask.used.detach().requires_grad_()
    assert (r == 0).any() and (r == 1).any()
    r_units = r.repeat_interleave((96 if site == "hidden" else 24) // 8, dim=-1)
    hidden = F.gelu(ff.w1(x))
    again = ff.w2(hidden * r_units) if site == "hidden" else ff.w2(hidden) * r_units
    torch.testing.assert_close(y, again)
    (slope,) = torch.autograd.grad(again, r, upstream)
    read = x if site == "hidden" else ff.w2(hidden).detach()
    learned = ff.router(read, 16, Context()).learned
    (expected,) = torch.autograd.grad(learned, ff.router.shift, slope)
    torch.testing.assert_close(got, expected)


def test_penalties_keep_their_precision_under_autocast():
    fields = {"n_expert": 8, "entropy_weight": 0.0185, "l1_weight": 0.037}
    model, idx = build(fields).train(), random_ids(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(mask.learned.dtype == torch.float32 for mask in model.stacks(idx).masks)
        loss, metrics = model(idx, idx)[1:]
    extra = 0.0185 * metrics["entropy"] + 0.037 * metrics["l1"]
    assert (loss - metrics["cross_entropy"]).item() == pytest.approx(extra.item(), abs=1e-6)


def test_a_mask_value_covers_its_group():
    x = torch.arange(1.0, 13.0).reshape(1, 2, 6)
    r = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    expected = [[[1, 2, 0, 0, 5, 6], [0, 0, 9, 10, 0, 0]]]
    assert apply_mask(x, r).tolist() == expected


@every_expert_variant
def test_penalties_are_means_over_all_masks(fields):
    """The metrics times the number of mask elements are the plain sums of the definition."""
    model, idx = build(fields), random_ids(3, 16)
    c, metrics = model.config, model(idx, idx).metrics
    m, r = model.expert_masks(idx)
    stacks = 2 if c.arch == "parallel" else 1
    assert m.shape == r.shape == (c.n_layer, stacks, 3, 16, c.n_expert)
    assert torch.equal(r, (m >= 0.5).float())
    total = m.numel()
    ln = m.clamp_min(1e-30).log2()
    assert metrics["entropy"].item() * total == pytest.approx(-(m * ln).sum().item(), rel=1e-4)
    norm = m.square() / 2 if c.l1_norm == "squared" else m
    assert metrics["l1"].item() * total == pytest.approx(norm.sum().item(), rel=1e-4)
    assert metrics["experts_on"].item() == pytest.approx((r >= 0.5).float().mean().item())
    for name in ("near_one", "near_zero"):
        share = (m > 0.9) if name == "near_one" else (m < 0.1)
        assert metrics[name].item() == pytest.approx(share.float().mean().item())
    assert 0.05 < metrics["experts_on"] < 0.95  # the test sees both kinds


def test_masks_are_those_of_the_blocks_in_order():
    model, idx = build({"n_expert": 8}), random_ids(2, 16)
    blocks = [model.encoder[0], model.decoder[0], model.encoder[1], model.decoder[1]]
    seen = []
    for layer in blocks:
        layer.ff.register_forward_hook(lambda m, _, out: seen.append((m, out[1].learned)))
    m = model.expert_masks(idx).learned.flatten(0, 1)
    for layer, found in zip(blocks, m, strict=True):
        assert torch.equal(found, next(x for module, x in seen if module is layer.ff))


@pytest.mark.parametrize("scale", [0.0, 0.25, 3.0])
def test_the_penalties_can_be_scaled(scale):
    model, idx = build({"n_expert": 8, "l1_weight": 0.1, "entropy_weight": 0.2}), random_ids(2, 16)
    for given in (scale, torch.tensor(scale)):
        loss, metrics = model(idx, idx, penalty_scale=given)[1:]
        extra = scale * (0.2 * metrics["entropy"] + 0.1 * metrics["l1"])
        torch.testing.assert_close(loss, metrics["cross_entropy"] + extra)
    assert not list(model.buffers())  # nothing that a trainer has to rewrite


@pytest.mark.parametrize("router_input", ["hidden", "encoder"])
def test_the_output_site_is_the_origins_learned_dropout(router_input):
    """LearnedDropout of yiphei/yif-AI, written anew: with G = C and as many router heads as heads,
    each channel of a block's output has its mask by causal attention over what is masked."""
    C, H, T = 24, 2, 7
    shape = dict(n_expert=C, expert_site="output", router_n_head=H, router_head_dim=C // H)
    config = ModelConfig(**SMALL, **shape, shift_init=0.7, router_input=router_input)
    ff = spread_weights(FeedForward(config)).double()
    torch.manual_seed(1)
    x, memory = torch.randn(2, 3, T, C, dtype=torch.float64)
    y = ff.w2(F.gelu(ff.w1(x)))
    read = y if router_input == "hidden" else memory
    weight = ff.router.query_key_value.weight
    masked = torch.zeros_like(y)
    for b in range(3):
        A = []
        for h in range(H):
            q, k, v = (read[b] @ part[h * C // H : (h + 1) * C // H].T for part in weight.split(C))
            scores = (q @ k.T) / math.sqrt(C / H)
            scores = scores.masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
            A.append(scores.softmax(-1) @ v)
        m = 0.5 * torch.cos(torch.cat(A, -1) + ff.router.shift) + 0.5
        masked[b] = y[b] * (m >= 0.5)
    got, mask = ff(x) if router_input == "hidden" else ff(x, memory)
    torch.testing.assert_close(got, masked, atol=1e-12, rtol=0)
    assert 0.1 < mask.used.mean() < 0.9


def test_experts_that_are_off_give_nothing():
    """With all of them off, the model is the one whose feed-forward blocks are cut out."""
    model, idx = build({"n_expert": 8}), random_ids(2, 16)
    routers = [m for m in model.modules() if hasattr(m, "shift")]
    with torch.no_grad():
        for router in routers:
            router.query_key_value.weight.zero_()
            router.shift.fill_(math.pi)
        assert model.expert_masks(idx).used.sum() == 0
        off = all_logits(model, idx)
        for module in model.modules():
            if hasattr(module, "w2"):
                module.w1.weight.mul_(1e6)
        assert torch.equal(all_logits(model, idx), off)
        for router in routers:
            router.shift.zero_()
        assert model.expert_masks(idx).used.min() == 1


@pytest.mark.parametrize("l1_norm", ["linear", "squared"])
@pytest.mark.parametrize("shift_init", [0.0, math.pi])
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_gradients_are_finite_where_masks_are_exactly_0_and_1(site, shift_init, l1_norm):
    model = build(
        dict(
            n_expert=8, expert_site=site, shift_init=shift_init, l1_norm=l1_norm,
            entropy_weight=1.0, l1_weight=1.0,
        ),
        spread=False,
    ).train()  # fmt: skip
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "shift"):
                module.query_key_value.weight.zero_()
    idx = random_ids(2, 16)
    m = model.expert_masks(idx).learned
    assert (m == (1.0 if shift_init == 0 else 0.0)).all()
    model(idx, idx).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        if "shift" in name:  # dm/dA is 0 at both ends
            assert p.grad.abs().max() < 1e-5


def test_training_with_a_large_entropy_penalty_stays_finite():
    for shift_init in (0.0, math.pi):
        fields = dict(n_expert=8, entropy_weight=1.0, shift_init=shift_init)
        model, idx = build(fields, spread=False).train(), random_ids(4, 16)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            output = model(idx, idx)
            output.loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_entropy_slope_meets_the_slope_of_the_mask():
    """dH/dA near the ends, against the formula in double precision; 0 at them."""
    A = torch.tensor([math.pi - 1e-2, math.pi - 1e-3, 1e-3, 2.0], dtype=torch.float64)
    for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
        a = A.to(dtype).detach().requires_grad_()
        entropy(0.5 * torch.cos(a) + 0.5).sum().backward()
        m = 0.5 * torch.cos(A) + 0.5
        expected = (-torch.log2(m) - 1 / math.log(2)) * -0.5 * torch.sin(A)
        assert a.grad.tolist() == pytest.approx(expected.tolist(), rel=rel, abs=1e-6)
    m = torch.tensor([0.0], requires_grad=True)
    entropy(m).backward()
    assert m.grad.item() == 0


def assert_router_slope(model, idx):
    """The slope of the loss along a direction of the routers' parameters: by autograd, and by
    finite differences."""
    parameters = [p for n, p in model.named_parameters() if "router" in n]
    model(idx, idx).loss.backward()
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()

    @torch.no_grad()
    def moved(step):
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=step)
        loss = model(idx, idx).loss.item()
        for p, d in zip(parameters, direction, strict=True):
            p.sub_(d, alpha=step)
        return loss

    h = 1e-6
    assert slope == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-4)


@every_expert_variant
def test_the_gradient_of_the_router_is_that_of_the_unrounded_path(fields, monkeypatch):
    """Autograd through mask, block and penalties, against finite differences, with r = m."""
    monkeypatch.setattr(model_file, "round_mask", lambda m, training: m)
    fields = {**fields, "entropy_weight": 0.3, "l1_weight": 0.2}
    assert_router_slope(build(fields).double().train(), random_ids(2, 8))


@every_expert_variant
def test_masks_are_causal(fields):
    model, idx = build(fields), random_ids(2, 16)
    before = model.expert_masks(idx).learned
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        after = model.expert_masks(changed).learned
        torch.testing.assert_close(after[..., :t, :], before[..., :t, :], atol=1e-6, rtol=0)
        assert (after[..., t, :] != before[..., t, :]).any()


def test_more_weight_on_a_penalty_gives_less_of_it():
    text = Path(__file__).with_name("LICENSE").read_text("utf-8")
    windows = torch.tensor([min(ord(char), 127) for char in text]).unfold(0, 33, 8)

    def train(**weights):
        sizes = dict(vocab_size=128, block_size=32, l1_norm="squared")
        model = build({"n_expert": 8, "n_layer": 1, **sizes, **weights}, spread=False).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            batch = windows[torch.randint(len(windows), (8,), generator=generator)]
            optimizer.zero_grad()
            model(batch[:, :-1], batch[:, 1:]).loss.backward()
            optimizer.step()
        return model.eval()(windows[:, :-1], windows[:, 1:]).metrics

    free = train()
    runs = free, train(l1_weight=0.01), train(l1_weight=0.03)
    on = [metrics["experts_on"] for metrics in runs]
    assert on[0] > 2 * on[1] > 4 * on[2]
    runs = free, train(entropy_weight=0.001), train(entropy_weight=0.03)
    bits = [metrics["entropy"] for metrics in runs]
    assert bits[0] > 5 * bits[1] > 25 * bits[2]


def test_a_model_without_experts_has_no_masks():
    with pytest.raises(ValueError, match="n_expert=0: this model has no experts"):
        build().expert_masks(random_ids(1, 4))


# ---- experts that are skipped -----------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, T", [(1, 1), (10, 1), (1, 10), (2, 16)])
@torch.no_grad()
def test_skipped_experts_equal_the_masked_product(B, T, share, bias):
    torch.manual_seed(0)
    ff = spread_weights(FeedForward(ModelConfig(**SMALL, n_expert=8, bias=bias)))
    for _ in range(20):
        x, on = torch.randn(B, T, 24), (torch.rand(B, T, 8) < share).float()
        dense = ff.w2(apply_mask(F.gelu(ff.w1(x)), on))
        torch.testing.assert_close(ff.skip_experts(x, on), dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 10])
@torch.no_grad()
def test_the_weights_of_experts_that_are_off_are_not_read(tokens):
    ff = FeedForward(ModelConfig(**SMALL, n_expert=4)).eval()
    x, on = torch.randn(1, tokens, 24), torch.tensor([1.0, 0, 0, 1]).expand(1, tokens, 4)
    expected = ff.skip_experts(x, on)
    ff.w1.weight[24:72] = ff.w2.weight[:, 24:72] = math.nan  # experts 1 and 2
    assert torch.equal(ff.skip_experts(x, on), expected)


@torch.no_grad()
def test_skipped_experts_under_autocast():
    """They are as close to float32 as the masked product is."""
    torch.manual_seed(0)
    ff = FeedForward(ModelConfig(**SMALL, n_expert=4)).eval()
    for tokens in (1, 10):
        x, on = torch.randn(1, tokens, 24), (torch.rand(1, tokens, 4) < 0.5).float()
        dense = lambda x=x, on=on: ff.w2(apply_mask(F.gelu(ff.w1(x)), on))  # noqa: E731
        expected = dense()
        with torch.autocast("cpu", torch.bfloat16):
            found, of_dense = ff.skip_experts(x, on), dense()
        allowed = 2 * (of_dense - expected).abs().max()
        assert allowed > 0 and (found - expected).abs().max() < allowed


def test_when_experts_are_skipped(monkeypatch):
    """An expert of C = 768 has 294,912 weights, over 2^17; of C = 64 2,048, 2^23 / 4,096."""
    sizes = [dict(n_embd=64, n_head=1), dict(n_embd=768)]
    small, large = (FeedForward(ModelConfig(**fields, n_expert=16)) for fields in sizes)
    odd = FeedForward(ModelConfig(n_embd=780, n_expert=16))  # 195 units an expert: no 16 bytes

    def skips(ff, tokens):
        masks = [(torch.arange(16) < n).float().expand(1, tokens, 16) for n in range(17)]
        return [n for n, r in enumerate(masks) if ff.skips(r)]

    assert not skips(large, 1)  # with gradients
    with torch.no_grad():
        assert skips(large, 1) == skips(large, 300) == list(range(9))
        assert not skips(small, 1) and not skips(small, 4095) and not skips(odd, 1)
        assert skips(small, 4096) == list(range(9))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not skips(large, 1)
        monkeypatch.undo()
        assert not skips(large.double(), 1)


@torch.no_grad()
def test_large_experts_are_skipped_by_the_rule(monkeypatch):
    sizes = dict(block_size=8, vocab_size=1003, n_layer=1, n_head=6, n_embd=768, n_expert=16)
    torch.manual_seed(0)
    model, text = ParallelEncoderDecoder(ModelConfig(**sizes)).eval(), torch.tensor([[1, 2, 3]])
    for layer in (*model.encoder, *model.decoder):
        layer.ff.router.shift.copy_(torch.arange(16) % 4 * math.pi / 3)  # half of the experts on
    skip, called = FeedForward.skip_experts, []
    monkeypatch.setattr(
        FeedForward, "skip_experts", lambda self, x, r: called.append(r.mean()) or skip(self, x, r)
    )
    skipped = [model.generate(text, 8, temperature=0, use_cache=c) for c in (True, False)]
    assert called and max(called) <= 0.5
    monkeypatch.setattr(FeedForward, "skips", lambda *_: False)
    assert all(torch.equal(model.generate(text, 8, temperature=0), x) for x in skipped)


@pytest.mark.parametrize(
    "fields", [{}, GPT | {"bias": True}, LEAN | {"router_input": "encoder"}], ids=str
)
@pytest.mark.parametrize("batch", [1, 3])
def test_texts_with_skipped_experts_are_the_same(fields, batch, monkeypatch):
    model, text = build({"n_expert": 8, **fields}), random_ids(batch, 16)
    assert 0.1 < model.expert_masks(text).used.mean() < 0.9
    how, called = dict(max_new_tokens=20, temperature=0), []
    dense = model.generate(text, **how)
    skip = FeedForward.skip_experts
    monkeypatch.setattr(FeedForward, "skips", lambda *_: True)
    monkeypatch.setattr(
        FeedForward, "skip_experts", lambda self, x, r: called.append(x.shape) or skip(self, x, r)
    )
    assert torch.equal(model.generate(text, **how), dense)
    blocks = model.config.n_layer * (2 if model.config.arch == "parallel" else 1)
    assert len(called) == 20 * blocks
    called.clear()
    model(text, text)
    assert len(called) == blocks


# ---- generation -------------------------------------------------------------


@every_variant
def test_greedy_generation_is_the_argmax_of_the_window(fields):
    model, text = build(fields), random_ids(2, 3)
    both = [model.generate(text, 30, temperature=0, use_cache=c) for c in (True, False)]
    for _ in range(30):  # block 16, moved by 8: the window holds 9 to 16 tokens once it is full
        start = 0
        while text.size(1) - start > 16:
            start += 8
        logits = reference_forward(model, text[:, start:])[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert all(torch.equal(out, text) for out in both)


@every_variant
def test_cached_and_uncached_texts_are_the_same(fields):
    model, text = build(fields).double(), random_ids(3, 5)  # so that no rounding parts a tie
    for how in (dict(temperature=0), dict(temperature=0.7, top_k=9)):
        both = [
            model.generate(text, 40, use_cache=c, generator=torch.Generator().manual_seed(0), **how)
            for c in (True, False)
        ]
        assert torch.equal(*both)


@every_variant
@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("how", ["token by token", "several at once", "as compiled"])
def test_cached_logits_are_those_of_the_whole_text(fields, batch, how):
    model, text = build(fields), random_ids(batch, 16)
    cache, expected = Cache(model, batch, 16), all_logits(model, text)
    ends = [5, 7, 8, 12, 16] if how == "several at once" else range(5, 17)
    with torch.inference_mode():
        for _ in range(2):
            start, cache.length = 0, 0  # later, old entries are still there
            for end in ends:
                if start and how == "as compiled":
                    cache.length = torch.as_tensor(cache.length)
                logits = model.step(text[:, start:end], cache)
                torch.testing.assert_close(logits[:, 0], expected[:, end - 1], atol=1e-5, rtol=1e-5)
                start = end
            assert cache.length == 16


def kept(model):
    """Shapes of what a cache of one text of 16 tokens keeps, by the modules' names."""
    names = {module: name for name, module in model.named_modules()}
    buffers = Cache(model, 1, 16).buffers
    return {names[module]: [tuple(b.shape) for b in of] for module, of in buffers.items()}


def test_what_a_cache_keeps():
    heads = [(1, 2, 16, 12)] * 2
    own = ["encoder.0.attention.key_value", "encoder.1.attention.key_value"]
    cross = ["key_value.e1", "key_value.e2"]
    decoder = ["decoder.0.attention.key_value", "decoder.1.attention.key_value"]
    assert kept(build()) == dict.fromkeys([*own, *cross, *decoder], heads)
    assert kept(build(GPT)) == dict.fromkeys(decoder, heads)
    lean = {"decoder_self_attention": False, "lateral": True}
    assert kept(build(lean)) == dict.fromkeys([*own, *cross], heads)
    states = ["key_value.e0", *cross]  # L + 1, where a GPT of 2 L layers has 2 L
    assert kept(build(LEAN)) == dict.fromkeys(states, heads)
    routers = [f"{s}.{k}.ff.router" for k in range(2) for s in ("encoder", "decoder")]
    small = [(1, 2, 16, 5), (1, 2, 16, 4)]
    experts = LEAN | {"n_expert": 8, "router_n_head": 2, "router_head_dim": 5}
    assert kept(build(experts)) == dict.fromkeys(states, heads) | dict.fromkeys(routers, small)


@torch.no_grad()
def test_the_cache_is_allocated_once():
    model = build({"n_expert": 8, "n_layer": 1})
    cache = Cache(model, 3, 16)
    places = [b.data_ptr() for buffers in cache.buffers.values() for b in buffers]
    model.step(random_ids(3, 7), cache)
    while cache.length < 16:
        model.step(random_ids(3, 1), cache)
    assert [b.data_ptr() for buffers in cache.buffers.values() for b in buffers] == places


def test_what_does_not_fit_a_cache():
    model = build()
    cache = Cache(model, 3, 16)
    for shape, allowed in (((2, 4), r"\(3, T\), T from 1 to 16"), ((3, 17), "T from 1 to 16")):
        with pytest.raises(ValueError, match=f"must be token ids .*{allowed}"):
            model.step(random_ids(*shape), cache)
    model.step(random_ids(3, 15), cache)
    for shape in ((3, 2), (1, 1)):
        with pytest.raises(ValueError, match=r"must be token ids \(3, T\), T from 1 to 1 "):
            model.step(random_ids(*shape), cache)
    assert cache.length == 15
    model.step(random_ids(3, 1), cache)
    with pytest.raises(ValueError, match=r"must be token ids \(3, T\), T from 1 to 0 "):
        model.step(random_ids(3, 1), cache)
    small = Cache(model, 1, 8)
    with pytest.raises(ValueError, match="T from 1 to 8 "):
        model.step(random_ids(1, 9), small)


def test_one_prompt_is_read_once(monkeypatch):
    model, prompt = build(), random_ids(1, 5)
    rows, step = [], ParallelEncoderDecoder.step
    spy = lambda self, idx, cache: rows.append(idx.shape) or step(self, idx, cache)  # noqa: E731
    monkeypatch.setattr(ParallelEncoderDecoder, "step", spy)
    out = model.generate(prompt.expand(4, -1), 3, temperature=0)
    assert rows == [(1, 5), (4, 1), (4, 1)]
    assert torch.equal(out, model.generate(prompt, 3, temperature=0).expand(4, -1))


def test_a_row_is_drawn_the_same_whatever_is_beside_it():
    model = build()

    def draw(batch):
        generator = torch.Generator().manual_seed(0)
        return model.generate(random_ids(1, 4).expand(batch, -1), 40, generator=generator)

    assert torch.equal(draw(1)[0], draw(3)[0]) and torch.equal(draw(3)[2], draw(10)[2])
    assert not torch.equal(draw(3)[0], draw(3)[1])


def test_rows_that_differ_when_the_window_moves():
    model, text = build({"n_expert": 8}), random_ids(3, 5)
    draw = lambda c: model.generate(  # noqa: E731
        text, 40, use_cache=c, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(draw(True), draw(False))


def test_window_start():
    assert [window_start(n, 4) for n in range(1, 11)] == [0, 0, 0, 0, 2, 2, 4, 4, 6, 6]
    assert [window_start(n, 1) for n in range(1, 4)] == [0, 1, 2]
    assert all(1 <= n - window_start(n, b) <= b for n in range(1, 60) for b in range(1, 12))


def test_generation_follows_its_generator_and_leaves_the_model_as_it_was():
    model = build({"dropout": 0.5}).train()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(random_ids(2, 20), 8, generator=generator)

    assert draw(0).shape == (2, 28)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert model.training
    next(model.stream(random_ids(1, 4), 5))  # and then let go of, half way
    assert model.training
    assert torch.equal(model.generate(random_ids(2, 4), 0), random_ids(2, 4))


def test_between_tokens_each_module_is_in_the_mode_that_it_had():
    model = build({"dropout": 0.5}).train()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    for _ in model.stream(random_ids(1, 4), 3):
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert torch.is_grad_enabled()
    with pytest.raises(ValueError):
        model.generate(random_ids(1, 4), 1, temperature=-1)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for _ in range(2):
        again = [model.generate(random_ids(1, 4), 9, temperature=0) for _ in range(2)]
        assert torch.equal(*again)  # without dropout
        model.eval().encoder.train()  # also where a part alone is in training


def test_a_token_that_stream_gave_can_be_trained_on():
    model, text = build().train(), random_ids(2, 4)
    for token in model.stream(text, 3):
        text = torch.cat([text, token], dim=1)
        model(token, token).loss.backward()
    model(text, text).loss.backward()
    model(model.generate(text, 2), random_ids(2, 9)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    usual = dict(temperature=1.0, top_k=None, top_p=None)

    def frequencies(**how):
        draws = torch.rand(20000, generator=generator)
        drawn = sample_token(logits.expand(20000, -1), draws, **{**usual, **how})
        return torch.bincount(drawn[:, 0], minlength=4) / 20000

    def close_to(*expected):
        return pytest.approx(expected, abs=0.02)

    assert frequencies().tolist() == close_to(0.5, 0.25, 0.15, 0.1)
    squares = [0.25, 0.0625, 0.0225, 0.01]
    assert frequencies(temperature=0.5).tolist() == close_to(*(s / sum(squares) for s in squares))
    assert frequencies(top_k=2).tolist() == close_to(2 / 3, 1 / 3, 0, 0)
    assert frequencies(top_k=9).tolist() == close_to(0.5, 0.25, 0.15, 0.1)
    assert frequencies(top_p=0.5).tolist() == close_to(1, 0, 0, 0)
    assert frequencies(top_p=0.6).tolist() == close_to(2 / 3, 1 / 3, 0, 0)
    assert frequencies(top_p=1e-9).tolist() == close_to(1, 0, 0, 0)
    assert frequencies(temperature=0).tolist() == close_to(1, 0, 0, 0)
    ends = torch.tensor([0.0, 1 - 2**-24])  # the least draw, the largest: never of probability 0
    none_of_it = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(2, -1)
    assert sample_token(none_of_it, ends, **usual).tolist() == [[1], [2]]
    tie = torch.tensor([1.0, 3.0, 3.0]).expand(2, -1)
    assert sample_token(tie, ends, 0.0, None, None).tolist() == [[1], [1]]
    assert frequencies(temperature=1e-46).tolist() == close_to(1, 0, 0, 0)
    for temperature in (0.0, 1.0):
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match="the logits are not finite"):
                sample_token(torch.tensor([[0.0, bad]]), torch.zeros(1), temperature, None, None)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_in_bfloat16(use_cache):
    for fields in (LEAN | NEW, GPT, {"bias": True}):
        idx, expected = random_ids(2, 9), build(fields)(random_ids(2, 9)).logits
        for autocast in (False, True):
            model = build(fields) if autocast else build(fields).bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert model.generate(idx, 20, use_cache=use_cache).shape == (2, 29)
                cache = Cache(model, 2, 16)
                for start, end in [(0, 5), *((t, t + 1) for t in range(5, 9))]:
                    logits = model.step(idx[:, start:end], cache)
                torch.testing.assert_close(logits, model(idx).logits, atol=0.03, rtol=0.05)
            torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


# ---- compiled ---------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """torch.compile makes the graph and runs it as it is; how many graphs it made."""
    made, usual = [], torch.compile
    backend = lambda graph, _: made.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **how: usual(f, **{**how, "backend": backend}))
    torch.compiler.reset()
    return made


COMPILED = [
    {"n_expert": 8, "lateral": True},
    {"n_expert": 8, "router_input": "encoder", "expert_site": "output", "bias": True},
    GPT | NEW | {"n_expert": 8},
    LEAN,
    LEAN | NEW | {"n_expert": 8, "router_input": "encoder"},
]


@pytest.mark.parametrize("fields", COMPILED, ids=variant_name)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_compiled_step_draws_the_same(fields, batch, compilations):
    model, how = build(fields), dict(max_new_tokens=30, temperature=0)
    texts = [random_ids(batch, length, seed=length) for length in (5, 7, 5)]
    expected = [model.generate(text, **how) for text in texts]
    compile_step(model)
    assert all(
        torch.equal(model.generate(t, **how), x) for t, x in zip(texts, expected, strict=True)
    )
    assert len(compilations) == 1  # for all positions, windows and texts
    draws = [model.generate(texts[0], 20, generator=torch.Generator().manual_seed(0)) for _ in "12"]
    assert torch.equal(*draws) and len(compilations) == 1
    assert torch.equal(model.generate(texts[0], **how, use_cache=False), expected[0])


def test_any_number_of_sizes_is_compiled(compilations):
    model = build(GPT | {"n_layer": 1})
    compile_step(model)
    for new in range(2, 12):  # more than torch's usual limit of 8
        text = random_ids(1, 2)
        expected = model.generate(text, new, temperature=0, use_cache=False)
        assert torch.equal(model.generate(text, new, temperature=0), expected)
    assert len(compilations) == 10


def test_another_number_of_texts_is_compiled_again(compilations):
    model = build(LEAN)
    compile_step(model)
    for batch, graphs in ((1, 1), (2, 2), (1, 2)):
        model.generate(random_ids(batch, 5), 30)
        assert len(compilations) == graphs


def test_options_of_compiling_can_be_changed(compilations):
    model, text = build(LEAN), random_ids(1, 5)
    expected = model.generate(text, 9, temperature=0)
    compile_step(model, fullgraph=False, dynamic=None)
    assert torch.equal(model.generate(text, 9, temperature=0), expected) and len(compilations) == 1


def test_a_copy_of_a_compiled_model_has_weights_of_its_own(compilations):
    model, text = build(LEAN), random_ids(1, 5)
    compile_step(model)
    before, other = model.generate(text, 9, temperature=0), copy.deepcopy(model)
    with torch.no_grad():
        other.tok_emb.weight.mul_(-1.0)
        other.ln_out.weight.mul_(-2.0)
    expected = build(LEAN)
    expected.load_state_dict(other.state_dict())
    assert torch.equal(
        other.generate(text, 9, temperature=0), expected.generate(text, 9, temperature=0)
    )
    assert torch.equal(model.generate(text, 9, temperature=0), before)


@torch.no_grad()
def test_several_tokens_behind_a_compiled_step():
    for fields in (LEAN, GPT, {"n_expert": 8}):
        model, text = build(fields), random_ids(2, 9)
        cache = Cache(model, 2, 16)
        model.step(text[:, :4], cache)
        cache.length = torch.tensor(4)
        logits = model.step(text[:, 4:], cache)
        assert logits.shape == (2, 1, 31)
        torch.testing.assert_close(logits, all_logits(model, text)[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_by_inductor():
    for fields in (COMPILED[0], COMPILED[-1]):
        model, text = build(fields | {"n_layer": 1}), random_ids(2, 5)
        expected = model.generate(text, 30, temperature=0)
        compile_step(model)
        assert torch.equal(model.generate(text, 30, temperature=0), expected)


@pytest.mark.parametrize(
    "fields",
    [*VARIANTS[:2], LEAN | NEW | {"bias": True}, *EXPERTS[:5], *COMPILED],
    ids=variant_name,
)
def test_compiles_into_one_graph(fields, compilations):
    model, idx = build(fields), random_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True)
    for scale in (0.0, 0.3, 1.0):  # a tensor does not make it compile again
        expected = model(idx, idx, torch.tensor(scale)).loss
        torch.testing.assert_close(compiled(idx, idx, torch.tensor(scale)).loss, expected)
    assert len(compilations) == 1


# ---- an nn.Module like any other --------------------------------------------


@every_variant
def test_a_model_made_without_memory_takes_its_weights(fields):
    model, idx = build(fields), random_ids(2, 16)
    for fill in (False, True):
        with torch.device("meta"):
            empty = ParallelEncoderDecoder(model.config)
        empty = empty.to_empty(device="cpu") if fill else empty
        empty.load_state_dict(model.state_dict(), assign=True)
        torch.testing.assert_close(empty.eval()(idx, idx), model(idx, idx))


@every_variant
def test_copies_are_the_same_model(fields):
    model, idx = build(fields), random_ids(2, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(idx, idx), model(idx, idx))
        assert torch.equal(
            other.generate(idx, 9, temperature=0), model.generate(idx, 9, temperature=0)
        )
    params = {n: p * 0.5 for n, p in model.named_parameters()}
    halved = torch.func.functional_call(model, params, (idx, idx)).loss
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(model(idx, idx).loss, halved)


@pytest.mark.parametrize("fields", [{}, GPT, LEAN | NEW, {"n_expert": 8}], ids=variant_name)
@pytest.mark.parametrize("with_targets", [True, False])
def test_exports_with_any_length(fields, with_targets):
    model, T = build(fields), torch.export.Dim("T", min=2, max=16)
    args = (random_ids(2, 9),) * (2 if with_targets else 1)
    shapes = {"idx": {1: T}} | ({"targets": {1: T}} if with_targets else {})
    exported = torch.export.export(model, args, dynamic_shapes=shapes).module()
    for length in (2, 9, 16):
        args = (random_ids(2, length, seed=length),) * len(args)
        torch.testing.assert_close(exported(*args).logits, model(*args).logits)


def test_a_copied_config_with_lazy_annotations():
    source = inspect.getsource(ModelConfig)
    names = {"dataclass": model_file.dataclass, "fields": model_file.fields, "math": math}
    exec(f"from __future__ import annotations\n{source}", names)
    assert names["ModelConfig"](n_embd=24, n_head=2).n_embd == 24
    for wrong in ({"n_embd": "24"}, {"arch": "encoder"}, {"bias": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            names["ModelConfig"](**wrong)


def test_a_config_of_ones_own():
    @model_file.dataclass
    class Mine(ModelConfig):
        extra: int | None = None
        rate: float = 1.0

    assert Mine(extra=3, rate=2).rate == 2.0
    with pytest.raises(ValueError, match="rate='a': must be of type float"):
        Mine(rate="a")


# ---- mistakes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"arch": "encoder"}, "arch='encoder': must be one of parallel, decoder_only"),
        ({"position_embedding": "alibi"}, "position_embedding='alibi': must be one of learned, ro"),
        ({"n_layer": 0}, "n_layer=0: must be at least 1"),
        ({"n_head": 5}, "n_head=5: must be a divisor of n_embd=24"),
        (
            {"n_head": 8, "position_embedding": "rotary"},
            "n_head=8: must be a divisor of n_embd/2=12",
        ),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"n_expert": 5}, "n_expert=5: must be 0, or a divisor of the 96 hidden units"),
        ({"n_expert": -4}, "n_expert=-4: must be 0, or a divisor"),
        ({"n_expert": 96, "expert_site": "output"}, "n_expert=96: .* divisor of the 24 output"),
        ({"n_expert": 8, "expert_site": "input"}, "expert_site='input': must be one of hidden"),
        ({"n_expert": 8, "router_input": "e"}, "router_input='e': must be one of hidden, encoder"),
        ({"n_expert": 8, "router_n_head": 3}, "router_n_head=3: must be a divisor of n_expert=8"),
        ({"router_head_dim": 0}, "router_head_dim=0: must be at least 1"),
        ({"shift_init": 3.2}, r"shift_init=3.2: must be in \[0, pi\]"),
        ({"shift_init": -0.1}, r"shift_init=-0.1: must be in \[0, pi\]"),
        ({"l1_norm": "l2"}, "l1_norm='l2': must be one of linear, squared"),
        ({"entropy_weight": -0.1}, "entropy_weight=-0.1: must be finite and not negative"),
        ({"entropy_weight": math.inf}, "entropy_weight=inf"),
        ({"l1_weight": math.nan}, "l1_weight=nan: must be finite and not negative"),
        ({"n_embd": "24"}, "n_embd='24': must be of type int"),
        ({"bias": 1}, "bias=1: must be of type bool"),
        ({"shared_kv": "yes"}, "shared_kv='yes': must be of type bool"),
        ({"vocab_size": True}, "vocab_size=True: must be of type int"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**{**SMALL, **fields})


IDS = "must be token ids"


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m(random_ids(1, 17)), rf"int64 \(1, 17\): {IDS} \(B, T\), T from 1 to 16"),
        (lambda m: m(random_ids(1, 17), random_ids(1, 17)), rf"\(1, 17\): {IDS}"),
        (lambda m: m(random_ids(1, 0)), rf"\(1, 0\): {IDS}"),
        (lambda m: m(random_ids(5)), rf"\(5,\): {IDS}"),
        (lambda m: m(torch.randn(2, 4)), rf"float32 \(2, 4\): {IDS}"),
        (lambda m: m(random_ids(1, 4), random_ids(1, 3)), r"targets is \(1, 3\), idx \(1, 4\)"),
        (lambda m: m(random_ids(2, 3), random_ids(3, 2)), r"targets is \(3, 2\)"),
        (lambda m: m.generate(random_ids(1, 4), 1, temperature=-1), "temperature=-1: must be"),
        (lambda m: m.generate(random_ids(1, 4), 1, top_k=0), "top_k=0: must be at least 1"),
        (lambda m: m.generate(random_ids(1, 4), 1, top_p=0), r"top_p=0: must be in \(0, 1\]"),
        (lambda m: m.generate(random_ids(1, 4), -1), "max_new_tokens=-1: must not be negative"),
        (lambda m: m.generate(random_ids(1, 0), 1), r"\(1, 0\)"),
        (lambda m: m.generate(random_ids(5), 1), rf"\(5,\): {IDS}"),
        (lambda m: m.generate(torch.randn(1, 40), 1), IDS),
        (lambda m: m.expert_masks(random_ids(1, 4)), "n_expert=0: this model has no experts"),
    ],
)
def test_a_bad_call_says_what_is_allowed(call, said):
    with pytest.raises(ValueError, match=said):
        call(build())


def test_model_file_stands_alone(tmp_path):
    source = Path(model_file.__file__).read_text(encoding="utf-8")
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported - {"torch"} <= sys.stdlib_module_names
    (tmp_path / "model.py").write_text(source, encoding="utf-8")
    code = (
        "import torch, model as m; c = m.ModelConfig(block_size=8, vocab_size=9, n_embd=12);"
        "print(m.ParallelEncoderDecoder(c).generate(torch.zeros(1, 1, dtype=int), 9).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch.Size([1, 10])", done.stderr

"""Tests of model.py: against torch.nn's layers, GPT-2, a second writing of the equations, numbers.

python -m pytest test_model.py
"""

import ast
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import model as model_file
from model import (
    Cache,
    FeedForward,
    Layer,
    Mask,
    ModelConfig,
    ParallelEncoderDecoder,
    apply_mask,
    encoder_loss_of,
    entropy,
    mask_statistics,
    round_mask,
    sample_token,
    window_start,
)

torch.set_num_threads(1)  # the tensors are small, and the cores may be shared
SMALL = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=24)

# Every value of every field beside the defaults, and what is worth trying together.
VARIANTS = [
    {},
    {"arch": "decoder_only"},
    {"bias": True},
    {"cross_first": True},
    {"lateral": True},
    {"decoder_self_attention": False},
    {"n_cross_head": 4},
    {"encoder_loss": "mse"},
    {"encoder_loss": "cosine"},
    {"encoder_loss": "log_cosine"},
    {"next_position": "add"},
    {"next_position": "subtract"},
    {"arch": "decoder_only", "next_position": "add", "bias": True},
    {"arch": "decoder_only", "next_position": "subtract"},
    {"lateral": True, "decoder_self_attention": False, "bias": True},
    {"cross_first": True, "lateral": True, "n_cross_head": 1, "next_position": "subtract"},
]
# The same for learned dropout: every value of every field of its table.
EXPERTS = [
    {"n_expert": 8, "l1_weight": 0.1, "entropy_weight": 0.05},
    {"n_expert": 96, "arch": "decoder_only", "l1_weight": 0.1, "l1_norm": "squared"},
    {"n_expert": 1, "bias": True},
    {"n_expert": 24, "expert_site": "output", "entropy_weight": 0.5},
    {"n_expert": 8, "router_input": "embedding", "l1_weight": 0.1},
    {"n_expert": 8, "router_input": "embedding", "arch": "decoder_only", "router_n_head": 4},
    {"n_expert": 8, "router_n_head": 2, "router_head_dim": 5, "router_detach": True},
    {"n_expert": 8, "shift_init": math.pi, "penalty_schedule": "linear"},
    {"n_expert": 8, "shift_init": 1.5, "penalty_schedule": "exponential", "penalty_iters": 7},
    {"n_expert": 8, "rounding": "sigmoid", "rounding_scale": 20.0},
    {"n_expert": 8, "rounding": "none", "expert_site": "output", "bias": True, "lateral": True},
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
                of_router = name.endswith(("router.shift", "router.query_key_value.weight"))
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


def copy_attention(target, attention):
    """Our Attention into torch.nn.MultiheadAttention."""
    if hasattr(attention, "query_key_value"):
        parts = [attention.query_key_value]
    else:
        parts = [attention.query, attention.key_value]
    target.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    target.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    copy_linear(target.out_proj, attention.proj)


def reference_layer(cls):
    return cls(24, 2, 96, dropout=0.0, activation=F.gelu, norm_first=True, batch_first=True).eval()


def spread_layer(**kwargs):
    torch.manual_seed(0)
    layer = Layer(ModelConfig(**SMALL, bias=True), **kwargs).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return layer


@torch.no_grad()
def test_encoder_layer_equals_torch():
    ours, theirs = spread_layer(), reference_layer(torch.nn.TransformerEncoderLayer)
    copy_attention(theirs.self_attn, ours.attention)
    for a, b in [("norm1", "ln_attention"), ("norm2", "ln_ff")]:
        copy_linear(getattr(theirs, a), getattr(ours, b))
    copy_linear(theirs.linear1, ours.ff.w1)
    copy_linear(theirs.linear2, ours.ff.w2)
    x = torch.randn(3, 16, 24)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    torch.testing.assert_close(ours(x, None)[0], theirs(x, src_mask=mask), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoder_layer_equals_torch():
    ours, theirs = spread_layer(cross=True), reference_layer(torch.nn.TransformerDecoderLayer)
    copy_attention(theirs.self_attn, ours.attention)
    copy_attention(theirs.multihead_attn, ours.cross_attention)
    for a, b in [("norm1", "ln_attention"), ("norm2", "ln_cross"), ("norm3", "ln_ff")]:
        copy_linear(getattr(theirs, a), getattr(ours, b))
    copy_linear(theirs.linear1, ours.ff.w1)
    copy_linear(theirs.linear2, ours.ff.w2)
    d, e = torch.randn(3, 16, 24), torch.randn(3, 16, 24)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    expected = theirs(d, ours.ln_memory(e), tgt_mask=mask, memory_mask=mask)
    torch.testing.assert_close(ours(d, e)[0], expected, atol=1e-5, rtol=1e-5)


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
        for conv, module in (  # GPT-2's Conv1D holds its weight transposed
            (block.attn.c_attn, attention.query_key_value),
            (block.attn.c_proj, attention.proj),
            (block.mlp.c_fc, layer.ff.w1),
            (block.mlp.c_proj, layer.ff.w2),
        ):
            conv.weight.copy_(module.weight.T)
            conv.bias.copy_(module.bias)
    idx = random_ids(3, 16)
    torch.testing.assert_close(all_logits(ours, idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def reference_forward(model, idx):
    """The equations once more, in einsums over the parameters' names; (B, T, V)."""
    w, c = dict(model.named_parameters()), model.config
    T = idx.size(1)

    def linear(name, x):
        y = torch.einsum("btc,dc->btd", x, w[f"{name}.weight"])
        return y + w[f"{name}.bias"] if c.bias else y

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return x + w[f"{name}.bias"] if c.bias else x

    def attend(name, x, memory, n_head):
        if f"{name}.query.weight" in w:  # cross-attention
            q, (k, v) = linear(f"{name}.query", x), linear(f"{name}.key_value", memory).chunk(2, -1)
        else:
            q, k, v = linear(f"{name}.query_key_value", x).chunk(3, -1)
        return linear(f"{name}.proj", attention(q, k, v, n_head))

    def attention(q, k, v, n_head):
        q, k, v = (t.reshape(*t.shape[:2], n_head, -1) for t in (q, k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
        future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)

    def route(router, x, groups):
        """The rounded masks, each mask value repeated for the units of its expert."""
        keys = c.router_n_head * c.router_head_dim
        qkv = linear(f"{router}.query_key_value", x)
        q, k, v = qkv.tensor_split([keys, 2 * keys], -1)
        A = attention(q, k, v, c.router_n_head)
        m = (torch.cos(A + w[f"{router}.shift"]) + 1) / 2
        m = m.round()  # where no m is 0.5
        return m.unflatten(-1, (groups, -1)).unbind(-2)

    def mask_of(layer, x):
        if c.n_expert == 0:
            return torch.ones(1)
        if c.router_input == "hidden":
            return route(f"{layer}.ff.router", x, 1)[0]
        blocks = [f"{s}.{i}" for i in range(c.n_layer) for s in ("encoder", "decoder")]
        blocks = [b for b in blocks if c.arch == "parallel" or b.startswith("decoder")]
        return route("router", emb, len(blocks))[blocks.index(layer)]

    def feed_forward(layer, x):
        x = norm(f"{layer}.ln_ff", x)
        h, r = linear(f"{layer}.ff.w1", x), mask_of(layer, x)
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        units = h if c.expert_site == "hidden" else x
        r = r.repeat_interleave(units.size(-1) // r.size(-1), dim=-1)
        if c.expert_site == "hidden":
            return linear(f"{layer}.ff.w2", h * r)
        return linear(f"{layer}.ff.w2", h) * r

    def self_attend(layer, x):
        x_norm = norm(f"{layer}.ln_attention", x)
        return attend(f"{layer}.attention", x_norm, x_norm, c.n_head)

    emb = w["tok_emb.weight"][idx] + w["pos_emb.weight"][:T]
    e, d = emb, linear("w_in", emb) if c.arch == "parallel" else emb
    if c.next_position == "add":
        d = d + w["pos_emb.weight"][1 : T + 1]
    for i in range(c.n_layer):
        enc, dec = f"encoder.{i}", f"decoder.{i}"
        if c.arch == "decoder_only":
            d = d + self_attend(dec, d)
        else:
            e = e + self_attend(enc, e)
            e = e + feed_forward(enc, e)
            memory = norm(f"{dec}.ln_memory", e)
            steps = ["self"] * c.decoder_self_attention + ["cross"]
            for step in reversed(steps) if c.cross_first else steps:
                if step == "self":
                    d = d + self_attend(dec, d)
                else:
                    query, heads = norm(f"{dec}.ln_cross", d), c.n_cross_head or c.n_head
                    d = d + attend(f"{dec}.cross_attention", query, memory, heads)
                    if c.lateral:
                        d = d + linear(f"{dec}.lateral", memory)
        d = d + feed_forward(dec, d)
    out = norm("ln_out", d)
    if c.next_position == "subtract":
        out = out - w["pos_emb.weight"][1 : T + 1]
    return torch.einsum("btc,vc->btv", out, w["tok_emb.weight"])


@every_variant
@torch.no_grad()
def test_forward_equals_the_equations(fields):
    model, idx = build(fields), random_ids(3, 16)
    targets = random_ids(3, 16, seed=2)
    targets[:, :3] = -1
    expected = reference_forward(model, idx)
    output = model(idx, targets)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    picked = expected.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    cross_entropy = -picked[targets >= 0].mean()
    torch.testing.assert_close(output.metrics["cross_entropy"], cross_entropy)
    penalties = {"encoder_loss": 1.0}
    penalties |= {"entropy": model.config.entropy_weight, "l1": model.config.l1_weight}
    extra = sum(weight * output.metrics.get(name, 0.0) for name, weight in penalties.items())
    torch.testing.assert_close(output.loss, cross_entropy + extra)

    last = model(idx)
    assert last.loss is None and last.metrics == {} and last.logits.shape == (3, 1, 31)
    torch.testing.assert_close(last.logits[:, 0], output.logits[:, -1])


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
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
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
    attention, ff = 4 * linear, 8 * C * C + b * 5 * C
    G, keys = c.n_expert, c.router_n_head * c.router_head_dim
    blocks = L * (2 if c.arch == "parallel" else 1)
    routers, shares = (blocks, 1) if c.router_input == "hidden" else (1, blocks)
    router = (C + b) * (2 * keys + shares * G) + shares * G if G else 0
    encoder = 2 * norm + attention + ff
    decoder = 3 * norm + attention + ff + linear * c.lateral
    decoder += (norm + attention) * c.decoder_self_attention
    body = L * (encoder + decoder) + linear if c.arch == "parallel" else L * encoder
    assert model.num_params() == V * C + body + norm + routers * router
    positions = c.block_size + (c.next_position != "none")
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


# ---- the parts, against numbers ---------------------------------------------


def test_encoder_loss_by_hand():
    emb = torch.tensor([[[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]])
    # LN(E) has the rows (1, -1), (-1, 1), (1, -1); their running means follow.
    mean = torch.tensor([[[1.0, -1.0], [0.0, 0.0], [1 / 3, -1 / 3]]])
    encoded = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [2.0, -2.0]]])
    mse = (((encoded - mean) ** 2).sum() / 6).item()
    assert encoder_loss_of("mse", encoded, emb).item() == pytest.approx(mse, abs=1e-4)
    cos = [0.0, 0.0, 1.0]
    expected = sum((1 - c) / 2 for c in cos) / 3
    assert encoder_loss_of("cosine", encoded, emb).item() == pytest.approx(expected, abs=1e-4)
    expected = sum(-math.log((1 + c) / 2) for c in cos) / 3
    assert encoder_loss_of("log_cosine", encoded, emb).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["mse", "cosine", "log_cosine"])
def test_encoder_loss_pulls_the_encoder_alone(kind):
    model, idx = build({"encoder_loss": kind, "encoder_loss_weight": 0.25}), random_ids(2, 16)
    output = model(idx, idx)
    extra = output.loss - output.metrics["cross_entropy"]
    torch.testing.assert_close(extra, 0.25 * output.metrics["encoder_loss"])
    # Its target is detached: without a path through the layers, no gradient reaches E.
    emb = torch.randn(2, 16, 24, requires_grad=True)
    encoded = torch.randn(2, 16, 24, requires_grad=True)
    encoder_loss_of(kind, encoded, emb).backward()
    assert emb.grad is None and encoded.grad.any()


def test_opposite_vectors_leave_log_cosine_finite():
    emb = torch.tensor([[[1.0, -1.0]]])
    encoded = torch.tensor([[[-1.0, 1.0]]], requires_grad=True)
    loss = encoder_loss_of("log_cosine", encoded, emb)
    loss.backward()
    assert loss.isfinite() and encoded.grad.isfinite().all()


def test_w_in_starts_as_the_identity():
    assert torch.equal(build(spread=False).w_in.weight, torch.eye(24))


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


def test_schedules_by_hand():
    def growth(schedule, *its):
        config = ModelConfig(penalty_schedule=schedule, penalty_iters=10)
        return [config.penalty_growth(it) for it in its]

    assert growth("constant", 0, 5, 99) == [1, 1, 1]
    assert growth("linear", 0, 1, 5, 10, 99) == [0, 0.1, 0.5, 1, 1]
    exponential = [0, (math.e**2.5 - 1) / (math.e**5 - 1), 1, 1]
    assert growth("exponential", 0, 5, 10, 99) == pytest.approx(exponential)


def test_rounding_by_hand():
    m = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.75, 1.0])
    for rounding in ("stochastic", "sigmoid", "none"):
        evaluated = round_mask(m, rounding, 60.0, training=False)
        assert evaluated.tolist() == [0, 0, 0, 1, 1, 1]
    soft = [1 / (1 + math.exp(-60 * (p - 0.5))) for p in m.tolist()]
    assert round_mask(m, "sigmoid", 60.0, training=True).tolist() == pytest.approx(soft)
    assert torch.equal(round_mask(m, "none", 60.0, training=True), m)
    torch.manual_seed(0)
    drawn = round_mask(m.expand(20000, -1), "stochastic", 60.0, training=True)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}  # exactly, so that off is nothing at all
    assert drawn.mean(0).tolist() == pytest.approx(m.tolist(), abs=0.02)
    assert drawn[:, 0].max() == 0 and drawn[:, -1].min() == 1


def test_stochastic_rounding_is_straight_through():
    """The slope dr/dm is 1 everywhere, also where m was rounded to 0."""
    torch.manual_seed(0)
    m = torch.rand(3, 5, 8, requires_grad=True)
    r = round_mask(m, "stochastic", 60.0, training=True)
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
    r = mask.r.detach().requires_grad_()
    assert (r == 0).any() and (r == 1).any()
    r_units = r.repeat_interleave((96 if site == "hidden" else 24) // 8, dim=-1)
    hidden = F.gelu(ff.w1(x))
    again = ff.w2(hidden * r_units) if site == "hidden" else ff.w2(hidden) * r_units
    torch.testing.assert_close(y, again)
    (slope,) = torch.autograd.grad(again, r, upstream)
    (expected,) = torch.autograd.grad(ff.router(x), ff.router.shift, slope)
    torch.testing.assert_close(got, expected)


def test_penalties_keep_their_precision_under_autocast():
    model, idx = build({"n_expert": 8}).train(), random_ids(2, 16)
    model.penalty_weights.copy_(torch.tensor([0.0185, 0.037]))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.stacks(idx)[-1].m.dtype == torch.float32
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
    m, r = model.expert_masks(idx, rounded=False), model.expert_masks(idx)
    stacks = 2 if c.arch == "parallel" else 1
    assert m.shape == r.shape == (2, stacks, 3, 16, c.n_expert)
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


def test_the_weights_of_the_penalties_can_be_set():
    model, idx = build({"n_expert": 8, "l1_weight": 0.1, "entropy_weight": 0.2}), random_ids(2, 16)
    model.penalty_weights.copy_(torch.tensor([3.0, 5.0]))
    loss, metrics = model(idx, idx)[1:]
    extra = 3 * metrics["entropy"] + 5 * metrics["l1"]
    torch.testing.assert_close(loss, metrics["cross_entropy"] + extra)
    assert "penalty_weights" not in model.state_dict()


def test_experts_that_are_off_give_nothing():
    """With all of them off, the model is the one whose feed-forward blocks are cut out."""
    model, idx = build({"n_expert": 8}), random_ids(2, 16)
    routers = [m for m in model.modules() if hasattr(m, "shift")]
    with torch.no_grad():
        for router in routers:
            router.query_key_value.weight.zero_()
            router.shift.fill_(math.pi)
        assert model.expert_masks(idx).sum() == 0
        off = all_logits(model, idx)
        for module in model.modules():
            if hasattr(module, "w2"):
                module.w1.weight.mul_(1e6)
        assert torch.equal(all_logits(model, idx), off)
        for router in routers:
            router.shift.zero_()
        assert model.expert_masks(idx).min() == 1


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
    m = model.expert_masks(idx, rounded=False)
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


@pytest.mark.parametrize(
    "fields", [e for e in EXPERTS if not e.get("router_detach")], ids=variant_name
)
def test_the_gradient_of_the_router_is_that_of_the_unrounded_path(fields):
    """Autograd through mask, block and penalties, against finite differences."""
    rounding = "sigmoid" if fields.get("rounding") == "sigmoid" else "none"
    fields = {**fields, "rounding": rounding, "entropy_weight": 0.3, "l1_weight": 0.2}
    model, idx = build(fields).double().train(), random_ids(2, 8)
    model.penalty_weights = model.penalty_weights.double()
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


def test_a_detached_router_sends_nothing_to_its_input():
    for router_input in ("hidden", "embedding"):
        for detach in (False, True):
            fields = dict(n_expert=8, router_input=router_input, router_detach=detach)
            fields |= dict(arch="decoder_only", n_layer=1, l1_weight=1.0)
            model, idx = build(fields).train(), random_ids(2, 16)
            stats = mask_statistics(model.stacks(idx)[-1], "linear")
            stats["l1"].sum().backward()
            reached = model.pos_emb.weight.grad is not None and model.pos_emb.weight.grad.any()
            assert bool(reached) is not detach


@every_expert_variant
def test_masks_are_causal(fields):
    model, idx = build(fields), random_ids(2, 16)
    before = model.expert_masks(idx, rounded=False)
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        after = model.expert_masks(changed, rounded=False)
        torch.testing.assert_close(after[..., :t, :], before[..., :t, :], atol=1e-6, rtol=0)
        assert (after[..., t, :] != before[..., t, :]).any()


def test_more_weight_on_a_penalty_gives_less_of_it():
    text = Path(__file__).with_name("LICENSE").read_text("utf-8")
    windows = torch.tensor([min(ord(char), 127) for char in text]).unfold(0, 33, 8)

    def train(**weights):
        sizes = dict(vocab_size=128, block_size=32, l1_norm="squared")
        model = build({"n_expert": 8, **sizes, **weights}, spread=False).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
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


# ---- generation -------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_argmax_of_the_window(fields, use_cache):
    model, text = build(fields), random_ids(2, 3)
    out = model.generate(text, 30, temperature=0, use_cache=use_cache)
    for _ in range(30):  # block 16, moved by 8: the window holds 9 to 16 tokens once it is full
        start = 0
        while text.size(1) - start > 16:
            start += 8
        logits = reference_forward(model, text[:, start:])[:, -1]
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, text)


@every_variant
@pytest.mark.parametrize("batch", [1, 10])
def test_cached_logits_are_those_of_the_whole_text(fields, batch):
    model, text, cache = build(fields), random_ids(batch, 16), Cache(batch, 16)
    expected = all_logits(model, text)
    with torch.inference_mode():
        for start, end in [(0, 5), *((t, t + 1) for t in range(5, 16))] * 2:
            if start == 0:
                cache.length = 0  # as when the window moves: old entries are still there
            logits = model(text[:, start:end], cache=cache).logits
            torch.testing.assert_close(logits[:, 0], expected[:, end - 1], atol=1e-5, rtol=1e-5)


def test_the_cache_is_allocated_once():
    model, cache = build({"n_expert": 8, "n_layer": 1}), Cache(3, 16)
    model(random_ids(3, 7), cache=cache)
    places = [buffer.data_ptr() for buffer in cache.buffers.values()]
    shapes = sorted(tuple(buffer.shape) for buffer in cache.buffers.values())
    assert shapes == [(3, 16, 24)] * 2 + [(3, 16, 48)] * 3  # of two routers, 16 + 8; 24 + 24
    while cache.length < 16:
        model(random_ids(3, 1), cache=cache)
    assert [buffer.data_ptr() for buffer in cache.buffers.values()] == places


def test_what_does_not_fit_a_cache():
    model, cache = build(), Cache(3, 16)
    with pytest.raises(ValueError, match=r"must be \(3, T\) behind the 0 tokens of a cache of 16"):
        model(random_ids(2, 4), cache=cache)
    with pytest.raises(ValueError, match="targets has the shape .* or a cache"):
        model(random_ids(3, 4), random_ids(3, 4), cache=cache)
    model(random_ids(3, 15), cache=cache)
    for shape in ((3, 2), (1, 1)):
        with pytest.raises(
            ValueError, match=r"must be \(3, 1\) behind the 15 tokens of a cache of 16"
        ):
            model(random_ids(*shape), cache=cache)
    model(random_ids(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"must be \(3, 1\) behind the 16 tokens of a cache of 16"):
        model(random_ids(3, 1), cache=cache)


def test_one_prompt_is_read_once(monkeypatch):
    model, prompt = build(), random_ids(1, 5)
    rows, stacks = [], ParallelEncoderDecoder.stacks
    spy = lambda self, idx, cache: rows.append(idx.shape) or stacks(self, idx, cache)  # noqa: E731
    monkeypatch.setattr(ParallelEncoderDecoder, "stacks", spy)
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


# ---- mistakes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"arch": "encoder"}, "arch='encoder': must be one of parallel, decoder_only"),
        ({"encoder_loss": "l2"}, "encoder_loss='l2': must be one of none, mse"),
        ({"next_position": "multiply"}, "next_position='multiply': must be one of none, add"),
        ({"n_layer": 0}, "n_layer=0: must be at least 1"),
        ({"n_head": 5}, "n_head=5: must be a divisor of n_embd=24"),
        ({"n_cross_head": 7}, "n_cross_head=7: must be 0 .*, or a divisor of n_embd=24"),
        ({"n_cross_head": -1}, "n_cross_head=-1: must be 0"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"dropout": math.nan}, "dropout=nan"),
        ({"encoder_loss_weight": -1}, "encoder_loss_weight=-1.0: must be finite and not negative"),
        ({"encoder_loss_weight": math.inf}, "encoder_loss_weight=inf"),
        ({"n_expert": 5}, "n_expert=5: must be 0, or a divisor of the 96 hidden units"),
        ({"n_expert": -4}, "n_expert=-4: must be 0, or a divisor"),
        ({"n_expert": 96, "expert_site": "output"}, "n_expert=96: .* divisor of the 24 output"),
        ({"n_expert": 8, "expert_site": "input"}, "expert_site='input': must be one of hidden"),
        ({"n_expert": 8, "router_input": "e"}, "router_input='e': must be one of hidden, embed"),
        ({"n_expert": 8, "router_n_head": 3}, "router_n_head=3: must be a divisor of n_expert=8"),
        ({"router_head_dim": 0}, "router_head_dim=0: must be at least 1"),
        ({"shift_init": 3.2}, r"shift_init=3.2: must be in \[0, pi\]"),
        ({"shift_init": -0.1}, r"shift_init=-0.1: must be in \[0, pi\]"),
        ({"rounding": "hard"}, "rounding='hard': must be one of stochastic, sigmoid, none"),
        ({"rounding_scale": -1.0}, "rounding_scale=-1.0: must be finite and not negative"),
        ({"l1_norm": "l2"}, "l1_norm='l2': must be one of linear, squared"),
        ({"entropy_weight": -0.1}, "entropy_weight=-0.1: must be finite and not negative"),
        ({"l1_weight": math.nan}, "l1_weight=nan: must be finite and not negative"),
        ({"penalty_schedule": "cosine"}, "penalty_schedule='cosine': must be one of constant"),
        ({"penalty_iters": 0}, "penalty_iters=0: must be at least 1"),
        ({"n_embd": "24"}, "n_embd='24': must be of type int"),
        ({"bias": 1}, "bias=1: must be of type bool"),
        ({"vocab_size": True}, "vocab_size=True: must be of type int"),
    ],
    ids=str,
)
def test_a_bad_field_is_named(fields, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m(random_ids(1, 17)), r"shape \(1, 17\): must be .* block_size=16"),
        (lambda m: m(random_ids(1, 0)), r"shape \(1, 0\)"),
        (lambda m: m(random_ids(5)), r"shape \(5,\)"),
        (lambda m: m(random_ids(1, 4), random_ids(1, 3)), r"targets has the shape \(1, 3\)"),
        (lambda m: m(random_ids(2, 3), random_ids(3, 2)), r"targets has the shape \(3, 2\)"),
        (lambda m: m.generate(random_ids(1, 4), 1, temperature=-1), "temperature=-1: must be"),
        (lambda m: m.generate(random_ids(1, 4), 1, top_k=0), "top_k=0: must be at least 1"),
        (lambda m: m.generate(random_ids(1, 4), 1, top_p=0), r"top_p=0: must be in \(0, 1\]"),
        (lambda m: m.generate(random_ids(1, 4), -1), "max_new_tokens=-1: must not be negative"),
        (lambda m: m.generate(random_ids(1, 0), 1), r"shape \(1, 0\)"),
    ],
)
def test_a_bad_call_says_what_is_allowed(call, said):
    with pytest.raises(ValueError, match=said):
        call(build())


@pytest.mark.parametrize("fields", [*VARIANTS[:2], VARIANTS[15], *EXPERTS[:5]], ids=variant_name)
def test_compiles_into_one_graph(fields):
    torch.compiler.reset()
    model, idx = build(fields), random_ids(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(idx, idx).loss, model(idx, idx).loss)


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

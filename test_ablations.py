"""Tests of experiments/ablations.py: against a second writing of the equations, torch.nn, numbers.

python -m pytest test_ablations.py
"""

import ast
import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import model as model_file
from test_model import GPT, LEAN, SMALL, assert_router_slope, random_ids

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "experiments"))
import ablations  # noqa: E402

torch.set_num_threads(1)  # the tensors are small, and the cores may be shared
# What the old lateral connection is compared with the new one under.
LEAN_W_LAT = dict(decoder_self_attention=False, shared_kv=True, position_embedding="rotary")
LEAN_W_LAT |= dict(qk_norm=True, token_shift=True)
ENCODER = dict(n_expert=8, router_input="encoder", l1_weight=0.1, entropy_weight=0.05)
OUTPUT = dict(n_expert=8, expert_site="output", router_n_head=2, router_head_dim=5)

# Ablations, separated by spaces, and the fields of a model that they are tried with.
VARIANTS = [
    ("cross_first()", {}),
    ("cross_first()", dict(shared_kv=True, bias=True)),
    ("cross_first()", dict(lateral=True, position_embedding="rotary", **ENCODER)),
    ("n_cross_head(4)", {}),
    ("n_cross_head(1)", dict(bias=True, lateral=True, decoder_self_attention=False, qk_norm=True)),
    ("w_lat()", {}),
    ("w_lat()", LEAN_W_LAT),
    ("w_lat(first=False)", dict(bias=True, shared_kv=True)),
    ("w_lat(gated=True)", dict(bias=True, position_embedding="rotary")),
    ("w_lat(gated=True)", {**LEAN_W_LAT, **ENCODER}),
    ("w_lat(gated=True,first=False)", dict(n_expert=8)),
    ("attention_encoder()", {}),
    ("attention_encoder()", dict(bias=True, **LEAN)),
    ("swiglu()", dict(bias=True)),
    ("swiglu()", LEAN),
    ("swiglu()", GPT),
    ("gate()", {}),
    ("gate()", dict(bias=True, position_embedding="rotary", qk_norm=True, **LEAN)),
    ("gate()", GPT),
    ("serial()", {}),
    ("serial()", dict(bias=True, lateral=True, decoder_self_attention=False)),
    ("serial()", dict(position_embedding="rotary", token_shift=True, **ENCODER)),
    ("next_position('add')", {}),
    ("next_position('add')", LEAN),
    ("next_position('add')", dict(bias=True, **GPT)),
    ("next_position('subtract')", {}),
    ("next_position('subtract')", LEAN),
    ("next_position('subtract')", GPT),
    ("rounding('none')", dict(n_expert=8, l1_weight=0.1)),
    ("rounding('none')", dict(bias=True, **LEAN, **OUTPUT)),
    ("rounding('sigmoid')", ENCODER),
    ("rounding('sigmoid',scale=20.0)", dict(n_expert=8, **GPT)),
    ("router_detach()", dict(n_expert=8, l1_weight=0.1)),
    ("router_detach()", {**LEAN, **ENCODER}),
    ("embedding_router()", dict(n_expert=8, l1_weight=0.1)),
    ("embedding_router()", dict(bias=True, **LEAN, **OUTPUT)),
    ("embedding_router()", dict(n_expert=8, router_n_head=4, **GPT)),
    ("top_k(2)", dict(n_expert=8)),
    ("top_k(3)", {**LEAN, **ENCODER}),
    ("top_k(2)", {**GPT, **OUTPUT}),
    ("serial() w_lat()", dict(decoder_self_attention=False)),
    ("router_detach() embedding_router()", dict(n_expert=8, l1_weight=0.1)),
]
FIELDS = [fields for _, fields in VARIANTS]
LABELS = [f"{text} {' '.join(f'{k}={v}' for k, v in fields.items())}" for text, fields in VARIANTS]
every_variant = pytest.mark.parametrize("text, fields", VARIANTS, ids=LABELS)


@pytest.fixture(autouse=True)
def model_file_stays_as_it_is():
    before = dict(vars(model_file))
    yield
    assert dict(vars(model_file)) == before


def build(text="", fields=None, seed=0, spread=True):
    """A small model with the ablations, in float64; `spread` makes its weights large, so that an
    error in one of them shows."""
    torch.manual_seed(seed)
    with ablations.restored():
        for one in text.split():
            ablations.apply(ablations.read(one))
        config = model_file.ModelConfig(**{**SMALL, **(fields or {})})
        model = model_file.ParallelEncoderDecoder(config)
    if spread:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) * (1.0 if "router" in name else 0.2))
    return model.double().eval()


def close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# ---- the equations once more ------------------------------------------------


@torch.no_grad()
def reference(model, text, idx):
    """The logits (B, T, V), from the parameters' names."""
    w, c, T = dict(model.named_parameters()), model.config, idx.size(1)
    parallel, G = c.arch == "parallel", c.n_expert
    n_cross = int(found[1]) if (found := re.search(r"n_cross_head\((\d+)", text)) else c.n_head

    def linear(name, x):
        y = torch.einsum("btc,dc->btd", x, w[f"{name}.weight"])
        return y + w[f"{name}.bias"] if c.bias else y

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        return x + w[f"{name}.bias"] if c.bias else x

    def turned(x, n_head):
        x = x.unflatten(-1, (n_head, -1))
        if c.qk_norm:
            x = x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
        if c.position_embedding == "learned":
            return x
        a, b = x.chunk(2, dim=-1)
        frequency = 10_000 ** (-torch.arange(a.size(-1)).double() / a.size(-1))
        angle = torch.arange(T)[:, None, None] * frequency
        z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    def mix(q, k, v):
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
        future = torch.arange(T)[None, :] > torch.arange(T)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v)

    def attend(name, x, source, memory, n_head):
        """x attends to memory, whose keys and values `source` projects."""
        k, v = linear(f"{source}.linear", memory).chunk(2, -1)
        q = turned(linear(f"{name}.query", x), n_head)
        y = mix(q, turned(k, n_head), v.unflatten(-1, (n_head, -1)))
        if "gate()" in text:
            y = y / (1 + torch.exp(-linear(f"{name}.gate", x)))[..., None]
        return linear(f"{name}.proj", y.flatten(2))

    def self_attend(layer, x):
        x = norm(f"{layer}.ln_attention", x)
        return attend(f"{layer}.attention", x, f"{layer}.attention.key_value", x, c.n_head)

    def route(router, x):
        """m and r of a router; r of a mixture of experts has the weights of those that are on."""
        if "top_k" in text:
            k = int(re.search(r"top_k\((\d)\)", text)[1])
            p = torch.einsum("btc,gc->btg", x, w[f"{router}.weight"] / c.n_embd).exp()
            p = p / p.sum(-1, keepdim=True)
            kept = p.sort(-1, descending=True).values[..., :k]
            on = (p >= kept[..., -1:]).double()
            return on, on * p * k / kept.sum(-1, keepdim=True)
        H, keys = c.router_n_head, c.router_n_head * c.router_head_dim
        q, k, v = linear(f"{router}.query_key_value", x).tensor_split([keys, 2 * keys], -1)
        A = mix(*(y.unflatten(-1, (H, -1)) for y in (q, k, v))).flatten(2)
        m = (torch.cos(A + w[f"{router}.shift"]) + 1) / 2
        if "'none'" in text:
            return m, m
        if "'sigmoid'" in text:
            scale = 20 if "scale=20" in text else 60
            return m, 1 / (1 + torch.exp(-scale * (m - 0.5)))
        return m, m.round()  # where no m is 0.5

    def mask(layer, x, memory):
        if "embedding_router" in text:
            stacks = ("encoder", "decoder") if parallel else ("decoder",)
            layers = [f"{stack}.{i}" for i in range(c.n_layer) for stack in stacks]
            return route("router", E)[1].split(G, dim=-1)[layers.index(layer)]
        encoder = c.router_input == "encoder" and memory is not None
        return route(f"{layer}.ff.router", memory if encoder else x)[1]

    def feed_forward(layer, x, memory=None):
        x = norm(f"{layer}.ln_ff", x)
        h = linear(f"{layer}.ff.w1", x)
        if "swiglu" in text:
            a, b = h[..., :64], h[..., 64:]
            return linear(f"{layer}.ff.w2", a / (1 + torch.exp(-a)) * b)
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        if G == 0:
            return linear(f"{layer}.ff.w2", h)
        if c.expert_site == "hidden":
            r = mask(layer, x, memory)
            return linear(f"{layer}.ff.w2", h * r.repeat_interleave(h.size(-1) // G, dim=-1))
        y = linear(f"{layer}.ff.w2", h)
        return y * mask(layer, y, memory).repeat_interleave(y.size(-1) // G, dim=-1)

    def lateral(layer, d, memory):
        y = linear(f"{layer}.lateral_proj", memory)
        if "gated" in text:
            gate = linear(f"{layer}.lateral_gate", norm(f"{layer}.ln_cross", d))
            y = y / (1 + torch.exp(-gate))
        return d + y

    E = w["tok_emb.weight"][idx]
    if c.token_shift:
        E = E + w["token_shift"] * F.pad(E, (0, 0, 1, 0))[:, :-1]
    if c.position_embedding == "learned":
        E = E + w["pos_emb.weight"][:T]
    states = [E]
    for i in range(c.n_layer if parallel else 0):
        layer, e = f"encoder.{i}", states[-1]
        if c.shared_kv:
            query, memory = norm(f"{layer}.ln_attention", e), norm(f"ln_memory.e{i}", e)
            e = e + attend(f"{layer}.attention", query, f"key_value.e{i}", memory, c.n_head)
        else:
            e = e + self_attend(layer, e)
        if "attention_encoder" not in text:
            e = e + feed_forward(layer, e)
        states.append(e)
    if "serial" in text:
        states = [E] + [states[-1]] * c.n_layer

    d = linear("w_in", E) if parallel and not c.lateral else E
    if "'add'" in text:
        d = d + w["pos_emb.weight"][1 : T + 1]
    for i in range(c.n_layer):
        layer = f"decoder.{i}"
        if not parallel:
            d = d + self_attend(layer, d)
            d = d + feed_forward(layer, d)
            continue
        memory = norm(f"ln_memory.e{i + 1}", states[i + 1])
        if c.lateral:
            d = d + (states[i + 1] - states[i])
        steps = ["self"] * c.decoder_self_attention + ["cross"]
        steps = steps[::-1] if "cross_first" in text else steps
        if "w_lat" in text:
            steps.insert(len(steps) - ("first=False" not in text), "lateral")
        for step in steps:
            if step == "self":
                d = d + self_attend(layer, d)
            elif step == "lateral":
                d = lateral(layer, d, memory)
            else:
                name, query = f"{layer}.cross_attention", norm(f"{layer}.ln_cross", d)
                d = d + attend(name, query, f"key_value.e{i + 1}", memory, n_cross)
        d = d + feed_forward(layer, d, memory)
    out = norm("ln_out", d)
    if "'subtract'" in text:
        out = out - w["pos_emb.weight"][1 : T + 1]
    return torch.einsum("btc,vc->btv", out, w["tok_emb.weight"])


@every_variant
@torch.no_grad()
def test_logits_equal_the_equations(text, fields):
    model, idx = build(text, fields), random_ids(3, 16)
    expected = reference(model, text, idx)
    output = model(idx, idx)
    close(output.logits, expected)
    close(model(idx).logits, expected[:, -1:])
    cross_entropy = F.cross_entropy(expected.flatten(0, 1), idx.flatten())
    close(output.metrics["cross_entropy"], cross_entropy)
    if not re.search("detach|attention_encoder|swiglu|embedding_router|top_k", text):
        # The others have other parameters than the model without them, or the same logits.
        assert (reference(model, "", idx) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_the_equations_are_those_of_model_py_without_an_ablation():
    for fields in [fields for k, fields in enumerate(FIELDS) if fields not in FIELDS[:k]]:
        model, idx = build("", fields), random_ids(3, 16)
        close(model(idx, idx).logits, reference(model, "", idx))


# ---- properties of every variant --------------------------------------------


@every_variant
@torch.no_grad()
def test_causality(text, fields):
    """Changing token t changes no logit before t, and does change the one at t."""
    model, idx = build(text, fields), random_ids(1, 16)
    changed = idx.repeat(17, 1)  # row t has another token t, the last row none
    changed[range(16), range(16)] = (changed[range(16), range(16)] + 1) % 31
    logits = model(changed, changed).logits
    for t in range(16):
        close(logits[t, :t], logits[16, :t])
        assert (logits[t, t] - logits[16, t]).abs().max() > 1e-3


@every_variant
def test_a_step_of_training_reaches_every_parameter(text, fields):
    model, idx, targets = build(text, fields).train(), random_ids(2, 16), random_ids(2, 16, seed=2)
    before = model(idx, targets).loss
    before.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    torch.manual_seed(0)
    after = model(idx, targets).loss
    assert after.isfinite() and after != before


@every_variant
@torch.no_grad()
def test_cached_logits_and_texts_are_those_without_a_cache(text, fields):
    model, idx = build(text, fields), random_ids(3, 16)
    expected = model(idx, idx).logits
    cache = model_file.Cache(model, 3, 16)
    for start, end in [(0, 5), (5, 6), (6, 7), (7, 10), (10, 11), (11, 16)]:
        close(model.step(idx[:, start:end], cache)[:, 0], expected[:, end - 1])
    for prompt, new in (idx[:2, :3], 20), (idx[:1, :3].expand(2, -1), 5):  # the window moves at 16
        text = model.generate(prompt, new, temperature=0)
        assert torch.equal(text, model.generate(prompt, new, temperature=0, use_cache=False))


@every_variant
@torch.no_grad()
def test_initial_loss_is_that_of_guessing(text, fields):
    sizes = dict(vocab_size=65, block_size=64, n_embd=120)
    model = build(text, {**fields, **sizes}, spread=False)
    idx = random_ids(8, 65, vocab_size=65)
    loss = model(idx[:, :-1], idx[:, 1:]).metrics["cross_entropy"]
    assert loss.item() == pytest.approx(math.log(65), rel=0.02)


# ---- each ablation ----------------------------------------------------------


@torch.no_grad()
def test_n_cross_head_equals_torch():
    ours = build("n_cross_head(4)", {"bias": True})
    attention, key_value = ours.decoder[0].cross_attention, ours.key_value["e1"]
    theirs = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.copy_(torch.cat([attention.query.weight, key_value.linear.weight]))
    theirs.in_proj_bias.copy_(torch.cat([attention.query.bias, key_value.linear.bias]))
    theirs.out_proj.load_state_dict(attention.proj.state_dict())
    d, memory = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    context = model_file.Context()
    actual = attention(d, key_value(memory, context), context)
    close(actual, theirs(d, memory, memory, attn_mask=future)[0])
    assert ours.decoder[0].attention.n_head == ours.encoder[0].attention.n_head == 2
    assert ours.num_params() == build("", {"bias": True}).num_params()


@torch.no_grad()
def test_w_lat_of_nothing_changes_nothing():
    model, plain, idx = build("w_lat()"), build(), random_ids(2, 16)
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert (model(idx).logits - plain(idx).logits).abs().max() > 1e-3
    for layer in model.decoder:
        layer.lateral_proj.weight.zero_()
    close(model(idx).logits, plain(idx).logits)


def test_w_lat_starts_as_the_other_outputs_of_its_layer():
    model = build("w_lat(gated=True)", {"n_embd": 240}, spread=False)
    layer = model.decoder[0]
    assert torch.equal(model.w_in.weight, torch.eye(240).double())
    std = layer.cross_attention.proj.weight.std().item()
    assert layer.lateral_proj.weight.std().item() == pytest.approx(std, rel=0.03)
    assert layer.lateral_gate.weight.std().item() == pytest.approx(0.02, rel=0.03)


@torch.no_grad()
def test_serial_layers_read_the_last_state_of_the_encoder():
    model, plain, idx = build("serial()"), build(), random_ids(2, 16)
    plain.load_state_dict(model.state_dict())
    e = plain.stacks(idx).e
    states = model.stacks(idx).e
    close(torch.stack(states), torch.stack([e[0], e[2], e[2]]))
    d = plain.w_in(e[0])
    for layer, name in zip(plain.decoder, ("e1", "e2"), strict=True):
        memory = plain.ln_memory[name](e[2])
        kv = plain.key_value[name](memory, model_file.Context())
        d, _ = layer(d, memory, kv, model_file.Context())
    close(model.stacks(idx).d[-1], d)


def test_the_encoder_without_feed_forward_has_no_such_parameters():
    model, plain = build("attention_encoder()"), build()
    gone = [p.numel() for n, p in plain.encoder.named_parameters() if "ff" in n]
    assert model.num_params() == plain.num_params() - sum(gone) and len(gone) == 6


def test_swiglu_has_as_many_parameters():
    assert build("swiglu()").num_params() == build().num_params()
    odd = {"n_embd": 40}
    sizes = [build(text, odd).num_params() for text in ("swiglu()", "")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert build("swiglu()").encoder[0].ff.w1.sizes == (64, 64)  # Muon takes them apart


@torch.no_grad()
def test_gates_are_per_head():
    model, plain, idx = build("gate()"), build(), random_ids(2, 16)
    plain.load_state_dict(model.state_dict(), strict=False)
    for module in model.modules():
        if hasattr(module, "gate"):
            assert module.gate.weight.shape == (2, 24)
            module.gate.weight.zero_()
            module.proj.weight.mul_(2)  # sigmoid(0) is 1/2
    close(model(idx).logits, plain(idx).logits)


def test_next_position_has_one_row_more():
    for how, std in (("add", 0.3), ("subtract", 0.03)):
        model = build(f"next_position('{how}')", {"n_embd": 240}, spread=False)
        assert model.pos_emb.weight.shape == (17, 240)
        assert model.pos_emb.weight.std().item() == pytest.approx(std, rel=0.05)


@torch.no_grad()
def test_the_position_after_the_window_has_its_embedding():
    for how in ("add", "subtract"):
        model, idx = build(f"next_position('{how}')"), random_ids(2, 16)
        before = model(idx, idx).logits
        model.pos_emb.weight[16] *= 2.0
        after = model(idx, idx).logits
        close(after[:, :15], before[:, :15])
        assert (after[:, 15] - before[:, 15]).abs().max() > 1e-3


@torch.no_grad()
def test_rounding_by_hand():
    m = [0.0, 0.25, 0.4999, 0.5, 0.75, 1.0]
    soft = {
        "rounding('none')": m,
        "rounding('sigmoid')": [1 / (1 + math.exp(-60 * (p - 0.5))) for p in m],
        "rounding('sigmoid',5)": [1 / (1 + math.exp(-5 * (p - 0.5))) for p in m],
    }
    for text, expected in soft.items():
        router = build(text, {"n_expert": 6}).encoder[0].ff.router
        router.query_key_value.weight.zero_()
        shift = [math.acos(2 * p - 1) for p in m]
        router.shift.copy_(torch.tensor(shift, dtype=torch.float64))
        for training in (True, False):
            x = torch.randn(2, 16, 24, dtype=torch.float64)
            mask = router.train(training)(x, 16, model_file.Context())
            assert mask.learned[1, 7].tolist() == pytest.approx(m, abs=1e-9)
            assert mask.used[1, 7].tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_soft_masks_never_skip_experts():
    """Skipping takes a mask for 0 or 1; here it is neither, and most experts are nearly off."""
    fields = dict(n_expert=4, n_embd=256, n_layer=1, vocab_size=8)
    for text in ("rounding('none')", "top_k(2)"):
        model, idx = build(text, fields).float(), random_ids(2, 16, vocab_size=8)
        for module in model.modules():
            if hasattr(module, "shift"):
                module.shift.fill_(2.5)
                module.query_key_value.weight.mul_(0.01)
        masks = model.expert_masks(idx).used
        hard = torch.zeros(2, 16, 4)
        hard[..., 0] = 1.0
        ff = model.encoder[0].ff
        assert 2 * masks.sum() <= masks.numel() and model_file.FeedForward.skips(ff, hard)
        assert not ff.skips(hard)
        expected = reference(model.double(), text, idx)
        close(model.float()(idx, idx).logits, expected.float(), atol=1e-3)


@pytest.mark.parametrize("rounding", ["rounding('none')", "rounding('sigmoid')"])
@pytest.mark.parametrize("more", ["", " embedding_router()"])
@pytest.mark.parametrize("fields", [dict(n_expert=8), dict(bias=True, **OUTPUT), ENCODER])
def test_the_gradient_of_the_router_is_that_of_finite_differences(rounding, more, fields):
    """Through mask, block and penalties."""
    fields = {**fields, "entropy_weight": 0.3, "l1_weight": 0.2}
    assert_router_slope(build(rounding + more, fields).train(), random_ids(2, 8))


@pytest.mark.parametrize("embedding", ["", "embedding_router()"])
@pytest.mark.parametrize("detach", ["", "router_detach() "])
def test_a_detached_router_sends_nothing_to_its_input(detach, embedding):
    fields = dict(n_expert=8, arch="decoder_only", n_layer=1, l1_weight=1.0)
    model, idx = build(detach + embedding, fields).train(), random_ids(2, 16)
    torch.stack([mask.learned for mask in model.stacks(idx).masks]).sum().backward()
    reached = model.pos_emb.weight.grad is not None and model.pos_emb.weight.grad.any()
    assert bool(reached) is not bool(detach)
    router = model.router if embedding else model.decoder[0].ff.router
    assert router.shift.grad.any()


def test_one_router_gives_the_masks_of_all_blocks():
    model, idx = build("embedding_router()", {"n_expert": 8, "router_n_head": 2}), random_ids(2, 16)
    m = model.expert_masks(idx).learned
    assert m.shape == (2, 2, 2, 16, 8)
    with torch.no_grad():
        wide = model.router(model.stacks(idx).e[0], 16, model_file.Context()).learned
    close(m, wide.unflatten(-1, (2, 2, 8)).permute(2, 3, 0, 1, 4))
    assert [n for n, _ in model.named_parameters() if "router" in n] == [
        "router.shift",
        "router.query_key_value.weight",
    ]
    assert model.router.shift.shape == (32,)
    weight = build("embedding_router()", {"n_expert": 96}, spread=False).router.query_key_value
    assert weight.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_balance_of_top_k_by_hand():
    for k in (2, 4):
        model, idx = build(f"top_k({k})", dict(n_expert=8, l1_weight=0.5)), random_ids(2, 16)
        output, balance = model(idx, idx), 0.0
        stacks = model.stacks(idx)
        layers = [(model.encoder[0], stacks.e[0]), (model.encoder[1], stacks.e[1])]
        inputs = [e + layer.attention(layer.ln_attention(e), None, model_file.Context())
                  for layer, e in layers]  # fmt: skip
        for layer, e in zip(model.encoder, inputs, strict=True):
            logits = layer.ln_ff(e) @ layer.ff.router.weight.T / 24
            probs = logits.softmax(-1).flatten(0, 1)
            share = torch.bincount(probs.topk(k).indices.flatten(), minlength=8) / (k * 32)
            balance += 8 * (share * probs.mean(0)).sum()
            close(layer.ff.router.balance, 8 * (share * probs.mean(0)).sum())
        balance += sum(layer.ff.router.balance for layer in model.decoder)
        extra = output.loss - output.metrics["cross_entropy"]
        close(extra, 0.01 * balance + 0.5 * k / 8)
        assert output.metrics["experts_on"] == k / 8 and output.metrics["entropy"] == 0
        assert torch.equal(*model.expert_masks(idx))


# ---- mistakes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text, fields, said",
    [
        ("cross_first()", GPT, "arch='decoder_only': must be 'parallel' in this ablation"),
        ("cross_first()", LEAN, "decoder_self_attention=False: must be True in this ablation"),
        ("n_cross_head(4)", dict(shared_kv=True), "shared_kv=True: must be False in this"),
        ("n_cross_head(4)", dict(position_embedding="rotary"), "='rotary': must be 'learned' in"),
        ("n_cross_head(7)", {}, r"n_cross_head\(7\): must be a divisor of n_embd=24"),
        ("n_cross_head(-1)", {}, r"n_cross_head\(-1\): must be an int, at least 1"),
        ("n_cross_head('4')", {}, r"n_cross_head\('4'\): must be an int"),
        ("w_lat()", dict(lateral=True), "lateral=True: must be False in this ablation"),
        ("attention_encoder()", dict(n_expert=8), "n_expert=8: must be 0 in this ablation"),
        ("swiglu()", dict(n_expert=8), "n_expert=8: must be 0 in this ablation"),
        ("serial()", dict(shared_kv=True), "shared_kv=True: must be False in this ablation"),
        ("serial()", GPT, "arch='decoder_only': must be 'parallel' in this ablation"),
        ("next_position('multiply')", {}, r"\('multiply'\): must be one of add, subtract"),
        ("next_position('add')", dict(position_embedding="rotary"), "='rotary': must be 'learned'"),
        ("rounding('hard')", {}, r"rounding\('hard'\): must be one of sigmoid, none"),
        ("rounding('sigmoid',-1.0)", {}, "scale=-1.0.: must be finite and not negative"),
        ("rounding('sigmoid',1e999)", {}, "scale=inf.: must be finite and not negative"),
        ("rounding('none')", {}, "n_expert=0: must be at least 1 in this ablation"),
        ("router_detach()", {}, "n_expert=0: must be at least 1 in this ablation"),
        ("embedding_router()", {}, "n_expert=0: must be at least 1 in this ablation"),
        ("top_k(1)", {}, r"top_k\(1\): must be an int, at least 2"),
        ("top_k(9)", dict(n_expert=8), "n_expert=8: must be at least 9 in this ablation"),
        ("gate()", dict(n_head=5), "n_head=5: must be a divisor"),  # as without it
    ],
)
def test_what_an_ablation_does_not_take(text, fields, said):
    with pytest.raises(ValueError, match=said) as error:
        build(text, fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("parallel()", r"no ablation 'parallel' \(all: cross_first, n_cross_head, .*, top_k\)$"),
        ("seriell()", r"no ablation 'seriell'; did you mean serial\? \(all: cross_first"),
        ("serial", "'serial': must be an ablation with its arguments, such as serial"),
        ("serial(", "must be an ablation"),
        ("", "'': must be an ablation"),
        ("top_k()", r"'top_k\(\)': missing a required argument: 'k'; it is top_k\(k: int\)"),
        ("top_k(4, 5)", "too many positional arguments; it is top_k"),
        ("w_lat(last=True)", "unexpected keyword argument 'last'; it is w_lat"),
        ("top_k(**{'k': 4})", "it is top_k|must be an ablation"),
        ("top_k(*[4])", "must be an ablation"),
        ("top_k(__import__('os').abort())", "must be an ablation"),
        ("sys.exit()", "must be an ablation"),
        ("(" * 300, "must be an ablation"),
        ("serial()\0", "must be an ablation"),
        ("top_k(\n1)", "must be an int, at least 2"),
    ],
)
def test_a_wrong_ablation_gets_one_line(text, said, capsys):
    with pytest.raises(SystemExit) as end:
        ablations.main([text])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(said, printed) and printed.count("\n") == 1, printed


# ---- the command line -------------------------------------------------------


def test_all_that_the_results_name_can_be_read():
    lines = (ROOT / "experiments" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    named = {json.loads(line).get("peer") for line in lines} - {None, ""}
    assert {"serial()", "attention_encoder()", "top_k(4)"} <= named
    for text in named:
        assert ablations.read(text)


def test_every_ablation_is_tried_and_says_what_it_is(capsys):
    tried = {ast.parse(one).body[0].value.func.id for text, _ in VARIANTS for one in text.split()}
    assert tried == set(ablations.ABLATIONS)
    assert all(ablation.__doc__ for ablation in ablations.ABLATIONS.values())
    ablations.main([])
    printed = capsys.readouterr().out
    assert "top_k(k: int)\n    A mixture of experts" in printed


def test_the_script_gets_the_classes_and_its_arguments(tmp_path, monkeypatch, capsys):
    for name in ("train.py", "sample.py"):
        source = "import sys\nfrom model import DecoderLayer, EncoderLayer\n"
        source += "print(sys.argv, EncoderLayer.__qualname__, DecoderLayer.__qualname__)"
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    for args, argv, classes in (
        (["serial()", "c.py", "--seed=1"], "['train.py', 'c.py', '--seed=1']", "DecoderLayer"),
        (["serial()", "train.py"], "['train.py']", "DecoderLayer"),
        (["serial()", "w_lat()", "sample.py"], "['sample.py']", "w_lat.<locals>.DecoderLayer"),
    ):
        with ablations.restored():
            ablations.main(args)
        note, printed = capsys.readouterr().out.splitlines()
        assert note.startswith("serial()") and "name it again" in note
        assert printed == f"{argv} serial.<locals>.EncoderLayer {classes}"


def test_apply_can_be_undone():
    before = dict(vars(model_file))
    with pytest.raises(ZeroDivisionError), ablations.restored():
        ablations.apply(ablations.serial())
        assert dict(vars(model_file)) != before
        raise ZeroDivisionError
    assert dict(vars(model_file)) == before


def test_a_model_can_be_copied():
    texts = ("serial()", "next_position('add')", "next_position('subtract')", "top_k(2)")
    for text in (*texts, "embedding_router()"):
        model, idx = build(text, {"n_expert": 8}), random_ids(1, 5)
        with torch.no_grad():
            expected = model(idx).logits
            again = copy.deepcopy(model)
            model.tok_emb.weight.zero_()
            model(idx)
            close(again(idx).logits, expected)


def test_trains_and_samples_as_a_user_would(tmp_path):
    (tmp_path / "input.txt").write_text((ROOT / "LICENSE").read_text("utf-8"), "utf-8")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*args):
        command = [sys.executable, str(ROOT / args[0]), *args[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("prepare_shakespeare.py", "--input_file=input.txt", "--dataset=mine")
    sizes = "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --warmup_iters=2"
    steps = "--max_iters=4 --lr_decay_iters=4 --eval_interval=4 --eval_iters=1 --log_interval=1"
    settings = f"{sizes} {steps} --dataset=mine --out_dir=out --device=cpu".split()
    printed = run("experiments/ablations.py", "serial()", *settings)
    assert printed.startswith("serial(): name it again to resume or to sample")
    assert re.search(r"(?m)^iter 3: loss [34]\.\d{4}, ", printed)
    assert re.search(r"(?m)^whole validation split: loss [34]\.\d{4}", printed)
    assert (tmp_path / "out" / "ckpt.pt").exists()
    with pytest.raises(
        AssertionError, match=r"its ablations are \['serial\(\)'\], here they are \[\]"
    ):
        run("sample.py", "--out_dir=out", "--device=cpu")
    sampled = run("experiments/ablations.py", "serial()", "sample.py", "--out_dir=out",
                  "--device=cpu", "--start=a", "--max_new_tokens=5")  # fmt: skip
    assert sampled.count("---\n") == 3

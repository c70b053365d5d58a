"""Tests of experiments/ablations.py: against a second writing of the equations, torch, numbers."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

import model as model_file
from ablation_reference import build, close, reference
from test_model import GPT, LEAN, assert_router_slope, random_ids

torch.set_num_threads(1)  # the tensors are small, and the cores may be shared
# What the old lateral connection is compared with the new one under.
LEAN_W_LAT = dict(decoder_self_attention=False, shared_kv=True, position_embedding="rotary")
LEAN_W_LAT |= dict(qk_norm=True, token_shift=True)
ENCODER = dict(n_expert=8, router_input="encoder", l1_weight=0.1, entropy_weight=0.05)
YOCO = dict(lateral=True, decoder_self_attention=False)
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
    ("lag(1)", {}),
    ("lag(2)", dict(position_embedding="rotary", token_shift=True, **ENCODER)),
    ("lag(2)", dict(bias=True, lateral=True, decoder_self_attention=False)),
    ("lag(2)", dict(lateral=True, n_expert=8)),
    ("lag(1)", dict(n_layer=3, bias=True, shared_kv=True)),
    ("lag(2)", {**LEAN, **ENCODER, "n_layer": 3, "position_embedding": "rotary"}),
    ("lag(3)", {**LEAN, "n_layer": 3, "token_shift": True, "qk_norm": True}),
    ("yoco()", YOCO),
    ("yoco()", dict(**YOCO, **ENCODER, n_layer=3, bias=True, position_embedding="rotary")),
    ("yoco()", dict(**YOCO, n_expert=8, token_shift=True)),
    ("gqa()", GPT),
    ("gqa()", dict(**GPT, n_head=4, bias=True, position_embedding="rotary", qk_norm=True)),
    ("gqa()", dict(**GPT, n_head=4, n_expert=8)),
    ("embedding_loss('mse',0.25)", dict(bias=True)),
    ("embedding_loss('cosine',2)", LEAN),
    ("embedding_loss('log_cosine',1)", dict(position_embedding="rotary", **ENCODER)),
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
    ("lag(2) w_lat()", dict(decoder_self_attention=False)),
    ("yoco() embedding_loss('mse',1)", YOCO),
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


# ---- the equations once more ------------------------------------------------


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
    if not re.search("detach|attention_encoder|swiglu|embedding_|top_k|yoco|gqa", text):
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


@pytest.mark.parametrize("fields", [{}, LEAN, dict(lateral=True, bias=True)])
@torch.no_grad()
def test_without_a_lag_it_is_the_parallel_model(fields):
    model, plain, idx = build("lag(0)", fields), build("", fields), random_ids(2, 16)
    plain.load_state_dict(model.state_dict())
    close(model(idx, idx).logits, plain(idx, idx).logits, atol=1e-12)


@torch.no_grad()
def test_the_serial_decoder_of_the_origin_starts_from_the_last_state_of_the_encoder():
    model, idx = build("lag(2)", dict(bias=True)), random_ids(2, 16)
    e = model.stacks(idx).e[2]
    d = model.w_in(e)
    for layer, name in zip(model.decoder, ("e1", "e2"), strict=True):
        memory = model.ln_memory[name](e)
        kv = model.key_value[name](memory, model_file.Context())
        d, _ = layer(d, memory, kv, model_file.Context())
    close(model.stacks(idx).d[-1], d, atol=1e-12)


@torch.no_grad()
def test_yoco_is_a_gpt_with_a_second_half_of_one_set_of_keys_and_values():
    """The first half equals a GPT's layers with the same weights, the second torch's attention."""
    model, gpt, idx = build("yoco()", YOCO), build("", GPT), random_ids(2, 16)
    state = {name.replace("encoder", "decoder"): w for name, w in model.state_dict().items()
             if not name.startswith(("decoder", "ln_memory", "key_value"))}  # fmt: skip
    gpt.load_state_dict(state)
    e, d, _ = model.stacks(idx)
    close(torch.stack(e), torch.stack(gpt.stacks(idx).d), atol=1e-12)
    (memory,), (kv,) = model.ln_memory.values(), model.key_value.values()
    memory, x = memory(e[-1]), e[-1]
    for layer in model.decoder:
        theirs = torch.nn.MultiheadAttention(24, 2, bias=False, batch_first=True).double()
        attention = layer.cross_attention
        theirs.in_proj_weight.copy_(torch.cat([attention.query.weight, kv.linear.weight]))
        theirs.out_proj.weight.copy_(attention.proj.weight)
        future = torch.ones(16, 16, dtype=torch.bool).triu(1)
        y, _ = theirs(layer.ln_cross(x), memory, memory, attn_mask=future, need_weights=False)
        x = x + y
        x = x + layer.ff.w2(F.gelu(layer.ff.w1(layer.ln_ff(x))))
    close(d[-1], x, atol=1e-12)
    assert model_file.Cache(model, 1, 16).buffers.keys() == {
        *(layer.attention.key_value for layer in model.encoder), kv
    }  # fmt: skip


@torch.no_grad()
def test_grouped_queries_equal_torch_with_repeated_keys():
    model, x = build("gqa()", {**GPT, "n_head": 4}), torch.randn(2, 16, 24, dtype=torch.float64)
    ours = model.decoder[0].attention
    k, v = ours.key_value.linear.weight.chunk(2)
    theirs = torch.nn.MultiheadAttention(24, 4, bias=False, batch_first=True).double()
    theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, k, k, v, v]))
    theirs.out_proj.weight.copy_(ours.proj.weight)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=future, need_weights=False)
    close(ours(x, None, model_file.Context()), expected, atol=1e-12)
    shapes = [k.shape for k, _ in model_file.Cache(model, 3, 16).buffers.values()]
    assert shapes == [(3, 2, 16, 6)] * 2


@pytest.mark.parametrize("how", ["mse", "cosine", "log_cosine"])
def test_the_embedding_loss_by_hand(how):
    """Token by token; its gradient reaches the embeddings and its LayerNorms, and nothing else."""
    model, idx = build(f"embedding_loss('{how}',0.5)", dict(bias=True)), random_ids(2, 16)
    assert model(idx, idx).loss == model(idx, idx).metrics["cross_entropy"]  # in evaluation
    model.train()
    output, e = model(idx, idx), model.stacks(idx).e
    total = 0.0
    for b in range(2):
        for t in range(16):
            mean = sum(model.ln_a(e[0][b, s]) for s in range(t + 1)) / (t + 1)
            aim = model.ln_b(e[2][b, t])
            cosine = (mean @ aim / mean.norm() / aim.norm()).item()
            mse = sum((x - y).item() ** 2 for x, y in zip(mean, aim, strict=True)) / 24
            total += {"mse": mse, "cosine": (1 - cosine) / 2,
                      "log_cosine": -math.log((1 + cosine) / 2)}[how]  # fmt: skip
    extra = output.loss - output.metrics["cross_entropy"]
    assert extra.item() == pytest.approx(0.5 * total / 32, abs=1e-9)
    model.embedding_loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"tok_emb", "pos_emb", "ln_a", "ln_b"}


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

"""Models with ablations, and their equations once more: an independent second writing."""

import math
import re

import torch
from torch.nn import functional as F

import ablations
import model as model_file
from test_model import SMALL


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
        q, n_key = turned(linear(f"{name}.query", x), n_head), n_head // (1 + ("gqa" in text))
        k, v = turned(k, n_key), v.unflatten(-1, (n_key, -1))
        if "gqa" in text:
            k, v = (torch.stack([y, y], dim=2).flatten(2, 3) for y in (k, v))
        y = mix(q, k, v)
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
    # What the decoder's start and its layers read, and whose keys and values the layers attend to.
    lag = int(found[1]) if (found := re.search(r"lag\((\d+)", text)) else 0
    reads = [min(i + lag, c.n_layer) for i in range(c.n_layer + 1)] if parallel else [0]
    projected = reads if c.shared_kv else range(c.n_layer + 1)
    if "yoco" in text:
        reads = projected = [c.n_layer] * (c.n_layer + 1)
    states = [states[i] for i in reads]

    d = linear("w_in", states[0]) if parallel and not c.lateral else states[0]
    if "'add'" in text:
        d = d + w["pos_emb.weight"][1 : T + 1]
    for i in range(c.n_layer):
        layer = f"decoder.{i}"
        if not parallel:
            d = d + self_attend(layer, d)
            d = d + feed_forward(layer, d)
            continue
        source = f"e{projected[i + 1]}"
        memory = norm(f"ln_memory.{source}", states[i + 1])
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
                d = d + attend(name, query, f"key_value.{source}", memory, n_cross)
        d = d + feed_forward(layer, d, memory)
    out = norm("ln_out", d)
    if "'subtract'" in text:
        out = out - w["pos_emb.weight"][1 : T + 1]
    return torch.einsum("btc,vc->btv", out, w["tok_emb.weight"])

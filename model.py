"""A language model of two stacks that advance side by side: the parallel encoder-decoder.

The encoder is meant to understand the text, the decoder to predict the next token. Both are causal
and read the same tokens. Layer l of the decoder attends to e_l, what layer l of the encoder made:

    for each layer:   e = e + attention(e)            d = d + attention(d)         optional
                      e = e + feed-forward(e)  ---->  d = d + cross-attention(d, e)
                                                      d = d + feed-forward(d)

Notable:
- Encoder layer l + 1 and decoder layer l are independent: side by side (not in this file) the
  critical path is L + 1 layers, not 2 L.
- Where no later token reads a state of the decoder (no decoder self-attention, and no router that
  reads the decoder), a prompt costs the encoder alone.
- Experts: a learned mask switches groups of hidden units off, per token ("learned dropout").

Shapes: B batch, T time, C `n_embd`, V `vocab_size`, L `n_layer`, G `n_expert`, H heads of width D.
Where T queries meet S keys, the queries are of the last T tokens. This file needs torch alone.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ModelConfig:
    """What shapes the model; ValueError for a bad value. `arch="decoder_only"` ignores lateral,
    decoder_self_attention, shared_kv and router_input."""

    # size
    arch: str = "parallel"  # or decoder_only, a plain GPT
    block_size: int = 256  # the longest text that the model reads at once, in tokens
    vocab_size: int = 50257  # GPT-2's BPE; 65 for the characters of tinyshakespeare
    n_layer: int = 6  # L, of each stack
    n_head: int = 6  # H, heads of each attention
    n_embd: int = 384  # C, the width of both streams
    dropout: float = 0.0
    bias: bool = False  # in every Linear and LayerNorm
    # embeddings and stacks
    position_embedding: str = "learned"  # or rotary: RoPE, arXiv:2104.09864
    qk_norm: bool = False  # RMS-normalise the queries and keys of each head
    token_shift: bool = False  # add s * the embedding of the token before; s (C,) is learned
    lateral: bool = False  # d starts from E; before its layer l, d = d + (e_l - e_{l-1})
    decoder_self_attention: bool = True  # False: the decoder reads the past through e alone
    shared_kv: bool = False  # K, V of LN(e_l), one LN, serve decoder layer l, encoder layer l + 1
    # learned dropout
    n_expert: int = 0  # G, experts in each feed-forward block; 0: no learned dropout
    expert_site: str = "hidden"  # mask the 4 C hidden units; or output: the C outputs of a block
    router_input: str = "hidden"  # the block's x (site output: its output); encoder: LN(e), in d
    router_n_head: int = 1
    router_head_dim: int = 16  # of queries and keys; values have G / router_n_head
    shift_init: float = 0.0  # 0: m starts near 1, all experts on; pi: all off
    l1_norm: str = "linear"  # mean of m; or squared: of m^2 / 2
    entropy_weight: float = 0.0  # lambda_H
    l1_weight: float = 0.0  # lambda_1

    def __post_init__(self):
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            if kind is float and type(value) is int:
                setattr(self, name, float(value))
            elif kind in (str, bool, int, float):
                self._require(name, type(value) is kind, f"of type {kind.__name__}")
        for name, choices in {
            "arch": ("parallel", "decoder_only"),
            "position_embedding": ("learned", "rotary"),
            "expert_site": ("hidden", "output"),
            "router_input": ("hidden", "encoder"),
            "l1_norm": ("linear", "squared"),
        }.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        sizes = "block_size vocab_size n_layer n_head n_embd router_n_head router_head_dim"
        for name in sizes.split():
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("entropy_weight", "l1_weight"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "finite and not negative")
        C, H, G, site = self.n_embd, self.n_head, self.n_expert, self.expert_site
        units = 4 * C if site == "hidden" else C
        of, n = ("n_embd/2", C / 2) if self.position_embedding == "rotary" else ("n_embd", C)
        self._require("n_head", n % H == 0, f"a divisor of {of}={n:g}")
        self._require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._require("shift_init", 0.0 <= self.shift_init <= math.pi, "in [0, pi]")
        ok = G == 0 or (G > 0 and units % G == 0)
        self._require("n_expert", ok, f"0, or a divisor of the {units} {site} units")
        self._require("router_n_head", G % self.router_n_head == 0, f"a divisor of n_expert={G}")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")


class ModelOutput(NamedTuple):
    """What the model returns, with targets (B, T) and without."""

    logits: Tensor  # (B, T, V); without targets (B, 1, V), those of the last position
    loss: Tensor | None  # the training objective, a scalar; None without targets
    metrics: dict[str, Tensor]  # detached scalars; cross_entropy is in nats per token


class Mask(NamedTuple):
    """Which experts are on, per token: (B, T, G) of one block, (..., B, T, G) of several."""

    learned: Tensor  # m, in [0, 1]
    used: Tensor  # r, 0 or 1: sampled from m in training, rounded in evaluation


WithMask = tuple[Tensor, Mask | None]  # what a block or a layer returns; None without experts

# Keys and values (B, H, S, D), and which are `seen`: booleans (T, S), or None: all up to the query.
KV = tuple[Tensor, Tensor, Tensor | None]


def attend(q: Tensor, kv: KV, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """Multi-head attention of q (B, H, T, D) to kv: (B, T, H D). The queries are of the last T
    tokens, and see none that follow; with causal=False all are of the newest token."""
    (k, v, seen), T, S = kv, q.size(2), kv[0].size(2)
    causal = bool(causal and seen is None and T > 1)  # a single query sees every key
    seen = None if seen is None else seen[-T:]
    if causal and T != S:  # several tokens behind a cache
        seen, causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T), False
    y = F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


def heads(x: Tensor, n_head: int, qk_norm: bool = False, rotation: Tensor | None = None) -> Tensor:
    """x (B, T, H D) as (B, H, T, D); queries and keys also normalised and, by RoPE, rotated: each
    pair (x_i, x_{i + D/2}) by an angle. `rotation` (2, T', D): cosines, and sines (negated in the
    first half), at the positions of this pass, of which x has the last T."""
    x = x.view(x.size(0), x.size(1), n_head, -1).transpose(1, 2)
    x = F.rms_norm(x, x.shape[-1:]) if qk_norm else x
    if rotation is None:
        return x
    cos, sin = rotation[:, -x.size(2) :]
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin).to(x.dtype)


def stacked(n_in: int, sizes: tuple[int, ...], bias: bool) -> nn.Linear:
    """Several matrices of one input as one Linear. `sizes`, their rows, tell muon.py the parts."""
    linear = nn.Linear(n_in, sum(sizes), bias=bias)
    linear.sizes = sizes
    return linear


class Cache:
    """Keys and values of the `length` tokens read so far, for every module that has a `kv_shape`
    (KeyValueProjection, Router): buffers for `batch` texts of `size` tokens, allocated here."""

    def __init__(self, model: nn.Module, batch: int, size: int):
        self.batch, self.size, self.buffers = batch, size, {}
        self.length: int | Tensor = 0  # 0 starts new texts; in a compiled step a 0-dim tensor
        device = next(model.parameters()).device
        self.newest = torch.zeros(batch, 1, dtype=torch.long, device=device)  # for token_shift
        for module in model.modules():
            if hasattr(module, "kv_shape"):
                n_head, *widths = module.kv_shape
                zeros = next(module.parameters()).new_zeros
                self.buffers[module] = [zeros(batch, n_head, size, width) for width in widths]

    def update(self, module: nn.Module, k: Tensor, v: Tensor) -> KV:
        """Writes keys and values of T new tokens in place, gives those of all. In a compiled step
        no shape may depend on the length: there it gives the whole buffers, and a mask."""
        (K, V), start, T = self.buffers[module], self.length, k.size(2)
        if isinstance(start, Tensor):
            positions = start + torch.arange(T, device=k.device)
            K.index_copy_(2, positions, k.to(K.dtype))
            V.index_copy_(2, positions, v.to(V.dtype))
            return K, V, torch.arange(self.size, device=k.device) <= positions[:, None]
        K[:, :, start : start + T], V[:, :, start : start + T] = k, v
        return K[: len(k), :, : start + T], V[: len(k), :, : start + T], None


class Context(NamedTuple):
    """What a pass through the layers carries beside the streams."""

    rotation: Tensor | None = None  # of `heads`, with rotary positions
    cache: Cache | None = None
    last: bool = False  # only the last position of this layer's result will be read

    def remember(self, module: nn.Module, k: Tensor, v: Tensor) -> KV:
        return (k, v, None) if self.cache is None else self.cache.update(module, k, v)


class KeyValueProjection(nn.Module):
    """The keys and values of a normalised stream x (B, T, C); with a cache, of all S tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, H, self.qk_norm = config.n_embd, config.n_head, config.qk_norm
        self.linear = stacked(C, (C, C), config.bias)
        self.kv_shape = H, C // H, C // H  # heads; widths of a key and of a value

    def forward(self, x: Tensor, context: Context) -> KV:
        (k, v), H = self.linear(x).chunk(2, dim=-1), self.kv_shape[0]
        return context.remember(self, heads(k, H, self.qk_norm, context.rotation), heads(v, H))


class Attention(nn.Module):
    """Multi-head attention: queries of x (B, T, C); keys and values given, or projected from x."""

    def __init__(self, config: ModelConfig, own_key_value: bool):
        super().__init__()
        C, self.n_head, self.qk_norm = config.n_embd, config.n_head, config.qk_norm
        self.query = nn.Linear(C, C, bias=config.bias)
        self.key_value = KeyValueProjection(config) if own_key_value else None
        self.proj = nn.Linear(C, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, kv: KV | None, context: Context, last: bool = False) -> Tensor:
        """(B, T, C); with `last` (B, 1, C), of the last query alone."""
        kv = self.key_value(x, context) if kv is None else kv
        q = self.queries(x[:, -1:] if last else x, context)
        return self.output(attend(q, kv, self.dropout.p if self.training else 0.0))

    def queries(self, x: Tensor, context: Context) -> Tensor:
        return heads(self.query(x), self.n_head, self.qk_norm, context.rotation)

    def output(self, y: Tensor) -> Tensor:
        return self.dropout(self.proj(y))


class Router(nn.Module):
    """m = 0.5 cos(A + shift) + 0.5, with A a causal attention over x, and r of m by round_mask."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        H, D, G = config.router_n_head, config.router_head_dim, config.n_expert
        self.query_key_value = stacked(config.n_embd, (H * D, H * D, G), config.bias)
        self.shift = nn.Parameter(torch.full((G,), config.shift_init))
        self.kv_shape = H, D, G // H

    def forward(self, x: Tensor, T: int, context: Context) -> Mask:
        """The Mask (B, T, G) of the last T tokens of x."""
        q, k, v = self.query_key_value(x).split(self.query_key_value.sizes, dim=-1)
        q, k, v = (heads(y, self.kv_shape[0]) for y in (q[:, -T:], k, v))
        m = 0.5 * torch.cos(attend(q, context.remember(self, k, v)) + self.shift) + 0.5
        return Mask(m, round_mask(m, self.training))


class FeedForward(nn.Module):
    """W2 (GELU(W1 x) * r), or at the site `output` (W2 GELU(W1 x)) * r, with r of a Router, or 1
    without experts. See "Learned dropout" in docs/settings.md."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, self.site, self.router_input = config.n_embd, config.expert_site, config.router_input
        self.w1 = nn.Linear(C, 4 * C, bias=config.bias)
        self.w2 = nn.Linear(4 * C, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.router = Router(config) if config.n_expert > 0 else None

    def forward(
        self, x: Tensor, memory: Tensor | None = None, context: Context = Context()
    ) -> WithMask:
        """x (B, T, C) to (B, T, C), or with context.last and a router, which reads all, (B, 1, C).
        Routers read x (site `output`: W2's output), or with router_input="encoder" any `memory`."""
        if self.router is None:
            return self.dropout(self.w2(F.gelu(self.w1(x)))), None
        if self.site == "output":
            x = self.w2(F.gelu(self.w1(x)))
        source = x if memory is None or self.router_input == "hidden" else memory
        x = x[:, -1:] if context.last else x
        mask = self.router(source, x.size(1), context)
        if self.site == "output":
            return self.dropout(apply_mask(x, mask.used)), mask
        if self.skips(mask.used):
            return self.dropout(self.skip_experts(x, mask.used)), mask
        return self.dropout(self.w2(apply_mask(F.gelu(self.w1(x)), mask.used))), mask

    def skips(self, r: Tensor) -> bool:
        """Whether skipping experts is faster, as measured on a CPU: if at most half are on, and an
        expert is large or the tokens are many. (grouped_mm needs rows of whole 16 bytes.)"""
        if r.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        G, (units, C), dtype = r.size(-1), self.w1.weight.shape, self.w1.weight.dtype
        each = 2 * units * C // G  # weights of an expert
        large = each >= 2**17 or each * r.numel() // G >= 2**23  # numel / G: tokens
        fits = dtype == torch.float32 and C % 4 == 0 and units // G % 4 == 0
        return large and fits and 2 * int(r.sum()) <= r.numel()

    def skip_experts(self, x: Tensor, r: Tensor) -> Tensor:
        """W2 (GELU(W1 x) * r), each expert only for the tokens that have it on."""
        G, shape, x = r.size(-1), x.shape, x.flatten(0, 1)
        w1, w2 = self.w1.weight.unflatten(0, (G, -1)), self.w2.weight.unflatten(1, (G, -1))
        expert, token = r.flatten(0, 1).mT.nonzero(as_tuple=True)  # in the order of experts
        ends = torch.bincount(expert, minlength=G).cumsum(0, dtype=torch.int32)
        hidden = F.grouped_mm(x[token], w1.mT, offs=ends)
        if self.w1.bias is not None:
            hidden = hidden + self.w1.bias.view(G, -1)[expert]
        y = F.grouped_mm(F.gelu(hidden), w2.permute(1, 2, 0), offs=ends)
        out = torch.zeros_like(x) if self.w2.bias is None else self.w2.bias.repeat(len(x), 1)
        return out.index_add_(0, token, y).view(shape)


def apply_mask(x: Tensor, r: Tensor) -> Tensor:
    """x (B, T, N) times r (B, T, G), each mask value on its group of N / G neighbours."""
    return (x.view(*r.shape, -1) * r.to(x.dtype).unsqueeze(-1)).view(x.shape)


def round_mask(m: Tensor, training: bool) -> Tensor:
    """r: in training Bernoulli(m), with the gradient dr/dm = 1; in evaluation [m >= 0.5]."""
    if not training:
        return (m >= 0.5).to(m.dtype)
    return (torch.rand_like(m) < m).to(m.dtype) + (m - m.detach())  # the bracket is exactly 0


def entropy(m: Tensor) -> Tensor:
    """-m log2(m), not Bernoulli's entropy. Its infinite slope at m = 0 counts as 0, as dm/dA is."""
    return -m * torch.log2(torch.where(m > 0, m, 1.0))


def mask_statistics(mask: Mask, l1_norm: str) -> dict[str, Tensor]:
    """Means over batch, time and experts of a Mask (..., B, T, G), each (...)."""
    m, r = mask
    l1 = m if l1_norm == "linear" else m.square() / 2  # |m| is m
    values = {"entropy": entropy(m), "l1": l1, "near_one": m > 0.9}
    values |= {"near_zero": m < 0.1, "experts_on": r >= 0.5}
    return {name: x.to(m.dtype).flatten(-3).mean(dim=-1) for name, x in values.items()}


def tail(x: Tensor, like: Tensor) -> Tensor:
    """The last positions of x (B, S, C), as many as `like` (B, T, C) has."""
    return x if x.size(1) == like.size(1) else x[:, -like.size(1) :]


class EncoderLayer(nn.Module):
    """Makes e_l of e_{l-1}; also a layer of the plain GPT. With context.last, in a GPT's last
    layer, what no later token reads is computed for the last position alone."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_attention = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config, config.arch == "decoder_only" or not config.shared_kv)
        self.ln_ff = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ff = FeedForward(config)

    def forward(self, e: Tensor, kv: KV | None, context: Context) -> WithMask:
        last = context.last and self.ff.router is None  # a router reads all positions
        y = self.attention(self.ln_attention(e), kv, context, last)
        e = tail(e, y) + y
        y, mask = self.ff(self.ln_ff(e), None, context)
        return tail(e, y) + y, mask


class DecoderLayer(nn.Module):
    """Makes d_l from d (d_{l-1} plus the lateral term), `memory` (LN(e_l)), and kv, its keys and
    values. d has all positions or the last one. context.last is as in EncoderLayer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.ln_attention = nn.LayerNorm(C, bias=bias) if config.decoder_self_attention else None
        self.attention = Attention(config, True) if config.decoder_self_attention else None
        self.ln_cross = nn.LayerNorm(C, bias=bias)
        self.cross_attention = Attention(config, own_key_value=False)
        self.ln_ff = nn.LayerNorm(C, bias=bias)
        self.ff = FeedForward(config)

    def forward(self, d: Tensor, memory: Tensor, kv: KV, context: Context) -> WithMask:
        d = self.self_attention(d, context)
        d = d + self.cross_attention(self.ln_cross(d), kv, context)
        y, mask = self.ff(self.ln_ff(d), memory, context)
        return tail(d, y) + y, mask

    def self_attention(self, d: Tensor, context: Context) -> Tensor:
        if self.attention is None:
            return d
        last = context.last and (self.ff.router is None or self.ff.router_input == "encoder")
        y = self.attention(self.ln_attention(d), None, context, last)  # a router of d reads all
        return tail(d, y) + y


class Stacks(NamedTuple):
    """Every state of both streams, each (B, T, C), and every mask; with `last` d[-1] (B, 1, C)."""

    e: list[Tensor]  # e_0 to e_L; empty for decoder_only
    d: list[Tensor]  # d_0 to d_L
    masks: list[Mask]  # of e_1, d_1, e_2, ..., or d_1, d_2, ...; empty without experts


class ParallelEncoderDecoder(nn.Module):
    """Two stacks between a tied embedding and output layer; or a plain GPT, of EncoderLayers."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, L, C, bias = config, config.n_layer, config.n_embd, config.bias
        self.tok_emb = nn.Embedding(config.vocab_size, C)
        if config.position_embedding == "learned":
            self.pos_emb = nn.Embedding(config.block_size, C)
        if config.token_shift:
            self.token_shift = nn.Parameter(torch.zeros(C))
        self.dropout = nn.Dropout(config.dropout)
        if config.arch == "parallel":
            if not config.lateral:
                self.w_in = nn.Linear(C, C, bias=bias)
            states = [f"e{k}" for k in range(0 if config.shared_kv else 1, L + 1)]
            self.ln_memory = nn.ModuleDict({name: nn.LayerNorm(C, bias=bias) for name in states})
            self.key_value = nn.ModuleDict({name: KeyValueProjection(config) for name in states})
            self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(L))
        layer = DecoderLayer if config.arch == "parallel" else EncoderLayer
        self.decoder = nn.ModuleList(layer(config) for _ in range(L))
        self.ln_out = nn.LayerNorm(C, bias=bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights of each Linear with std 0.02; over sqrt(n) where a residual stream adds up n
        outputs, as in GPT-2. Biases 0. LayerNorms except ln_out, and shifts, are left as made."""
        c = self.config
        # With lateral the outputs of the encoder enter d, too.
        of_d = 2 if c.arch == "decoder_only" else 2 + c.decoder_self_attention + 2 * c.lateral
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                n = c.n_layer * (of_d if name.startswith("decoder") else 2)
                n = n if name.endswith(("proj", "w2")) else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(n))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)  # learns faster than 0.02, measured
        nn.init.constant_(self.ln_out.weight, 0.03)  # logits near 0: the loss starts at ln V
        if hasattr(self, "w_in"):
            nn.init.eye_(self.w_in.weight)  # both streams start from E; learns faster, measured

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, penalty_scale: float | Tensor = 1.0
    ) -> ModelOutput:
        """Reads idx (B, T), T <= block_size; targets (B, T) are token ids, negative for no
        cross-entropy. loss = cross-entropy + penalty_scale (lambda_H H(m) + lambda_1 L1(m))."""
        if targets is None:
            return ModelOutput(self.step(idx), None, {})
        if targets.shape != idx.shape:
            of_targets, of_idx = tuple(targets.shape), tuple(idx.shape)
            raise ValueError(f"targets is {of_targets}, idx {of_idx}: must be alike")
        _, d, masks = self.stacks(idx)
        logits = F.linear(self.ln_out(d[-1]), self.tok_emb.weight)
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten().clamp_min(-1), ignore_index=-1
        )
        metrics = {"cross_entropy": loss.detach()}
        if masks:
            c, every = self.config, Mask(*map(torch.stack, zip(*masks, strict=True)))
            mean = {name: x.mean() for name, x in mask_statistics(every, c.l1_norm).items()}
            weights = {"entropy": c.entropy_weight, "l1": c.l1_weight}
            penalty = sum(w * mean[name] for name, w in weights.items() if w)  # 0 costs nothing
            loss = loss + penalty_scale * penalty
            metrics |= {name: x.detach() for name, x in mean.items()}
        return ModelOutput(logits, loss, metrics)

    def step(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """The logits (B, 1, V) of what follows idx (B, T). Writes to a cache: use torch.no_grad."""
        d = self.stacks(idx, cache, last=True).d[-1]  # (B, 1, C)
        return F.linear(self.ln_out(d), self.tok_emb.weight)

    def stacks(self, idx: Tensor, cache: Cache | None = None, last: bool = False) -> Stacks:
        """Both streams of idx (B, T), by layer; with `last` only what the last logits need."""
        self._check(idx, cache)
        c, L = self.config, self.config.n_layer
        x, rotation = self.embed(idx, cache)
        usual, final = Context(rotation, cache), Context(rotation, cache, last)
        if c.arch == "decoder_only":
            all_e, d, all_d, masks = [], x, [x], []
            for layer in self.decoder:
                d, mask = layer(d, None, final if layer is self.decoder[-1] else usual)
                all_d, masks = [d] if last else [*all_d, d], [*masks, mask]
        else:
            routes_d = c.n_expert > 0 and c.router_input == "hidden"  # routers read all of d
            e, d = x, (x if c.decoder_self_attention or routes_d or not last else x[:, -1:])
            d = d if c.lateral else self.w_in(d)
            all_e, all_d, masks, previous_e = [e], [d], [], e
            one_token = last and cache is not None and idx.size(1) == 1  # decoding
            for k in range(L + 1):  # makes d_k (k > 0) of e_k and d_{k-1}, and e_{k+1} of e_k
                if k > 0 or c.shared_kv:
                    memory = self.ln_memory[f"e{k}"](e)  # what d reads of e_k
                    kv = self.key_value[f"e{k}"](memory, usual)  # if shared, also of encoder[k]
                if k > 0 and c.lateral:
                    d = d + (tail(e, d) - tail(previous_e, d))
                previous_e = e
                if 0 < k < L and c.shared_kv and one_token:
                    d, e = self._pair(k, d, e, memory, kv, usual)
                    continue  # of these layers no states and masks are kept
                if k > 0:
                    d, mask = self.decoder[k - 1](d, memory, kv, final if k == L else usual)
                    all_d, masks = [d] if last else [*all_d, d], [*masks, mask]
                if k < L:
                    e, mask = self.encoder[k](e, kv if c.shared_kv else None, usual)
                    all_e, masks = [e] if last else [*all_e, e], [*masks, mask]
        if cache is not None:
            cache.length = cache.length + idx.size(1)
            if c.token_shift:
                cache.newest.copy_(idx[:, -1:])
        return Stacks(all_e, all_d, masks if c.n_expert > 0 else [])

    def _pair(self, k, d, e, memory, kv, context):
        """Layers k of the decoder and k + 1 of the encoder, for one token: both queries go through
        one attention, so that the keys and values of e_k are loaded once."""
        dec, enc = self.decoder[k - 1], self.encoder[k]
        d = dec.self_attention(d, context)
        of_d = dec.cross_attention.queries(dec.ln_cross(d), context)
        of_e = enc.attention.queries(enc.ln_attention(e), context)
        y = attend(torch.cat([of_d, of_e], dim=2), kv, causal=False)
        d, e = d + dec.cross_attention.output(y[:, :1]), e + enc.attention.output(y[:, 1:])
        d = d + dec.ff(dec.ln_ff(d), memory, context)[0]
        return d, e + enc.ff(enc.ln_ff(e), None, context)[0]

    def embed(self, idx: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """E (B, T, C); with rotary positions also the `rotation` of a Context."""
        x, past = self.tok_emb(idx), 0 if cache is None else cache.length
        if self.config.token_shift:
            first = isinstance(past, int) and past == 0  # has no token before it
            before = torch.zeros_like(x[:, :1]) if first else self.tok_emb(cache.newest)
            x = x + self.token_shift * torch.cat([before, x], dim=1)[:, :-1]
        positions = torch.arange(idx.size(1), device=idx.device) + past
        if self.config.position_embedding == "learned":
            return self.dropout(x + self.pos_emb(positions)), None
        D, dtype = x.size(-1) // self.config.n_head, torch.promote_types(x.dtype, torch.float32)
        rates = 10_000 ** (-torch.arange(0, D, 2, device=idx.device, dtype=dtype) / D)
        angles = positions[:, None] * torch.cat([-rates, rates])
        return self.dropout(x), torch.stack([angles.cos(), angles.sin()])

    @torch.no_grad()
    def expert_masks(self, idx: Tensor) -> Mask:
        """The masks of idx (B, T) in evaluation, each (L, stacks, B, T, G), the encoder's stack
        first. ValueError for a model without experts."""
        if self.config.n_expert == 0:
            raise ValueError("n_expert=0: this model has no experts")
        with evaluation(self.modules()):
            masks = zip(*self.stacks(idx).masks, strict=True)
        return Mask(*(torch.stack(m).unflatten(0, (self.config.n_layer, -1)) for m in masks))

    def _check(self, idx: Tensor, cache: Cache | None = None) -> None:
        rows, past, size = "B", 0, self.config.block_size  # B: any number
        if cache is not None and not isinstance(cache.length, Tensor):
            rows, past, size = cache.batch, cache.length, min(size, cache.size)
        fits = idx.dim() == 2 and not idx.is_floating_point() and 1 <= idx.size(1) <= size - past
        if not fits or not (rows in ("B", len(idx)) or (len(idx) == 1 and past == 0)):
            allowed = f"token ids ({rows}, T), T from 1 to {size - past} (the room that is left)"
            raise ValueError(f"idx is {idx.dtype} {tuple(idx.shape)}: must be {allowed}")

    def num_params(self) -> int:
        """The number of parameters; the position embedding is not counted, as in nanoGPT."""
        return sum(p.numel() for name, p in self.named_parameters() if "pos_emb" not in name)

    def generate(self, idx: Tensor, max_new_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """Continues idx (B, T) by sampling: (B, T + max_new_tokens). Arguments as in `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **kwargs)], dim=1)

    @torch.no_grad()
    def stream(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The tokens (B, 1) that `generate` adds to idx (B, T), one by one. A full window moves by
        half a block. The generator draws row by row; the rest as in sample_token."""
        self._check(idx[..., -self.config.block_size :])
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must not be negative")
        (B, T), block_size, start, token = idx.shape, self.config.block_size, -1, idx
        device = idx.device if generator is None else generator.device
        draws = [torch.rand(max_new_tokens, generator=generator, device=device) for _ in range(B)]
        draws, modules = torch.stack(draws).to(idx.device), [*self.modules()]
        text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        cache = Cache(self, B, min(block_size, T + max_new_tokens)) if use_cache else None
        for end in range(T, T + max_new_tokens):
            before, start = start, window_start(end, block_size)
            window = text[:, start:end]
            if cache is not None and start == before:  # decode: the newest token alone
                window = token
            elif cache is not None:  # prefill: the prompt, later a window that has moved
                cache.length = 0
                window = window[:1] if (window == window[:1]).all() else window  # one serves all
            with torch.inference_mode(), evaluation(modules):
                logits = self.step(window, cache)[:, -1].expand(B, -1)
            token = sample_token(logits, draws[:, end - T], temperature, top_k, top_p)
            text[:, end : end + 1] = token
            yield token


@contextmanager
def evaluation(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, all modules are in evaluation; afterwards each is as it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def compile_step(model: ParallelEncoderDecoder, **options: Any) -> None:
    """Makes `model.step` run compiled for one token behind a cache, compiled anew for each shape
    (texts, tokens) of the cache; options are those of torch.compile."""
    eager = type(model).step
    how = dict(fullgraph=True, dynamic=False, isolate_recompiles=True, recompile_limit=1000)
    compiled = torch.compile(eager, **how | options)

    def step(self: ParallelEncoderDecoder, idx: Tensor, cache: Cache | None = None) -> Tensor:
        past = 0 if cache is None else cache.length
        if idx.size(1) > 1 or (isinstance(past, int) and past == 0):
            return eager(self, idx, cache)
        cache.length = torch.as_tensor(past, device=idx.device)
        return compiled(self, idx, cache)

    model.step = MethodType(step, model)  # a method: a copy of the model runs its own weights


def window_start(length: int, block_size: int) -> int:
    """Where the window on a text starts: after as few half blocks as let the rest fit."""
    step = max(1, block_size // 2)
    return step * math.ceil(max(0, length - block_size) / step)


def sample_token(
    logits: Tensor, draw: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """A token (B, 1) of each row of logits (B, V), chosen by `draw` (B,), uniform in [0, 1).
    Temperature 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest that hold the
    probability p. ValueError for what is out of range, and for logits that are NaN or infinite."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None for all tokens")
    highest = logits.amax(dim=-1, keepdim=True)
    if not highest.isfinite().all():
        raise ValueError("the logits are not finite; look at the model's weights")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits.float() - highest) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # what comes before it holds p already
        probs = probs.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
    total = probs.cumsum(dim=-1, dtype=torch.float32 if probs.is_mps else torch.float64)
    below_one = 1 - 2**-22  # or a draw near 1, rounded, could fall beyond the last token
    return torch.searchsorted(total, draw[:, None] * total[:, -1:] * below_one, right=True)

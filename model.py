"""A language model of two stacks that advance side by side: the parallel encoder-decoder.

The encoder understands the text read so far, the decoder predicts the next token. Both are causal
and read the same tokens; layer l of the decoder attends to layer l of the encoder:

    for each layer:   e = e + attention(e)            d = d + attention(d)
                      e = e + feed-forward(e)  ---->  d = d + cross-attention(d, e)
                                                      d = d + feed-forward(d)

    model = ParallelEncoderDecoder(ModelConfig(block_size=64, vocab_size=65))
    logits, loss, metrics = model(idx, targets)

Notable: pre-norm everywhere; tied input and output embedding; W_in, the way into the decoder,
starts as the identity; one attention class for self- and cross-attention. `arch="decoder_only"` is
the plain GPT made of the same blocks, the baseline. In shapes, B is the batch, T the time, C is
`n_embd` and V is `vocab_size`. This file needs torch and the standard library only.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

CHOICES = {
    "arch": ("parallel", "decoder_only"),
    "encoder_loss": ("none", "mse", "cosine", "log_cosine"),
    "next_position": ("none", "add", "subtract"),
    "expert_site": ("hidden", "output"),
    "router_input": ("hidden", "embedding"),
    "rounding": ("stochastic", "sigmoid", "none"),
    "l1_norm": ("linear", "squared"),
    "penalty_schedule": ("constant", "linear", "exponential"),
}


@dataclass
class ModelConfig:
    """Everything that shapes the model. Raises ValueError for a value that is not allowed.

    `decoder_only` has neither encoder nor cross-attention and reads none of the fields from
    `cross_first` to `encoder_loss_weight`.
    """

    arch: str = "parallel"  # or "decoder_only", the plain GPT
    block_size: int = 256  # the longest text that the model reads at once, in tokens
    vocab_size: int = 50257  # GPT-2's BPE; 65 for the characters of tinyshakespeare
    n_layer: int = 6  # layers of each stack
    n_head: int = 6  # heads of each self-attention
    n_embd: int = 384  # C, the width of both streams
    dropout: float = 0.0
    bias: bool = False  # in every Linear and LayerNorm
    cross_first: bool = False  # cross-attention before the decoder's self-attention
    lateral: bool = False  # beside cross-attention, d = d + W_lat LN(e): this very token
    decoder_self_attention: bool = True  # False: the decoder reads the past only through e
    n_cross_head: int = 0  # heads of the cross-attention; 0: n_head
    encoder_loss: str = "none"  # pulls e_L to the mean of what was read: mse, cosine, log_cosine
    encoder_loss_weight: float = 1.0
    next_position: str = "none"  # pos_emb[t + 1]: "add" to the input, "subtract" from the output

    n_expert: int = 0  # G, experts in each feed-forward block; 0: no learned dropout
    expert_site: str = "hidden"  # the mask is on the 4 C hidden units, or on the C "output" units
    router_input: str = "hidden"  # the block's input; "embedding": E, read once for all blocks
    router_n_head: int = 1
    router_head_dim: int = 16  # size of a head's queries and keys; its values have G / heads
    router_detach: bool = False  # no gradient from the router to its input
    shift_init: float = 0.0  # 0: all experts on at the start; pi: all off
    rounding: str = "stochastic"  # of the mask in training; "sigmoid", "none"
    rounding_scale: float = 60.0  # of rounding="sigmoid"
    l1_norm: str = "linear"  # mean of m; "squared": of m^2 / 2
    entropy_weight: float = 0.0  # lambda_H
    l1_weight: float = 0.0  # lambda_1
    penalty_schedule: str = "constant"  # how both weights grow; "linear", "exponential"
    penalty_iters: int = 1000  # iterations until they have their full value

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif type(value) is not field.type:
                raise ValueError(f"{field.name}={value!r}: must be of type {field.type.__name__}")
        for name, allowed in CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        for name in (*sizes, "router_n_head", "router_head_dim", "penalty_iters"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("encoder_loss_weight", "rounding_scale", "entropy_weight", "l1_weight"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "finite and not negative")
        self._require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._require("shift_init", 0.0 <= self.shift_init <= math.pi, "in [0, pi]")
        self._require("n_cross_head", self.n_cross_head >= 0, "0 (the same as n_head) or more")
        for name in ("n_head", "n_cross_head"):
            divides = self.n_embd % (getattr(self, name) or self.n_head) == 0
            self._require(name, divides, f"a divisor of n_embd={self.n_embd}")
        units = self.n_embd * (4 if self.expert_site == "hidden" else 1)
        divides = self.n_expert == 0 or (self.n_expert > 0 and units % self.n_expert == 0)
        allowed = f"0, or a divisor of the {units} {self.expert_site} units"
        self._require("n_expert", divides, allowed)
        divides = self.n_expert % self.router_n_head == 0
        self._require("router_n_head", divides, f"a divisor of n_expert={self.n_expert}")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")


class ModelOutput(NamedTuple):
    """What the model returns, with targets (B, T) and without."""

    logits: Tensor  # (B, T, V); without targets (B, 1, V), those of the last position
    loss: Tensor | None  # the training objective, a scalar; None without targets
    metrics: dict[str, Tensor]  # detached scalars; cross_entropy is in nats per token


class Mask(NamedTuple):
    """Which experts of one feed-forward block exist, per token; both (B, T, G)."""

    m: Tensor  # as learned, in [0, 1]
    r: Tensor  # as used, rounded


class Cache:
    """Keys and values of the tokens read so far, of every attention, to generate `batch` texts.

    Each attention's buffer (batch, block_size, D) is allocated once, then written in place;
    `length` tokens are in it. With length 0 new texts start; one row then serves all of them.
    """

    def __init__(self, batch: int, block_size: int):
        self.batch, self.block_size, self.length = batch, block_size, 0
        self.buffers: dict[Any, Tensor] = {}

    def extend(self, owner: Any, new: Tensor) -> Tensor:
        """Writes new (B, T, D) behind the owner's earlier ones, and gives all, (B, S, D)."""
        if owner not in self.buffers:
            self.buffers[owner] = new.new_empty(self.batch, self.block_size, new.size(2))
        buffer, T = self.buffers[owner], new.size(1)
        buffer.narrow(1, self.length, T).copy_(new)
        return new if self.length == 0 else buffer.narrow(1, 0, self.length + T)


def attend(q: Tensor, k: Tensor, v: Tensor, n_head: int, dropout: float = 0.0) -> Tensor:
    """Causal multi-head attention; q (B, T, Dk), k (B, S, Dk) and v (B, S, Dv) to (B, T, Dv).

    The T queries are those of all S tokens, or of the last one alone.
    """
    q, k, v = (t.view(*t.shape[:2], n_head, -1).transpose(1, 2) for t in (q, k, v))
    causal = q.size(2) > 1  # the last token may look at all
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


class Projections(nn.Linear):
    """Queries, where asked for, keys and values as one matrix product: x (B, T, C) to a tensor
    (B, T, n) for each n of `sizes`. With a cache the keys and values are those of all S tokens.
    """

    def __init__(self, n_embd: int, sizes: Sequence[int], bias: bool):
        super().__init__(n_embd, sum(sizes), bias=bias)
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, ...]:
        y = F.linear(x, self.weight, self.bias)
        if cache is None:
            return torch.split_with_sizes(y, self.sizes, dim=-1)
        *queries, keys, values = self.sizes
        y, key_value = torch.split_with_sizes(y, (sum(queries), keys + values), dim=-1)
        k, v = torch.split_with_sizes(cache.extend(self, key_value), (keys, values), dim=-1)
        return (y, k, v) if queries else (k, v)


class Attention(nn.Module):
    """Causal multi-head attention: x (B, T, C) attends to `memory` (B, T, C), or to itself."""

    def __init__(self, config: ModelConfig, n_head: int, cross: bool = False):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.n_head = n_head
        if cross:
            self.query = nn.Linear(C, C, bias=bias)
            self.key_value = Projections(C, (C, C), bias)
        else:
            self.query_key_value = Projections(C, (C, C, C), bias)
        self.proj = nn.Linear(C, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        if memory is None:
            q, k, v = self.query_key_value(x, cache)
        else:
            q, (k, v) = self.query(x), self.key_value(memory, cache)
        dropout = self.dropout.p if self.training else 0.0
        return self.dropout(self.proj(attend(q, k, v, self.n_head, dropout)))


class Router(nn.Module):
    """The masks of `n_block` feed-forward blocks: x (B, T, C) to m (B, T, n_block G), in [0, 1].

    A = causal attention over x, m = 0.5 cos(A + shift) + 0.5. See "Learned dropout" in the README.
    """

    def __init__(self, config: ModelConfig, n_block: int = 1):
        super().__init__()
        self.config = config
        keys, values = config.router_n_head * config.router_head_dim, n_block * config.n_expert
        self.query_key_value = Projections(config.n_embd, (keys, keys, values), config.bias)
        self.shift = nn.Parameter(torch.empty(values))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x.detach() if self.config.router_detach else x
        q, k, v = self.query_key_value(x, cache)
        A = attend(q, k, v, self.config.router_n_head)
        return 0.5 * torch.cos(A + self.shift) + 0.5


class FeedForward(nn.Module):
    """W2 (GELU(W1 x) * r), (B, T, C) to (B, T, C), with 4 C hidden units in G groups, the experts.

    Their mask is the block's own router's, or given: m (B, T, G), where the router reads E.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.w2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        own_router = config.n_expert > 0 and config.router_input == "hidden"
        self.router = Router(config) if own_router else None

    def forward(
        self, x: Tensor, m: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Mask | None]:
        if self.router is not None:
            m = self.router(x, cache)
        if m is None:
            return self.dropout(self.w2(F.gelu(self.w1(x)))), None
        r = round_mask(m, self.config.rounding, self.config.rounding_scale, self.training)
        if not self.training and self.sparse_pays(r):
            return self.sparse(x, r), Mask(m, r)
        hidden = F.gelu(self.w1(x))
        if self.config.expert_site == "hidden":
            y = self.w2(apply_mask(hidden, r))
        else:
            y = apply_mask(self.w2(hidden), r)
        return self.dropout(y), Mask(m, r)

    def sparse_pays(self, r: Tensor) -> bool:
        """Whether `sparse` is faster on a CPU, by what was measured (experiments/README.md):
        weights cost 15 % more than in one product, and an expert as much as reading 240,000 weights
        where there is one token, or as 9 million multiplications.
        """
        G, tokens = r.size(-1), r.numel() // r.size(-1)
        each = 2 * self.w1.weight.numel() // G  # weights of an expert
        dense, overhead = tokens * G * each, 240_000 if tokens == 1 else 9_000_000
        hidden, on_cpu = self.config.expert_site == "hidden", r.device.type == "cpu"
        if not hidden or not on_cpu or overhead > dense or torch.compiler.is_compiling():
            return False
        on = int(r.sum())
        return 1.15 * on * each + min(on, G) * overhead < dense

    def sparse(self, x: Tensor, r: Tensor) -> Tensor:
        """The same in evaluation, with no work for experts that are off: tokens are grouped by
        expert; r (..., G) is 0 or 1."""
        tokens, r, G = x.flatten(0, -2), r.flatten(0, -2), r.size(-1)
        w1 = self.w1.weight.unflatten(0, (G, -1)).mT  # (G, C, n)
        w2 = self.w2.weight.unflatten(1, (G, -1)).permute(1, 2, 0)  # (G, n, C)
        b1 = None if self.w1.bias is None else self.w1.bias.unflatten(0, (G, 1, -1))
        y = torch.zeros_like(tokens) if self.w2.bias is None else self.w2.bias.repeat(len(r), 1)
        for g, on in enumerate(r.amax(dim=0).tolist()):
            if not on:
                continue
            rows = r[:, g].nonzero().flatten()
            hidden = tokens[rows] @ w1[g]
            hidden = F.gelu(hidden if b1 is None else hidden + b1[g])
            y.index_add_(0, rows, (hidden @ w2[g]).to(y.dtype))
        return y.view_as(x)


def apply_mask(x: Tensor, r: Tensor) -> Tensor:
    """x (B, T, D) times r (B, T, G), each mask value on its group of D / G neighbours."""
    return (x.view(*r.shape, -1) * r.to(x.dtype).unsqueeze(-1)).flatten(-2)


def round_mask(m: Tensor, rounding: str, scale: float, training: bool) -> Tensor:
    """The mask as used: in evaluation [m >= 0.5]. In training Bernoulli(m) for `stochastic`, with
    the gradient dr/dm = 1; sigmoid(scale (m - 0.5)) for `sigmoid`; m itself for `none`."""
    if not training:
        return (m >= 0.5).to(m.dtype)
    if rounding == "none":
        return m
    if rounding == "sigmoid":
        return torch.sigmoid(scale * (m - 0.5))
    drawn = (torch.rand_like(m) < m).to(m.dtype)  # Bernoulli(m)
    return drawn + (m - m.detach())  # the bracket is exactly 0, its slope is 1


def entropy(m: Tensor) -> Tensor:
    """-m log2(m), in bits: 0, with slope 0, at m = 0.

    The true slope there is infinite, but it meets dm/dA = 0, and their product has the limit 0.
    """
    return -m * torch.log2(torch.where(m > 0, m, 1.0))


def l1(m: Tensor, norm: str) -> Tensor:
    """|m|, which is m, for the norm `linear`; m^2 / 2 for `squared`."""
    return m if norm == "linear" else m.square() / 2


def penalty_growth(schedule: str, it: int, penalty_iters: int) -> float:
    """The share, 0 to 1, of its full weight that a penalty has at iteration `it`.

    `linear` s, `exponential` (exp(5 s) - 1) / (exp(5) - 1), with s = it / penalty_iters up to 1.
    """
    share = min(1.0, it / penalty_iters)
    if schedule == "exponential":
        return math.expm1(5 * share) / math.expm1(5)
    return share if schedule == "linear" else 1.0


def mask_statistics(mask: Mask, l1_norm: str) -> dict[str, Tensor]:
    """Means over batch, time and experts of a Mask (..., B, T, G), each (...)."""
    m, r = mask
    values = {
        "entropy": entropy(m),
        "l1": l1(m, l1_norm),
        "experts_on": (r >= 0.5).to(m.dtype),
        "near_one": (m > 0.9).to(m.dtype),
        "near_zero": (m < 0.1).to(m.dtype),
    }
    return {name: value.flatten(-3).mean(dim=-1) for name, value in values.items()}


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward. A decoder-only GPT is a stack of these."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_attention = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config, config.n_head)
        self.ln_ff = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ff = FeedForward(config)

    def forward(
        self, x: Tensor, m: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Mask | None]:
        x = x + self.attention(self.ln_attention(x), cache=cache)
        y, mask = self.ff(self.ln_ff(x), m, cache)
        return x + y, mask


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the encoder's stream at the same layer, feed-forward."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, bias = config.n_embd, config.bias
        self.cross_first = config.cross_first
        if config.decoder_self_attention:
            self.ln_attention = nn.LayerNorm(C, bias=bias)
            self.attention = Attention(config, config.n_head)
        else:
            self.attention = None
        self.ln_memory = nn.LayerNorm(C, bias=bias)
        self.ln_cross = nn.LayerNorm(C, bias=bias)
        self.cross_attention = Attention(config, config.n_cross_head or config.n_head, cross=True)
        self.lateral = nn.Linear(C, C, bias=bias) if config.lateral else None
        self.ln_ff = nn.LayerNorm(C, bias=bias)
        self.ff = FeedForward(config)

    def forward(
        self, d: Tensor, e: Tensor, m: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Mask | None]:
        memory = self.ln_memory(e)
        if self.cross_first:
            d = self._read(d, memory, cache)
        if self.attention is not None:
            d = d + self.attention(self.ln_attention(d), cache=cache)
        if not self.cross_first:
            d = self._read(d, memory, cache)
        y, mask = self.ff(self.ln_ff(d), m, cache)
        return d + y, mask

    def _read(self, d: Tensor, memory: Tensor, cache: Cache | None) -> Tensor:
        d = d + self.cross_attention(self.ln_cross(d), memory, cache)
        return d if self.lateral is None else d + self.lateral(memory)


class ParallelEncoderDecoder(nn.Module):
    """The two stacks between one embedding and one output layer, which share their weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, layers = config.n_embd, range(config.n_layer)
        self.tok_emb = nn.Embedding(config.vocab_size, C)
        # The last token's next position lies one beyond the block.
        rows = config.block_size + (config.next_position != "none")
        self.pos_emb = nn.Embedding(rows, C)
        self.dropout = nn.Dropout(config.dropout)
        if config.arch == "parallel":
            self.encoder = nn.ModuleList(EncoderLayer(config) for _ in layers)
            self.w_in = nn.Linear(C, C, bias=config.bias)
            self.decoder = nn.ModuleList(DecoderLayer(config) for _ in layers)
        else:
            self.decoder = nn.ModuleList(EncoderLayer(config) for _ in layers)
        self.ln_out = nn.LayerNorm(C, bias=config.bias)
        self.router = None
        if config.n_expert > 0 and config.router_input == "embedding":
            self.router = Router(config, config.n_layer * (2 if config.arch == "parallel" else 1))
        if config.n_expert > 0:
            # The weights (lambda_H, lambda_1) of the penalties; a schedule may write to them.
            weights = torch.tensor([config.entropy_weight, config.l1_weight])
            self.register_buffer("penalty_weights", weights, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises every parameter:

        | parameter | starts as | why |
        | --- | --- | --- |
        | matrices of the layers | N(0, 0.02) | as GPT-2 |
        | those that write to a stream | N(0, 0.02 / sqrt(n)) | n writes sum up in the stream |
        | tok_emb, pos_emb | N(0, 0.3) | learns faster than 0.1 and 0.02, measured |
        | pos_emb that is subtracted | N(0, 0.03) | the output starts close to uniform |
        | w_in | the identity | both stacks start from the same E; learns faster, measured |
        | ln_out | 0.03 | the tied output starts close to uniform: the loss at ln V |
        | other LayerNorms, biases | 1, 0 | |
        | shift of a router | shift_init | 0: all experts on at the start, pi: all off |
        """
        for name, module in self.named_modules():
            if isinstance(module, Router):
                nn.init.constant_(module.shift, self.config.shift_init)
            elif isinstance(module, nn.Linear):
                # self-attention, cross-attention and its lateral, feed-forward: at most 4 a layer
                writes = 4 if name.startswith("decoder") and self.config.arch == "parallel" else 2
                writes_to_stream = name.endswith(("proj", "w2", "lateral"))
                std = 0.02 / math.sqrt(writes * self.config.n_layer if writes_to_stream else 1)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
        if self.config.next_position == "subtract":
            nn.init.normal_(self.pos_emb.weight, std=0.03)
        nn.init.constant_(self.ln_out.weight, 0.03)
        if self.config.arch == "parallel":
            nn.init.eye_(self.w_in.weight)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> ModelOutput:
        """Reads idx (B, T), T ≤ block_size; targets (B, T) are token ids, -1 where not counted.

        With a cache that holds tokens already, idx (B, 1) is the token that follows them. Raises
        ValueError for shapes that do not fit and, where a text starts on a CPU, for ids outside the
        vocabulary.
        """
        self._check(idx, targets, cache)
        past = 0 if cache is None else cache.length
        emb, e, d, masks = self.stacks(idx, cache)
        out = self.ln_out(d)
        if self.config.next_position == "subtract":
            out = out - self.pos_emb.weight[past + 1 : past + idx.size(1) + 1]
        if targets is None:
            return ModelOutput(F.linear(out[:, -1:], self.tok_emb.weight), None, {})
        logits = F.linear(out, self.tok_emb.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        metrics = {"cross_entropy": loss.detach()}
        if self.config.n_expert > 0:
            stats = mask_statistics(self.stack_masks(masks), self.config.l1_norm)
            stats = {name: per_block.mean() for name, per_block in stats.items()}
            penalties = torch.stack([stats["entropy"], stats["l1"]])
            loss = loss + (self.penalty_weights * penalties).sum()
            metrics |= {name: value.detach() for name, value in stats.items()}
        if e is not None and self.config.encoder_loss != "none":
            memory = self.decoder[-1].ln_memory(e)
            encoder_loss = encoder_loss_of(self.config.encoder_loss, memory, emb)
            loss = loss + self.config.encoder_loss_weight * encoder_loss
            metrics["encoder_loss"] = encoder_loss.detach()
        return ModelOutput(logits, loss, metrics)

    def stacks(
        self, idx: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, list[Mask | None]]:
        """E, e_L and d_L of idx (B, T), each (B, T, C), and the masks, layer by layer, the
        encoder's first; None for a block without experts, and e_L is None in the decoder-only
        model. The cache, where there is one, takes in what was read.
        """
        parallel, past = self.config.arch == "parallel", 0 if cache is None else cache.length
        end = past + idx.size(1)
        emb = self.dropout(self.tok_emb(idx) + self.pos_emb.weight[past:end])
        e, d = (emb, self.w_in(emb)) if parallel else (None, emb)
        if self.config.next_position == "add":
            d = d + self.pos_emb.weight[past + 1 : end + 1]
        masks = []
        given = repeat(None)
        if self.router is not None:
            given = iter(self.router(emb, cache).split(self.config.n_expert, dim=-1))
        if parallel:
            for encoder_layer, decoder_layer in zip(self.encoder, self.decoder, strict=True):
                e, mask_e = encoder_layer(e, next(given), cache)
                d, mask_d = decoder_layer(d, e, next(given), cache)
                masks += [mask_e, mask_d]
        else:
            for layer in self.decoder:
                d, mask = layer(d, next(given), cache)
                masks.append(mask)
        if cache is not None:
            cache.length = end
        return emb, e, d, masks

    def stack_masks(self, masks: list[Mask]) -> Mask:
        """The masks of all blocks, as `stacks` gives them, as one, each (L, stacks, B, T, G)."""
        m, r = map(torch.stack, zip(*masks, strict=True))
        shape = (self.config.n_layer, -1)
        return Mask(m.unflatten(0, shape), r.unflatten(0, shape))

    @torch.no_grad()
    def expert_masks(self, idx: Tensor, rounded: bool = True) -> Tensor:
        """The masks of idx (B, T) in evaluation: (L, stacks, B, T, G), the encoder's stack first.

        `rounded=False` gives them as learned, in [0, 1]. ValueError for a model without experts.
        """
        if self.config.n_expert == 0:
            raise ValueError("n_expert=0: this model has no experts")
        self._check(idx, None)
        training = self.training
        self.eval()
        try:
            mask = self.stack_masks(self.stacks(idx)[-1])
        finally:
            self.train(training)
        return mask.r if rounded else mask.m

    def _check(self, idx: Tensor, targets: Tensor | None, cache: Cache | None = None) -> None:
        block_size, shape = self.config.block_size, tuple(idx.shape)
        if idx.dim() != 2 or not 1 <= idx.size(1) <= block_size:
            allowed = f"(B, T) with 1 ≤ T ≤ block_size={block_size}"
            raise ValueError(f"idx has the shape {shape}: must be {allowed}")
        if cache is not None:
            if targets is not None:
                raise ValueError("targets: must be None with a cache, which is for generation")
            B, room = cache.batch, min(cache.block_size, block_size) - cache.length
            if cache.length and (shape != (B, 1) or room < 1):
                allowed = f"({B}, 1) behind the {cache.length} tokens of the cache, of {block_size}"
                raise ValueError(f"idx has the shape {shape}: must be {allowed}")
            if shape[0] not in (1, B) or shape[1] > room:
                raise ValueError(f"idx has the shape {shape}: must fit a cache of ({B}, {room})")
            if cache.length:
                return  # what comes token by token is the model's own
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets has the shape {tuple(targets.shape)}: must be as idx")
        if torch.compiler.is_compiling() or idx.is_cuda:
            return  # a look at the values would break the graph, or wait for the device
        V = self.config.vocab_size
        for name, ids, least in (("idx", idx, 0), ("targets", targets, -1)):
            if ids is not None and ids.numel():
                low, high = torch.stack(ids.aminmax()).tolist()
                if not least <= low <= high < V:
                    span = f"{low} to {high}"
                    raise ValueError(f"{name} has ids from {span}: must be {least} to {V - 1}")

    def matrices(self) -> dict[tuple[int, ...], list[nn.Parameter]]:
        """The weights of all layers, by the rows of the matrices that each of them stacks."""
        found = defaultdict(list)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                found[getattr(module, "sizes", (module.out_features,))].append(module.weight)
        return found

    def num_params(self) -> int:
        """The number of parameters; the position embedding is not counted, as in nanoGPT."""
        return sum(p.numel() for p in self.parameters()) - self.pos_emb.weight.numel()

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float = 0.0) -> float:
        """The share of the peak that training reached (model FLOPs utilisation), in [0, 1].

        `fwdbwd_per_iter` sequences of block_size tokens in `dt` seconds, against `peak_flops`
        floating-point operations a second; 0: what a GEMM reaches on this device. Counts 6 per
        weight and token, and 12 C T per attention and token (PaLM, arXiv:2204.02311, B).
        """
        C, T = self.config.n_embd, self.config.block_size
        attentions = sum(isinstance(m, Attention) for m in self.modules())  # routers are small
        flops = (6 * self.num_params() + 12 * attentions * C * T) * T * fwdbwd_per_iter
        return flops / dt / (peak_flops or gemm_peak(str(self.pos_emb.weight.device)))

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues idx (B, T) by sampling: (B, T + max_new_tokens).

        The window that the model reads moves by half a block when it is full. The generator, or
        torch's own, gives max_new_tokens numbers for the first row, then for the next. Without the
        cache the text is the same, and takes longer. Other arguments, and ValueErrors, as
        `sample_token` has them.
        """
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        how |= dict(use_cache=use_cache, generator=generator)
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **how)], dim=1)

    @torch.inference_mode()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
        **how: Any,
    ) -> Iterator[Tensor]:
        """What `generate` adds to idx, token by token as it comes: (B, 1), max_new_tokens times."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must not be negative")
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(
                f"idx has the shape {tuple(idx.shape)}: must be (B, T), at least (1, 1)"
            )
        B, T = idx.shape
        device = idx.device if generator is None else generator.device
        draws = [torch.rand(max_new_tokens, generator=generator, device=device) for _ in range(B)]
        draws = torch.stack(draws).to(idx.device)
        text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        block_size, start = self.config.block_size, -1
        cache = Cache(B, min(block_size, T + max_new_tokens)) if use_cache else None
        training = self.training
        self.eval()
        try:
            for end in range(T, T + max_new_tokens):
                before, start = start, window_start(end, block_size)
                if cache is None:
                    logits = self(text[:, start:end]).logits
                elif start == before:  # decode: the newest token alone
                    logits = self(text[:, end - 1 : end], cache=cache).logits
                else:  # prefill: the prompt, later a window that has moved
                    cache.length, window = 0, text[:, start:end]
                    alike = bool((window == window[:1]).all())  # then one row stands for all
                    logits = self(window[:1] if alike else window, cache=cache).logits
                    logits = logits.expand(B, -1, -1)
                token = sample_token(logits[:, -1], draws[:, end - T], **how)
                text[:, end : end + 1] = token
                yield token
        finally:
            self.train(training)


def encoder_loss_of(kind: str, encoded: Tensor, emb: Tensor) -> Tensor:
    """How far `encoded`, LN(e_L), is from the running mean over time of LN(E), which is detached.

    Both (B, T, C). `mse`, `cosine` = (1 - cos) / 2, `log_cosine` = -log((1 + cos) / 2); a scalar.
    """
    read = F.layer_norm(emb.detach(), emb.shape[-1:])
    count = torch.arange(1, emb.size(1) + 1, device=emb.device, dtype=emb.dtype)
    mean_read = read.cumsum(dim=1) / count[:, None]
    if kind == "mse":
        return F.mse_loss(encoded, mean_read)
    cos = F.cosine_similarity(encoded, mean_read, dim=-1)
    if kind == "cosine":
        return ((1 - cos) / 2).mean()
    return -((1 + cos) / 2).clamp_min(1e-6).log().mean()


def window_start(length: int, block_size: int) -> int:
    """Where the window that the model reads starts in a text of `length` tokens.

    0 until the block is full; then as few steps of half a block as make the rest fit.
    """
    step = max(1, block_size // 2)
    return step * math.ceil(max(0, length - block_size) / step)


def sample_token(
    logits: Tensor,
    draw: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The token (B, 1) of logits (B, V) that the numbers `draw` (B,), uniform in [0, 1), choose.

    Temperature 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest tokens that
    hold the probability p. Raises ValueError for an argument out of range, and for logits that
    are NaN or infinite.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None for all tokens")
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    if not math.isfinite(highest.sum()):  # one look at the device for all rows
        raise ValueError("the logits are not finite, hence some of the model's weights")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = (logits - highest) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # what comes before it holds p already
        probs = probs.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
    float64 = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has none
    total = probs.cumsum(dim=-1, dtype=float64)
    below_one = 1 - 2**-22  # or a draw near 1, rounded, could fall beyond the last token
    return torch.searchsorted(total, draw[:, None] * total[:, -1:] * below_one, right=True)


@cache
def gemm_peak(device: str) -> float:
    """Floating-point operations a second of a large matrix product on this device, measured once.

    In bfloat16 on a CUDA device that has it, else in float32.
    """
    bfloat16 = "cuda" in device and torch.cuda.is_bf16_supported(including_emulation=False)
    n, dtype = (8192, torch.bfloat16) if bfloat16 else (1024, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.2).median

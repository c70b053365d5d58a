"""A language model of two stacks that advance side by side: the parallel encoder-decoder.

The encoder understands the text read so far, the decoder predicts the next token. Both are causal
and read the same tokens; layer l of the decoder attends to layer l of the encoder:

    for each layer:   e = e + attention(e)            d = d + attention(d)
                      e = e + feed-forward(e)  ---->  d = d + cross-attention(d, e)
                                                      d = d + feed-forward(d)

In shapes B is the batch, T the time, C `n_embd`, V `vocab_size`, L `n_layer`, G `n_expert`. This
file needs torch and the standard library only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ModelConfig:
    """Everything that shapes the model; ValueError for a value that is not allowed. `decoder_only`
    reads none of the fields from `cross_first` to `encoder_loss_weight`."""

    arch: Literal["parallel", "decoder_only"] = "parallel"  # the latter: a plain GPT, the baseline
    block_size: int = 256  # the longest text that the model reads at once, in tokens
    vocab_size: int = 50257  # GPT-2's BPE; 65 for the characters of tinyshakespeare
    n_layer: int = 6  # L, of each stack
    n_head: int = 6  # heads of each self-attention
    n_embd: int = 384  # C, the width of both streams
    dropout: float = 0.0
    bias: bool = False  # in every Linear and LayerNorm
    cross_first: bool = False  # cross-attention before the decoder's self-attention
    lateral: bool = False  # beside cross-attention, d = d + W_lat LN(e): this very token
    decoder_self_attention: bool = True  # False: the decoder reads the past only through e
    n_cross_head: int = 0  # heads of the cross-attention; 0: n_head
    encoder_loss: Literal["none", "mse", "cosine", "log_cosine"] = "none"  # LN(e_L) to what is read
    encoder_loss_weight: float = 1.0
    next_position: Literal["none", "add", "subtract"] = "none"  # pos_emb[t + 1] to d_0, from output

    n_expert: int = 0  # G, experts in each feed-forward block; 0: no learned dropout
    expert_site: Literal["hidden", "output"] = "hidden"  # the mask is on 4 C hidden units, or on C
    router_input: Literal["hidden", "embedding"] = "hidden"  # the block's; or E, for all blocks
    router_n_head: int = 1
    router_head_dim: int = 16  # size of a head's queries and keys; its values have G / heads
    router_detach: bool = False  # no gradient from the router to its input
    shift_init: float = 0.0  # 0: all experts on at the start; pi: all off
    rounding: Literal["stochastic", "sigmoid", "none"] = "stochastic"  # of the mask, in training
    rounding_scale: float = 60.0  # of rounding="sigmoid"
    l1_norm: Literal["linear", "squared"] = "linear"  # mean of m, of m^2 / 2
    entropy_weight: float = 0.0  # lambda_H
    l1_weight: float = 0.0  # lambda_1
    penalty_schedule: Literal["constant", "linear", "exponential"] = "constant"  # of both weights
    penalty_iters: int = 1000  # iterations until they have their full value

    def __post_init__(self):
        for field in fields(self):
            name, value, choices = field.name, getattr(self, field.name), get_args(field.type)
            if field.type is float and type(value) is int:
                setattr(self, name, float(value))
            elif choices:
                self._require(name, value in choices, f"one of {', '.join(choices)}")
            else:
                self._require(name, type(value) is field.type, f"of type {field.type.__name__}")
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        for name in (*sizes, "router_n_head", "router_head_dim", "penalty_iters"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("encoder_loss_weight", "rounding_scale", "entropy_weight", "l1_weight"):
            self._require(name, 0.0 <= getattr(self, name) < math.inf, "finite and not negative")
        C, G, cross, site = self.n_embd, self.n_expert, self.n_cross_head, self.expert_site
        units = 4 * C if site == "hidden" else C
        self._require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._require("shift_init", 0.0 <= self.shift_init <= math.pi, "in [0, pi]")
        self._require("n_head", C % self.n_head == 0, f"a divisor of n_embd={C}")
        ok = cross == 0 or (cross > 0 and C % cross == 0)
        self._require("n_cross_head", ok, f"0 (as n_head), or a divisor of n_embd={C}")
        ok = G == 0 or (G > 0 and units % G == 0)
        self._require("n_expert", ok, f"0, or a divisor of the {units} {site} units")
        self._require("router_n_head", G % self.router_n_head == 0, f"a divisor of n_expert={G}")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def penalty_growth(self, it: float) -> float:
        """The share, 0 to 1, of their full weight that the penalties have at iteration `it`."""
        s = min(1.0, it / self.penalty_iters)
        growth = {"constant": 1.0, "linear": s, "exponential": math.expm1(5 * s) / math.expm1(5)}
        return growth[self.penalty_schedule]


class ModelOutput(NamedTuple):
    """What the model returns, with targets (B, T) and without."""

    logits: Tensor  # (B, T, V); without targets (B, 1, V), those of the last position
    loss: Tensor | None  # the training objective, a scalar; None without targets
    metrics: dict[str, Tensor]  # detached scalars; cross_entropy is in nats per token


class Mask(NamedTuple):
    """Which experts exist, per token: of a block (B, T, G), of all of them (L, stacks, B, T, G)."""

    m: Tensor  # as learned, in [0, 1]
    r: Tensor  # as used, rounded


class Cache:
    """Keys and values of the `length` tokens read so far, of every attention, to generate `batch`
    texts. Each buffer (batch, block_size, D) is allocated once, then written in place. With length
    0 new texts start; one row then serves all of them."""

    def __init__(self, batch: int, block_size: int):
        self.batch, self.block_size, self.length = batch, block_size, 0
        self.buffers: dict[Any, Tensor] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, n_head: int, dropout: float = 0.0) -> Tensor:
    """Causal multi-head attention; q (B, T, Dk), k (B, S, Dk) and v (B, S, Dv) to (B, T, Dv).
    The T queries are those of all S tokens, or of the last one alone."""
    q, k, v = (t.view(*t.shape[:2], n_head, -1).transpose(1, 2) for t in (q, k, v))
    causal = q.size(2) > 1  # the last token may look at all
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


class Projections(nn.Linear):
    """Queries, where asked for, keys and values as one matrix product: x (B, T, C) to a tensor
    (B, T, n) for each n of `sizes`. With a cache the keys and values are those of all S tokens."""

    def __init__(self, n_embd: int, sizes: Sequence[int], bias: bool):
        super().__init__(n_embd, sum(sizes), bias=bias)
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, ...]:
        y = F.linear(x, self.weight, self.bias)
        if cache is None:
            return torch.split_with_sizes(y, self.sizes, dim=-1)
        *queries, keys, values = self.sizes
        q, new = torch.split_with_sizes(y, (sum(queries), keys + values), dim=-1)
        if self not in cache.buffers:
            cache.buffers[self] = new.new_empty(cache.batch, cache.block_size, keys + values)
        buffer, end = cache.buffers[self], cache.length + x.size(1)
        buffer[:, cache.length : end] = new
        k, v = (new if cache.length == 0 else buffer[:, :end]).split((keys, values), dim=-1)
        return (q, k, v) if queries else (k, v)


class Attention(nn.Module):
    """Causal multi-head attention: x (B, T, C) attends to `memory` (B, T, C), or to itself."""

    def __init__(self, config: ModelConfig, n_head: int, cross: bool = False):
        super().__init__()
        C, bias, self.n_head = config.n_embd, config.bias, n_head
        if cross:
            self.query = nn.Linear(C, C, bias=bias)
            self.key_value = Projections(C, (C, C), bias)
        else:
            self.query_key_value = Projections(C, (C, C, C), bias)
        self.proj = nn.Linear(C, C, bias=bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor | None, cache: Cache | None = None) -> Tensor:
        if memory is None:
            q, k, v = self.query_key_value(x, cache)
        else:
            q, (k, v) = self.query(x), self.key_value(memory, cache)
        y = attend(q, k, v, self.n_head, self.dropout.p if self.training else 0.0)
        return self.dropout(self.proj(y))


class Router(nn.Module):
    """The masks of `n_block` feed-forward blocks: x (B, T, C) to m (B, T, n_block G), in [0, 1].
    A = causal attention over x, m = 0.5 cos(A + shift) + 0.5: "Learned dropout" in the README."""

    def __init__(self, config: ModelConfig, n_block: int = 1):
        super().__init__()
        self.config = config
        keys, values = config.router_n_head * config.router_head_dim, n_block * config.n_expert
        self.query_key_value = Projections(config.n_embd, (keys, keys, values), config.bias)
        self.shift = nn.Parameter(torch.full((values,), config.shift_init))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x.detach() if self.config.router_detach else x
        A = attend(*self.query_key_value(x, cache), self.config.router_n_head)
        return 0.5 * torch.cos(A + self.shift) + 0.5


class FeedForward(nn.Module):
    """W2 (GELU(W1 x) * r), or for the site `output` W2 GELU(W1 x) * r, (B, T, C) to (B, T, C), and
    the Mask, None without experts. Where one router reads E for all blocks, it gives m."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.w1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.w2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        own_router = config.n_expert > 0 and config.router_input == "hidden"
        self.router = Router(config) if own_router else None

    def forward(self, x: Tensor, m: Tensor | None = None, cache: Cache | None = None) -> tuple:
        m = m if self.router is None else self.router(x, cache)
        hidden = F.gelu(self.w1(x))
        if m is None:
            return self.dropout(self.w2(hidden)), None
        r = round_mask(m, self.config.rounding, self.config.rounding_scale, self.training)
        masks_hidden = self.config.expert_site == "hidden"
        y = self.w2(apply_mask(hidden, r)) if masks_hidden else apply_mask(self.w2(hidden), r)
        return self.dropout(y), Mask(m, r)


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
    """-m log2(m), in bits: 0, with slope 0, at m = 0. The true slope there is infinite, but it
    meets dm/dA = 0, and their product has the limit 0."""
    return -m * torch.log2(torch.where(m > 0, m, 1.0))


def mask_statistics(mask: Mask, l1_norm: str) -> dict[str, Tensor]:
    """Means over batch, time and experts of a Mask (..., B, T, G), each (...)."""
    m, r = mask
    values = {
        "entropy": entropy(m),
        "l1": m if l1_norm == "linear" else m.square() / 2,  # |m| is m
        "experts_on": (r >= 0.5).to(m.dtype),
        "near_one": (m > 0.9).to(m.dtype),
        "near_zero": (m < 0.1).to(m.dtype),
    }
    return {name: value.flatten(-3).mean(dim=-1) for name, value in values.items()}


class Layer(nn.Module):
    """A layer of the encoder or, with e None, of a GPT: self-attention, feed-forward. With `cross`,
    of the decoder: also cross-attention to e, the encoder's stream at the same layer."""

    def __init__(self, config: ModelConfig, cross: bool = False):
        super().__init__()
        C, bias, self.cross_first = config.n_embd, config.bias, config.cross_first
        self.attention = self.lateral = None
        if config.decoder_self_attention or not cross:
            self.ln_attention = nn.LayerNorm(C, bias=bias)
            self.attention = Attention(config, config.n_head)
        if cross:
            self.ln_memory = nn.LayerNorm(C, bias=bias)
            self.ln_cross = nn.LayerNorm(C, bias=bias)
            self.cross_attention = Attention(config, config.n_cross_head or config.n_head, cross)
            self.lateral = nn.Linear(C, C, bias=bias) if config.lateral else None
        self.ln_ff = nn.LayerNorm(C, bias=bias)
        self.ff = FeedForward(config)

    def forward(
        self, x: Tensor, e: Tensor | None, m: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Mask | None]:
        for step in ("cross", "self") if self.cross_first else ("self", "cross"):
            if step == "self" and self.attention is not None:
                x = x + self.attention(self.ln_attention(x), None, cache)
            if step == "cross" and e is not None:
                memory = self.ln_memory(e)
                x = x + self.cross_attention(self.ln_cross(x), memory, cache)
                x = x if self.lateral is None else x + self.lateral(memory)
        y, mask = self.ff(self.ln_ff(x), m, cache)
        return x + y, mask


class ParallelEncoderDecoder(nn.Module):
    """The two stacks between one embedding and one output layer, which share their weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.router = config, None
        C, layers, parallel = config.n_embd, range(config.n_layer), config.arch == "parallel"
        self.tok_emb = nn.Embedding(config.vocab_size, C)
        self.pos_emb = nn.Embedding(config.block_size + (config.next_position != "none"), C)
        self.dropout = nn.Dropout(config.dropout)
        if parallel:
            self.encoder = nn.ModuleList(Layer(config) for _ in layers)
            self.w_in = nn.Linear(C, C, bias=config.bias)
        self.decoder = nn.ModuleList(Layer(config, cross=parallel) for _ in layers)
        self.ln_out = nn.LayerNorm(C, bias=config.bias)
        if config.n_expert > 0:
            if config.router_input == "embedding":
                self.router = Router(config, config.n_layer * (2 if parallel else 1))
            weights = torch.tensor([config.entropy_weight, config.l1_weight])  # schedules set them
            self.register_buffer("penalty_weights", weights, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises all but LayerNorms, which start at 1, and a Router's shift, which is set."""
        parallel = self.config.arch == "parallel"
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)  # learns faster than 0.02 and 0.1, measured
            elif isinstance(module, nn.Linear):
                n = 1  # N(0, 0.02) as GPT-2, over sqrt(n) where n outputs or fewer add up
                if name.endswith(("proj", "w2", "lateral")):
                    n = self.config.n_layer * (4 if parallel and name.startswith("decoder") else 2)
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(n))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.next_position == "subtract":
            nn.init.normal_(self.pos_emb.weight, std=0.03)  # the loss starts at ln V: here, and
        nn.init.constant_(self.ln_out.weight, 0.03)  # here, as logits start near 0
        if parallel:
            nn.init.eye_(self.w_in.weight)  # both stacks start from E; learns faster, measured

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> ModelOutput:
        """Reads idx (B, T), T ≤ block_size; targets (B, T) are token ids, -1 where not counted.
        Behind the tokens of a cache idx is (B, 1). ValueError for shapes that do not fit."""
        self._check(idx, cache)
        if targets is not None and (targets.shape != idx.shape or cache is not None):
            raise ValueError(f"targets has the shape {tuple(targets.shape)}: not idx's, or a cache")
        past = 0 if cache is None else cache.length
        emb, e, d, mask = self.stacks(idx, cache)
        out = self.ln_out(d)
        if self.config.next_position == "subtract":
            out = out - self.pos_emb.weight[past + 1 : past + idx.size(1) + 1]
        if targets is None:
            return ModelOutput(F.linear(out[:, -1:], self.tok_emb.weight), None, {})
        logits = F.linear(out, self.tok_emb.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        metrics = {"cross_entropy": loss.detach()}
        if mask is not None:
            mean = {k: v.mean() for k, v in mask_statistics(mask, self.config.l1_norm).items()}
            loss = loss + (self.penalty_weights * torch.stack([mean["entropy"], mean["l1"]])).sum()
            metrics |= {k: v.detach() for k, v in mean.items()}
        if e is not None and self.config.encoder_loss != "none":
            memory = self.decoder[-1].ln_memory(e)
            encoder_loss = encoder_loss_of(self.config.encoder_loss, memory, emb)
            loss = loss + self.config.encoder_loss_weight * encoder_loss
            metrics["encoder_loss"] = encoder_loss.detach()
        return ModelOutput(logits, loss, metrics)

    def stacks(
        self, idx: Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Mask | None]:
        """E, e_L and d_L of idx (B, T), each (B, T, C), and the masks (L, stacks, B, T, G), the
        encoder's first; None for what there is not, as masks with a cache, which takes in idx."""
        parallel, past = self.config.arch == "parallel", 0 if cache is None else cache.length
        end = past + idx.size(1)
        emb = self.dropout(self.tok_emb(idx) + self.pos_emb.weight[past:end])
        e, d = (emb, self.w_in(emb)) if parallel else (None, emb)
        if self.config.next_position == "add":
            d = d + self.pos_emb.weight[past + 1 : end + 1]
        given, masks = iter(()), []  # given: by the router that reads E
        if self.router is not None:
            given = iter(self.router(emb, cache).split(self.config.n_expert, dim=-1))
        for k, layer in enumerate(self.decoder):
            if parallel:
                e, mask = self.encoder[k](e, None, next(given, None), cache)
                masks.append(mask)
            d, mask = layer(d, e, next(given, None), cache)
            masks.append(mask)
        if cache is not None:
            cache.length = end
        if cache is not None or self.config.n_expert == 0:
            return emb, e, d, None
        stacked = map(torch.stack, zip(*masks, strict=True))
        return emb, e, d, Mask(*(x.unflatten(0, (self.config.n_layer, -1)) for x in stacked))

    @torch.no_grad()
    def expert_masks(self, idx: Tensor, rounded: bool = True) -> Tensor:
        """The masks of idx (B, T) in evaluation: (L, stacks, B, T, G), the encoder's stack first;
        `rounded=False`: as learned, in [0, 1]. ValueError for a model without experts."""
        if self.config.n_expert == 0:
            raise ValueError("n_expert=0: this model has no experts")
        self._check(idx, None)
        training = self.training
        try:
            mask = self.eval().stacks(idx)[-1]
        finally:
            self.train(training)
        return mask.r if rounded else mask.m

    def _check(self, idx: Tensor, cache: Cache | None) -> None:
        size, fits = self.config.block_size, idx.dim() == 2
        allowed, past = f"(B, T) with 1 ≤ T ≤ block_size={size}", 0
        if fits and cache is not None:
            B, past, size = cache.batch, cache.length, min(size, cache.block_size)
            allowed = f"({B}, {1 if past else 'T'}) behind the {past} tokens of a cache of {size}"
            fits = (idx.shape == (B, 1)) if past else (idx.size(0) in (1, B))
        if not fits or not 1 <= idx.size(1) <= size - past:
            raise ValueError(f"idx has the shape {tuple(idx.shape)}: must be {allowed}")

    def num_params(self) -> int:
        """The number of parameters; the position embedding is not counted, as in nanoGPT."""
        return sum(p.numel() for p in self.parameters()) - self.pos_emb.weight.numel()

    def generate(self, idx: Tensor, max_new_tokens: int, *args: Any, **kwargs: Any) -> Tensor:
        """Continues idx (B, T) by sampling: (B, T + max_new_tokens). Arguments as in `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **kwargs)], dim=1)

    @torch.inference_mode()
    def stream(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """What `generate` adds to idx, token by token as it comes: (B, 1), max_new_tokens times.

        The window that is read moves by half a block when it is full. The generator, or torch's
        own, gives max_new_tokens numbers for the first row, then for the next. Without the cache
        the text is the same. The rest, and ValueErrors, as in `sample_token`."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must not be negative")
        (B, T), block_size, start = idx.shape, self.config.block_size, -1
        device = idx.device if generator is None else generator.device
        draws = [torch.rand(max_new_tokens, generator=generator, device=device) for _ in range(B)]
        draws = torch.stack(draws).to(idx.device)
        text = torch.cat([idx, idx.new_zeros(B, max_new_tokens)], dim=1)
        cache = Cache(B, min(block_size, T + max_new_tokens)) if use_cache else None
        training = self.training
        self.eval()
        try:
            for end in range(T, T + max_new_tokens):
                before, start = start, window_start(end, block_size)
                window = text[:, start:end]
                if cache is not None and start == before:  # decode: the newest token alone
                    window = window[:, -1:]
                elif cache is not None:  # prefill: the prompt, later a window that has moved
                    cache.length = 0
                    alike = (window == window[:1]).all()  # then one row stands for all
                    window = window[:1] if alike else window
                logits = self(window, cache=cache).logits[:, -1].expand(B, -1)
                token = sample_token(logits, draws[:, end - T], temperature, top_k, top_p)
                text[:, end : end + 1] = token
                yield token
        finally:
            self.train(training)


def encoder_loss_of(kind: str, encoded: Tensor, emb: Tensor) -> Tensor:
    """How far `encoded`, LN(e_L), is from the running mean over time of LN(E), which is detached.
    Both (B, T, C), to a scalar: mse, cosine = (1 - cos) / 2, log_cosine = -log((1 + cos) / 2)."""
    read = F.layer_norm(emb.detach(), emb.shape[-1:])
    mean_read = read.cumsum(dim=1) / torch.arange(1, emb.size(1) + 1, device=emb.device)[:, None]
    if kind == "mse":
        return F.mse_loss(encoded, mean_read)
    cos = F.cosine_similarity(encoded, mean_read, dim=-1)
    return ((1 - cos) / 2 if kind == "cosine" else -((1 + cos) / 2).clamp_min(1e-6).log()).mean()


def window_start(length: int, block_size: int) -> int:
    """Where the window on a text starts: after the fewest steps of half a block that let it fit."""
    step = max(1, block_size // 2)
    return step * math.ceil(max(0, length - block_size) / step)


def sample_token(
    logits: Tensor, draw: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """The token (B, 1) of logits (B, V) that the numbers `draw` (B,), uniform in [0, 1), choose.
    Temperature 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest that hold the
    probability p. ValueError for what is out of range, and for logits that are NaN or infinite."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None for all tokens")
    highest = logits.amax(dim=-1, keepdim=True)
    if not math.isfinite(highest.sum()):  # one look at the device for all rows
        raise ValueError("the logits are not finite, hence some of the model's weights")
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

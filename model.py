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
from pathlib import Path
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


def attend(q: Tensor, k: Tensor, v: Tensor, n_head: int, dropout: float = 0.0) -> Tensor:
    """Causal multi-head attention; q, k (B, T, Dk) and v (B, T, Dv) to (B, T, Dv)."""
    q, k, v = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return y.transpose(1, 2).flatten(2)


class Projections(nn.Linear):
    """Several projections as one matrix product: x (..., C) to a tensor (..., n) for each n."""

    def __init__(self, n_embd: int, sizes: Sequence[int], bias: bool):
        super().__init__(n_embd, sum(sizes), bias=bias)
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).split(self.sizes, dim=-1)


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

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if memory is None:
            q, k, v = self.query_key_value(x)
        else:
            q, (k, v) = self.query(x), self.key_value(memory)
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

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach() if self.config.router_detach else x
        q, k, v = self.query_key_value(x)
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

    def forward(self, x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Mask | None]:
        hidden = F.gelu(self.w1(x))
        if self.router is not None:
            m = self.router(x)
        if m is None:
            return self.dropout(self.w2(hidden)), None
        r = round_mask(m, self.config.rounding, self.config.rounding_scale, self.training)
        if self.config.expert_site == "hidden":
            y = self.w2(apply_mask(hidden, r))
        else:
            y = apply_mask(self.w2(hidden), r)
        return self.dropout(y), Mask(m, r)


def apply_mask(x: Tensor, r: Tensor) -> Tensor:
    """x (B, T, D) times r (B, T, G), each mask value on its group of D / G neighbours."""
    return (x.unflatten(-1, (r.size(-1), -1)) * r.to(x.dtype)[..., None]).flatten(-2)


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

    def forward(self, x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Mask | None]:
        x = x + self.attention(self.ln_attention(x))
        y, mask = self.ff(self.ln_ff(x), m)
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

    def forward(self, d: Tensor, e: Tensor, m: Tensor | None = None) -> tuple[Tensor, Mask | None]:
        memory = self.ln_memory(e)
        if self.cross_first:
            d = self._read(d, memory)
        if self.attention is not None:
            d = d + self.attention(self.ln_attention(d))
        if not self.cross_first:
            d = self._read(d, memory)
        y, mask = self.ff(self.ln_ff(d), m)
        return d + y, mask

    def _read(self, d: Tensor, memory: Tensor) -> Tensor:
        d = d + self.cross_attention(self.ln_cross(d), memory)
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

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> ModelOutput:
        """Reads idx (B, T), T ≤ block_size; targets (B, T) are token ids, -1 where not counted.

        Raises ValueError for a sequence that is too long and, on a CPU, for ids outside the
        vocabulary.
        """
        self._check(idx, targets)
        emb, e, d, masks = self.stacks(idx)
        out = self.ln_out(d)
        if self.config.next_position == "subtract":
            out = out - self.pos_emb.weight[1 : idx.size(1) + 1]
        if targets is None:
            return ModelOutput(F.linear(out[:, -1:], self.tok_emb.weight), None, {})
        logits = F.linear(out, self.tok_emb.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        metrics = {"cross_entropy": loss.detach()}
        if self.config.n_expert > 0:
            stats = mask_statistics(masks, self.config.l1_norm)
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

    def stacks(self, idx: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Mask | None]:
        """E, e_L and d_L of idx (B, T), each (B, T, C), and the Mask (L, stacks, B, T, G).

        e_L is None in the decoder-only model, the mask where there are no experts.
        """
        T, parallel = idx.size(1), self.config.arch == "parallel"
        emb = self.dropout(self.tok_emb(idx) + self.pos_emb.weight[:T])
        e, d = (emb, self.w_in(emb)) if parallel else (None, emb)
        if self.config.next_position == "add":
            d = d + self.pos_emb.weight[1 : T + 1]
        masks = []  # of each block, layer by layer
        given = repeat(None)
        if self.router is not None:
            given = iter(self.router(emb).split(self.config.n_expert, dim=-1))
        if parallel:
            for encoder_layer, decoder_layer in zip(self.encoder, self.decoder, strict=True):
                e, mask_e = encoder_layer(e, next(given))
                d, mask_d = decoder_layer(d, e, next(given))
                masks += [mask_e, mask_d]
        else:
            for layer in self.decoder:
                d, mask = layer(d, next(given))
                masks.append(mask)
        if self.config.n_expert == 0:
            return emb, e, d, None
        m, r = map(torch.stack, zip(*masks, strict=True))
        shape = (self.config.n_layer, -1)
        return emb, e, d, Mask(m.unflatten(0, shape), r.unflatten(0, shape))

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
            mask = self.stacks(idx)[-1]
        finally:
            self.train(training)
        return mask.r if rounded else mask.m

    def _check(self, idx: Tensor, targets: Tensor | None) -> None:
        if idx.dim() != 2 or not 1 <= idx.size(1) <= self.config.block_size:
            allowed = f"(B, T) with 1 ≤ T ≤ block_size={self.config.block_size}"
            raise ValueError(f"idx has the shape {tuple(idx.shape)}: must be {allowed}")
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
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues idx (B, T) by sampling: (B, T + max_new_tokens).

        The window that the model reads moves by half a block when it is full. Arguments and
        ValueErrors as `sample_token` has them.
        """
        how = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **how)], dim=1)

    @torch.inference_mode()
    def stream(self, idx: Tensor, max_new_tokens: int, **how: Any) -> Iterator[Tensor]:
        """What `generate` adds to idx, token by token as it comes: (B, 1), max_new_tokens times."""
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must not be negative")
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"idx has the shape {tuple(idx.shape)}: must be (B, T) with T ≥ 1")
        training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits = self(idx[:, window_start(idx.size(1), self.config.block_size) :]).logits
                token = sample_token(logits[:, -1], **how)
                idx = torch.cat([idx, token], dim=1)
                yield token
        finally:
            self.train(training)


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[ParallelEncoderDecoder, dict]:
    """The model that train.py saved at `path`, in training mode, and its other entries.

    Loads tensors and plain values only, never code. Raises ValueError, with a line for the user,
    for a file that is missing or is not such a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no checkpoint; train.py writes one") from None
    except Exception as error:  # a damaged file can fail anywhere inside torch's reader
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a checkpoint of train.py: {reason}") from None
    try:
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
        model = ParallelEncoderDecoder(ModelConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint.pop("model"))
    except (TypeError, KeyError, AttributeError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a checkpoint of this model: {reason}") from None
    return model.to(device), checkpoint


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
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one token (B, 1) from logits (B, V).

    Temperature 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest tokens that
    hold the probability p. Raises ValueError for an argument out of range.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1], or None for all tokens")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= top_p  # what comes before it holds p already
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


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

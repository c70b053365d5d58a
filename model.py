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
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

CHOICES = {
    "arch": ("parallel", "decoder_only"),
    "encoder_loss": ("none", "mse", "cosine", "log_cosine"),
    "next_position": ("none", "add", "subtract"),
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

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                setattr(self, field.name, float(value))
            elif type(value) is not field.type:
                raise ValueError(f"{field.name}={value!r}: must be of type {field.type.__name__}")
        for name, allowed in CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._require("n_cross_head", self.n_cross_head >= 0, "0 (the same as n_head) or more")
        for name in ("n_head", "n_cross_head"):
            divides = self.n_embd % (getattr(self, name) or self.n_head) == 0
            self._require(name, divides, f"a divisor of n_embd={self.n_embd}")
        weight_ok = 0.0 <= self.encoder_loss_weight < math.inf
        self._require("encoder_loss_weight", weight_ok, "finite and not negative")

    def _require(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")


class ModelOutput(NamedTuple):
    """What the model returns, with targets (B, T) and without."""

    logits: torch.Tensor  # (B, T, V); without targets (B, 1, V), those of the last position
    loss: torch.Tensor | None  # the training objective, a scalar; None without targets
    metrics: dict[str, torch.Tensor]  # detached scalars; cross_entropy is in nats per token


class Attention(nn.Module):
    """Causal multi-head attention: x (B, T, C) attends to `memory` (B, T, C), or to itself."""

    def __init__(self, config: ModelConfig, n_head: int):
        super().__init__()
        C = config.n_embd
        self.n_head = n_head
        self.query = nn.Linear(C, C, bias=config.bias)
        self.key_value = nn.Linear(C, 2 * C, bias=config.bias)
        self.proj = nn.Linear(C, C, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        key, value = self.key_value(memory).chunk(2, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, T, C / n_head)
            for t in (self.query(x), key, value)
        )
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)


class FeedForward(nn.Module):
    """W2 GELU(W1 x), with 4 C hidden units; (B, T, C) to (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.w2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(F.gelu(self.w1(x))))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward. A decoder-only GPT is a stack of these."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_attention = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config, config.n_head)
        self.ln_ff = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.ff = FeedForward(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.ln_attention(x))
        return x + self.ff(self.ln_ff(x))


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
        self.cross_attention = Attention(config, config.n_cross_head or config.n_head)
        self.lateral = nn.Linear(C, C, bias=bias) if config.lateral else None
        self.ln_ff = nn.LayerNorm(C, bias=bias)
        self.ff = FeedForward(config)

    def forward(self, d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        memory = self.ln_memory(e)
        if self.cross_first:
            d = self._read(d, memory)
        if self.attention is not None:
            d = d + self.attention(self.ln_attention(d))
        if not self.cross_first:
            d = self._read(d, memory)
        return d + self.ff(self.ln_ff(d))

    def _read(self, d: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
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
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialises every parameter:

        | parameter | starts as | why |
        | --- | --- | --- |
        | matrices of the layers | N(0, 0.02) | as GPT-2 |
        | those that write to a stream | N(0, 0.02 / sqrt(n)) | n writes sum up in the stream |
        | tok_emb, pos_emb | N(0, 0.1) | learns faster than 0.02, measured |
        | w_in | the identity | both stacks start from the same E; learns faster, measured |
        | ln_out | 0.1 | the tied output starts close to uniform: the loss at ln V |
        | other LayerNorms, biases | 1, 0 | |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # self-attention, cross-attention and its lateral, feed-forward: at most 4 a layer
                writes = 4 if name.startswith("decoder") and self.config.arch == "parallel" else 2
                writes_to_stream = name.endswith(("proj", "w2", "lateral"))
                std = 0.02 / math.sqrt(writes * self.config.n_layer if writes_to_stream else 1)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
        nn.init.constant_(self.ln_out.weight, 0.1)
        if self.config.arch == "parallel":
            nn.init.eye_(self.w_in.weight)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> ModelOutput:
        """Reads idx (B, T), T ≤ block_size; targets (B, T) are token ids, -1 where not counted.

        Raises ValueError for a sequence that is too long and for ids outside the vocabulary.
        """
        self._check(idx, targets)
        T = idx.size(1)
        next_pos = self.pos_emb.weight[1 : T + 1]  # (T, C); used by next_position alone
        emb = self.dropout(self.tok_emb(idx) + self.pos_emb.weight[:T])  # E, (B, T, C)

        parallel = self.config.arch == "parallel"
        d = self.w_in(emb) if parallel else emb
        if self.config.next_position == "add":
            d = d + next_pos
        if parallel:
            e = emb
            for encoder_layer, decoder_layer in zip(self.encoder, self.decoder, strict=True):
                e = encoder_layer(e)
                d = decoder_layer(d, e)
        else:
            for layer in self.decoder:
                d = layer(d)

        out = self.ln_out(d)
        if self.config.next_position == "subtract":
            out = out - next_pos
        if targets is None:
            return ModelOutput(F.linear(out[:, -1:], self.tok_emb.weight), None, {})
        logits = F.linear(out, self.tok_emb.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        metrics = {"cross_entropy": loss.detach()}
        if parallel and self.config.encoder_loss != "none":
            encoder_loss = encoder_loss_of(
                self.config.encoder_loss, self.decoder[-1].ln_memory(e), emb
            )
            metrics["encoder_loss"] = encoder_loss.detach()
            loss = loss + self.config.encoder_loss_weight * encoder_loss
        return ModelOutput(logits, loss, metrics)

    def _check(self, idx: torch.Tensor, targets: torch.Tensor | None) -> None:
        if idx.dim() != 2 or not 1 <= idx.size(1) <= self.config.block_size:
            allowed = f"(B, T) with 1 ≤ T ≤ block_size={self.config.block_size}"
            raise ValueError(f"idx has the shape {tuple(idx.shape)}: must be {allowed}")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets has the shape {tuple(targets.shape)}: must be as idx")
        if torch.compiler.is_compiling():  # a look at the values would break the graph
            return
        V = self.config.vocab_size
        for name, ids, least in (("idx", idx, 0), ("targets", targets, -1)):
            if ids is not None and ids.numel():
                low, high = torch.stack(ids.aminmax()).tolist()
                if not least <= low <= high < V:
                    span = f"{low} to {high}"
                    raise ValueError(f"{name} has ids from {span}: must be {least} to {V - 1}")

    def num_params(self) -> int:
        """The number of parameters; the position embedding is not counted, as in nanoGPT."""
        return sum(p.numel() for p in self.parameters()) - self.pos_emb.weight.numel()

    def estimate_mfu(
        self, fwdbwd_per_iter: float, dt: float, peak_flops: float | None = None
    ) -> float:
        """The share of the peak that training reached (model FLOPs utilisation), in [0, 1].

        `fwdbwd_per_iter` sequences of block_size tokens in `dt` seconds, against `peak_flops`
        floating-point operations a second, by default what a GEMM reaches on this device. Counts
        6 per weight and token, and 12 C T per attention and token (PaLM, arXiv:2204.02311, B).
        """
        C, T = self.config.n_embd, self.config.block_size
        attentions = sum(isinstance(m, Attention) for m in self.modules())
        flops = (6 * self.num_params() + 12 * attentions * C * T) * T * fwdbwd_per_iter
        return flops / dt / (peak_flops or gemm_peak(str(self.pos_emb.weight.device)))

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continues idx (B, T) by sampling: (B, T + max_new_tokens). Raises as `stream` does."""
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator))
        return torch.cat([idx, *new], dim=1)

    @torch.inference_mode()
    def stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yields the next token of every row, (B, 1), max_new_tokens times.

        Temperature 0 is greedy; `top_k` keeps the k likeliest tokens, `top_p` the fewest tokens
        that hold the probability p. When the context is full, the window that the model reads
        moves by half a block, here as with a cache, so that both give the same text. Raises
        ValueError for an argument out of range.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: must not be negative")
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"idx has the shape {tuple(idx.shape)}: must be (B, T) with T ≥ 1")
        training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits = self(idx[:, window_start(idx.size(1), self.config.block_size) :]).logits
                token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
                idx = torch.cat([idx, token], dim=1)
                yield token
        finally:
            self.train(training)


def load_checkpoint(path: str | Path, device: str = "cpu") -> tuple[ParallelEncoderDecoder, dict]:
    """The model that train.py saved at `path`, on `device`, and the checkpoint's other entries.

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


def encoder_loss_of(kind: str, encoded: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
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
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws one token (B, 1) from logits (B, V); arguments and errors as `stream` has them."""
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
    """Floating-point operations a second of a large matrix product, the best of 10, on this device.

    In bfloat16 on a CUDA device that has it, else in float32. Measured once per process.
    """
    bfloat16 = "cuda" in device and torch.cuda.is_bf16_supported(including_emulation=False)
    n, dtype = (8192, torch.bfloat16) if bfloat16 else (1024, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

"""Draws text fast: the model's equations as plain functions of its weights.

    fast = Inference(model)
    text = fast.generate(idx, 500, temperature=0.8)  # the text of model.generate, sooner

To read one token, the calls and look-ups of nn.Module take longer than the arithmetic. So here a
layer is a closure over its weights, which are the model's own; of a small model, weights that read
the same vector are copied into one matrix, hence make an Inference after the weights are final.
Experts that are off are not computed where that is faster. Read model.py first: what a layer
computes stands there, and at its start an Inference is compared with it. In shapes, N is B T.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import (
    Attention,
    Cache,
    FeedForward,
    Layer,
    ModelOutput,
    ParallelEncoderDecoder,
    Router,
)

LARGE = 2**17  # weights; one row is multiplied by so many on all threads, and they are not copied


class Inference:
    """A model that draws, from the weights of a ParallelEncoderDecoder, as if in evaluation.

    With `compile` two graphs are compiled when they first come, each in 5 to 15 seconds: the
    step of one token, and the reading of a window that has moved; again for another number of texts
    or length of the cache (prompt and new tokens, up to the block). What the compiler makes of them
    is not compared with the model. Small models then draw 1.2 to 2 times as fast;
    large ones gain nothing, and experts that are off are computed.

    Raises ValueError where it gives other logits than the model, as after a change of model.py.
    """

    generate, stream = ParallelEncoderDecoder.generate, ParallelEncoderDecoder.stream

    training = property(lambda self: self.model.training)

    def __init__(self, model: ParallelEncoderDecoder, compile: bool = False):
        self.model, self.config = model, model.config
        self.eval, self.train = model.eval, model.train
        self.cache, self.shape, self.start = None, (0, 0), 0  # of the call at hand
        self.compile = False  # not while it compares itself with the model
        self.compiled: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self.moved = self.config.block_size + 1 - max(1, self.config.block_size // 2)  # tokens then
        try:
            parallel = self.config.arch == "parallel"
            self.w_in = product(model.w_in) if parallel else None
            self.encoder = [*map(self._encoder_layer, model.encoder)] if parallel else []
            layer_of = self._decoder_layer if parallel else self._encoder_layer
            self.decoder = [*map(layer_of, model.decoder)]
            self.router = None if model.router is None else self._router(model.router)
            self.ln_out = norm(model.ln_out)
            self._compare()
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"inference.py does not fit model.py: {error}") from error
        self.compile = compile

    def __call__(self, idx: Tensor, cache: Cache | None = None) -> ModelOutput:
        """The logits (B, 1, V) of what follows idx (B, T), as the model gives them."""
        if cache is None:
            return self.model(idx)
        self.model._check(idx, cache)
        self.cache, self.shape, start = cache, tuple(idx.shape), cache.length
        again = start > 0 or (cache.buffers and idx.size(1) == self.moved)
        if self.compile and again and torch.is_inference_mode_enabled():
            where = torch.full((1,), start, device=idx.device) if start else 0
            # Type and strides are compiled, too.
            idx = idx.to(torch.long, copy=True, memory_format=torch.contiguous_format)
            logits = self._compiled()(idx, where)
        else:
            logits = self._read(idx, start)
        cache.length, self.cache = start + idx.size(1), None
        return ModelOutput(logits, None, {})

    def _read(self, idx: Tensor, start: int | Tensor) -> Tensor:
        """The logits of idx at the position `start`, which is a tensor (1,) for one graph of a
        single token to serve all positions."""
        config, (B, T), self.start = self.config, self.shape, start
        tok_emb, pos_emb = self.model.tok_emb.weight, self.model.pos_emb.weight

        def positions(first: int | Tensor) -> Tensor:
            return pos_emb[first] if isinstance(first, Tensor) else pos_emb[first : first + T]

        emb = (F.embedding(idx, tok_emb) + positions(start)).view(B * T, -1)
        given: Iterator[Tensor | None] = iter(())
        if self.router is not None:
            given = iter(self.router(emb).split(config.n_expert, dim=-1))
        e, d = emb, emb if self.w_in is None else self.w_in(emb)
        if config.next_position == "add":
            d = (d.view(B, T, -1) + positions(start + 1)).view(B * T, -1)
        for k, decoder_layer in enumerate(self.decoder):
            if self.encoder:
                e = self.encoder[k](e, next(given, None))
                d = decoder_layer(d, e, next(given, None))
            else:
                d = decoder_layer(d, next(given, None))
        out = self.ln_out(d.view(B, T, -1)[:, -1])
        if config.next_position == "subtract":
            out = out - pos_emb[start + T]
        return linear(out, tok_emb).unsqueeze(1)

    def _compiled(self) -> Callable[..., Tensor]:
        """`_read` for the shapes at hand. Between its calls in `stream` nothing changes but tokens,
        position and buffers: so they are not checked, which would take a fifth of the time."""
        device = self.model.pos_emb.weight.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        (buffer, *_), *_ = self.cache.buffers.values()
        key = *self.shape, *buffer.shape, buffer.dtype, autocast
        if key not in self.compiled:
            options = {
                "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
                "cpp_wrapper": device == "cpu",
            }
            self.compiled[key] = torch.compile(
                self._read, fullgraph=True, dynamic=False, isolate_recompiles=True, options=options
            )
        return self.compiled[key]

    @torch.inference_mode()
    def _compare(self) -> None:
        """Reads the same tokens as the model."""
        model, length = self.model, min(8, self.config.block_size)
        generator = torch.Generator().manual_seed(0)
        idx = torch.randint(self.config.vocab_size, (1, length), generator=generator)
        idx, cache, training = idx.to(model.tok_emb.weight.device), Cache(1, length), model.training
        model.eval()
        try:
            expected = model(idx).logits
        finally:
            model.train(training)
        for tokens in idx.split([length - length // 2] + [1] * (length // 2), dim=1):
            self.cache, self.shape, found = cache, tuple(tokens.shape), []
            if tokens.size(1) == 1:  # first as if compiled
                start = torch.full((1,), cache.length, device=idx.device)
                found.append(self._read(tokens, start))
            logits = self(tokens, cache).logits
        found = torch.stack([*found, logits])
        difference = (found - expected).abs().max().item()
        tolerance = max(1e-3, 8 * torch.finfo(logits.dtype).eps)
        if difference > tolerance * max(1.0, expected.abs().max().item()):
            raise ValueError(
                f"inference.py gives other logits than model.py, by {difference:.2g}; what was "
                "changed in one is to be changed in the other"
            )

    def _encoder_layer(self, layer: Layer) -> Callable[..., Tensor]:
        attention, ff = self._self_attention(layer), self._feed_forward(layer)
        return lambda x, off: ff(attention(x), off)

    def _decoder_layer(self, layer: Layer) -> Callable[..., Tensor]:
        cross, lateral = layer.cross_attention, layer.lateral
        attention = None if layer.attention is None else self._self_attention(layer)
        query, attend = project(layer.ln_cross, cross.query), self._attend(cross)
        of_memory = [cross.key_value] if lateral is None else [cross.key_value, lateral]
        memory, proj = project(layer.ln_memory, *of_memory), product(cross.proj)
        ff = self._feed_forward(layer)

        def read(d: Tensor, key_value: Tensor, lateral: Tensor | None = None) -> Tensor:
            d = proj(attend(*query(d), key_value), d)
            return d if lateral is None else d + lateral

        def run(d: Tensor, e: Tensor, off: Tensor | None) -> Tensor:
            if layer.cross_first:
                d = read(d, *memory(e))
            if attention is not None:
                d = attention(d)
            if not layer.cross_first:
                d = read(d, *memory(e))
            return ff(d, off)

        return run

    def _self_attention(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """x + attention(LN(x)), (N, C)."""
        attention = layer.attention
        query_key_value = project(layer.ln_attention, attention.query_key_value)
        attend, proj = self._attend(attention), product(attention.proj)
        return lambda x: proj(attend(*query_key_value(x)), x)

    def _attend(self, owner: Attention | Router) -> Callable[[Tensor, Tensor], Tensor]:
        """Attention of queries (N, Dk) to the keys and values that were read before and to new
        ones, (N, Dk + Dv): (N, Dv)."""
        if isinstance(owner, Router):
            n_head, projections = self.config.router_n_head, owner.query_key_value
        else:
            n_head = owner.n_head
            projections = owner.key_value if hasattr(owner, "key_value") else owner.query_key_value
        sizes = projections.sizes[-2:]

        def heads(buffer: Tensor) -> list[Tensor]:
            return [t.unflatten(2, (n_head, -1)).transpose(1, 2) for t in buffer.split(sizes, 2)]

        def attend(q: Tensor, key_value: Tensor) -> Tensor:
            cache, (B, T), start = self.cache, self.shape, self.start
            if owner not in cache.buffers:
                # Zeros, since compiled code multiplies what is not written yet by 0.
                new = key_value.new_zeros(cache.batch, cache.block_size, sum(sizes))
                cache.buffers[owner] = new, *heads(new)
            buffer, k, v = cache.buffers[owner]
            if isinstance(start, Tensor):  # the whole buffer: one graph for all positions
                buffer.index_copy_(1, start, key_value.view(B, 1, -1))
                k, v = heads(buffer)
                A = q.view(B, n_head, 1, -1) * k.size(3) ** -0.5 @ k.mT  # (B, n_head, 1, S)
                unseen = torch.arange(k.size(2), device=q.device) > start
                return (A.masked_fill(unseen, -torch.inf).softmax(dim=3) @ v).view(B, -1)
            if T == 1:  # the fewest calls
                buffer.select(1, start).copy_(key_value)
            else:
                buffer.narrow(1, start, T).copy_(key_value.view(B, T, -1))
            k, v = k.narrow(2, 0, start + T), v.narrow(2, 0, start + T)
            if B < cache.batch:
                k, v = k[:B], v[:B]
            q = q.view(B, T, n_head, -1).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
            return y.transpose(1, 2).reshape(B * T, -1)

        return attend

    def _decide(self, router: Router) -> Callable[[Tensor, Tensor], Tensor]:
        """Which experts are off, (N, n_block G), by the router's queries, and keys with values."""
        attend, shift = self._attend(router), router.shift
        return lambda q, key_value: experts_off(attend(q, key_value) + shift)

    def _router(self, router: Router) -> Callable[[Tensor], Tensor]:
        """Which experts are off for what the router reads, (N, C): (N, n_block G)."""
        query_key_value, sizes = product(router.query_key_value), parts(router.query_key_value)
        decide = self._decide(router)
        return lambda x: decide(*query_key_value(x).split(sizes, dim=1))

    def _feed_forward(self, layer: Layer) -> Callable[..., Tensor]:
        """x + FeedForward(LN(x)), (N, C); which experts are off comes from the block's own router,
        or is given, (N, G)."""
        ff, router, G = layer.ff, layer.ff.router, self.config.n_expert
        hidden_site, w2 = self.config.expert_site == "hidden", product(ff.w2)

        def write(hidden: Tensor, off: Tensor | None, x: Tensor) -> Tensor:
            hidden = F.gelu(hidden)
            if off is None:
                return w2(hidden, x)
            off = off.unsqueeze(-1)
            if hidden_site:
                hidden.view(len(x), G, -1).masked_fill_(off, 0.0)
                return w2(hidden, x)
            return x + w2(hidden).view(len(x), G, -1).masked_fill_(off, 0.0).flatten(1)

        if ff.w1.weight.numel() < LARGE:
            if router is None:
                read = project(layer.ln_ff, ff.w1)
                return lambda x, off: write(*read(x), off, x)
            read = project(layer.ln_ff, router.query_key_value, ff.w1)
            decide = self._decide(router)

            def small(x: Tensor, _: None) -> Tensor:
                q, key_value, hidden = read(x)
                return write(hidden, decide(q, key_value), x)

            return small

        ln, w1, sparse = norm(layer.ln_ff), product(ff.w1), SparseToken(ff)
        own_router = None if router is None else self._router(router)

        def large(x: Tensor, off: Tensor | None) -> Tensor:
            y = ln(x)
            off = off if own_router is None else own_router(y)
            if off is not None:
                r = (~off).to(y.dtype)
                if sparse_pays(ff, r):
                    return x + (sparse(y, r) if len(x) == 1 else sparse_tokens(ff, y, r))
            return write(w1(y), off, x)

        return large


def sparse_pays(ff: FeedForward, r: Tensor) -> bool:
    """Whether skipping the experts that are off, where r (N, G) is 0, is faster on a CPU, by what
    was measured (experiments/README.md): weights cost 15 % more than in one product, and an expert
    as much as reading 240,000 weights where there is one token, or as 9 million multiplications.
    """
    tokens, G = r.shape
    each = 2 * ff.w1.weight.numel() // G  # weights of an expert
    dense, overhead = tokens * G * each, 240_000 if tokens == 1 else 9_000_000
    hidden, on_cpu = ff.config.expert_site == "hidden", r.device.type == "cpu"
    if not hidden or not on_cpu or overhead > dense or torch.compiler.is_compiling():
        return False
    on = int(r.sum())
    return 1.15 * on * each + min(on, G) * overhead < dense


def sparse_tokens(ff: FeedForward, x: Tensor, r: Tensor) -> Tensor:
    """A feed-forward block for x (N, C), with no work for experts that are off: tokens are grouped
    by expert; r (N, G) is 0 or 1."""
    G = r.size(1)
    w1, w2 = ff.w1.weight.unflatten(0, (G, -1)), ff.w2.weight.unflatten(1, (G, -1))
    b1 = [None] * G if ff.w1.bias is None else ff.w1.bias.unflatten(0, (G, -1))
    y = torch.zeros_like(x) if ff.w2.bias is None else ff.w2.bias.repeat(len(x), 1)
    for g in r.any(dim=0).nonzero().flatten().tolist():
        rows = r[:, g].nonzero().flatten()
        hidden = F.gelu(F.linear(x[rows], w1[g], b1[g]))
        y.index_add_(0, rows, F.linear(hidden, w2[:, g]).to(y.dtype))
    return y


class SparseToken:
    """A feed-forward block for one token, (1, C) to (1, C), that reads no weights of experts that
    are off; r (1, G) is 0 or 1.

    The weights of experts at even distances are a view, hence one batched product, which runs on
    all threads. At the first use W2 is copied, an expert's weights in one piece, which is faster.
    """

    def __init__(self, ff: FeedForward):
        self.ff, self.w2 = ff, None
        G = ff.config.n_expert
        if G:
            self.w1 = ff.w1.weight.unflatten(0, (G, -1)).mT  # (G, C, n)
            self.b1 = None if ff.w1.bias is None else ff.w1.bias.unflatten(0, (G, 1, -1))

    def __call__(self, x: Tensor, r: Tensor) -> Tensor:
        if self.w2 is None:
            w2 = self.ff.w2.weight.unflatten(1, (r.size(1), -1))
            self.w2 = w2.permute(1, 2, 0).contiguous()  # (G, n, C)
        bias = self.ff.w2.bias
        y = torch.zeros_like(x) if bias is None else bias.unsqueeze(0)
        used = r[0].nonzero().flatten().tolist()
        if not used:
            return y
        runs = list(evenly_spaced(used))
        pieces = [self.w1[some] for some in runs]
        hidden = torch.cat([torch.bmm(x.expand(len(w), 1, -1), w) for w in pieces])
        hidden = F.gelu(hidden if self.b1 is None else hidden + self.b1[used])  # (experts, 1, n)
        hidden = hidden.split([len(w) for w in pieces])
        written = [torch.bmm(h, self.w2[some]) for h, some in zip(hidden, runs, strict=True)]
        return y + torch.cat(written).sum(dim=0)


def evenly_spaced(numbers: list[int]) -> Iterator[slice]:
    """Cuts ascending numbers into runs at even distances, as slices: 1 2 3 7 9 to 1:4:1, 7:10:2."""
    while numbers:
        first, step, end = numbers[0], 1, 1
        if len(numbers) > 1:
            step = numbers[1] - first
            while end < len(numbers) and numbers[end] == first + end * step:
                end += 1
        yield slice(first, numbers[end - 1] + 1, step)
        numbers = numbers[end:]


def experts_off(A: Tensor) -> Tensor:
    """Where m < 0.5, with m = 0.5 cos(A) + 0.5, which a cosine of -eps / 4 still rounds to 0.5."""
    return torch.cos(A) < -torch.finfo(A.dtype).eps / 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (N, D). On a CPU one row is multiplied by a piece of a large weight on each
    thread, since BLAS uses one thread for it: 19 instead of 13 GB/s on two cores."""
    small = weight.numel() < LARGE or weight.device.type != "cpu"
    if len(x) > 1 or small or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    n = min(torch.get_num_threads(), len(weight) // 64)  # pieces
    if n < 2:
        return F.linear(x, weight, bias)
    rows = len(weight) // n * n
    pieces = weight[:rows].view(n, -1, weight.size(1)).mT
    y = torch.bmm(x.expand(n, 1, -1), pieces).view(1, -1)
    y = y if rows == len(weight) else torch.cat([y, F.linear(x, weight[rows:])], dim=1)
    return y if bias is None else y + bias


def product(module: nn.Linear) -> Callable[..., Tensor]:
    """The module as a function of x (N, D) and, where given, of what is added to the result."""
    weight, bias, weight_t = module.weight, module.bias, module.weight.mT

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return linear(x, weight, bias)
        if bias is None and (len(x) > 1 or small):
            return torch.addmm(residual, x, weight_t)
        return residual + linear(x, weight, bias)

    small = weight.numel() < LARGE
    return run


def norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def parts(module: nn.Linear) -> list[int]:
    """Sizes of what a Linear gives: queries, where it has them, and keys with values; or all."""
    *queries, k, v = getattr(module, "sizes", (module.out_features, 0))
    return [*queries, k + v]


def project(ln: nn.LayerNorm, *modules: nn.Linear) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What the modules, in `parts`, make of LN(x), x (N, C): by one product where they are small.

    W (u * w + b) + c, with w and b of the LayerNorm, is (W w) u + (W b + c).
    """
    sizes = [n for module in modules for n in parts(module)]
    if sum(module.weight.numel() for module in modules) >= LARGE:
        each = [(product(module), parts(module)) for module in modules]
        normed = norm(ln)

        def large(x: Tensor) -> tuple[Tensor, ...]:
            x = normed(x)
            return tuple(part for run, sizes in each for part in run(x).split(sizes, dim=1))

        return large

    with torch.no_grad():
        weight = torch.cat([module.weight for module in modules])
        bias = None if ln.bias is None else torch.cat([m.bias for m in modules]) + weight @ ln.bias
        weight = (weight * ln.weight).mT.contiguous()
    shape, eps = ln.normalized_shape, ln.eps

    def small(x: Tensor) -> tuple[Tensor, ...]:
        x = torch.layer_norm(x, shape, eps=eps)
        y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        return torch.split_with_sizes(y, sizes, dim=1)

    return small

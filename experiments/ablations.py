"""Models that no setting of train.py makes: ideas that did not pay, and peers to compare with.

    python experiments/ablations.py "lag(2)" config/canonical.py --out_dir=out-serial
    python experiments/ablations.py "lag(2)" sample.py --out_dir=out-serial
    python experiments/ablations.py                           lists the ablations

An ablation is a function below. It returns a few small classes, each a subclass of the class of
model.py with the same name. `apply` puts them in its place, and model.py builds the model of them.
So an ablation is applied before the model is built, and before train.py imports the classes.
Several are applied in order: `"lag(2)" "top_k(4)"`. A checkpoint has their names, and is refused
where they are not named again, to resume or to sample. Names and shapes are those of model.py. "The
origin" is https://github.com/yiphei/yif-AI, where the idea of this project comes from.
"""

import ast
import difflib
import inspect
import math
import os
import runpy
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model  # noqa: E402
from configurator import fail  # noqa: E402
from model import Context, Mask, Stacks, attend, stacked, tail  # noqa: E402

Classes = tuple[type, ...]


# ---- the layers -------------------------------------------------------------


def cross_first() -> Classes:
    """The decoder's cross-attention before its self-attention. The origin's OrderType.ALT."""

    class DecoderLayer(model.DecoderLayer):
        def forward(self, d, memory, kv, context):
            d = d + self.cross_attention(self.ln_cross(d), kv, context)
            d = self.self_attention(d, context)
            y, mask = self.ff(self.ln_ff(d), memory, context)
            return tail(d, y) + y, mask

    return DecoderLayer, unpaired(), needs(arch="parallel", decoder_self_attention=True)


def n_cross_head(n: int) -> Classes:
    """n heads in the cross-attention, as in the origin. The parameters stay the same."""
    require(type(n) is int and n >= 1, f"n_cross_head({n!r}): must be an int, at least 1")

    class ParallelEncoderDecoder(model.ParallelEncoderDecoder):
        def __init__(self, config):
            super().__init__(config)
            C = config.n_embd
            require(C % n == 0, f"n_cross_head({n}): must be a divisor of n_embd={C}")
            for key_value, layer in zip(self.key_value.values(), self.decoder, strict=True):
                key_value.kv_shape = n, C // n, C // n
                layer.cross_attention.n_head = n

    # With shared_kv the encoder attends to the same keys; rotary angles are those of n_head heads.
    others = needs(arch="parallel", shared_kv=False, position_embedding="learned")
    return ParallelEncoderDecoder, others


def w_lat(gated: bool = False, first: bool = True) -> Classes:
    """The first form of the lateral connection, with parameters: d = d + W_lat LN(e). LN(e) is what
    the cross-attention reads. It is added before the cross-attention, or after it (first=False).
    gated: times sigmoid(W_gate LN(d)), per channel. The decoder starts from W_in E. W_lat starts
    like the other outputs of its layer."""

    class DecoderLayer(model.DecoderLayer):
        def __init__(self, config):
            super().__init__(config)
            C, bias = config.n_embd, config.bias
            self.lateral_proj = nn.Linear(C, C, bias=bias)  # init_weights knows it by its name
            self.lateral_gate = nn.Linear(C, C, bias=bias) if gated else None

        def forward(self, d, memory, kv, context):
            d = self.self_attention(d, context)
            d = self.lateral(d, memory) if first else d
            d = d + self.cross_attention(self.ln_cross(d), kv, context)
            d = d if first else self.lateral(d, memory)
            y, mask = self.ff(self.ln_ff(d), memory, context)
            return tail(d, y) + y, mask

        def lateral(self, d, memory):
            y = self.lateral_proj(tail(memory, d))
            return d + (y * torch.sigmoid(self.lateral_gate(self.ln_cross(d))) if gated else y)

    return DecoderLayer, unpaired(), needs(arch="parallel", lateral=False)


def attention_encoder() -> Classes:
    """The encoder without its feed-forward blocks: a cheaper way to the same active size."""

    class Nothing(nn.Module):
        router = None

        def forward(self, x, memory=None, context=None):
            return torch.zeros_like(x), None

    class EncoderLayer(model.EncoderLayer):
        def __init__(self, config):
            super().__init__(config)
            self.ln_ff, self.ff = nn.Identity(), Nothing()

    return EncoderLayer, needs(arch="parallel", n_expert=0)


def swiglu() -> Classes:
    """W2 (SiLU(W1 x) * W3 x) as the feed-forward block, 8/3 C hidden units for as many parameters
    (arXiv:2002.05202). W1 and W3 are stacked."""

    class FeedForward(model.FeedForward):
        def __init__(self, config):
            super().__init__(config)
            C, units = config.n_embd, round(8 / 3 * config.n_embd)
            self.w1 = stacked(C, (units, units), config.bias)
            self.w2 = nn.Linear(units, C, bias=config.bias)

        def forward(self, x, memory=None, context=None):
            gate, up = self.w1(x).chunk(2, dim=-1)
            return self.dropout(self.w2(F.silu(gate) * up)), None

    return FeedForward, needs(n_expert=0)


def gate() -> Classes:
    """The output of each attention head times sigmoid(w x): one gate per head and token, made of
    what the queries are made of (arXiv:2505.06708)."""

    class Attention(model.Attention):
        def __init__(self, config, own_key_value):
            super().__init__(config, own_key_value)
            self.gate = nn.Linear(config.n_embd, config.n_head, bias=config.bias)

        def forward(self, x, kv, context, last=False):
            kv = self.key_value(x, context) if kv is None else kv
            x = x[:, -1:] if last else x
            y = attend(self.queries(x, context), kv, self.dropout.p if self.training else 0.0)
            y = y.unflatten(-1, (self.n_head, -1)) * torch.sigmoid(self.gate(x))[..., None]
            return self.output(y.flatten(2))

    return Attention, unpaired()


# ---- the stacks -------------------------------------------------------------


def lag(k: int) -> Classes:
    """The decoder k layers behind: it starts from W_in e_k, with `lateral` from e_k, and its layer
    l reads e_{min(l + k, L)}. lag(0) is the parallel model, lag(L) the serial one of the origin.
    The critical path has min(L + 1 + k, 2 L) layers."""
    require(type(k) is int and k >= 0, f"lag({k!r}): must be an int, not negative")
    return staggered(k), needs(arch="parallel")


def yoco() -> Classes:
    """YOCO (arXiv:2405.05254) with full attention in its first half: L layers, as of a GPT, make
    e_L, from which L others go on. These attend to one set of keys and values, of LN(e_L)."""
    lean = dict(lateral=True, decoder_self_attention=False, shared_kv=False)
    return staggered(None), needs(arch="parallel", **lean)


def staggered(k: int | None) -> type:
    """The model of lag(k); None: that of yoco(). The encoder runs first, and then the decoder."""

    class ParallelEncoderDecoder(model.ParallelEncoderDecoder):
        def __init__(self, config):
            super().__init__(config)
            L = config.n_layer
            require(k is None or k <= L, f"lag({k}): must be at most n_layer={L}")
            if k is None:
                for of_states in (self.ln_memory, self.key_value):
                    for j in range(1, L):
                        del of_states[f"e{j}"]

        def stacks(self, idx, cache=None, last=False):
            self._check(idx, cache)
            c, L = self.config, self.config.n_layer
            (e, rotation), masks, kv = self.embed(idx, cache), {}, None
            context, all_e, shared = Context(rotation, cache), [e], {}
            for j in range(L + 1):
                if c.shared_kv or (k is None and j == L):
                    shared[j] = _, kv = self.memory(j, e, context)
                if j < L:
                    e, masks[2 * j] = self.encoder[j](e, kv, context)
                    all_e.append(e)
            reads = [L if k is None else min(j + k, L) for j in range(L + 1)]
            by_all = c.decoder_self_attention or (c.n_expert > 0 and c.router_input == "hidden")
            before = all_e[reads[0]]
            d = before[:, -1:] if last and not by_all else before
            d = d if c.lateral else self.w_in(d)
            all_d = [d]
            for j in range(1, L + 1):
                e = all_e[reads[j]]
                d, before = (d + tail(e - before, d) if c.lateral else d), e
                memory, kv = shared.get(reads[j]) or self.memory(j, e, context)
                how = context._replace(last=last and j == L)
                d, masks[2 * j - 1] = self.decoder[j - 1](d, memory, kv, how)
                all_d.append(d)
            if cache is not None:
                cache.length = cache.length + idx.size(1)
                if c.token_shift:
                    cache.newest.copy_(idx[:, -1:])
            return Stacks(all_e, all_d, [masks[j] for j in range(2 * L)] if c.n_expert else [])

        def memory(self, j, e, context):
            memory = self.ln_memory[f"e{j}"](e)
            return memory, self.key_value[f"e{j}"](memory, context)

    return ParallelEncoderDecoder


def gqa() -> Classes:
    """A GPT with grouped-query attention (arXiv:2305.13245): query heads h and h + H / 2 attend to
    head h of the keys and values."""

    class KeyValueProjection(model.KeyValueProjection):
        def __init__(self, config):
            super().__init__(config)
            C, H = config.n_embd, config.n_head
            require(H % 2 == 0, f"n_head={H}: must be even in this ablation")
            self.linear = stacked(C, (C // 2, C // 2), config.bias)
            self.kv_shape = H // 2, C // H, C // H

    class Attention(model.Attention):
        def forward(self, x, kv, context, last=False):
            k, v, seen = self.key_value(x, context)
            q = self.queries(x[:, -1:] if last else x, context)  # (B, H, T, D)
            dropout = self.dropout.p if self.training else 0.0
            if q.size(2) > 1:
                kv = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), seen
                return self.output(attend(q, kv, dropout))
            # The two queries of a group go side by side, so that its keys are read once.
            q = q.view(len(q), 2, -1, q.size(-1)).transpose(1, 2)  # (B, H / 2, 2, D)
            y = attend(q, (k, v, seen), dropout, causal=False)  # (B, 2, C / 2)
            return self.output(y.flatten(1)[:, None])

    return KeyValueProjection, Attention, needs(arch="decoder_only")


def embedding_loss(how: str, weight: float) -> Classes:
    """The origin's embedding loss, in training only. It draws LN_a(E), averaged over the tokens so
    far, to LN_b(e_L). e_L is detached, so the loss trains the embeddings and the two LayerNorms.
    "mse"; "cosine": (1 - cos) / 2; "log_cosine": -log((1 + cos) / 2). If the weights of both
    LayerNorms go to 0, so does the mse."""
    allowed = ("mse", "cosine", "log_cosine")
    require(how in allowed, f"embedding_loss({how!r}): must be one of {', '.join(allowed)}")
    ok = type(weight) in (int, float) and 0 <= weight < math.inf
    require(ok, f"embedding_loss(weight={weight!r}): must be finite and not negative")

    class ParallelEncoderDecoder(model.ParallelEncoderDecoder):
        def __init__(self, config):
            super().__init__(config)
            self.ln_a = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.ln_b = nn.LayerNorm(config.n_embd, bias=config.bias)

        def forward(self, idx, targets=None, penalty_scale=1.0):
            output = super().forward(idx, targets, penalty_scale)
            if output.loss is None or not self.training:
                return output
            return output._replace(loss=output.loss + weight * self.embedding_loss)

        def stacks(self, idx, cache=None, last=False):
            found = super().stacks(idx, cache, last)
            if self.training:
                x, e = self.ln_a(found.e[0]), self.ln_b(found.e[-1].detach())
                x = x.cumsum(dim=1) / torch.arange(1, x.size(1) + 1, device=x.device)[:, None]
                same = (1 + F.cosine_similarity(x, e, dim=-1)) / 2
                losses = dict(mse=(x - e).square(), cosine=1 - same, log_cosine=-same.log())
                self.embedding_loss = losses[how].mean()
            return found

    return ParallelEncoderDecoder, needs(arch="parallel")


def next_position(how: str) -> Classes:
    """The embedding of the position that is predicted, t + 1, as in the origin. "add": it is added
    to d_0. "subtract": it is subtracted from LN(d_L), before the logits. pos_emb has a row more."""
    allowed = ("add", "subtract")
    require(how in allowed, f"next_position({how!r}): must be one of {', '.join(allowed)}")

    class ParallelEncoderDecoder(unpaired()):
        def __init__(self, config):
            super().__init__(config)
            self.pos_emb = nn.Embedding(config.block_size + 1, config.n_embd)
            # With 0.03 the logits stay near 0 in "subtract", too: the loss starts at ln V.
            nn.init.normal_(self.pos_emb.weight, std=0.3 if how == "add" else 0.03)
            if how == "add":
                self.decoder[0].register_forward_pre_hook(self.add_to_input)
            else:
                self.ln_out.register_forward_hook(self.subtract_from_output)

        def embed(self, idx, cache):
            positions = torch.arange(1, idx.size(1) + 1, device=idx.device)[None]
            self.following = self.pos_emb(positions + (0 if cache is None else cache.length))
            return super().embed(idx, cache)

        def add_to_input(self, first_layer, args):
            return args[0] + tail(self.following, args[0]), *args[1:]

        def subtract_from_output(self, ln_out, args, out):
            return out - tail(self.following, out)

    return ParallelEncoderDecoder, needs(position_embedding="learned")


# ---- learned dropout --------------------------------------------------------


def rounding(how: str, scale: float = 60.0) -> Classes:
    """Soft masks, in evaluation too, as in the origin. "sigmoid": r = sigmoid(scale (m - 0.5)).
    "none": r = m."""
    allowed = ("sigmoid", "none")
    require(how in allowed, f"rounding({how!r}): must be one of {', '.join(allowed)}")
    ok = type(scale) in (int, float) and 0 <= scale < math.inf
    require(ok, f"rounding(scale={scale!r}): must be finite and not negative")

    class Router(model.Router):
        def forward(self, x, T, context):
            m = super().forward(x, T, context).learned
            return Mask(m, m if how == "none" else torch.sigmoid(scale * (m - 0.5)))

    return Router, unskipped(), needs(experts=1)


def router_detach() -> Classes:
    """No gradient from a router to what it reads. The origin's use_detached_input."""

    class Router(model.Router):
        def forward(self, x, T, context):
            return super().forward(x.detach(), T, context)

    return Router, needs(experts=1)


def embedding_router() -> Classes:
    """One router that reads E and gives the masks of all blocks, in the order e_1, d_1, e_2, ...
    In the origin each block has its own router, which reads E."""

    RouterOfAll = model.Router

    class Router(model.Router):  # of one block: `mask` is its part
        def __init__(self, config):
            nn.Module.__init__(self)

        def forward(self, x, T, context):
            return Mask(*(y[:, -T:] for y in self.mask))

    class ParallelEncoderDecoder(model.ParallelEncoderDecoder):
        def __init__(self, config):
            super().__init__(config)
            layers = self.decoder
            if config.arch == "parallel":
                pairs = zip(self.encoder, self.decoder, strict=True)
                layers = [layer for pair in pairs for layer in pair]
            self.routers = [layer.ff.router for layer in layers]
            wide = copy(config)  # not replace, which would check n_expert
            wide.n_expert *= len(layers)
            self.router = RouterOfAll(wide)
            self.init_weights()

        def embed(self, idx, cache):
            E, rotation = super().embed(idx, cache)
            mask = self.router(E, idx.size(1), Context(cache=cache))
            parts = (y.chunk(len(self.routers), dim=-1) for y in mask)
            for router, *part in zip(self.routers, *parts, strict=True):
                router.mask = Mask(*part)
            return E, rotation

    return Router, ParallelEncoderDecoder, needs(experts=1)


def top_k(k: int) -> Classes:
    """A mixture of experts: the k largest of G probabilities of a linear router, scaled to the sum
    k, weigh the groups of hidden units. The loss gets 0.01 times the balance loss of each block,
    that of the Switch Transformer (arXiv:2101.03961, 2.2)."""
    require(type(k) is int and k >= 2, f"top_k({k!r}): must be an int, at least 2")

    class Router(model.Router):
        def __init__(self, config):
            nn.Module.__init__(self)
            # No nn.Linear: AdamW trains it, as an output layer, and not Muon.
            self.weight = nn.Parameter(0.02 * torch.randn(config.n_expert, config.n_embd))

        def forward(self, x, T, context):
            # / C: at the learning rate of the embeddings the logits would saturate in a few steps.
            probs = (F.linear(x[:, -T:], self.weight) / x.size(-1)).softmax(dim=-1)
            values, chosen = probs.topk(k, dim=-1)
            on = torch.zeros_like(probs).scatter(-1, chosen, 1.0)
            share = on.flatten(0, -2).mean(dim=0) / k
            self.balance = len(self.weight) * (share * probs.flatten(0, -2).mean(dim=0)).sum()
            return Mask(on, on * probs * (k / values.sum(dim=-1, keepdim=True)))

    class FeedForward(unskipped()):
        def forward(self, *args, **kwargs):
            y, mask = super().forward(*args, **kwargs)
            return y, Mask(mask.learned, mask.learned)  # on is on in the statistics, at any weight

    class ParallelEncoderDecoder(model.ParallelEncoderDecoder):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is None:
                return output
            balance = sum(m.balance for m in self.modules() if isinstance(m, Router))
            return output._replace(loss=output.loss + 0.01 * balance)

    return Router, FeedForward, ParallelEncoderDecoder, needs(experts=k)


# ---- what several of them need ----------------------------------------------


def require(ok: bool, said: str) -> None:
    if not ok:
        raise ValueError(said)


def needs(experts: int = 0, **values: object) -> type:
    """A ModelConfig that takes these values alone, and as many experts or more."""

    class ModelConfig(model.ModelConfig):
        def __post_init__(self):
            super().__post_init__()
            enough = self.n_expert >= experts
            self._require("n_expert", enough, f"at least {experts} in this ablation")
            for name, value in values.items():
                self._require(name, getattr(self, name) == value, f"{value!r} in this ablation")

    return ModelConfig


def unpaired() -> type:
    """A model that decodes through the layers' forward, since `_pair` does not know what an
    ablation has changed there. It reads the keys and values of e_k twice."""

    class ParallelEncoderDecoder(model.ParallelEncoderDecoder):
        def _pair(self, k, d, e, memory, kv, context):
            d, _ = self.decoder[k - 1](d, memory, kv, context)
            return d, self.encoder[k](e, kv, context)[0]

    return ParallelEncoderDecoder


def unskipped() -> type:
    """Feed-forward blocks that never skip experts: the mask is not 0 or 1, and it multiplies."""

    class FeedForward(model.FeedForward):
        def skips(self, r):
            return False

    return FeedForward


# ---- the command line -------------------------------------------------------

ABLATIONS = {
    ablation.__name__: ablation
    for ablation in (
        cross_first, n_cross_head, w_lat, attention_encoder, swiglu, gate, lag, yoco, gqa,
        embedding_loss, next_position, rounding, router_detach, embedding_router, top_k,
    )
}  # fmt: skip


def apply(classes: Classes) -> None:
    """Puts the classes in the place of those of model.py that have their names."""
    for one in classes:
        setattr(model, one.__name__, one)


@contextmanager
def restored() -> Iterator[None]:
    """On leaving, model.py has the classes again that it had before, and no ablation is named."""
    before = {name: value for name, value in vars(model).items() if isinstance(value, type)}
    try:
        yield
    finally:
        vars(model).update(before)
        if "checkpoint" in sys.modules:
            sys.modules["checkpoint"].ABLATIONS.clear()


def read(text: str) -> Classes:
    """The classes of an ablation as one writes it, such as "top_k(4)"; ValueError with one line.
    The arguments are plain values, and nothing is run as code."""
    try:
        call = ast.parse(text, mode="eval").body
        name, args = call.func.id, [ast.literal_eval(arg) for arg in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
        said = "must be an ablation with its arguments, such as yoco() or top_k(4)"
        raise ValueError(f"{text!r}: {said}") from None
    if name not in ABLATIONS:
        near = difflib.get_close_matches(name, ABLATIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no ablation {name!r}{hint} (all: {', '.join(ABLATIONS)})")
    try:
        inspect.signature(ABLATIONS[name]).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{text!r}: {error}; it is {usage(name)}") from None
    return ABLATIONS[name](*args, **kwargs)


def usage(name: str) -> str:
    return name + str(inspect.signature(ABLATIONS[name])).partition(" ->")[0]


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        try:
            print(__doc__)
            for name, ablation in ABLATIONS.items():
                print(f"{usage(name)}\n{textwrap.indent(inspect.getdoc(ablation), '    ')}")
        except OSError as error:
            fail(error)
        return
    named = [argv.pop(0)]
    while argv and argv[0].endswith(")"):
        named.append(argv.pop(0))
    try:
        for text in named:
            apply(read(text))
    except ValueError as error:
        fail(error)
    import checkpoint  # only now, since it takes its classes from model.py

    checkpoint.ABLATIONS[:] = named
    script = argv.pop(0) if argv and argv[0] in ("train.py", "sample.py") else "train.py"
    print(
        f"{', '.join(named)}: name it again to resume or to sample; else its checkpoint is refused"
    )
    sys.argv = [script, *argv]
    runpy.run_path(os.path.relpath(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

"""How fast a prompt is read and text is sampled, beside GPTs of equal size.

    pip install transformers
    python experiments/bench_inference.py                  about an hour on two slow cores
    python experiments/bench_inference.py prompt decode    some of the parts

Prints a table per part and writes experiments/bench_inference.json, where parts that were not asked
for stay as they are. Everything is float32, on two threads, with weights as they are initialised.
What is compared is interleaved: each round runs each model once, in random order, so that all meet
the same noise. The first of six rounds is not counted. A time is the median over the rounds, a
ratio the median of the ratios within a round.

prompt and decode compare models of equal parameters, all with a vocabulary of 65:
- lean: lateral, without decoder self-attention, shared keys and values; 6 + 6 layers
- lean, own keys and values: the same, but each layer of a stack has its own
- YOCO: the stacks of lean in series, with one set of keys and values for the decoder
- canonical: 6 + 6 layers with none of these; serial: the same in series
- GPT: arch="decoder_only", 12 layers
- GPT, in full: the same, but its last layer computes every position of a prompt, not only the last
- GPT, GQA: the GPT with one head of keys and values for two heads of queries
- Hugging Face GPT-2 (biases, learned positions), with the exact GELU, which is faster than its
  own; its cache a DynamicCache, logits of the last position only; 12 layers
Ours have rotary positions. Each peer has the width that brings it closest to the parameters of the
first, among those that give an even head size. The position embedding is not counted.

prompt: the time that one text takes to read, from an empty cache on; allocating the cache is in it.
Also the size of the cache. decode: the time of one token behind a prompt that was read before, for
one text and for ten. Ours are interleaved, and then the GPTs with lean.

texts: 500 characters by the model of the CPU preset with its 16 experts, and by GPT-2s of equal
parameters with as many blocks (4) and fewer (3). GPT-2 reads no more than its positions, so it has
512. Ours has a block of 256, which moves as the text grows, or of 512 as well. GPT-2 samples by
`generate`, as users call it, or by the shortest loop around its model. Compiled, ours is
`compile_step`, as sample.py calls it. GPT-2 is compiled with that loop and a static cache, and
without guards, which is safe only while the number of texts and the size of the cache stay the
same. Compiling is not timed with the rest, and takes less where torch has compiled the same before.
One by one is one text with `use_cache=False`, times the number of texts.

experts: lean, whose routers read the encoder, with random masks that have a given number
of 16 experts on. Experts that are off are skipped, or all are computed and masked. Sampling the
masks is in both. By the rule: FeedForward.skips decides. Ideal is the speed-up if time went with
the bytes of weights that are read (decoding), or with the products with weights (a prompt).

Ten texts of the larger models, behind 4,096 tokens, take 17 GB of memory.
"""

import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from measuring import fields_of, num_params, settings_of  # noqa: E402

import model as model_py  # noqa: E402
from ablations import Classes, apply, gqa, lag, restored, yoco  # noqa: E402
from model import (  # noqa: E402
    Cache,
    FeedForward,
    Mask,
    ParallelEncoderDecoder,
    Router,
    compile_step,
)
from view import gemm_peak  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
THREADS, ROUNDS = 2, 6  # the first round is not counted
VOCABULARY = 65
PROMPTS = (256, 1024, 4096)
PRODUCTS = 2048 * 384**2  # in a round, short prompts are read until T C^2 adds up to this
BEHIND = (1024, 4096)
TOKENS = {1: 32, 10: 8}  # decoded in a round, by the number of texts
POSITIONS = 4096 + 64  # enough for a prompt and what is decoded behind it
CHARACTERS = 500


class Size(NamedTuple):
    width: int  # of lean; peers get as many parameters
    n_head: int
    n_layer: int  # of each stack; a GPT has twice as many


SIZES = (Size(96, 2, 6), Size(384, 6, 6), Size(768, 12, 6))
WITH_EXPERTS = (
    dict(vocab_size=VOCABULARY, block_size=256, n_layer=3, n_head=6, n_embd=384),
    dict(vocab_size=50257, block_size=1024, n_layer=6, n_head=12, n_embd=768),
)


def in_full() -> Classes:
    """A GPT whose last layer computes all positions, as most implementations do."""

    class ParallelEncoderDecoder(model_py.ParallelEncoderDecoder):
        def step(self, idx, cache=None):
            d = self.stacks(idx, cache, last=False).d[-1]
            return F.linear(self.ln_out(d[:, -1:]), self.tok_emb.weight)

    return (ParallelEncoderDecoder,)


LEAN, GPT, GPT_IN_FULL, GPT2 = "lean", "GPT", "GPT, in full", "Hugging Face GPT-2"
DECODER_ONLY = dict(arch="decoder_only")
LATERAL = dict(lateral=True, decoder_self_attention=False)
OURS: dict[str, tuple[Callable[[], Classes], dict]] = {  # what changes model.py, and fields
    LEAN: (tuple, LATERAL | dict(shared_kv=True)),
    "lean, own keys and values": (tuple, LATERAL),
    "YOCO": (yoco, LATERAL),
    "canonical": (tuple, {}),
    "serial": (partial(lag, 6), {}),  # 6 layers, as SIZES have
    GPT: (tuple, DECODER_ONLY),
    GPT_IN_FULL: (in_full, DECODER_ONLY),
    "GPT, GQA": (gqa, DECODER_ONLY),
}
MODELS = (*OURS, GPT2)
DECODED_TOGETHER = (  # with lean; memory does not hold the caches of all
    (LEAN, "lean, own keys and values", "YOCO", "canonical", "serial"),
    (GPT, "GPT, GQA", GPT2),
)
Model = ParallelEncoderDecoder | GPT2LMHeadModel
AnyCache = Cache | DynamicCache


# -----------------------------------------------------------------------------
# building models


def build_gpt2(positions: int, n_layer: int, n_head: int, n_embd: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    ids = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=None)
    how = dict(activation_function="gelu", attn_implementation="sdpa")
    config = GPT2Config(n_positions=positions, **sizes, **ids, **how)
    return GPT2LMHeadModel(config).eval()


def build_ours(
    ablation: Callable[[], Classes] = tuple, kind: type | None = None, **fields: Any
) -> Model:
    """A model with an ablation; or of a class of the caller's."""
    torch.manual_seed(0)
    with restored():
        apply(ablation())
        kind = kind or model_py.ParallelEncoderDecoder
        return kind(model_py.ModelConfig(**fields)).eval()


def build_preset(block_size: int) -> Model:
    """The model of the CPU preset, except for its block."""
    of_model = fields_of(settings_of(str(ROOT / "config/shakespeare_char.py")))
    return build_ours(**of_model | dict(vocab_size=VOCABULARY, block_size=block_size))


def build(name: str, size: Size, width: int) -> Model:
    """One of MODELS."""
    if name == GPT2:
        return build_gpt2(POSITIONS, 2 * size.n_layer, size.n_head, width)
    ablation, fields = OURS[name]
    layers = size.n_layer * (2 if fields is DECODER_ONLY else 1)
    sizes = dict(n_layer=layers, n_head=size.n_head, n_embd=width, vocab_size=VOCABULARY)
    positions = dict(block_size=POSITIONS, position_embedding="rotary")
    return build_ours(ablation, **positions, **sizes, **fields)


def closest_width(
    build: Callable[[int], nn.Module], n_head: int, guess: int, parameters: int
) -> int:
    """The width at which build(width) has the number of parameters closest to the given one."""
    multiple = 2 * n_head  # for an even head size

    def count(width: int) -> int:
        with torch.device("meta"):
            return num_params(build(width))

    # Parameters grow nearly with the square of the width.
    below = int(guess * math.sqrt(parameters / count(guess))) // multiple * multiple
    best = min((below, below + multiple), key=lambda width: abs(count(width) - parameters))
    assert abs(count(best) / parameters - 1) < 0.05, "no width gives as many parameters"
    return best


def build_all(names: tuple[str, ...], size: Size) -> dict[str, Model]:
    """Models of as many parameters as LEAN has."""
    with torch.device("meta"):
        models, parameters = {}, num_params(build(LEAN, size, size.width))
    for name in names:
        of_width = partial(build, name, size)
        width = closest_width(of_width, size.n_head, size.width, parameters)
        models[name] = of_width(width)
        check_cache(models[name])
    return models


# -----------------------------------------------------------------------------
# running models


def step(model: Model, idx: Tensor, cache: AnyCache) -> Tensor:
    """Reads idx behind the cache: the logits of the last position."""
    if isinstance(model, GPT2LMHeadModel):
        return model(idx, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return model.step(idx, cache)


def new_cache(model: Model, texts: int, size: int) -> AnyCache:
    if isinstance(model, GPT2LMHeadModel):
        return DynamicCache(config=model.config)
    return Cache(model, texts, size)


def read_prompt(model: Model, prompt: Tensor, texts: int = 1, room: int = 0) -> AnyCache:
    """Reads a prompt (1, T). The cache serves so many texts, with room for more tokens."""
    cache = new_cache(model, texts, prompt.size(1) + room)
    step(model, prompt, cache)
    if isinstance(cache, DynamicCache) and texts > 1:
        cache.batch_repeat_interleave(texts)
    return cache


def decode(model: Model, cache: AnyCache, texts: int, tokens: int) -> float:
    """The seconds that decoding takes. After it the cache is as it was."""
    token = torch.zeros(texts, 1, dtype=torch.long)
    start = time.perf_counter()
    for _ in range(tokens):
        step(model, token, cache)
    seconds = time.perf_counter() - start
    if isinstance(cache, DynamicCache):
        cache.crop(-tokens)
    else:
        cache.length -= tokens
    return seconds


def cache_bytes(cache: AnyCache) -> int:
    if isinstance(cache, DynamicCache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return sum(buffer.nbytes for kv in cache.buffers.values() for buffer in kv)


@torch.inference_mode()
def check_cache(model: Model) -> None:
    """A prompt, then two texts token by token: the logits must be those of one forward pass."""
    text = random_ids(1, 8)
    of_text = model(text) if isinstance(model, GPT2LMHeadModel) else model(text, text)
    expected, cache = of_text.logits[:, 4:], read_prompt(model, text[:, :5], texts=2, room=3)
    found = [step(model, text[:, :5], Cache(model, 1, 5))] if isinstance(cache, Cache) else []
    found += [step(model, text[:, t : t + 1].expand(2, -1), cache)[1:] for t in range(5, 8)]
    error = torch.cat(found, dim=1) - expected[:, -len(found) :]
    assert error.abs().max() < 1e-4 * expected.abs().max(), "the cache changes the logits"


def random_ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def interleave(tasks: dict[str, Callable[[], float | None]]) -> dict[str, list[float]]:
    """The seconds of each task, its own count where it gives one, in each round but the first."""
    seconds, order = {name: [] for name in tasks}, list(tasks)
    for k in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            own = tasks[name]()
            if k:
                seconds[name].append(own or time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of how many times as long the slow one takes."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# -----------------------------------------------------------------------------
# the parts: each gives the rows of its table


def of_model(size: Size, name: str, model: Model) -> dict:
    """What rows of the first two parts begin with."""
    width = model.config.n_embd
    return {"size": size.width, "model": name, "width": width, "parameters": num_params(model)}


@torch.inference_mode()
def measure_prompt() -> Iterator[dict]:
    for size in SIZES:
        models = build_all(MODELS, size)
        bytes_a_token = {
            name: cache_bytes(read_prompt(model, random_ids(1, 16))) // 16
            for name, model in models.items()
        }
        for T in PROMPTS:
            prompt = random_ids(1, T)
            times = max(1, PRODUCTS // (T * size.width**2))

            def read(model: Model, prompt: Tensor = prompt, times: int = times) -> None:
                for _ in range(times):
                    read_prompt(model, prompt)

            seconds = interleave({name: partial(read, model) for name, model in models.items()})
            for name, model in models.items():
                of_name = [s / times for s in seconds[name]]
                yield of_model(size, name, model) | {
                    "prompt": T, "ms": statistics.median(of_name) * 1e3,
                    "times_lean": ratio(seconds[name], seconds[LEAN]),
                    "cache_bytes_a_token": bytes_a_token[name], "seconds": of_name,
                }  # fmt: skip


@torch.inference_mode()
def measure_decode() -> Iterator[dict]:
    for size in SIZES:
        models = build_all(sum(DECODED_TOGETHER, ()), size)
        for T, texts, names in product(BEHIND, TOKENS, DECODED_TOGETHER):
            tokens = TOKENS[texts]
            caches = {
                name: read_prompt(models[name], random_ids(1, T), texts, room=tokens)
                for name in (LEAN, *names)
            }
            seconds = interleave({
                name: partial(decode, models[name], cache, texts, tokens)
                for name, cache in caches.items()
            })  # fmt: skip
            del caches  # before the next ones are there
            for name in names:
                of_name = [s / tokens for s in seconds[name]]
                yield of_model(size, name, models[name]) | {
                    "texts": texts, "behind": T, "ms": statistics.median(of_name) * 1e3,
                    "times_lean": ratio(seconds[name], seconds[LEAN]), "seconds": of_name,
                    "lean_seconds": [s / tokens for s in seconds[LEAN]],
                }  # fmt: skip


NO_GUARDS = dict(
    isolate_recompiles=True,
    options={"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
)


def bare_loop(model: Callable[..., Any], idx: Tensor, past: Any = None) -> Iterator[Tensor]:
    """The least that samples text from a GPT-2 with its cache, which `past` may be."""
    for k in range(CHARACTERS):
        here = torch.full((1, 1), k)
        out = model(idx, past_key_values=past, use_cache=True, position_ids=here)
        idx, past = out.logits[:, -1].softmax(dim=-1).multinomial(1), out.past_key_values
        yield idx


def compile_gpt2(model: GPT2LMHeadModel) -> Callable[[Tensor], Iterator[Tensor]]:
    """The same loop, compiled."""
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False, **NO_GUARDS)

    def loop(idx: Tensor) -> Iterator[Tensor]:
        c = model.config
        past = StaticCache(config=c, max_cache_len=c.n_positions)
        sizes = len(idx), c.n_head, c.n_embd // c.n_head
        past.early_initialization(*sizes, dtype=torch.float32, device=idx.device)
        return bare_loop(forward, idx, past)

    return loop


def compile_ours(block_size: int) -> Model:
    model = build_preset(block_size)
    compile_step(model, options={"cpp_wrapper": True})
    return model


def by_generate(model: GPT2LMHeadModel, idx: Tensor) -> None:
    how = dict(do_sample=True, top_k=0, max_new_tokens=CHARACTERS)
    model.generate(idx, attention_mask=torch.ones_like(idx), **how)


def first_tokens(stream: Iterator[Tensor]) -> tuple[Tensor, float]:
    """The first 20 tokens from seed 0, and the seconds that they take."""
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.cat([*islice(stream, 20)], dim=1), time.perf_counter() - start


def exhaust(sampler: Callable[[Tensor], Iterator[Tensor]], idx: Tensor) -> None:
    for _ in sampler(idx):
        pass


@torch.inference_mode()
def measure_texts() -> Iterator[dict]:
    preset, gpt2s = build_preset(256), {}
    for layers in (4, 3):
        of_width = partial(build_gpt2, 512, layers, 2)
        width = closest_width(of_width, 2, preset.config.n_embd, num_params(preset))
        gpt2s[f"{GPT2}, {layers} layers"] = of_width(width)
    base, uncached = "ours, block 256", "ours, one by one, no cache"
    for texts in (10, 1):
        idx = torch.zeros(texts, 1, dtype=torch.long)
        models: dict[str, Model] = {
            base: preset,
            f"{base}, compiled": compile_ours(256),
            "ours, block 512": build_preset(512),
            "ours, block 512, compiled": compile_ours(512),
        }
        samplers: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
            name: partial(model.stream, max_new_tokens=CHARACTERS) for name, model in models.items()
        }
        for name, model in gpt2s.items():
            samplers[f"{name}, bare loop"] = partial(bare_loop, model)
            samplers[f"{name}, compiled, no guards"] = compile_gpt2(model)
            ways = ("", ", bare loop", ", compiled, no guards")
            models |= {f"{name}{way}": model for way in ways}
        compile_seconds = {}
        for name, sampler in samplers.items():
            eager, is_compiled, _ = name.partition(", compiled")
            if is_compiled:
                eager = samplers.get(eager) or samplers[f"{eager}, bare loop"]
                expected, _ = first_tokens(eager(idx))
                found, compile_seconds[name] = first_tokens(sampler(idx))
                assert torch.equal(found, expected), f"{name}: compiled, it samples another text"
        tasks = {name: partial(exhaust, sampler, idx) for name, sampler in samplers.items()}
        tasks |= {name: partial(by_generate, model, idx) for name, model in gpt2s.items()}
        models[uncached] = models[base]
        tasks[uncached] = partial(exhaust, partial(samplers[base], use_cache=False), idx[:1])
        seconds = interleave(tasks)
        seconds[uncached] = [s * texts for s in seconds[uncached]]
        for name, model in models.items():
            of_name = seconds[name]
            yield {
                "model": name, "texts": texts, "parameters": num_params(model),
                "tokens_per_second": texts * CHARACTERS / statistics.median(of_name),
                "ours_is_faster": ratio(of_name, seconds[base]),
                "compiled_is_faster": ratio(of_name, seconds[f"{base}, compiled"]),
                "compile_seconds": compile_seconds.get(name), "seconds": of_name,
            }  # fmt: skip


@contextmanager
def random_masks(on: int, skip: bool | None) -> Iterator[None]:
    """Inside, routers choose so many experts at random, and those that are off are skipped, or not;
    None: as FeedForward.skips decides."""
    generator, forward = torch.Generator().manual_seed(0), Router.forward

    def at_random(self: Router, x: Tensor, T: int, context: model_py.Context) -> Mask:
        m = forward(self, x, T, context).learned
        chosen = torch.rand(m.shape, generator=generator).argsort(dim=-1) < on
        return Mask(m, chosen.to(m.dtype))

    rule = FeedForward.skips if skip is None else lambda *_: skip
    with (
        mock.patch.object(Router, "forward", at_random),
        mock.patch.object(FeedForward, "skips", rule),
    ):
        yield


def count_products(model: ParallelEncoderDecoder, idx: Tensor) -> tuple[int, int]:
    """The multiplications by weights that reading idx takes, and those of them in experts."""
    seen: dict[nn.Module, int] = {}

    def count(linear: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
        seen[linear] = linear.weight.numel() * inputs[0][..., 0].numel()

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_hook(count) for linear in linears]
    with random_masks(on=16, skip=False):
        model.step(idx)
    for hook in hooks:
        hook.remove()
    blocks = [module for module in model.modules() if isinstance(module, FeedForward)]
    in_experts = sum(seen[linear] for block in blocks for linear in (block.w1, block.w2))
    return sum(seen.values()) + model.tok_emb.weight.numel(), in_experts  # logits of one position


@torch.inference_mode()
def measure_experts() -> Iterator[dict]:
    G, fields = 16, OURS[LEAN][1] | dict(position_embedding="rotary", router_input="encoder")
    for sizes in WITH_EXPERTS:
        model = build_ours(n_expert=G, **sizes, **fields)
        T = model.config.block_size // 2
        prompt = random_ids(1, T)

        def read_often(prompt: Tensor, times: int, model: Model = model) -> float:
            start = time.perf_counter()
            for _ in range(times):
                read_prompt(model, prompt)
            return (time.perf_counter() - start) / times

        def decode_some(cache: Cache, model: Model = model) -> float:
            tokens = TOKENS[cache.batch]
            return decode(model, cache, cache.batch, tokens) / tokens

        def with_masks(on: int, skip: bool | None, run: Callable[[], float]) -> float:
            with random_masks(on, skip):
                return run()

        logits = []
        for skip in (False, True):
            with random_masks(4, skip):
                logits.append(model.step(prompt))
        error = (logits[0] - logits[1]).abs().max()
        assert error < 1e-4 * logits[0].abs().max(), "skipping experts changes the logits"

        for texts, read in ((1, False), (10, False), (1, True)):
            if read:
                run = partial(read_often, prompt, max(1, 1024 // T))
            else:
                run = partial(decode_some, read_prompt(model, prompt, texts, TOKENS[texts]))
            seconds = interleave({
                (on, skip): partial(with_masks, on, skip, run)
                for on in (16, 8, 4, 2) for skip in (False, True, None)
            })  # fmt: skip
            total, in_experts = count_products(model, prompt if read else prompt[:, :1])
            for on in (16, 8, 4, 2):
                dense, sparse, rule = (seconds[on, skip] for skip in (False, True, None))
                # Decoding, the weights of an expert are read if any of the texts has it on.
                share = on / G if read else 1 - (1 - on / G) ** texts
                left = total - (1 - share) * in_experts
                sparse_seconds = statistics.median(sparse)
                of_peak = None if read else 4 * left / sparse_seconds / memory_bandwidth()
                yield {
                    "size": f"{num_params(model) / 1e6:.0f} M", "width": model.config.n_embd,
                    "parameters": num_params(model), "on": on, "of": G,
                    "tokens_at_once": T if read else texts,
                    "dense_ms": statistics.median(dense) * 1e3, "sparse_ms": sparse_seconds * 1e3,
                    "speed_up": ratio(dense, sparse), "ideal": total / left,
                    "speed_up_by_rule": ratio(dense, rule), "share_of_bandwidth": of_peak,
                    "seconds": {"dense": dense, "sparse": sparse, "by_rule": rule},
                }  # fmt: skip


@cache
def memory_bandwidth() -> float:
    """Bytes a second that reading a large tensor reaches."""
    big = torch.ones(2**26)
    return big.numel() * 4 / min(interleave({"": lambda: big.sum() and None})[""])


def about() -> dict:
    """What a part was measured with, and on what."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return {
        "commit": commit.strip(), "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "gemm_peak": gemm_peak("cpu"), "memory_bandwidth": memory_bandwidth(),
    }  # fmt: skip


# Each part, and the columns that are printed of it with their formats.
PARTS: dict[str, tuple[Callable[[], Iterator[dict]], dict[str, str]]] = {
    "prompt": (measure_prompt, {
        "size": "", "model": "", "width": "", "parameters": ",", "prompt": ",", "ms": ",.1f",
        "times_lean": ".2f", "cache_bytes_a_token": ",",
    }),
    "decode": (measure_decode, {
        "size": "", "model": "", "width": "", "parameters": ",", "texts": "", "behind": ",",
        "ms": ",.2f", "times_lean": ".2f",
    }),
    "texts": (measure_texts, {
        "model": "", "texts": "", "parameters": ",", "tokens_per_second": ",.0f",
        "ours_is_faster": ".2f", "compiled_is_faster": ".2f", "compile_seconds": ".0f",
    }),
    "experts": (measure_experts, {
        "size": "", "tokens_at_once": "", "on": "", "of": "", "dense_ms": ".2f",
        "sparse_ms": ".2f", "speed_up": ".2f", "ideal": ".2f", "speed_up_by_rule": ".2f",
        "share_of_bandwidth": ".0%",
    }),
}  # fmt: skip


def main(asked: list[str]) -> None:
    if unknown := set(asked) - set(PARTS):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(THREADS)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    here = about()
    print(f"Memory {here['memory_bandwidth'] / 1e9:.1f} GB/s, "
          f"GEMM {here['gemm_peak'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    for part in asked or PARTS:
        measure, columns = PARTS[part]
        print(f"\n{part}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        rows, start = [], time.perf_counter()
        for row in measure():
            rows.append(row)
            cells = ("" if row[c] is None else f"{row[c]:{spec}}" for c, spec in columns.items())
            print(f"| {' | '.join(cells)} |", flush=True)
        print(f"\n{time.perf_counter() - start:.0f} s", flush=True)
        results[part] = {**here, "rows": rows}
        kept = {name: results[name] for name in PARTS if name in results}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

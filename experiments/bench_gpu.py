"""How fast training, prompts and decoding are on one CUDA GPU, beside GPTs of equal size.

    pip install transformers
    python experiments/bench_gpu.py                 eight minutes on an H100
    python experiments/bench_gpu.py step decode     some of the parts
    python experiments/bench_gpu.py --quick         a smoke test with tiny models, on a GPU or CPU

Prints a table per part and writes experiments/bench_gpu.json (or --out=FILE), where parts that were
not asked for stay as they are. A smoke test writes to --out alone. Each part is a process of its
own with a time budget. The next part gets what is left of it, and what does not fit is left out.
Weights are as initialised. Each round runs each model once, in random order, and the first of six
rounds is not counted. A time is the median over the rounds; speed is the median of GPT's time over
the model's within a round.

Models have equal widths, and by their layers equal parameters within 5 %. So heads are 64 wide, as
fused attention likes them. They are those of bench_inference.py: lean with 6 + 6 layers;
GPT and Hugging Face GPT-2 with 11; GPT, GQA with 12; canonical with 6 + 6, 7/8 as wide, as its
heads are.

preset: train.py as a user starts it, each preset for as many seconds, which include evaluating, and
compiling what a short run before has compiled. The wall-clock time also includes starting and
sampling.
step: forward, backward, clipping and AdamW, or Muon, in bfloat16 autocast. The small models have
5 + 5 layers beside 9. GPT-2 has the exact GELU, and the loss function of ours. FLOPs are counted as
in view.estimate_mfu. Memory is what a model adds at its peak.
prompt: the time to read texts in bfloat16, from an empty cache on; for one text also as one CUDA
graph, since its kernels are shorter than what Python takes to launch them.
decode: the time of one token behind a prompt in bfloat16, without sampling. GPT-2 is as it comes.
Then the ways to do without launching kernels one by one:
- graph: the eager step as one CUDA graph. The length is a tensor, so attention reads the whole
  cache through a mask.
- graph, fixed length: the same without a mask. It cannot sample; it shows what the mask costs.
- compiled: as by `compile_step`; compiled, graph: that as one CUDA graph.
Four models of the ways have the same weights: lean, in which encoder layer l + 1 and
decoder layer l share one attention; in pairs, they share their matrix products, too; in series, the
encoder and then the decoder; two streams, each stack on its own CUDA stream. lag(6) is the
ablation, with keys and values of its own: 7 % larger.
"""

import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

START = time.time()  # before the imports, which take seconds

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import bench_inference as base  # noqa: E402
from bench_inference import GPT, GPT2, GPT_IN_FULL, LEAN, random_ids, ratio, read_prompt  # noqa: E402
from measuring import num_params, step_flops  # noqa: E402

import model as model_py  # noqa: E402
from ablations import lag  # noqa: E402
from model import KV, Cache, Context, ModelOutput, ParallelEncoderDecoder, Stacks  # noqa: E402
from muon import configure_optimizers  # noqa: E402
from view import gemm_peak  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
BUDGETS = {"preset": 145.0, "step": 165.0, "prompt": 65.0, "decode": 95.0}  # seconds
GRACE = 6.0  # seconds behind its budget, after which a part is ended
CUDA = torch.cuda.is_available()
DEVICE, BACKEND = ("cuda", "inductor") if CUDA else ("cpu", "eager")
TOLERANCE = 0.05  # of bfloat16 logits, times the largest one; 1e-3 in float32
POSITIONS = 8192 + 64
EXPERTS, MUON, GQA = f"{LEAN}, 16 experts", f"{LEAN}, Muon", "GPT, GQA"
IN_SERIES, TWO_STREAMS, IN_PAIRS = "lean, in series", "lean, two streams", "lean, in pairs"
SERIAL = "lag(6)"
Rows = Iterator[dict | str]  # a str says what was left out, and why


class Run(NamedTuple):
    """How a part is measured."""

    quick: bool
    deadline: float  # by time.time()
    rounds: int = 6  # the first one is not counted

    def spent(self, need: float) -> bool:
        """Whether so many seconds are no longer there."""
        return not self.quick and time.time() + need > self.deadline


class InSeries(ParallelEncoderDecoder):
    """The lean model with shared keys and values. A token goes through the encoder, then through
    the decoder; or, with two_streams, each of them has a stream, and d_k waits for e_k alone."""

    two_streams = False

    def stacks(self, idx: Tensor, cache: Cache | None = None, last: bool = False) -> Stacks:
        if cache is None or idx.size(1) > 1:
            return super().stacks(idx, cache, last)
        (e, rotation), L = self.embed(idx, cache), self.config.n_layer
        # `states` keeps what both streams read: its memory must not be reused before they meet.
        d, states, context = e, [], Context(rotation, cache)
        for k in range(L + 1):
            memory = self.ln_memory[f"e{k}"](e)
            states.append((e, memory, self.key_value[f"e{k}"](memory, context)))
            if k > 0 and self.two_streams:
                d = self.beside(k, d, states, context)
            if k < L:
                e = self.encoder[k](e, states[k][2], context)[0]
        if self.two_streams and CUDA:
            torch.cuda.current_stream().wait_stream(second_stream())
        for k in range(1, 1 if self.two_streams else L + 1):
            d = self.decode_layer(k, d, states, context)
        cache.length = cache.length + 1
        return Stacks([], [d], [])

    def decode_layer(self, k: int, d: Tensor, states: list, context: Context) -> Tensor:
        (e, memory, kv), before = states[k], states[k - 1][0]
        return self.decoder[k - 1](d + (e - before), memory, kv, context)[0]

    def beside(self, *args: Any) -> Tensor:
        if not CUDA:
            return self.decode_layer(*args)
        second_stream().wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(second_stream()):
            return self.decode_layer(*args)


class TwoStreams(InSeries):
    two_streams = True


class InPairs(ParallelEncoderDecoder):
    """The lean model with shared keys and values. A token goes through layers k of the decoder and
    k + 1 of the encoder at once: as one layer of two vectors, each with matrices of its own."""

    def __init__(self, config: model_py.ModelConfig):
        super().__init__(config)
        for k in range(1, config.n_layer):
            dec, enc = self.decoder[k - 1], self.encoder[k]
            of_d, of_e = dec.cross_attention, enc.attention
            pairs = {
                "ln_attention": (dec.ln_cross, enc.ln_attention), "query": (of_d.query, of_e.query),
                "proj": (of_d.proj, of_e.proj), "ln_ff": (dec.ln_ff, enc.ln_ff),
                "w1": (dec.ff.w1, enc.ff.w1), "w2": (dec.ff.w2, enc.ff.w2),
            }  # fmt: skip
            for name, (one, other) in pairs.items():
                both = torch.stack([one.weight, other.weight]).detach()
                both = both.mT.contiguous() if both.dim() == 3 else both[:, None]
                self.register_buffer(f"{name}_{k}", both)  # (2, in, out), or (2, 1, C)

    def stacks(self, idx: Tensor, cache: Cache | None = None, last: bool = False) -> Stacks:
        if cache is None or idx.size(1) > 1:
            return super().stacks(idx, cache, last)
        (e, rotation), L = self.embed(idx, cache), self.config.n_layer
        context = Context(rotation, cache)
        x = torch.cat([e, e]).view(2, -1, self.config.n_embd)  # d and e, each (B, C)
        for k in range(L + 1):
            before, e = e, x[1][:, None]
            memory = self.ln_memory[f"e{k}"](e)
            kv = self.key_value[f"e{k}"](memory, context)
            if 0 < k < L:
                x = self.pair(k, torch.stack([x[0] + (e - before)[:, 0], x[1]]), kv, rotation)
            elif k == 0:
                x = torch.stack([x[0], self.encoder[0](e, kv, context)[0][:, 0]])
        d = self.decoder[-1](x[0][:, None] + (e - before), memory, kv, context)[0]
        cache.length = cache.length + 1
        return Stacks([], [d], [])

    def pair(self, k: int, x: Tensor, kv: KV, rotation: Tensor) -> Tensor:
        q = self.normalised("ln_attention", k, x) @ getattr(self, f"query_{k}")
        q = model_py.heads(q.transpose(0, 1), self.config.n_head, rotation=rotation)
        y = model_py.attend(q, kv, causal=False).transpose(0, 1)
        x = torch.baddbmm(x, y, getattr(self, f"proj_{k}"))
        h = F.gelu(self.normalised("ln_ff", k, x) @ getattr(self, f"w1_{k}"))
        return torch.baddbmm(x, h, getattr(self, f"w2_{k}"))

    def normalised(self, name: str, k: int, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * getattr(self, f"{name}_{k}")


LEAN_FIELDS = base.OURS[LEAN][1]
WAYS = {IN_SERIES: InSeries, TWO_STREAMS: TwoStreams, IN_PAIRS: InPairs}
PEERS = base.OURS | {SERIAL: (partial(lag, 6), LEAN_FIELDS | dict(shared_kv=False))}
SHAPES = {"canonical": (6, 7 / 8), GPT: (11, 1), GPT_IN_FULL: (11, 1), GQA: (12, 1), GPT2: (11, 1)}

# -----------------------------------------------------------------------------
# what the parts share


@cache
def second_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@cache
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def interleave(tasks: dict[Any, tuple[Callable[[], Any], int]], rounds: int) -> dict:
    """The seconds of each task, which a round calls so many times, in each round but the first."""
    seconds, order = {name: [] for name in tasks}, list(tasks)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            task, times = tasks[name]
            synchronize()
            start = time.perf_counter()
            for _ in range(times):
                task()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / times)
    return {name: values[1:] for name, values in seconds.items()}


def timed(seconds: list[float], of_gpt: list[float] | None) -> dict:
    speed = None if of_gpt is None else ratio(of_gpt, seconds)
    return {"ms": statistics.median(seconds) * 1e3, "speed": speed, "seconds": seconds}


def build(name: str, width: int, heads: int) -> nn.Module:
    """A model of prompt and decode in bfloat16, checked in float32."""
    layers, share = SHAPES.get(name, (6, 1))
    sizes = dict(n_layer=layers, n_head=heads, n_embd=int(width * share))
    ours = dict(position_embedding="rotary", vocab_size=base.VOCABULARY, block_size=POSITIONS)
    with torch.device(DEVICE):
        if name == GPT2:
            model = base.build_gpt2(POSITIONS, **sizes)
        else:
            ablation, fields = PEERS.get(name, (tuple, LEAN_FIELDS))
            model = base.build_ours(ablation, WAYS.get(name), **ours, **sizes, **fields)
    text = random_ids(1, 40).to(DEVICE)
    found = base.step(model, text[:, -1:], read_prompt(model, text[:, :-1], room=1))
    assert difference(found, model(text).logits[:, -1:]) < 1e-3, f"{name}: wrong with a cache"
    return model.to(torch.bfloat16)


def build_all(names: tuple[str, ...], width: int, heads: int) -> dict[str, nn.Module]:
    models = {name: build(name, width, heads) for name in names}
    check_sizes({name: model for name, model in models.items() if name != SERIAL})
    return models


def check_sizes(models: dict[str, nn.Module]) -> None:
    for name, model in models.items():
        share = num_params(model) / num_params(models[GPT])
        assert abs(share - 1) < 0.05, f"{name} has {share:.3f} times the parameters of {GPT}"


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one, over the largest value."""
    found, expected = found.float(), expected.float()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def brief(what: str, error: Exception) -> str:
    return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


# -----------------------------------------------------------------------------
# the parts: each gives the rows of its table

ITERATION = re.compile(r"iter \d+: .*?time ([\d.]+)ms, ([\d,]+) tok/s, mfu (\d+)%")
WHOLE = re.compile(r"whole validation split: loss ([\d.]+).* after (\d+) iterations, ([\d.]+) s")
TINY_PRESET = "--n_layer=1 --n_head=2 --n_embd=48 --block_size=32 --batch_size=4 --eval_iters=1"


def measure_preset(run: Run) -> Rows:
    seconds, presets = 1 if run.quick else 25, ("shakespeare_char", "decoder_only")
    settings = [f"--device={DEVICE}", f"--max_seconds={seconds}"]
    settings += [*TINY_PRESET.split(), f"--compile={CUDA}"] if run.quick else []
    yield from compile_presets(presets, run)
    for preset in presets:
        if run.spent(seconds + 15):  # to start, and to sample
            yield f"{preset}: the budget is spent"
            continue
        arguments = ["train.py", f"config/{preset}.py", *settings]
        with tempfile.TemporaryDirectory() as folder:
            command, start = [sys.executable, *arguments, f"--out_dir={folder}"], time.time()
            limit = 90 if run.quick else run.deadline - start
            try:
                done = subprocess.run(
                    command, cwd=ROOT, timeout=limit, capture_output=True, text=True
                )
            except subprocess.TimeoutExpired:
                yield f"{preset}: not done within the budget"
                continue
        wall, said = time.time() - start, done.stdout
        whole, lines = WHOLE.search(said), ITERATION.findall(said)
        if done.returncode or not whole or not lines:
            yield f"{preset}: status {done.returncode}: {(said + done.stderr)[-1500:]}"
            settings.append("--compile=False")  # the others, then
            continue
        on = re.search(r"experts on ([\d.]+)%, after", said)
        numbers = [re.search(r"([\d,]+) parameters", said)[1], whole[2], lines[-1][1]]
        parameters, iterations, tokens = (int(n.replace(",", "")) for n in numbers)
        yield {
            "preset": preset, "parameters": parameters, "loss": float(whole[1]),
            "iterations": iterations, "seconds": float(whole[3]), "wall_seconds": wall,
            "ms": float(lines[-1][0]), "tokens_per_second": tokens, "mfu": int(lines[-1][2]) / 100,
            "experts_on": float(on[1]) / 100 if on else None, "arguments": arguments,
        }  # fmt: skip
        if run.quick:
            settings.append("--compile=False")


def compile_presets(presets: tuple[str, ...], run: Run) -> list[str]:
    """Starts them for one iteration, all at once: then torch finds them in its cache."""
    one = ["--max_iters=1", "--eval_iters=1", f"--device={DEVICE}"]
    with tempfile.TemporaryDirectory() as folder:
        return finish({
            p: [sys.executable, "train.py", f"config/{p}.py", *one, f"--out_dir={folder}/{p}"]
            for p in presets
        }, run)  # fmt: skip


def finish(commands: dict[str, list[str]], run: Run) -> list[str]:
    """Runs them at once, ends those that take half of the part's time; says what failed. A smoke
    test does without."""
    if run.quick:
        return []
    start, quiet = time.time(), dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    limit = (run.deadline - start) / 2
    started = {name: subprocess.Popen(c, text=True, **quiet) for name, c in commands.items()}
    failed = []
    for name, process in started.items():
        try:
            _, said = process.communicate(timeout=max(0.1, start + limit - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"{process.communicate()[1]}\nnot done in {limit:.0f} s"
        if process.returncode:
            failed.append(f"{name}, compiling: {' '.join(said.split())[-300:]}")
    return failed


class Training(NamedTuple):
    C: int  # width
    T: int  # tokens in a sequence
    B: int  # sequences in a batch
    heads: int
    vocabulary: int
    stack: int  # layers of each stack
    layers: int  # of a GPT
    steps: int  # in a round


SMALL, LARGE = Training(384, 256, 64, 6, 65, 5, 9, 10), Training(768, 1024, 8, 12, 50257, 6, 11, 4)
TINY = Training(64, 16, 2, 2, 65, 2, 4, 1)


class WithLoss(nn.Module):
    """Hugging Face's GPT-2, with the loss function of ours."""

    def __init__(self, gpt2: GPT2LMHeadModel):
        super().__init__()
        self.gpt2 = gpt2

    def forward(self, x: Tensor, y: Tensor) -> ModelOutput:
        logits = self.gpt2(x, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten().clamp_min(-1), ignore_index=-1)
        return ModelOutput(logits, loss, {})


def build_trained(name: str, size: Training) -> nn.Module:
    torch.manual_seed(0)
    depth = size.stack if name.startswith(LEAN) else size.layers
    sizes = dict(vocab_size=size.vocabulary, n_layer=depth, n_head=size.heads, n_embd=size.C)
    with torch.device(DEVICE):
        if name == GPT2:
            how = dict(attn_implementation="sdpa", use_cache=False, activation_function="gelu")
            how |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            ids = dict(n_positions=size.T, bos_token_id=0, eos_token_id=0)
            return WithLoss(GPT2LMHeadModel(GPT2Config(**sizes, **how, **ids))).train()
        fields = base.OURS[GPT if name == GPT else LEAN][1] | dict(position_embedding="rotary")
        if name == EXPERTS:
            fields |= dict(n_expert=16, router_input="encoder", l1_norm="squared", l1_weight=0.05)
        return base.build_ours(block_size=size.T, **sizes, **fields).train()


class Trained:
    """A model in training, and what was measured before its rounds."""

    def __init__(self, name: str, size: Training, compiled: bool):
        before = torch.cuda.memory_allocated() if CUDA else 0
        self.model, self.memory = build_trained(name, size), None
        how = dict(dynamic=False, backend=BACKEND)  # else a second size is compiled for any size
        self.forward = torch.compile(self.model, **how) if compiled else self.model
        adamw = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        self.optimizers = configure_optimizers(self.model, adamw, {} if name == MUON else None)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(size.vocabulary, (size.B, size.T + 1), generator=generator).to(DEVICE)
        self.x, self.y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        start = time.perf_counter()
        first = self.step().item()
        self.compile_seconds = time.perf_counter() - start if compiled else None
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        last = [self.step() for _ in range(3)][-1].item()
        known = math.log(size.vocabulary)  # an untrained model's loss, and later not far from it
        assert abs(first / known - 1) < 0.1 and 0 < last < 1.5 * known, f"losses {first}, {last}"
        if CUDA:
            self.memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        self.flops = step_flops(self.model, size.C, size.T, size.B)

    def step(self) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.forward(self.x, self.y).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()


SIZES = {"small": SMALL, "large": LARGE}
COMPILED = {
    "small": (GPT, LEAN, GPT2, EXPERTS), "large": (GPT, LEAN, GPT2),
    "decode": (LEAN, GPT, IN_PAIRS, IN_SERIES),
}  # fmt: skip


def compile_all(run: Run, *kinds: str) -> list[str]:
    """Compiles the models, each in a process of its own: then torch finds them in its cache."""
    names = [(kind, name) for kind in kinds for name in COMPILED[kind]]
    command = [sys.executable, __file__, "--compile"]
    return finish({", ".join(of): [*command, *of] for of in names}, run)


def compile_one(kind: str, name: str) -> None:
    if kind == "decode":
        with torch.no_grad():
            model = build(name, *LARGE_DECODED)
            past = read_prompt(model, random_ids(1, NEAR).to(DEVICE), room=64)
            find_way(model, past, NEAR, "compiled")
    else:
        torch.set_float32_matmul_precision("high")
        Trained(name, SIZES[kind], compiled=True)


def measure_step(run: Run) -> Rows:
    torch.set_float32_matmul_precision("high")  # as train.py
    yield from compile_all(run, "small", "large")
    sizes = (TINY,) if run.quick else (SMALL, LARGE)
    turns = [(size, (GPT, LEAN, EXPERTS, GPT2, MUON), "eager") for size in sizes]
    if run.quick:
        turns.append((TINY, (LEAN,), "compiled"))
    else:
        turns += [(SIZES[size], COMPILED[size], "compiled") for size in SIZES]
    gpts: dict[tuple[Training, str], Trained] = {}
    slowest = 8.0  # seconds, of compiling what is in the cache
    for size, names, how in turns:
        trained: dict[str, Trained] = {}
        for name in names:
            what = f"C={size.C}, {name}, {how}"
            if run.spent((1.3 * slowest if how == "compiled" else 2) + 4):
                yield f"{what}: the budget is spent"
                continue
            try:
                trained[name] = one = Trained(name, size, how == "compiled")
                slowest = max(slowest, one.compile_seconds or 0)
            except Exception as error:
                yield brief(what, error)
        if GPT in trained:
            gpts[size, how] = trained[GPT]
        gpt = {GPT: gpts[size, how]} if trained and (size, how) in gpts else {}
        check_sizes({name: one.model for name, one in (gpt | trained).items()} if gpt else {})
        tasks = {name: (one.step, size.steps) for name, one in (gpt | trained).items()}
        seconds = interleave(tasks, run.rounds)
        for name, one in trained.items():
            row = timed(seconds[name], seconds.get(GPT))
            yield {
                "C": size.C, "T": size.T, "batch": size.B, "model": name, "how": how,
                "parameters": num_params(one.model), **row,
                "tokens_per_second": size.B * size.T / row["ms"] * 1e3,
                "share_of_gemm_peak": one.flops / row["ms"] * 1e3 / gemm_peak(DEVICE),
                "peak_memory_mib": one.memory, "compile_seconds": one.compile_seconds,
            }  # fmt: skip


@torch.inference_mode()
def measure_prompt(run: Run) -> Rows:
    for width, heads in ((64, 2),) if run.quick else ((384, 6), (768, 12)):
        models = build_all((LEAN, "canonical", GPT, GPT_IN_FULL, GQA, GPT2), width, heads)
        for T, texts in ((32, 1), (64, 2)) if run.quick else ((1024, 1), (8192, 1), (8192, 16)):
            if run.spent(3 + texts):
                yield f"C={width}, {texts} prompts of {T:,}: the budget is spent"
                continue
            prompt, times = random_ids(texts, T).to(DEVICE), 1 if run.quick else 5
            calls = {("eager", n): partial(read_texts, m, prompt) for n, m in models.items()}
            for way, name in [*calls] if texts == 1 else ():
                if name == GPT2:
                    what = f"C={width}, a prompt of {T:,}, {name}, graph"
                    yield f"{what}: while one is captured it builds a mask, which is slower"
                    continue
                try:
                    again, out = capture(calls[way, name])
                    out.zero_()
                    prompt.copy_(prompt.roll(1, dims=1))  # the graph must read it anew
                    again()
                    assert difference(out, calls[way, name]()) < TOLERANCE, "other logits"
                    calls["graph", name] = again
                except Exception as error:
                    yield brief(f"C={width}, a prompt of {T:,}, {name}, graph", error)
            seconds = interleave({key: (call, times) for key, call in calls.items()}, run.rounds)
            for way, name in calls:
                cache = read_prompt(models[name], prompt[:1])
                yield {
                    "C": width, "model": name, "way": way, "prompt": T, "texts": texts,
                    "parameters": num_params(models[name]),
                    **timed(seconds[way, name], seconds.get((way, GPT))),
                    "cache_bytes_a_token": base.cache_bytes(cache) // T,
                }  # fmt: skip


def read_texts(model: nn.Module, texts: Tensor) -> Tensor:
    """The logits of what follows each text (B, T), read into a new cache."""
    return base.step(model, texts, base.new_cache(model, *texts.shape))


LARGE_DECODED, NEAR = (768, 12), 1024  # width and heads; tokens behind which one is decoded


def measure_decode(run: Run) -> Rows:
    large, small = (64, 2) if run.quick else LARGE_DECODED, (384, 6)
    (near, far), many = ((32, 64), 4) if run.quick else ((NEAR, 8192), 64)
    yield from compile_all(run, "decode")
    yield from decode_eagerly(run, *large, near, many)
    yield from decode_in_ways(run, *large, near, 1, COMPILED["decode"][: 1 if run.quick else 4])
    if not run.quick:
        yield from decode_eagerly(run, *small, near, many)
        yield from decode_in_ways(run, *large, near, many)
        yield from decode_in_ways(run, *small, near, 1)
        yield from decode_eagerly(run, *large, far, many)
        yield from decode_eagerly(run, *small, far, many)


@torch.inference_mode()
def decode_eagerly(run: Run, width: int, heads: int, T: int, many: int) -> Rows:
    if run.spent(12):
        yield f"C={width}, behind {T:,}, eager: the budget is spent"
        return
    models, prompt = build_all((LEAN, GPT, GQA, GPT2), width, heads), random_ids(1, T).to(DEVICE)

    def decode(model: nn.Module, token: Tensor, past: Cache | DynamicCache) -> None:
        base.step(model, token, past)
        if isinstance(past, Cache):  # the same position again and again
            past.length -= 1
        else:
            past.crop(-1)

    for texts in (1, many):
        token = torch.zeros(texts, 1, dtype=torch.long, device=DEVICE)
        try:
            tasks = {}
            for name, model in models.items():
                past = read_prompt(model, prompt, texts, room=64)
                tasks[name] = (partial(decode, model, token, past), 2 if run.quick else 16)
            seconds = interleave(tasks, run.rounds)
        except torch.OutOfMemoryError as error:
            yield brief(f"C={width}, {texts} texts behind {T:,}", error)
            return
        for name, model in models.items():
            row = {"C": width, "behind": T, "texts": texts, "model": name, "way": "eager"}
            row["parameters"] = num_params(model)
            yield row | timed(seconds[name], seconds[GPT])


def capture(call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """What repeats the call as one CUDA graph, and where its result is then. On a CPU it calls."""
    if not CUDA:
        out = call().clone()
        return lambda: out.copy_(call()), out
    synchronize()
    with torch.cuda.stream(capture_stream()):
        for _ in range(3):
            call()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture_stream()):
        out = call()
    return (lambda inputs=call: graph.replay()), out  # the graph reads the memory of `inputs`


def find_way(
    model: ParallelEncoderDecoder, past: Cache, T: int, way: str
) -> tuple[Callable[[], Any], float, float | None]:
    """What decodes one token behind T others, the error of its logits, and seconds to compile."""
    token = torch.zeros(past.batch, 1, dtype=torch.long, device=DEVICE)
    fixed = way in ("eager, no_grad", "graph, fixed length")
    length = T if fixed else torch.full((), T, device=DEVICE)
    take, is_compiled = type(model).step, way.startswith("compiled")
    if is_compiled:  # as compile_step, without arguments that torch 2.11 does not know
        take = torch.compile(take, fullgraph=True, dynamic=False, backend=BACKEND)

    def call() -> Tensor:
        past.length = length  # `stacks` puts another one in its place
        return take(model, token, past)

    start = time.perf_counter()
    call()
    synchronize()
    compile_seconds = time.perf_counter() - start if is_compiled else None
    again, out = capture(call) if "graph" in way else (call, None)
    # The logits must be those of the usual step, for other tokens and, unless fixed, lengths.
    error = 0.0
    for position, value in ((T, 1), (T, 2)) if fixed else ((T - 5, 1), (T, 2)):
        token.fill_(value)
        past.length = position
        d = ParallelEncoderDecoder.stacks(model, token, past, last=True).d[-1]
        expected = F.linear(model.ln_out(d), model.tok_emb.weight)
        if not fixed:
            length.fill_(position)
        found = again()
        error = max(error, difference(found if out is None else out, expected))
    assert error < TOLERANCE, f"the logits differ by {error:.3f} of the largest"
    return again, error, compile_seconds


@torch.no_grad()  # in inference_mode the caches would be tensors of another kind
def decode_in_ways(
    run: Run, width: int, heads: int, T: int, texts: int, compiled: tuple[str, ...] = ()
) -> Rows:
    if run.spent(12):
        yield f"C={width}, {texts} texts behind {T:,}, graphs: the budget is spent"
        return
    torch._dynamo.config.recompile_limit = 64
    models = build_all((LEAN, GPT, GQA, *WAYS, SERIAL), width, heads)
    prompt, slowest = random_ids(1, T).to(DEVICE), 8.0  # seconds, of compiling
    caches = {name: read_prompt(model, prompt, texts, room=64) for name, model in models.items()}
    ways = ("eager, no_grad", "graph, fixed length", "graph")
    simple = [(way, name) for way in ways for name in models]
    for turn in (simple, [(w, n) for n in compiled for w in ("compiled", "compiled, graph")]):
        found, times = {}, {"eager, no_grad": 25, "compiled": 50}
        for way, name in turn:
            what = f"C={width}, {texts} texts behind {T:,}, {name}, {way}"
            if run.spent((1.3 * slowest if way == "compiled" else 2) + 4):
                yield f"{what}: the budget is spent"
            elif way == "compiled, graph" and ("compiled", name) not in found:
                yield f"{what}: left out, as without the graph"
            else:
                try:
                    found[way, name] = find_way(models[name], caches[name], T, way)
                    slowest = max(slowest, found[way, name][2] or 0)
                except Exception as error:
                    yield brief(what, error)
        tasks = {
            key: (again, 2 if run.quick else times.get(key[0], 200))
            for key, (again, _, _) in found.items()
        }
        seconds = interleave(tasks, run.rounds)
        for (way, name), (_, error, compile_seconds) in found.items():
            yield {
                "C": width, "behind": T, "texts": texts, "model": name, "way": way,
                "parameters": num_params(models[name]),
                **timed(seconds[way, name], seconds.get((way, GPT))),
                "error": error, "compile_seconds": compile_seconds,
            }  # fmt: skip


# Each part, and the columns that are printed of it with their formats.
PARTS: dict[str, tuple[Callable[[Run], Rows], dict[str, str]]] = {
    "preset": (measure_preset, {
        "preset": "", "parameters": ",", "loss": ".4f", "iterations": ",", "seconds": ".1f",
        "wall_seconds": ".1f", "ms": ".2f", "tokens_per_second": ",", "mfu": ".0%",
        "experts_on": ".1%",
    }),
    "step": (measure_step, {
        "C": "", "T": ",", "batch": "", "model": "", "how": "", "parameters": ",", "ms": ".2f",
        "tokens_per_second": ",.0f", "speed": ".3f", "share_of_gemm_peak": ".1%",
        "peak_memory_mib": ",.0f", "compile_seconds": ".0f",
    }),
    "prompt": (measure_prompt, {
        "C": "", "prompt": ",", "texts": "", "model": "", "way": "", "parameters": ",",
        "ms": ".2f", "speed": ".2f", "cache_bytes_a_token": ",",
    }),
    "decode": (measure_decode, {
        "C": "", "behind": ",", "texts": "", "model": "", "way": "", "parameters": ",",
        "ms": ".3f", "speed": ".2f", "error": ".4f", "compile_seconds": ".0f",
    }),
}  # fmt: skip


# -----------------------------------------------------------------------------
# the command line


def about(quick: bool) -> dict:
    """What a part was measured with, and on what."""
    commit = None
    if (ROOT / ".git").exists():
        with suppress(OSError):  # there is no git
            git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
            commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    source = torch.ones(2**20 if quick else 2**28, device=DEVICE)
    target = torch.empty_like(source)
    copying = min(interleave({"": (lambda: target.copy_(source), 10)}, 4)[""])
    return {
        "commit": commit or None, "gpu": torch.cuda.get_device_name() if CUDA else None,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "gemm_peak": gemm_peak(DEVICE), "memory_bandwidth": 2 * source.nbytes / copying,
    }  # fmt: skip


def measure_part(part: str, path: str, deadline: str, *quick: str) -> None:
    """In a process of its own: prints the rows, and appends them to a file, a line each."""
    if not CUDA:
        torch.set_num_threads(1)
    measure, columns = PARTS[part]
    run = Run(True, float(deadline), rounds=2) if quick else Run(False, float(deadline))
    with open(path, "w", encoding="utf-8") as file:
        here = about(run.quick)
        print(json.dumps(here), file=file, flush=True)
        print(f"\n{part}: {here['gpu']}, GEMM {here['gemm_peak'] / 1e12:.1f} TFLOP/s, "
              f"memory {here['memory_bandwidth'] / 1e9:.0f} GB/s")  # fmt: skip
        print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        for row in measure(run):
            print(json.dumps(row), file=file, flush=True)
            if isinstance(row, dict):
                values = ((row.get(name), spec) for name, spec in columns.items())
                cells = ("" if value is None else f"{value:{spec}}" for value, spec in values)
                print(f"| {' | '.join(cells)} |", flush=True)


def run_part(part: str, deadline: float, quick: bool) -> dict:
    """What a process measures of it, and how it failed, if it did."""
    start, failed, limit = time.time(), None, max(1.0, deadline + GRACE - time.time())
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder, "rows"), Path(folder, "stderr")
        command = [sys.executable, __file__, "--part", part, str(path), str(deadline)]
        command += ["quick"] if quick else []
        with open(said, "w", encoding="utf-8") as stderr:
            process = subprocess.Popen(command, stderr=stderr, start_new_session=True)
            try:
                status = process.wait(limit)
                failed = f"status {status}" if status else None
            except subprocess.TimeoutExpired:
                failed = f"stopped after {limit:.0f} s"
            finally:  # with all that it started
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if failed:
            text = said.read_text(encoding="utf-8", errors="replace")
            failed = "\n".join([failed, *text.splitlines()[-15:]])
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    here, *rows = [json.loads(line) for line in lines] or [{}]
    return here | {
        "wall_seconds": time.time() - start, "failed": failed,
        "left_out": [row for row in rows if isinstance(row, str)],
        "rows": [row for row in rows if isinstance(row, dict)],
    }  # fmt: skip


def main(argv: list[str]) -> None:
    options = [arg for arg in argv if arg.startswith("--")]
    asked, quick = [arg for arg in argv if arg not in options], "--quick" in options
    paths = [Path(arg.removeprefix("--out=")) for arg in options if arg.startswith("--out=")]
    if len(paths) + quick != len(options) or not set(asked) <= set(PARTS):
        sys.exit(f"bench_gpu.py [{'] ['.join(PARTS)}] [--quick] [--out=FILE]")
    if not CUDA and not quick:
        sys.exit("there is no CUDA GPU; --quick is a smoke test that needs none")
    out = [*([] if quick else [RESULTS]), *paths][-1:]
    results = json.loads(out[0].read_text(encoding="utf-8")) if out and out[0].exists() else {}
    deadline, failed = START, False
    for part in asked or PARTS:
        deadline += BUDGETS[part]
        results[part] = result = run_part(part, deadline, quick)
        for line in result["left_out"]:
            print(f"left out: {line}")
        if result["failed"]:
            failed = True
            print(f"{part} failed: {result['failed']}")
        print(f"\n{part}: {result['wall_seconds']:.0f} s", flush=True)
        for path in out:
            kept = {name: results[name] for name in PARTS if name in results}
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        measure_part(*sys.argv[2:])
    elif sys.argv[1:2] == ["--compile"]:
        compile_one(*sys.argv[2:])
    else:
        main(sys.argv[1:])

"""How fast text is drawn: with and without the cache, beside Hugging Face GPT-2, and by experts.

    pip install transformers
    python experiments/bench_inference.py        about twenty minutes on two cores

Prints three tables and writes experiments/bench_inference.json. What is compared takes turns in
random order, so that all meets the same noise; medians of five rounds, on two threads, in float32,
with weights as they start. All draw from all tokens at temperature 1.

Ours draws by inference.py, as sample.py does, or, where the table says so, by model.generate alone.

Texts: 500 characters by the CPU preset's model, its experts included, and by GPT-2s of as many
parameters: with as many blocks (4 layers), and with the 3 layers of the decoder-only preset. GPT-2
reads no more than its positions, hence 512 of them; ours has a block of 96, which moves as the text
grows, or of 512 as well. One by one is one text with `use_cache=False`, times the number of texts.
GPT-2 draws by `generate`, as users call it, or by the shortest loop around its model. Compiled,
ours is `sample.py --compile=True`, and GPT-2 that loop with torch.compile and a static cache; what
compiling takes is not in it. It is printed, and is less where torch has compiled the same before.

Sizes: tokens a second while decoding, behind a prompt of half a block; the prompt's own time is not
in it. Ours is parallel (lateral, without decoder self-attention), as the presets are, with as many
parameters and blocks as the GPT-2. Memory is what reading the prompt and drawing add to a process
at their peak (Linux). Without a cache fewer tokens are drawn, at the cheap end of the block.

Experts: masks drawn at random with a given number of 16 experts on, sparse against the same masks
multiplied; drawing the masks is in both. Ideal is the speed-up if time went with the bytes of
weights that are read (one token at once), or with the products computed (many).
"""

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import memory, num_params  # noqa: E402

import inference  # noqa: E402
from inference import Inference  # noqa: E402
from mfu import gemm_peak  # noqa: E402
from model import Cache, FeedForward, ModelConfig, ParallelEncoderDecoder  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
THREADS, ROUNDS = 2, 6  # the first round is not counted
OURS, UNCACHED, GPT2 = "ours", "ours, no cache", "Hugging Face GPT-2"
Drawer = Inference | ParallelEncoderDecoder | GPT2LMHeadModel
LAYER = dict(lateral=True, decoder_self_attention=False)


class Size(NamedTuple):
    block_size: int
    vocab_size: int
    gpt2: dict[str, int]
    ours: dict[str, int]
    tokens: int  # decoded in a round
    uncached: int  # the same without a cache


SIZES = {
    "0.8 M": Size(64, 65, dict(n_layer=4, n_head=4, n_embd=128),
                  dict(n_layer=2, n_head=4, n_embd=124), tokens=31, uncached=16),
    "11 M": Size(256, 65, dict(n_layer=6, n_head=6, n_embd=384),
                 dict(n_layer=3, n_head=6, n_embd=372), tokens=64, uncached=4),
    "100 M": Size(1024, 50257, dict(n_layer=12, n_head=12, n_embd=768),
                  dict(n_layer=6, n_head=12, n_embd=744), tokens=16, uncached=2),
}  # fmt: skip


def build_gpt2(vocab_size: int, positions: int, **sizes: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ids = dict(bos_token_id=0, eos_token_id=None, pad_token_id=0)
    sizes |= dict(vocab_size=vocab_size, n_positions=positions)
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids, attn_implementation="sdpa")).eval()


def build_ours(**fields: Any) -> ParallelEncoderDecoder:
    torch.manual_seed(0)
    return ParallelEncoderDecoder(ModelConfig(**LAYER, **fields)).eval()


class Clock:
    """When tokens came, by the call; `put` and `end` make it a streamer for Hugging Face."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, _: Any = None) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_seconds(model: Drawer, prompt: Tensor, tokens: int, cached: bool) -> float:
    """The seconds that drawing `tokens` tokens takes from the moment the prompt is read."""
    clock = Clock()
    if not isinstance(model, GPT2LMHeadModel):
        for _ in model.stream(prompt, tokens + 1, use_cache=cached):
            clock.put()
    else:
        how = dict(do_sample=True, top_k=0, max_new_tokens=tokens + 1, streamer=clock)
        with torch.inference_mode():
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    return clock.times[-1] - clock.times[-1 - tokens]


def of(drawer: Drawer) -> torch.nn.Module:
    """The model that has the parameters."""
    return drawer.model if isinstance(drawer, Inference) else drawer


def bare_loop(model: Callable[..., Any], idx: Tensor, tokens: int, past: Any = None) -> Tensor:
    """The least that draws text from a GPT-2 with its cache, which `past` may be."""
    drawn = []
    for k in range(tokens):
        here = torch.full((1, 1), k)
        out = model(idx, past_key_values=past, use_cache=True, position_ids=here)
        idx, past = out.logits[:, -1].softmax(dim=-1).multinomial(1), out.past_key_values
        drawn.append(idx)
    return torch.cat(drawn, dim=1)


def static(model: GPT2LMHeadModel) -> Callable[[Tensor, int], Tensor]:
    """The same, compiled as ours is, as a function of the tokens and how many to draw."""
    options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    how = dict(fullgraph=True, dynamic=False, isolate_recompiles=True, options=options)
    step, c = torch.compile(model.forward, **how), model.config

    def loop(idx: Tensor, tokens: int) -> Tensor:
        cache = StaticCache(config=c, max_cache_len=c.n_positions)
        sizes = len(idx), c.n_head, c.n_embd // c.n_head
        cache.early_initialization(*sizes, dtype=torch.float32, device=idx.device)
        return bare_loop(step, idx, tokens, cache)

    return loop


def take_turns(tasks: dict[str, Callable[[], float | None]]) -> dict[str, list[float]]:
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


def measure_texts() -> list[dict]:
    """Rows of the first table."""
    preset = dict(vocab_size=65, n_layer=2, n_head=2, n_embd=80, n_expert=16)
    ours = {n: build_ours(block_size=n, **preset) for n in (96, 512)}
    peers = {
        f"{GPT2}, 4 layers": build_gpt2(65, 512, n_layer=4, n_head=2, n_embd=84),
        f"{GPT2}, 3 layers": build_gpt2(65, 512, n_layer=3, n_head=3, n_embd=96),
    }
    rows, one_by_one, zero = [], "ours, one by one, no cache", torch.zeros(1, 1, dtype=torch.long)

    @torch.inference_mode()
    def draw(model: Drawer, batch: int, bare: Callable | None = None, cached: bool = True) -> None:
        idx = zero.repeat(batch, 1)
        if not isinstance(model, GPT2LMHeadModel):
            model.generate(idx, 500, use_cache=cached)
        elif bare:
            bare(idx, 500)
        else:
            how = dict(do_sample=True, top_k=0, max_new_tokens=500)
            model.generate(idx, attention_mask=torch.ones_like(idx), **how)

    for batch in (10, 1):
        models = {f"ours, block {n}": Inference(m) for n, m in ours.items()} | peers
        models["ours, model.generate"] = ours[96]
        for n, one in ours.items():
            models[f"ours, block {n}, compiled"] = Inference(one, compile=True)
        tasks = {name: partial(draw, model, batch) for name, model in models.items()}
        for name, peer in peers.items():
            loops = {"bare loop": partial(bare_loop, peer), "compiled": static(peer)}
            drawn = []
            for loop in loops.values():
                with torch.inference_mode(), torch.random.fork_rng():
                    torch.manual_seed(0)
                    drawn.append(loop(zero.repeat(batch, 1), 20))
            assert torch.equal(*drawn), "compiled, GPT-2 draws another text"
            for how, loop in loops.items():
                models[f"{name}, {how}"] = peer
                tasks[f"{name}, {how}"] = partial(draw, peer, batch, bare=loop)
        for name in [name for name in tasks if "compiled" in name]:
            start = time.perf_counter()
            tasks[name]()
            print(f"{name}, {batch} at once: {time.perf_counter() - start:.0f} s for the first 500")
        tasks[one_by_one] = partial(draw, ours[96], 1, cached=False)
        models[one_by_one] = ours[96]
        seconds = take_turns(tasks)
        seconds[one_by_one] = [s * batch for s in seconds[one_by_one]]
        for name, of_model in seconds.items():
            rows.append({
                "model": name, "batch": batch, "parameters": num_params(of(models[name])),
                "tokens_per_second": batch * 500 / statistics.median(of_model),
                "ours_is_faster": ratio(of_model, seconds["ours, block 96"]),
                "compiled_is_faster": ratio(of_model, seconds["ours, block 96, compiled"]),
                "seconds": of_model,
            })  # fmt: skip
    return rows


def tasks_of_size(size: Size, batch: int, which: str = "") -> dict[str, tuple]:
    """What the second table compares: (model, prompt, tokens, cached), built as asked for."""
    shape, generator = (batch, size.block_size // 2), torch.Generator().manual_seed(0)
    prompt, tasks = torch.randint(size.vocab_size, shape, generator=generator), {}
    if which != GPT2:
        ours = build_ours(block_size=size.block_size, vocab_size=size.vocab_size, **size.ours)
        tasks[OURS] = Inference(ours), prompt, size.tokens, True
        tasks[UNCACHED] = ours, prompt, size.uncached, False
    if which in ("", GPT2):
        gpt2 = build_gpt2(size.vocab_size, size.block_size, **size.gpt2)
        tasks[GPT2] = gpt2, prompt, size.tokens, True
    return tasks


def measure_size(name: str) -> list[dict]:
    """Rows of the second table."""
    size, rows = SIZES[name], []
    for batch in (1, 10):
        tasks = tasks_of_size(size, batch)
        seconds = take_turns({n: partial(decode_seconds, *t) for n, t in tasks.items()})
        a_token = {n: [s / tasks[n][2] for s in of_task] for n, of_task in seconds.items()}
        for who, of_who in a_token.items():
            rows.append({
                "size": name, "batch": batch, "model": who,
                "parameters": num_params(of(tasks[who][0])),
                "tokens_per_second": batch / statistics.median(of_who),
                "times_gpt2": ratio(a_token[GPT2], of_who),
                "peak_memory_mib": peak_memory(name, str(batch), who),
                "seconds_a_token": of_who,
            })  # fmt: skip
    return rows


def peak_memory(*which: str) -> float | None:
    """What a process of its own measures with --memory."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, __file__, "--memory", *which]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def memory_bandwidth() -> float:
    """Bytes a second that reading a large tensor reaches."""
    big = torch.ones(2**26)
    return big.numel() * 4 / min(take_turns({"": lambda: big.sum() and None})[""])


def measure_experts(name: str, bandwidth: float) -> list[dict]:
    """Rows of the third table."""
    size, G = SIZES[name], 16
    fields = dict(block_size=size.block_size, vocab_size=size.vocab_size, n_expert=G)
    ours = build_ours(**fields, **size.ours)
    fast = Inference(ours)
    blocks = [m for m in ours.modules() if isinstance(m, FeedForward)]
    in_experts = sum(m.w1.weight.numel() + m.w2.weight.numel() for m in blocks)
    generator = torch.Generator().manual_seed(0)
    experts_off, sparse_pays, rows = inference.experts_off, inference.sparse_pays, []
    half = size.block_size // 2

    def run(on: int, sparse: bool | None, batch: int, prefill: bool, decoded: int) -> float:
        def draw_off(A: Tensor) -> Tensor:
            return torch.rand(A.shape, generator=generator).argsort(dim=-1) >= on

        inference.experts_off = draw_off
        inference.sparse_pays = sparse_pays if sparse is None else lambda *_: sparse
        try:
            idx = torch.zeros(batch, half, dtype=torch.long)
            if not prefill:
                return decode_seconds(fast, idx, decoded, True)
            with torch.inference_mode():
                start = time.perf_counter()
                fast(idx, Cache(batch, half))
                return time.perf_counter() - start
        finally:
            inference.experts_off, inference.sparse_pays = experts_off, sparse_pays

    for batch, prefill in ((1, False), (10, False), (1, True)):
        decoded = min(64, half - 1) if batch == 1 else size.tokens
        tasks = {
            (on, sparse): partial(run, on, sparse, batch, prefill, decoded)
            for on in (16, 8, 4, 2) for sparse in (False, True, None)
        }  # fmt: skip
        seconds = take_turns(tasks)
        for on in (16, 8, 4, 2):
            dense, sparse, rule = (seconds[on, way] for way in (False, True, None))
            # Of a batch, an expert is read where one token at least has it on.
            share = on / G if prefill else 1 - (1 - on / G) ** batch
            weights = ours.num_params() - (1 - share) * in_experts
            of_weights = ours.num_params() / weights
            if prefill:  # of the output layer the last position alone
                layers = ours.num_params() - ours.tok_emb.weight.numel()
                of_weights = layers / (layers - (1 - share) * in_experts)
            a_step = statistics.median(sparse) / (1 if prefill else decoded)
            rows.append({
                "size": name, "on": on, "of": G, "batch": batch,
                "tokens_at_once": half if prefill else batch,
                "dense_ms": statistics.median(dense) * 1e3 / (1 if prefill else decoded),
                "sparse_ms": a_step * 1e3,
                "speed_up": ratio(dense, sparse), "ideal": of_weights,
                "speed_up_by_rule": ratio(dense, rule),
                "share_of_bandwidth": None if prefill else 4 * weights / a_step / bandwidth,
                "seconds": {"dense": dense, "sparse": sparse, "by_rule": rule},
            })  # fmt: skip
    return rows


def main() -> None:
    bandwidth, peak = memory_bandwidth(), gemm_peak("cpu")
    print(f"Memory {bandwidth / 1e9:.1f} GB/s, GEMM {peak / 1e9:.0f} GFLOP/s\n")
    versions = {name: version(name) for name in ("torch", "transformers")}
    results = {"threads": THREADS, "versions": versions}
    results |= {"memory_bandwidth": bandwidth, "gemm_peak": peak}

    results["texts"] = measure_texts()
    print("| texts of 500 characters | parameters | texts | tokens/s | ours to it | compiled |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in results["texts"]:
        print(
            f"| {row['model']} | {row['parameters']:,} | {row['batch']} "
            f"| {row['tokens_per_second']:,.0f} | {row['ours_is_faster']:.2f} x "
            f"| {row['compiled_is_faster']:.2f} x |",
            flush=True,
        )

    print("\n| size | model | parameters | batch | tokens/s | to GPT-2 | MiB |")
    print(f"| --- | --- {'| ---: ' * 5}|")
    results["sizes"] = []
    for name in SIZES:
        for row in measure_size(name):
            results["sizes"].append(row)
            print(
                f"| {name} | {row['model']} | {row['parameters']:,} | {row['batch']} "
                f"| {row['tokens_per_second']:,.1f} | {row['times_gpt2']:.2f} x "
                f"| {row['peak_memory_mib'] or float('nan'):.0f} |", flush=True,
            )  # fmt: skip

    print("\n| size | tokens at once | on | dense ms | sparse ms | speed-up | ideal | by the rule "
          f"| of bandwidth |\n| --- {'| ---: ' * 8}|")  # fmt: skip
    results["experts"] = []
    for name in list(SIZES)[1:]:  # of a small model all experts are computed
        for row in measure_experts(name, bandwidth):
            results["experts"].append(row)
            share = row["share_of_bandwidth"]
            print(
                f"| {name} | {row['tokens_at_once']} | {row['on']} of 16 | {row['dense_ms']:.2f} "
                f"| {row['sparse_ms']:.2f} | {row['speed_up']:.2f} | {row['ideal']:.2f} "
                f"| {row['speed_up_by_rule']:.2f} | {f'{share:.0%}' if share else ''} |",
                flush=True,
            )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--memory"]:
        size_name, rows_of_batch, who = sys.argv[2:]
        model, prompt, tokens, cached = tasks_of_size(SIZES[size_name], int(rows_of_batch), who)[
            who
        ]
        decode_seconds(model, prompt[:1, :1], 1, cached)  # loads torch's code
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        before = memory("VmRSS")
        decode_seconds(model, prompt, tokens, cached)
        print(memory("VmHWM") - before)
    else:
        main()

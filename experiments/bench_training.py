"""How fast a training step is, beside the decoder-only baseline and two other libraries.

    pip install transformers x-transformers
    python experiments/bench_training.py        about ten minutes on two cores

Prints a table per size and writes experiments/bench_training.json. All models have one width and
as many heads, learn from one batch in float32 and take turns, so that all meet the same noise.
Speed is relative to the decoder-only model. L lean layers have matrices of (22 L + 2) C², L
canonical ones (28 L + 1) C², D decoder-only ones 12 D C²: 7 lean layers are 13 decoder-only ones.
Where they do not match, read speed x parameters. The share of the GEMM peak is of the peak measured
right before each turn, since that of a shared machine changes from minute to minute.

The peers run with fused attention and without dropout; x-transformers without biases and with a
tied output, as ours. GPT-2 is there as it comes, with its own GELU of eight operations, and in its
fastest setting, with the exact GELU in one call. It always has biases, and shifts its labels
itself: it computes all T positions, T - 1 of them count in its loss. Memory is what three steps
add, at their peak, to a process that has loaded all code, in MiB (Linux only).
"""

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from x_transformers import Decoder, TransformerWrapper

sys.path.insert(0, str(Path(__file__).parent.parent))
from measuring import memory, num_params, step_flops  # noqa: E402

from model import ModelConfig, ParallelEncoderDecoder  # noqa: E402
from muon import configure_optimizers  # noqa: E402
from runtime import start_processes  # noqa: E402
from view import gemm_peak  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
V, ROUNDS, THREADS = 65, 16, 2  # the first round is not counted


class Size(NamedTuple):
    C: int  # width
    T: int  # tokens in a sequence
    B: int  # sequences in a batch
    heads: int
    steps: int  # in a round
    depth: int  # decoder-only layers


SIZES = {
    "C=96": Size(96, 256, 6, 3, steps=4, depth=4),  # the CPU presets' size
    "C=128": Size(128, 64, 12, 2, steps=4, depth=13),
    "C=384": Size(384, 256, 4, 6, steps=1, depth=13),
}
NEW = dict(position_embedding="rotary", token_shift=True)
LEAN = NEW | dict(lateral=True, decoder_self_attention=False, shared_kv=True)
EXPERTS = dict(n_expert=16, router_input="encoder", l1_norm="squared", l1_weight=0.05)
BASELINE, X = "decoder-only", "x-transformers"
GPT2 = {"Hugging Face GPT-2": "gelu_new", "Hugging Face GPT-2, exact GELU": "gelu"}
OURS = {  # the rest of the names are peers
    "lean": LEAN,
    "lean, 16 experts": LEAN | EXPERTS,
    "canonical": NEW,
    BASELINE: NEW | dict(arch="decoder_only"),
    "lean, Muon": LEAN,
    f"{BASELINE}, Muon": NEW | dict(arch="decoder_only"),
}
NAMES = (*OURS, *GPT2, X)


def n_layer(name: str, size: Size) -> int:
    """The layers that have as many matrices as `depth` decoder-only ones, rounded."""
    if name.startswith("lean"):
        return round((12 * size.depth - 2) / 22)
    return round((12 * size.depth - 1) / 28) if name == "canonical" else size.depth


def build(name: str, size: Size) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The model, and its loss as a function of inputs and targets (B, T)."""
    C, T, heads, depth = size.C, size.T, size.heads, n_layer(name, size)
    if name in GPT2:
        sizes = dict(vocab_size=V, n_positions=T, n_embd=C, n_layer=depth, n_head=heads)
        no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        how = dict(attn_implementation="sdpa", use_cache=False, activation_function=GPT2[name])
        ids = dict(bos_token_id=0, eos_token_id=0)  # its own are beyond V
        gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **how, **ids))
        gpt2.loss_type = "ForCausalLM"  # its default, of which it warns where it is not set
        return gpt2, lambda x, y: gpt2(x, labels=x).loss
    if name == X:
        attention = dict(heads=heads, attn_dim_head=C // heads, attn_flash=True)
        layers = Decoder(dim=C, depth=depth, ff_no_bias=True, **attention)
        sizes = dict(num_tokens=V, max_seq_len=T)
        wrapper = TransformerWrapper(**sizes, attn_layers=layers, tie_embedding=True)
        return wrapper, lambda x, y: F.cross_entropy(wrapper(x).flatten(0, 1), y.flatten())
    sizes = dict(vocab_size=V, block_size=T, n_embd=C, n_layer=depth, n_head=heads)
    ours = ParallelEncoderDecoder(ModelConfig(**sizes, **OURS[name]))
    return ours, lambda x, y: ours(x, y).loss


def stepper(name: str, size: Size) -> tuple[nn.Module, Callable[[], None]]:
    """A new model, and a function that trains it for one step on a batch of random tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(V, (size.B, size.T + 1))
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    model, loss = build(name, size)
    adamw = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    optimizers = configure_optimizers(model, adamw, {} if "Muon" in name else None)
    params = list(model.parameters())

    def step() -> None:
        loss(x, y).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return model, step


def peak_memory(name: str, size: str) -> float | None:
    """What a process of its own measures with --memory."""
    if sys.platform != "linux":
        return None
    command = [sys.executable, __file__, "--memory", name, size]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(size: Size) -> tuple[float, dict[str, dict]]:
    """The GEMM peak in FLOP/s, and what was measured of each model but the memory."""
    built = {name: stepper(name, size) for name in NAMES}
    seconds, peaks = {name: [] for name in NAMES}, {name: [] for name in NAMES}
    order = list(NAMES)
    for _ in range(ROUNDS):
        random.shuffle(order)  # no model always runs behind the same one
        for name in order:
            step = built[name][1]
            gemm_peak.cache_clear()
            peaks[name].append(gemm_peak("cpu"))
            start = time.perf_counter()
            for _ in range(size.steps):
                step()
            seconds[name].append((time.perf_counter() - start) / size.steps)
    rows, base = {}, num_params(built[BASELINE][0])
    for name, (model, _) in built.items():
        median = statistics.median(seconds[name][1:])
        achieved = [step_flops(model, size.C, size.T, size.B) / s for s in seconds[name][1:]]
        shares = [a / peak for a, peak in zip(achieved, peaks[name][1:], strict=True)]
        pairs = zip(seconds[BASELINE][1:], seconds[name][1:], strict=True)
        speed = statistics.median(baseline / own for baseline, own in pairs)
        rows[name] = {
            "layers": n_layer(name, size),
            "parameters": num_params(model),
            "ms": median * 1000,
            "tokens_per_second": size.B * size.T / median,
            "speed": speed,
            "speed_x_parameters": speed * num_params(model) / base,
            "share_of_gemm_peak": statistics.median(shares),
            "ms_of_rounds": [s * 1000 for s in seconds[name]],
            "gemm_peak_of_rounds": peaks[name],
        }
    return statistics.median(sum((p[1:] for p in peaks.values()), [])), rows


def main() -> None:
    packages = ("torch", "transformers", "x-transformers")
    results = {"threads": THREADS, "versions": {name: version(name) for name in packages}}
    for key, size in SIZES.items():
        peak, rows = measure(size)
        for name, row in rows.items():
            row["peak_memory_mib"] = peak_memory(name, key)
        results[key] = {**size._asdict(), "gemm_peak": peak, "models": rows}
        print(f"\n{key}, T={size.T}, batch {size.B}, GEMM peak {peak / 1e9:.0f} GFLOP/s\n")
        columns = "model | layers | parameters | ms a step | tokens/s | speed | speed x parameters"
        print(f"| {columns} | of GEMM peak | MiB |\n| --- {'| ---: ' * 8}|")
        for name, row in rows.items():
            print(
                f"| {name} | {row['layers']} | {row['parameters']:,} | {row['ms']:.1f} "
                f"| {row['tokens_per_second']:,.0f} | {row['speed']:.3f} "
                f"| {row['speed_x_parameters']:.3f} | {row['share_of_gemm_peak']:.0%} "
                f"| {row['peak_memory_mib'] or float('nan'):.0f} |",
                flush=True,
            )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    start_processes("auto", "cpu")  # as train.py: keeps freed memory for the next step
    torch.set_num_threads(THREADS)
    if sys.argv[1:2] == ["--memory"]:
        stepper(sys.argv[2], Size(12, 8, 1, 2, steps=1, depth=2))[1]()  # loads torch's code, 20 MiB
        before = memory("VmRSS")
        _, train_step = stepper(sys.argv[2], SIZES[sys.argv[3]])
        for _ in range(3):
            train_step()
        print(memory("VmHWM") - before)
    else:
        main()

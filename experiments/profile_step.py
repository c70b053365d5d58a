"""Where the time of a training step goes, on this machine.

    OMP_NUM_THREADS=2 python experiments/profile_step.py [config/shakespeare_char.py --key=value]

Prints the parts of a step in milliseconds, medians of 100 steps, and the share of each kind of
operation in a step, by torch.profiler on one thread, where the times of operations add up.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from measuring import fields_of, settings_of  # noqa: E402

from model import ModelConfig, ParallelEncoderDecoder  # noqa: E402
from muon import configure_optimizers, grad_norm  # noqa: E402
from runtime import start_processes  # noqa: E402

PARTS = ("forward", "backward", "gradient norm", "AdamW", "Muon")
KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "attention": ("flash_attention", "scaled_dot"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "AdamW": ("adamw",),
}


def main(argv: list[str], steps: int = 100) -> None:
    given = settings_of(*argv)
    start_processes("auto", "cpu")  # as train.py: keeps freed memory for the next step
    model = ParallelEncoderDecoder(ModelConfig(**fields_of(given), vocab_size=65))
    adamw, muon = dict(lr=1e-3), dict(lr=1e-3, momentum=0.9, weight_decay=0.1)
    optimizers, params = configure_optimizers(model, adamw, muon), list(model.parameters())
    text = torch.randint(65, (given["batch_size"], given["block_size"] + 1))

    def step() -> list[float]:
        times = [time.perf_counter()]

        def lap() -> None:
            times.append(time.perf_counter())

        loss = model(text[:, :-1], text[:, 1:]).loss
        lap()
        loss.backward()
        lap()
        grad_norm(params)
        lap()
        for opt in optimizers:
            opt.step()
            lap()
        model.zero_grad(set_to_none=True)
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    seconds_of = [step() for _ in range(10 + steps)][10:]
    medians = [statistics.median(part) for part in zip(*seconds_of, strict=True)]
    print(f"{' '.join(argv)}: {model.num_params():,} parameters, {torch.get_num_threads()} threads")
    for name, seconds in zip((*PARTS, "a step"), (*medians, sum(medians)), strict=True):
        print(f"{name:16} {seconds * 1e3:6.2f} ms {seconds / sum(medians):5.0%}")

    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps // 5):
            step()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in events:
        name = event.key.removeprefix("aten::")
        kind = next((k for k, of in KINDS.items() if any(part in name for part in of)), "other")
        shares[kind] += event.self_cpu_time_total / total
    calls = sum(event.count for event in events if event.key.startswith("aten::")) // (steps // 5)
    print(", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    print(f"{calls:,} calls of torch's operations a step")


if __name__ == "__main__":
    main(sys.argv[1:] or ["config/shakespeare_char_dense.py"])

"""What the benchmarks measure alike."""

from pathlib import Path

from torch import nn


def num_params(model: nn.Module) -> int:
    """Parameters, the position embedding not counted; shared ones count once."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if "pos_emb" not in n and "wpe" not in n)


def step_flops(model: nn.Module, width: int, tokens: int, sequences: int) -> int:
    """Floating-point operations of a training step, counted as view.estimate_mfu does, also for
    models that are not ours."""
    attentions = sum(type(m).__name__.endswith("Attention") for m in model.modules())
    per_token = 6 * num_params(model) + 12 * attentions * width * tokens
    return per_token * sequences * tokens


def memory(field: str) -> float:
    """A field of this process's memory in MiB (Linux): VmRSS now, VmHWM at its peak.

    Not getrusage: its ru_maxrss starts a new process at the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

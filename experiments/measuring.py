"""What the benchmarks measure alike."""

from pathlib import Path

from torch import nn


def num_params(model: nn.Module) -> int:
    """Parameters, the position embedding not counted; shared ones count once."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if "pos_emb" not in n and "wpe" not in n)


def memory(field: str) -> float:
    """A field of this process's memory in MiB (Linux): VmRSS now, VmHWM at its peak.

    Not getrusage: its ru_maxrss starts a new process at the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

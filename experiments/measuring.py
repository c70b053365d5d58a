"""What the benchmarks share."""

import sys
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import configurator  # noqa: E402
from model import ModelConfig  # noqa: E402


def settings_of(*argv: str) -> dict[str, Any]:
    """The settings of `train.py config/... --key=value`, on a CPU if they name no device."""
    train = {"__file__": "train.py"}
    exec((ROOT / "train.py").read_text("utf-8").split("# " + "-" * 77)[1], train)
    try:
        return configurator.override(train, ["--device=cpu", *argv])
    finally:
        configurator.UNDO.close()  # what a script changes in its process


def fields_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that are fields of ModelConfig: all but `vocab_size`."""
    return {name: settings[name] for name in vars(ModelConfig()) if name in settings}


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

"""What learned dropout, and its routers alone, add to a training step.

python experiments/bench_experts.py          half a minute; medians of interleaved runs
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import ModelConfig, ParallelEncoderDecoder, Router  # noqa: E402

ROUNDS, STEPS = 12, 8  # the first round is not counted
SIZES = dict(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=128)
EXPERTS = dict(n_expert=16, l1_norm="squared", l1_weight=0.05)
VARIANTS = {
    "dense": {},
    "16 experts": EXPERTS,
    "16 experts, masks without routers": EXPERTS,
    "16 experts, router_input=embedding": {**EXPERTS, "router_input": "embedding"},
}


def constant_mask(router: Router, x: torch.Tensor) -> torch.Tensor:
    """In place of Router.forward: a mask that reads nothing but the shift."""
    return (0.5 * torch.cos(router.shift + 0.3) + 0.5).expand(*x.shape[:2], -1)


if __name__ == "__main__":
    torch.set_num_threads(2)
    tokens = torch.randint(65, (12, 65))
    models = {
        name: ParallelEncoderDecoder(ModelConfig(**SIZES, **v)) for name, v in VARIANTS.items()
    }
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in models.items()}
    times = {name: [] for name in models}
    route = Router.forward
    for _ in range(ROUNDS):
        for name, model in models.items():
            Router.forward = constant_mask if "without" in name else route
            start = time.perf_counter()
            for _ in range(STEPS):
                model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers[name].step()
                optimizers[name].zero_grad()
            times[name].append((time.perf_counter() - start) / STEPS * 1000)
    for name, model in models.items():
        ratios = [t / dense for t, dense in zip(times[name][1:], times["dense"][1:], strict=True)]
        ms, ratio = statistics.median(times[name][1:]), statistics.median(ratios)
        print(f"{name}: {model.num_params():,} parameters, {ms:.1f} ms, {ratio:.3f} of dense")

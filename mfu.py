"""How much of the device training uses: model FLOPs utilisation (PaLM, arXiv:2204.02311, B)."""

from functools import cache

import torch
from torch.utils.benchmark import Timer

from model import Attention, ParallelEncoderDecoder


def estimate_mfu(
    model: ParallelEncoderDecoder, fwdbwd_per_iter: float, dt: float, peak_flops: float = 0.0
) -> float:
    """The share of the peak that training reached, in [0, 1].

    `fwdbwd_per_iter` sequences of block_size tokens in `dt` seconds, against `peak_flops`
    floating-point operations a second; 0: what a GEMM reaches on this device. Counts 6 per weight
    and token, and 12 C T per attention and token.
    """
    C, T = model.config.n_embd, model.config.block_size
    attentions = sum(isinstance(m, Attention) for m in model.modules())  # routers are small
    flops = (6 * model.num_params() + 12 * attentions * C * T) * T * fwdbwd_per_iter
    return flops / dt / (peak_flops or gemm_peak(str(model.tok_emb.weight.device)))


@cache
def gemm_peak(device: str) -> float:
    """Floating-point operations a second of a large matrix product on this device, measured once.

    In bfloat16 on a CUDA device that has it, else in float32.
    """
    bfloat16 = "cuda" in device and torch.cuda.is_bf16_supported(including_emulation=False)
    n, dtype = (8192, torch.bfloat16) if bfloat16 else (1024, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.2).median

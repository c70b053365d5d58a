"""What the fork server of common.py has done once for all the processes that it starts: modules,
and the measured peak that mfu is a share of. Their samples at the end of a run are short."""

import contextlib

import tiktoken  # noqa: F401
import torch
import torch._dynamo  # any optimizer imports it, in 0.6 s
import torch.distributed.fsdp
import torch.utils.benchmark

torch.set_num_threads(1)
with contextlib.suppress(Exception):  # a test's own process then says it
    import view

    view.gemm_peak("cpu")
    view.SAMPLED = 30

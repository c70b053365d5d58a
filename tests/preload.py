"""What the fork server of common.py has done once for all the processes that it starts: modules,
and the measured peak that mfu is a share of."""

import torch
import torch._dynamo  # any optimizer imports it, in 0.6 s
import torch.distributed.fsdp
import torch.utils.benchmark

torch.set_num_threads(1)
import view  # noqa: E402

view.gemm_peak("cpu")

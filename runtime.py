"""What a run stands on: processes, device, lock, signals, errors in one line, and speed.
Nothing here knows of losses, schedules or optimizers."""

import ctypes
import errno
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer

from configurator import fail, lacks_memory, pick_device, pick_dtype
from model import Attention, DecoderLayer, EncoderLayer, ParallelEncoderDecoder

# What torchrun says of this process
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DDP, MASTER = "RANK" in os.environ, RANK == 0
UNWRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def start_processes(backend: str, device: str) -> str:
    """Joins the processes of torchrun, where there are any; the device of this one. The master
    speaks for all: the others' stdout goes nowhere."""
    handle_signals()  # until training starts Ctrl-C just ends it
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # keep freed memory up to 32 MB a piece: each step asks for the same again
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    device = pick_device(device)
    if DDP and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if DDP and device.startswith("mps"):
        device = "cpu"  # torch.distributed has no backend for MPS
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
        if ":" in device:
            torch.cuda.set_device(device)
    if DDP:
        nccl = "cpu:gloo,cuda:nccl"  # gloo beside it, since signals are agreed on without the GPU
        auto = nccl if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group({"auto": auto, "nccl": nccl, "gloo": "gloo"}[backend])
        except (RuntimeError, ValueError) as error:
            fail(f"backend={backend!r}: {str(error).splitlines()[0]}")
    if not MASTER:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def place(model: ParallelEncoderDecoder, device: str, fsdp: bool) -> None:
    """Moves the model to the device: all of it, or with `fsdp` the share of this process, layer by
    layer, so that no device ever has to hold the whole (arXiv:2304.11277)."""
    if not fsdp:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh  # these take a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # FSDP warns of modules that return views, as of keys and values; we never modify them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.split(":")[0], (WORLD_SIZE,))
    layers = [m for m in model.modules() if isinstance(m, EncoderLayer | DecoderLayer)]
    layers += model.key_value.values() if model.config.arch == "parallel" else []
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "expert_masks")


def agree(*values: float) -> list[float]:
    """The largest of each value over all processes, for which it waits."""
    largest = torch.tensor(values or [0.0], dtype=torch.float64)
    if DDP:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def leave(status: int) -> NoReturn:
    """Ends this process when all are here: the master may still be evaluating, or saving."""
    sys.stdout.flush()  # here, where it fails with one line
    if not DDP:
        sys.exit(status)
    if MASTER and "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(status)  # at a usual exit gloo's threads abort the process now and then


def end_run(message: str) -> NoReturn:
    """Ends this process, the master with the line; all come here, or lose the master and end."""
    try:
        if MASTER:
            fail(message)
    finally:
        if DDP:  # as in `leave`
            sys.stdout.flush()
            os._exit(2)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, `path` is written; where it cannot be, that is the end of the run."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter: torch.save
        end_run(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def report_errors(checkpoint: Path, resumes: bool) -> None:
    """From here on what is no fault of this program ends it with one line, not with a traceback. It
    says how to go on from `checkpoint`, if this run `resumes` it or has written it."""
    began = 0.0 if resumes else time.time()

    def on_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        reason = str(error).partition("\n")[0]
        if DDP and (issubclass(kind, dist.DistError) or "gloo" in reason):
            what = f"process {RANK} has lost another one"
        elif isinstance(error, OSError) and error.errno in UNWRITTEN:
            what = "its output cannot be written"
        elif lacks_memory(error):
            what = "not enough memory; lower --batch_size or --block_size"
        else:
            return sys.__excepthook__(kind, error, trace)
        try:
            if checkpoint.exists() and checkpoint.stat().st_mtime > began:
                what += f"; --init_from=resume goes on from {checkpoint}"
            fail(f"{what} ({reason})")
        finally:
            os._exit(1)  # a usual exit would wait for the others, or write once more

    sys.excepthook = on_error


def catch_signals() -> list[int]:
    """Makes Ctrl-C and SIGTERM requests to stop: the list gets their numbers. A second one ends
    a single process at once."""
    caught: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        caught.append(number)
        if not DDP:
            handle_signals()

    handle_signals(on_signal)
    return caught


def handle_signals(handler: Any = signal.SIG_DFL) -> None:
    """Sets the handler of Ctrl-C and SIGTERM; by default they end the process at once."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def command_to_resume() -> str:
    """The command that goes on with this run."""
    args = shlex.join([arg for arg in sys.argv if arg != "--init_from=resume"])
    start = f"torchrun --standalone --nproc_per_node={WORLD_SIZE}" if DDP else "python"
    if int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE)) < WORLD_SIZE:
        start = "torchrun (with the options as before)"
    return f"{start} {args} --init_from=resume"


def lock_folder(settings: dict[str, Any]) -> object:
    """Makes out_dir, where this run writes, and locks it for as long as the result lives: one run
    at a time. Where there are no such locks, as on Windows, two runs are not told apart."""
    folder, resumes = settings["out_dir"], settings["init_from"] == "resume"
    if not MASTER or settings["eval_only"] or (resumes and not os.path.exists(folder)):
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder, ".lock"), "w", encoding="utf-8")
    except OSError as error:
        fail(f"out_dir={folder!r}: cannot be used: {error.strerror}")
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"out_dir={folder!r}: another run is writing there; choose another --out_dir")
    return lock


def estimate_mfu(
    model: ParallelEncoderDecoder, fwdbwd_per_iter: float, dt: float, peak_flops: float = 0.0
) -> float:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv:2204.02311, B): `fwdbwd_per_iter` sequences of
    block_size in `dt` seconds, against `peak_flops` operations a second; 0: what a GEMM reaches.
    Counts 6 operations per weight and token, and 12 C T per attention and token."""
    C, T = model.config.n_embd, model.config.block_size
    attentions = sum(isinstance(m, Attention) for m in model.modules())  # routers are small
    flops = (6 * model.num_params() + 12 * attentions * C * T) * T * fwdbwd_per_iter
    return flops / dt / (peak_flops or gemm_peak(str(model.tok_emb.weight.device)))


@cache
def gemm_peak(device: str) -> float:
    """Floating-point operations a second of a large matrix product, measured once: in bfloat16 on a
    CUDA device that has it, else in float32."""
    bfloat16 = pick_dtype("auto", device) == "bfloat16"
    n, dtype = (8192, torch.bfloat16) if bfloat16 else (1024, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.2).median

"""What a run needs beneath it: processes, device, signals, one-line errors."""

import ctypes
import errno
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from configurator import UNDO, fail, lacks_memory, pick_device, to_nowhere
from model import DecoderLayer, EncoderLayer, ParallelEncoderDecoder

# What torchrun says of this process. It sets all of these, or it was not torchrun.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
said, RANK, WORLD_SIZE = {name: os.environ.get(name, "") for name in TORCHRUN}, 0, 1
if DDP := all(said.values()):
    numbers = [int(n) if n.isdecimal() else -1 for n in said.values()][:4]
    RANK, WORLD_SIZE = numbers[:2]
    if min(numbers) < 0 or RANK >= WORLD_SIZE or max(numbers) >= 2**31:
        fail(f"{said}: not as torchrun sets them; start with torchrun, or unset them")
MASTER = RANK == 0
# Ctrl-C, and what clusters, terminals that close, and limits of time send.
STOP_SIGNALS = "INT TERM HUP QUIT USR1 USR2 ALRM XCPU BREAK".split()
HANDLERS = ExitStack()  # gives the signals back to the handlers that they had before
UNWRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def start_processes(backend: str, device: str) -> str:
    """Joins torchrun's processes, if there are any; returns this one's device. Only the master's
    stdout is shown."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # keep freed memory up to 32 MB a piece: each step asks for the same again
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    UNDO.enter_context(torch.random.fork_rng(devices=[]))
    device = pick_device(device)
    if DDP and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if DDP and device.startswith("mps"):
        device = "cpu"  # torch.distributed has no backend for MPS
    if device.startswith("cuda"):
        UNDO.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("high")  # TF32
        if DDP:
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
    """The maximum of each value over all processes, for which it waits."""
    largest = torch.tensor(values or [0.0], dtype=torch.float64)
    if DDP:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def leave(status: int) -> NoReturn:
    """Ends this process when all have come here: the master may still be evaluating or saving."""
    UNDO.close()
    if not DDP:
        sys.exit(status)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(status)  # at a usual exit gloo's threads abort the process now and then


def end_run(message: str) -> NoReturn:
    """Ends every process that comes here, the master with this line."""
    try:
        if MASTER:
            fail(message)
    finally:
        if DDP:  # as in `leave`
            os._exit(2)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Wraps the writing of `path`: if that fails, the run ends with one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter: torch.save
        end_run(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def report_errors(checkpoint: Path, resumes: bool) -> None:
    """From here on, errors that are not bugs end the process with one line, not a traceback. The
    line names `checkpoint` to resume from, if this run `resumes` it or wrote it. Comes after
    `start_processes`, where torch sets a hook of its own."""
    began, before = 0.0 if resumes else time.time(), sys.excepthook

    def on_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return UNDO.close()  # Python itself ends then, as by the signal
        reason = str(error).partition("\n")[0]
        if DDP and (issubclass(kind, dist.DistError) or "gloo" in reason):
            what = f"process {RANK} has lost another one"
        elif isinstance(error, OSError) and error.errno in UNWRITTEN:
            what = "its output cannot be written"
        elif lacks_memory(error):
            what = "not enough memory; lower --batch_size or --block_size"
        else:
            UNDO.close()
            return before(kind, error, trace)
        try:
            if checkpoint.exists() and checkpoint.stat().st_mtime > began:
                what += f"; --init_from=resume goes on from {checkpoint}"
            fail(f"{what} ({reason})", 1)
        finally:
            if DDP:
                os._exit(1)  # a usual exit would wait for the others

    UNDO.callback(setattr, sys, "excepthook", before)
    sys.excepthook = on_error


def catch_signals() -> list[int]:
    """Turns STOP_SIGNALS into requests to stop: the list gets their numbers. Ignored ones, as under
    nohup, stay ignored. The same signal again ends a single process at once, and so does one after
    an error has ended the script. A stdout that cannot be written is a request, too: SIGPIPE."""
    caught, script = [], sys._getframe(1)

    def on_signal(number: int, frame: FrameType | None) -> None:
        while frame not in (script, None):
            frame = frame.f_back
        if frame is None or (number in caught and not DDP):
            UNDO.close()  # also for a caller that catches what this raises
            return signal.raise_signal(number)
        caught.append(number)

    UNDO.push(HANDLERS)
    gets_signals = threading.current_thread() is threading.main_thread()
    for number in filter(None, (getattr(signal, f"SIG{name}", None) for name in STOP_SIGNALS)):
        before = signal.getsignal(number)
        if before != signal.SIG_IGN and gets_signals:
            HANDLERS.callback(signal.signal, number, before or signal.SIG_DFL)
            signal.signal(number, on_signal)
    UNDO.callback(setattr, sys, "stdout", sys.stdout)
    sys.stdout = Output(sys.stdout, caught)
    return caught


class Output:
    """A stdout that never fails: if its disk is full or its reader gone, `caught` gets SIGPIPE."""

    def __init__(self, stream: Any, caught: list[int]):
        self.stream, self.caught, self.clear = stream, caught, ""

    def renew(self, line: str) -> None:
        """Writes a line that the next text replaces, in a terminal."""
        self.write(line)
        self.clear = "\r\x1b[K"

    def write(self, text: str) -> int:
        text, self.clear = self.clear + text, ""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            self.caught.append(13)  # SIGPIPE, which Windows lacks
            to_nowhere(self.stream)
            try:
                print(f"train.py: its output cannot be written ({error})", file=sys.stderr)
            except OSError:
                to_nowhere(sys.stderr)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

"""What a run stands on: processes, device, lock, signals, errors in one line.
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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from checkpoint import ABLATIONS
from configurator import UNDO, fail, lacks_memory, pick_device
from model import DecoderLayer, EncoderLayer, ParallelEncoderDecoder

# What torchrun says of this process. It sets all of these: what is set by halves is not from it.
DDP = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if DDP else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if DDP else 1
MASTER = RANK == 0
# Ctrl-C, and what clusters, terminals that close, and limits of CPU time send.
STOP_SIGNALS = [getattr(signal, f"SIG{n}", None) for n in ("INT", "TERM", "HUP", "XCPU", "BREAK")]
HANDLERS = ExitStack()  # gives the signals back to the handlers that they had before
UNWRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def start_processes(backend: str, device: str) -> str:
    """Joins the processes of torchrun, where there are any; the device of this one. The master
    speaks for all: the others' stdout goes nowhere."""
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
    """The largest of each value over all processes, for which it waits."""
    largest = torch.tensor(values or [0.0], dtype=torch.float64)
    if DDP:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def leave(status: int) -> NoReturn:
    """Ends this process when all are here: the master may still be evaluating, or saving."""
    sys.stdout.flush()  # here, where it fails with one line
    UNDO.close()
    if not DDP:
        sys.exit(status)
    if MASTER and hasattr(sys.modules.get("wandb"), "finish"):
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
    began, before = 0.0 if resumes else time.time(), sys.excepthook
    UNDO.callback(setattr, sys, "excepthook", before)

    def on_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return  # Python itself ends then, as by the signal
        reason = str(error).partition("\n")[0]
        if DDP and (issubclass(kind, dist.DistError) or "gloo" in reason):
            what = f"process {RANK} has lost another one"
        elif isinstance(error, OSError) and error.errno in UNWRITTEN:
            what = "its output cannot be written"
        elif lacks_memory(error):
            what = "not enough memory; lower --batch_size or --block_size"
        else:
            return before(kind, error, trace)
        try:
            if checkpoint.exists() and checkpoint.stat().st_mtime > began:
                what += f"; --init_from=resume goes on from {checkpoint}"
            fail(f"{what} ({reason})")
        finally:
            os._exit(1)  # a usual exit would wait for the others, or write once more

    sys.excepthook = on_error


def catch_signals() -> list[int]:
    """Makes STOP_SIGNALS requests to stop, but those that are ignored, as by nohup: the list gets
    their numbers. A second one is handled as before, which ends a single process. A stdout that
    cannot be written is a request, too: SIGPIPE."""
    caught: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        caught.append(number)
        if not DDP:
            HANDLERS.close()

    UNDO.push(HANDLERS)
    for number in filter(None, STOP_SIGNALS):
        if signal.getsignal(number) != signal.SIG_IGN:
            before = signal.signal(number, on_signal) or signal.SIG_DFL
            HANDLERS.callback(signal.signal, number, before)
    UNDO.callback(setattr, sys, "stdout", sys.stdout)
    sys.stdout = Output(sys.stdout, caught)
    return caught


class Output:
    """A stream that takes text also where it cannot write it, as the terminal is gone, or the disk
    is full; then SIGPIPE comes into `caught`."""

    def __init__(self, stream: Any, caught: list[int]):
        self.stream, self.caught = stream, caught

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.caught.append(13)  # SIGPIPE, which Windows lacks
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what it holds back goes there, too
            try:
                print(f"train.py: its output cannot be written ({error})", file=sys.stderr)
            except OSError:
                os.dup2(nowhere, sys.stderr.fileno())
            return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def command(*args: str) -> str:
    """The command that calls a script with this Python, and with the ablations of this run."""
    by = [os.path.relpath(Path(__file__).parent / "experiments/ablations.py"), *ABLATIONS]
    return shlex.join([sys.orig_argv[0], *(by if ABLATIONS else []), *args])


def command_to_resume() -> str:
    """The command that goes on with this run."""
    args = [*(arg for arg in sys.argv if not arg.startswith("--init_from=")), "--init_from=resume"]
    if int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE)) < WORLD_SIZE:
        return f"torchrun (with the options as before) {shlex.join(args)}"
    start = f"torchrun --standalone --nproc_per_node={WORLD_SIZE}"
    return f"{start} {shlex.join(args)}" if DDP else command(*args)


def lock_folder(settings: dict[str, Any]) -> None:
    """Makes out_dir, where this run writes, and locks it to the end of the script: one run at a
    time. Where there are no such locks, as on Windows, two runs are not told apart."""
    folder, resumes = settings["out_dir"], settings["init_from"] == "resume"
    if not MASTER or settings["eval_only"] or (resumes and not os.path.exists(folder)):
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = UNDO.enter_context(open(Path(folder, ".lock"), "w", encoding="utf-8"))
    except OSError as error:
        fail(f"out_dir={folder!r}: cannot be used: {error.strerror}")
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"out_dir={folder!r}: another run is writing there; choose another --out_dir")


def compiler_works(device: str) -> bool:
    """Whether torch.compile works here; where it does not, a line on stderr says why."""
    try:
        torch.compile(torch.cos)(torch.ones(64, device=device))
        return True
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"compile=True: goes on without ({reason:.200})", file=sys.stderr)
        return False

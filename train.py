"""Trains the parallel encoder-decoder, or the decoder-only baseline, on a data set of tokens.

    python train.py config/shakespeare_char.py                        the main job
    python train.py config/shakespeare_char.py --batch_size=32        a setting overridden
    python train.py config/shakespeare_char.py --init_from=resume     goes on where it stopped
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

Notable: every random draw follows from the seed, the iteration and the micro-step alone. So a
resumed run repeats the undisturbed one (on a CPU bit for bit), and two processes repeat what one
does with the same accumulation, unless max_seconds ties the schedules to the clock. A reported loss
is the cross-entropy in nats per token.
"""

import ctypes
import errno
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import ABLATIONS, FORMAT, lacks_memory, load_checkpoint, write_whole
from config import check, fail, override, pick_device, printable
from mfu import estimate_mfu
from model import (
    DecoderLayer,
    EncoderLayer,
    ModelConfig,
    ParallelEncoderDecoder,
    mask_statistics,
)
from muon import Muon, configure_optimizers, is_sharded, restore
from prepare_shakespeare import SHAKESPEARE, load_data, prepare

# -----------------------------------------------------------------------------
# input and output
out_dir = "out"  # checkpoints and log.jsonl; sample.py's --out_dir
eval_interval = 250  # iterations between evaluations, each with a checkpoint
log_interval = 10  # iterations between log lines
eval_iters = 20  # batches per split in each evaluation; the last one reads all of val
eval_only = False  # evaluate once, then stop
always_save_checkpoint = True  # False: only when the validation loss improved
init_from = "scratch"  # or resume, from out_dir/ckpt.pt
wandb_log = False  # needs: pip install wandb
wandb_project = "parallel-encoder-decoder"
wandb_run_name = "run"
# data
dataset = "shakespeare_char"  # the folder below data/; prepare_shakespeare.py makes it
gradient_accumulation_steps = 1  # micro-batches per iteration, over all processes together
batch_size = 12  # sequences in a micro-batch
block_size = 256  # tokens in a sequence
# model: the fields of ModelConfig in model.py, where each is explained
arch = "parallel"  # or decoder_only
n_layer = 6  # of each stack
n_head = 6
n_embd = 384
dropout = 0.0  # for small data 0.1 to 0.2
bias = False
position_embedding = "learned"  # or rotary
qk_norm = False
token_shift = False
lateral = False  # the decoder runs on top of the encoder
decoder_self_attention = True
shared_kv = False  # the encoder's keys and values serve the decoder, too
# learned dropout: the experts of the feed-forward blocks, more fields of ModelConfig
n_expert = 0  # experts in each block; 0: no learned dropout
expert_site = "hidden"  # or output
router_input = "hidden"  # or encoder
router_n_head = 1
router_head_dim = 16
shift_init = 0.0  # 0: all experts on at the start; pi: all off
l1_norm = "linear"  # or squared
entropy_weight = 0.0  # pushes the masks to 0 or 1
l1_weight = 0.0  # pushes the experts off
penalty_schedule = "constant"  # how both weights grow; or linear, exponential
penalty_iters = 1000  # iterations until they have their full value
# the optimizer
optimizer = "muon"  # for the matrices of the layers, AdamW for the rest; or adamw for all
learning_rate = 3e-3  # of AdamW, the largest; smaller models bear larger ones
max_iters = 5000
max_seconds = 0.0  # over 0: train that long; max_iters is then the length that schedules assume
weight_decay = 0.1  # on matrices only
muon_learning_rate = 0.02  # the largest; it follows the schedule of learning_rate
muon_momentum = 0.95  # 0.9 for a short run
muon_weight_decay = 0.0
beta1 = 0.9  # of AdamW
beta2 = 0.95  # 0.99 where a batch has few tokens
grad_clip = 1.0  # the largest norm of the gradient; 0: no limit
# the learning rate: linear warm-up, then down to min_lr
decay_lr = True
lr_schedule = "cosine"  # or linear
warmup_iters = 100
lr_decay_iters = 5000  # usually max_iters
min_lr = 3e-4  # usually learning_rate / 10
# system
backend = "auto"  # of torchrun: nccl on CUDA, else gloo
fsdp = False  # under torchrun: each process holds a share of the model and the optimizer, not all
device = "auto"  # CUDA, else MPS, else CPU; or cpu, cuda, cuda:1, mps
dtype = "auto"  # bfloat16 on CUDA where it has it, else float32; or bfloat16, float32
compile = False  # torch.compile: faster steps after a minute of compiling
seed = 1337
# -----------------------------------------------------------------------------
mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
if mallopt:  # keep freed memory up to 32 MB a piece: each step asks for the same again
    mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts Ctrl-C just ends it
settings = override(globals(), sys.argv[1:])
globals().update(settings)
LEAST = {
    "eval_interval": 1,
    "log_interval": 1,
    "eval_iters": 1,
    "gradient_accumulation_steps": 1,
    "batch_size": 1,
    "max_iters": 0,
    "penalty_iters": 1,
    "max_seconds": 0.0,
    "learning_rate": 1e-12,
    "min_lr": 0.0,
    "muon_learning_rate": 0.0,
    "weight_decay": 0.0,
    "muon_weight_decay": 0.0,
    "seed": 0,
}
ALLOWED = {
    "init_from": ("scratch", "resume"),
    "dtype": ("auto", "bfloat16", "float32"),
    "backend": ("auto", "nccl", "gloo"),
    "optimizer": ("muon", "adamw"),
    "lr_schedule": ("cosine", "linear"),
    "penalty_schedule": ("constant", "linear", "exponential"),
}


def check_ranges() -> None:
    """Ends the process where a setting is out of its range."""
    for name, least in LEAST.items():
        if not settings[name] >= least:  # NaN is not, either
            fail(f"{name}={settings[name]}: must be at least {least}")
    for name, allowed in ALLOWED.items():
        if settings[name] not in allowed:
            fail(f"{name}={settings[name]!r}: must be one of {', '.join(allowed)}")


check_ranges()
if min_lr > learning_rate:
    fail(f"min_lr={min_lr}: must be at most learning_rate={learning_rate}")
if not 0 <= muon_momentum < 1:
    fail(f"muon_momentum={muon_momentum}: must be at least 0 and less than 1")
if max_seconds and not max_iters:
    fail("max_iters=0: must be at least 1 with max_seconds")
if fsdp and "RANK" not in os.environ:
    fail("fsdp=True: shards a model over processes; start them with torchrun, or set --fsdp=False")


# What becomes of stdout where its reader has gone, or its disk is full.
UNWRITTEN = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def on_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """One line in place of a traceback where the cause is none of this program's."""
    reason, resume = str(error).partition("\n")[0], ""
    if ddp and (issubclass(kind, dist.DistError) or "gloo" in reason):
        what = f"process {rank} has lost another one"
    elif isinstance(error, OSError) and error.errno in UNWRITTEN:
        what = "its output cannot be written"
    elif lacks_memory(error):
        what = "not enough memory; lower --batch_size or --block_size"
    else:
        return sys.__excepthook__(kind, error, trace)
    try:
        if "iter_num" in globals() and Path(out_dir, "ckpt.pt").exists():  # it trained
            resume = f"; --init_from=resume goes on from {out_dir}/ckpt.pt"
        fail(f"{what}{resume} ({reason})")
    finally:
        os._exit(1)  # a usual exit would wait for the others, or write once more


# The device, and under torchrun the processes: each takes its share of the micro-batches.
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ddp, master = "RANK" in os.environ, rank == 0
device = pick_device(device)
if ddp and device == "cuda":
    device = f"cuda:{os.environ['LOCAL_RANK']}"
if ddp and device.startswith("mps"):
    device = "cpu"  # torch.distributed has no backend for MPS
device_type = device.split(":")[0]
if device_type == "cuda" and ":" in device:
    torch.cuda.set_device(device)
if ddp:
    nccl = "cpu:gloo,cuda:nccl"  # gloo beside it, since signals are agreed on without the GPU
    auto = nccl if device_type == "cuda" else "gloo"
    try:
        dist.init_process_group({"auto": auto, "nccl": nccl, "gloo": "gloo"}[backend])
    except (RuntimeError, ValueError) as error:
        fail(f"backend={backend!r}: {str(error).splitlines()[0]}")
sys.excepthook = on_error
if not master:
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the master speaks for all
micro_steps = math.ceil(gradient_accumulation_steps / world_size)  # of this process
if micro_steps * world_size != gradient_accumulation_steps:
    print(f"gradient_accumulation_steps={micro_steps * world_size}, to share among {world_size}")
if dtype == "auto":
    has_it = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = "bfloat16" if has_it else "float32"
if device_type == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32
autocast = nullcontext()
if dtype == "bfloat16":  # it keeps no copies of what fsdp gathers
    autocast = torch.autocast(device_type, torch.bfloat16, cache_enabled=not fsdp)

# One run at a time writes to out_dir: its lock goes when the process ends, however that comes
# about. Where there are no such locks, as on Windows, runs are not told from each other.
if master and not eval_only and (init_from == "scratch" or os.path.exists(out_dir)):
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        lock = open(Path(out_dir, ".lock"), "w", encoding="utf-8")
    except OSError as error:
        fail(f"out_dir={out_dir!r}: cannot be used: {error.strerror}")
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"out_dir={out_dir!r}: another run is writing there; choose another --out_dir")

# The data: uint16 tokens on disk, mapped into memory.
data_dir = Path("data", dataset)
try:
    if master and not (data_dir / "meta.json").exists():
        if dataset not in SHAKESPEARE:
            command = f"python prepare_shakespeare.py --input_file=PATH --dataset={dataset}"
            raise ValueError(f"{data_dir}: there is no data set; make one: {command}")
        prepare(dataset.removeprefix("shakespeare_"))
    if ddp:
        dist.barrier()
    tokenizer, data = load_data(data_dir)
except (ValueError, OSError) as error:
    fail(str(error) if str(data_dir) in str(error) else f"{data_dir}: {error}")

# The model and its optimizer.
start_iter, start_seconds, best_val_loss, saved_is_best = 0, 0.0, math.inf, False
decisions = None  # which experts were on at the last evaluation
try:
    torch.manual_seed(seed)
    if init_from == "resume":
        raw_model, checkpoint = load_checkpoint(Path(out_dir, "ckpt.pt"), "cpu" if fsdp else device)
        start_iter, start_seconds = checkpoint["iter_num"], checkpoint["seconds"]
        best_val_loss = checkpoint["best_val_loss"]
        saved_is_best, decisions = checkpoint["is_best"], checkpoint["decisions"]
        print(f"goes on from {out_dir}/ckpt.pt, saved after {start_iter} iterations")
        vocab_size = raw_model.config.vocab_size
        if checkpoint["tokenizer"] != asdict(tokenizer) or vocab_size != tokenizer.vocab_size:
            raise ValueError(f"{data_dir}: not the vocabulary that {out_dir} was trained with")
        kept = asdict(raw_model.config)
        for name in checkpoint["config"].keys() & {"penalty_schedule", "penalty_iters"}:
            kept[name] = check(name, checkpoint["config"][name], settings, f"{out_dir}/ckpt.pt")
        for name, value in kept.items():
            if name in settings and settings[name] != value:
                print(f"{name}={value!r}, as in the checkpoint (not {settings[name]!r})")
                settings[name] = globals()[name] = value
        check_ranges()
    else:
        model_args = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
        config = ModelConfig(vocab_size=tokenizer.vocab_size, **model_args)
        raw_model = ParallelEncoderDecoder(config)
        if not fsdp:
            raw_model.to(device)
    if fsdp:  # layer by layer, so that the device never has to hold the whole model
        from torch.distributed.device_mesh import init_device_mesh  # these take a second
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # FSDP warns of modules that return views, as of keys and values; we never modify them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        mesh = init_device_mesh(device_type, (world_size,))
        layers = [m for m in raw_model.modules() if isinstance(m, EncoderLayer | DecoderLayer)]
        if raw_model.config.arch == "parallel":
            layers += raw_model.key_value.values()
        for module in layers:
            fully_shard(module, mesh=mesh)
        fully_shard(raw_model, mesh=mesh)
        register_fsdp_forward_method(raw_model, "expert_masks")
    for part, tokens in data.items():
        if len(tokens) <= block_size:
            raise ValueError(
                f"{data_dir}/{part}.bin: {len(tokens)} tokens are fewer than block_size + 1 = "
                f"{block_size + 1}; set a smaller --block_size, or use more text"
            )
    params = list(raw_model.parameters())
    adamw = dict(lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay)
    muon = dict(lr=muon_learning_rate, momentum=muon_momentum, weight_decay=muon_weight_decay)
    optimizers = configure_optimizers(raw_model, adamw, muon if optimizer == "muon" else None)
    if init_from == "resume" and not eval_only:
        if (trained_with := checkpoint["config"]["optimizer"]) != optimizer:
            raise ValueError(
                f"optimizer={optimizer!r}: {out_dir} was trained with {trained_with!r}"
            )
        restore(optimizers, checkpoint.pop("optimizers"))
except KeyError as error:
    fail(f"{out_dir}/ckpt.pt: has no entry {error}; it was not written by this train.py")
except (ValueError, RuntimeError) as error:  # the latter: a seed too large, no memory
    fail(str(error).partition("\n")[0])
has_experts = raw_model.config.n_expert > 0
model = torch.compile(raw_model) if compile else raw_model
if ddp and not fsdp:
    model = DistributedDataParallel(model)
evaluates = master or fsdp  # a model in shares needs all of them, and all compute the same


def get_batch(split: str, *key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (batch_size, block_size), drawn at random: the same for one key.

    Seeds torch from the key as well, so that dropout follows from it too.
    """
    rng = np.random.default_rng([seed, *key])
    starts = rng.integers(len(data[split]) - block_size, size=(batch_size, 1))
    window = data[split][starts + np.arange(block_size + 1)]  # one gather
    torch.manual_seed(int(rng.integers(2**63)))
    return to_device(torch.from_numpy(window.astype(np.int64)))


def to_device(window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) of tokens as inputs and targets (B, T) on the device."""
    if device_type == "cuda":
        window = window.pin_memory().to(device, non_blocking=True)
    else:
        window = window.to(device)
    return window[:, :-1], window[:, 1:]


@torch.no_grad()  # in inference_mode what fsdp gathers could not be trained
def evaluate(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """The model's metrics in evaluation, their mean over all tokens of the batches."""
    raw_model.eval()
    sums, tokens = Counter(), 0
    for x, y in batches:
        with autocast:
            metrics = raw_model(x, y).metrics
        tokens += y.numel()
        sums.update({name: value * y.numel() for name, value in metrics.items()})
    raw_model.train()
    return {name: value.item() / tokens for name, value in sums.items()}


def estimate_loss(split: str) -> float:
    """Cross-entropy over eval_iters batches of a split, the same ones at every evaluation."""
    part = {"train": 1, "val": 2}[split]
    loss = evaluate(get_batch(split, part, k) for k in range(eval_iters))["cross_entropy"]
    return agree(loss)[0] if fsdp else loss  # so that all see it improve, or none


def whole_val() -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """All of val.bin in consecutive windows of block_size, the last one shorter."""
    tokens = torch.from_numpy(data["val"].astype(np.int64))
    windows = tokens.unfold(0, block_size + 1, block_size)  # each starts at its forerunner's end
    rest = tokens[len(windows) * block_size :]
    batches = windows.split(max(batch_size, 4096 // block_size))
    return map(to_device, (*batches, rest[None]) if len(rest) > 1 else batches)


def expert_statistics() -> dict[str, list]:
    """Statistics of the masks per layer and stack, on 16 windows of val, the same in every run.

    `changed` is the share of decisions that differ from those of the last call.
    """
    global decisions
    starts = np.random.default_rng(0).integers(len(data["val"]) - block_size, size=(16, 1))
    idx = torch.from_numpy(data["val"][starts + np.arange(block_size)].astype(np.int64))
    with autocast:
        mask = raw_model.expert_masks(idx.to(device))
    stats = mask_statistics(mask, raw_model.config.l1_norm)
    before, decisions = decisions, mask.used > 0.5
    if isinstance(before, torch.Tensor) and before.shape == decisions.shape:
        changed = decisions != before.to(decisions.device)
        stats["changed"] = changed.float().mean(dim=(-3, -2, -1))
    return {name: value.tolist() for name, value in stats.items()}


def penalty_weights(it: float) -> dict[str, float]:
    """The weights of the penalties at iteration `it`."""
    scale, c = get_penalty_scale(it), raw_model.config
    return {"entropy_weight": scale * c.entropy_weight, "l1_weight": scale * c.l1_weight}


def get_lr(it: float) -> float:
    """The learning rate at iteration `it`: linear warm-up, decay by lr_schedule, then min_lr."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    share = min(1.0, (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    left = 1.0 - share if lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return min_lr + left * (learning_rate - min_lr)


def get_penalty_scale(it: float) -> float:
    """The share, 0 to 1, of their full weight that the penalties have at iteration `it`."""
    share = min(1.0, it / penalty_iters)
    exponential = math.expm1(5 * share) / math.expm1(5)
    return {"constant": 1.0, "linear": share, "exponential": exponential}[penalty_schedule]


def save_checkpoint(is_best: bool) -> None:
    """Writes out_dir/ckpt.pt. ckpt_best.pt is there where the best one is an older one."""
    global saved_is_best, saved_iter
    checkpoint = {
        "format": FORMAT,
        "ablations": ABLATIONS,
        "model": gather(raw_model.state_dict()),
        "optimizers": [gather(opt.state_dict()) for opt in optimizers],
        "model_args": asdict(raw_model.config),
        "iter_num": iter_num,
        "seconds": seconds,
        "best_val_loss": best_val_loss,
        "is_best": is_best,
        "decisions": decisions,
        "tokenizer": asdict(tokenizer),
        "config": settings,
    }
    path, best = Path(out_dir, "ckpt.pt"), Path(out_dir, "ckpt_best.pt")
    before, saved_is_best, saved_iter = saved_is_best, is_best, iter_num
    if not master:
        return
    try:
        if before and not is_best and path.exists():
            with open(path, "rb") as old:
                write_whole(best, partial(shutil.copyfileobj, old))
        write_whole(path, partial(torch.save, checkpoint))
        if is_best:
            best.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        end_run(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def gather(state: Any) -> Any:
    """A state_dict with its sharded tensors whole, on the CPU, and in the master alone."""
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if not is_sharded(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if master else None


def log_evaluation(**row: float) -> None:
    """Appends a row to out_dir/log.jsonl, and to wandb where asked for."""
    if not master:
        return
    path, before = Path(out_dir, "log.jsonl"), 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            before = file.tell()
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        with suppress(OSError):  # where not even the file could be made
            os.truncate(path, before)  # no half a line
        end_run(f"{path}: cannot be written: {error.strerror}")
    if wandb_log:
        wandb.log({name: float(np.mean(value)) for name, value in row.items()})


stop_signal = 0


def on_signal(number: int, frame: object) -> None:
    """Asks for a stop after this iteration; a second signal ends a single process at once."""
    global stop_signal
    stop_signal = number
    if not ddp:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def agree(*values: float) -> list[float]:
    """The largest of each value over all processes, so that they stop together."""
    largest = torch.tensor(values, dtype=torch.float64)
    if ddp:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def end_run(message: str) -> NoReturn:
    """Ends this process, the master with the line; all come here, or lose the master and end."""
    try:
        if master:
            fail(message)
    finally:
        if ddp:  # as in leave_processes
            sys.stdout.flush()
            os._exit(2)


def leave_processes(status: int) -> None:
    """Ends this process when all of them are here: the master still evaluates, or saves."""
    if wandb_log and master:
        wandb.finish()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)  # at a usual exit gloo's threads abort the process now and then


if wandb_log and master:
    try:
        import wandb
    except ImportError:
        fail("wandb_log=True needs wandb: pip install wandb, or set --wandb_log=False")
    try:
        wandb.init(project=wandb_project, name=wandb_run_name, config=settings)
    except wandb.Error as error:
        fail(f"wandb: {error}")
if master:
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        for name in ("ckpt.pt", "ckpt_best.pt", "log.jsonl"):
            path, old = Path(out_dir, name), Path(out_dir, f"{name}.old")
            if init_from == "scratch" and not eval_only and path.exists():
                lost = ", in place of the one before it" if old.exists() else ""
                os.replace(path, old)
                print(f"{path}, of an earlier run, is now {old.name}{lost}")
                if name == "ckpt.pt":  # whose best one is not that of the run before
                    Path(out_dir, "ckpt_best.pt.old").unlink(missing_ok=True)
    except OSError as error:
        fail(f"out_dir={out_dir!r}: cannot be used: {error.strerror}")
print(
    f"{raw_model.num_params():,} parameters, {arch} on {device} in {dtype}, "
    f"{micro_steps * world_size * batch_size * block_size:,} tokens per iteration"
)
if decay_lr and min_lr == 0 and lr_decay_iters < max_iters and not max_seconds:
    print(f"the learning rate is 0 from iteration {lr_decay_iters} on; raise --lr_decay_iters, too")
for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and what a cluster sends
    signal.signal(number, on_signal)

iter_num, bad_steps = start_iter, 0  # steps skipped in a row
grad_norm = torch.tensor(math.nan)
saved_iter = start_iter if init_from == "resume" else -1
estimate_mfu(raw_model, 1, 1)  # measures the machine's peak, before the clock starts
start = last = time.perf_counter()
last_iter = iter_num
while True:
    stop, seconds = agree(stop_signal, start_seconds + time.perf_counter() - start)
    # Where the schedules are: at this iteration, or as far as the time is spent.
    schedule_iter = max_iters * min(1.0, seconds / max_seconds) if max_seconds else iter_num
    finished = schedule_iter >= max_iters

    # Evaluate, and save. A resumed run did that before it stopped.
    due = iter_num % eval_interval == 0 or finished
    if evaluates and (eval_only or (due and (iter_num == 0 or iter_num != start_iter))):
        began = time.perf_counter()
        losses = {split: estimate_loss(split) for split in data}
        print(
            f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}",
            flush=True,
        )
        if not math.isfinite(losses["val"]):
            end_run(
                f"iter {iter_num}: the validation loss is not finite (loss {losses['val']:.4g}, "
                f"gradient norm before it {grad_norm:.4g}, learning rate "
                f"{get_lr(schedule_iter):.3g}); checkpoints are as they were; lower --learning_rate"
            )
        if not eval_only:
            log_evaluation(
                iter=iter_num,
                train_loss=losses["train"],
                val_loss=losses["val"],
                lr=get_lr(schedule_iter),
                seconds=seconds,
                **(expert_statistics() | penalty_weights(schedule_iter) if has_experts else {}),
            )
            improved = iter_num > 0 and losses["val"] < best_val_loss
            if improved:
                best_val_loss = losses["val"]
            if improved or (always_save_checkpoint and iter_num > 0):
                save_checkpoint(is_best=improved)
        last += time.perf_counter() - began
    if finished or eval_only:
        break
    if stop:
        if evaluates and saved_iter != iter_num:
            save_checkpoint(is_best=False)
        again = [arg for arg in sys.argv if arg != "--init_from=resume"]
        start_with = "python"
        if ddp:
            one_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
            start_with = f"torchrun --standalone --nproc_per_node={world_size}"
            start_with = start_with if one_node else "torchrun (with the options as before)"
        print(
            f"stopped after {iter_num} iterations; saved {out_dir}/ckpt.pt; to go on:\n"
            f"  {start_with} {shlex.join(again)} --init_from=resume",
            flush=True,
        )
        status = 128 + int(stop)
        if ddp:
            leave_processes(status)
        sys.exit(status)

    # One iteration: accumulate the gradient over the micro-steps, then step.
    lr = get_lr(schedule_iter)
    for opt in optimizers:
        largest = muon_learning_rate if isinstance(opt, Muon) else learning_rate
        for group in opt.param_groups:
            group["lr"] = largest * lr / learning_rate
    penalty_scale = torch.full((), get_penalty_scale(schedule_iter), device=device)
    logged = torch.zeros(2, device=device)  # the loss, and the share of experts on
    for micro_step in range(micro_steps):
        x, y = get_batch("train", 0, iter_num, micro_step * world_size + rank)
        if ddp and not fsdp:  # averages the gradients once, in the last micro-step
            model.require_backward_grad_sync = micro_step == micro_steps - 1
        with autocast:
            output = model(x, y, penalty_scale=penalty_scale)
        (output.loss / micro_steps).backward()
        logged[0] += output.metrics["cross_entropy"] / micro_steps
        if has_experts:
            logged[1] += output.metrics["experts_on"] / micro_steps
    grads = [p.grad for p in params if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads)
    if fsdp:
        grad_norm = grad_norm.full_tensor()
    if math.isfinite(grad_norm.item()):
        bad_steps = 0
        if grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, grad_norm)
        for opt in optimizers:
            opt.step()
    else:  # of the averaged gradient, hence on all processes alike
        bad_steps += 1
        (bad_loss,) = agree(not math.isfinite(output.loss.item() + logged[0].item()))
        what = f"iter {iter_num}: the {'loss' if bad_loss else 'gradient'} is not finite"
        what += f" (loss {logged[0]:.4g}, gradient norm {grad_norm:.4g}, learning rate {lr:.3g})"
        if bad_loss or bad_steps == 5:
            end_run(f"{what}; checkpoints are as they were; lower --learning_rate")
        print(f"{what}; step skipped", flush=True)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)

    if iter_num % log_interval == 0:
        if ddp:
            dist.all_reduce(logged)
        loss, experts_on = (logged / world_size).tolist()  # waits for the device
        now = time.perf_counter()
        dt, last, last_iter = (now - last) / (iter_num + 1 - last_iter), now, iter_num + 1
        left = round(max_seconds - seconds if max_seconds else dt * (max_iters - iter_num - 1))
        tokens_per_second = micro_steps * world_size * batch_size * block_size / dt
        print(
            f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, "
            f"{tokens_per_second:,.0f} tok/s, "
            f"mfu {estimate_mfu(raw_model, batch_size * micro_steps, dt):.0%}, "
            f"{left // 60}:{left % 60:02} left"
            + (f", experts on {experts_on:.1%}" if has_experts else ""),
            flush=True,
        )
    iter_num += 1

for number in (signal.SIGINT, signal.SIGTERM):  # what is left to do is not saved
    signal.signal(number, signal.SIG_DFL)
if evaluates:
    val = evaluate(whole_val())
    experts = f", experts on {val['experts_on']:.1%}" if "experts_on" in val else ""
    print(
        f"whole validation split: loss {val['cross_entropy']:.4f}{experts}, after {iter_num} "
        f"iterations, {seconds:.1f} s"
    )
    if not eval_only:
        log_evaluation(
            iter=iter_num, whole_val_loss=val.pop("cross_entropy"), **val, seconds=seconds
        )
        has_newline = tokenizer.kind == "gpt2" or "\n" in tokenizer.chars
        prompt = "\n" if has_newline else tokenizer.chars[0]
        if not fsdp:  # which would gather all layers for each token
            idx = torch.tensor([tokenizer.encode(prompt)], device=device)
            torch.manual_seed(seed)
            idx = raw_model.generate(idx, 300, temperature=0.8, top_k=200)
            print(f"\nA sample:\n{printable(tokenizer.decode(idx[0].tolist()))}\n")
        if Path(out_dir, "ckpt.pt").exists():
            command = ["python", "sample.py", f"--out_dir={out_dir}"]
            command += [] if has_newline else [f"--start={prompt}"]
            print(f"More of it: {printable(shlex.join(command))}")
    sys.stdout.flush()  # here, where it fails with one line
if ddp:
    leave_processes(0)

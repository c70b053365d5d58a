"""Trains the parallel encoder-decoder, or the decoder-only baseline, on a data set of tokens.

    python train.py config/shakespeare_char.py                        the main job
    python train.py config/shakespeare_char.py --batch_size=32        a setting overridden
    python train.py config/shakespeare_char.py --init_from=resume     goes on where it stopped
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

Notable: every random draw follows from the seed, the iteration and the micro-step alone. So a
resumed run repeats the undisturbed one bit for bit, and two processes repeat what one does with the
same accumulation. A reported loss is the cross-entropy in nats per token.
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import fail, override, pick_device
from model import ModelConfig, ParallelEncoderDecoder, load_checkpoint
from prepare_shakespeare import SHAKESPEARE, Tokenizer, prepare

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
cross_first = False
lateral = False
decoder_self_attention = True
n_cross_head = 0  # 0: n_head
encoder_loss = "none"  # or mse, cosine, log_cosine
encoder_loss_weight = 1.0
next_position = "none"  # or add, subtract
# AdamW
learning_rate = 1e-3  # the largest; smaller models bear larger ones
max_iters = 5000
weight_decay = 0.1  # on matrices only
beta1 = 0.9
beta2 = 0.95  # 0.99 where a batch has few tokens
grad_clip = 1.0  # the largest norm of the gradient; 0: no limit
# the learning rate: linear warm-up, then a cosine down to min_lr
decay_lr = True
warmup_iters = 100
lr_decay_iters = 5000  # usually max_iters
min_lr = 1e-4  # usually learning_rate / 10
# system
backend = "auto"  # of torchrun: nccl on CUDA, else gloo
device = "auto"  # CUDA, else MPS, else CPU; or cpu, cuda, cuda:1, mps
dtype = "auto"  # bfloat16 on CUDA where it has it, else float32; or bfloat16, float32
compile = False  # torch.compile: faster steps after a minute of compiling
seed = 1337
# -----------------------------------------------------------------------------
settings = override(globals(), sys.argv[1:])
globals().update(settings)
for name, least in {
    "eval_interval": 1,
    "log_interval": 1,
    "eval_iters": 1,
    "gradient_accumulation_steps": 1,
    "batch_size": 1,
    "max_iters": 0,
    "learning_rate": 0.0,
    "seed": 0,
}.items():
    if not settings[name] >= least:  # NaN is not, either
        fail(f"{name}={settings[name]}: must be at least {least}")
for name, allowed in {
    "init_from": ("scratch", "resume"),
    "dtype": ("auto", "bfloat16", "float32"),
    "backend": ("auto", "nccl", "gloo"),
}.items():
    if settings[name] not in allowed:
        fail(f"{name}={settings[name]!r}: must be one of {', '.join(allowed)}")

# The device, and under torchrun the processes: each takes its share of the micro-batches.
device = pick_device(device)
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ddp, master = "RANK" in os.environ, rank == 0
if ddp and device == "cuda":
    device = f"cuda:{os.environ['LOCAL_RANK']}"
device_type = device.split(":")[0]
try:
    torch.zeros(1, device=device)
except (RuntimeError, AssertionError) as error:
    fail(f"device={device!r}: {str(error).splitlines()[0]}")
if ddp:
    if device_type == "cuda":
        torch.cuda.set_device(device)
    auto = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(auto if backend == "auto" else backend)
micro_steps = math.ceil(gradient_accumulation_steps / world_size)  # of this process
if micro_steps * world_size != gradient_accumulation_steps and master:
    print(f"gradient_accumulation_steps={micro_steps * world_size}, to share among {world_size}")
torch.set_float32_matmul_precision("high")  # TF32 on CUDA
has_bfloat16 = device_type == "cuda" and torch.cuda.is_bf16_supported()
if dtype == "auto":
    dtype = "bfloat16" if has_bfloat16 else "float32"
autocast = torch.autocast(device_type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()

# The data: uint16 tokens on disk, mapped into memory.
data_dir = Path("data", dataset)
if master and not (data_dir / "meta.json").exists():
    if dataset not in SHAKESPEARE:
        fail(
            f"{data_dir}: no data set; python prepare_shakespeare.py --input_file=PATH "
            f"--dataset={dataset} makes one"
        )
    try:
        prepare(dataset.removeprefix("shakespeare_"))
    except (ValueError, OSError) as error:
        fail(str(error))
if ddp:
    dist.barrier()
meta = json.loads((data_dir / "meta.json").read_text(encoding="utf-8"))
tokenizer, vocab_size = Tokenizer(**meta["tokenizer"]), meta["vocab_size"]
data = {part: np.memmap(data_dir / f"{part}.bin", np.uint16, mode="r") for part in ("train", "val")}

# The model and its optimizer.
torch.manual_seed(seed)
start_iter, best_val_loss = 0, math.inf
try:
    if init_from == "resume":
        raw_model, checkpoint = load_checkpoint(Path(out_dir, "ckpt.pt"), device)
        start_iter, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
        for name, value in asdict(raw_model.config).items():
            if name in settings and settings[name] != value and master:
                print(f"{name}={value!r}, as in the checkpoint (not {settings[name]!r})")
        block_size = raw_model.config.block_size
        if checkpoint["tokenizer"] != meta["tokenizer"]:
            fail(f"{data_dir}: not the vocabulary that {out_dir}/ckpt.pt was trained with")
    else:
        model_args = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
        raw_model = ParallelEncoderDecoder(ModelConfig(vocab_size=vocab_size, **model_args))
        raw_model.to(device)
except ValueError as error:
    fail(str(error))
for part, tokens in data.items():
    if len(tokens) <= block_size:
        fail(
            f"{data_dir}/{part}.bin: {len(tokens)} tokens, fewer than block_size + 1 = "
            f"{block_size + 1}; set a smaller --block_size, or use more text"
        )
    if tokens.max() >= vocab_size:
        fail(
            f"{data_dir}/{part}.bin: token {tokens.max()} is beyond the vocabulary of "
            f"{vocab_size}; prepare the data again"
        )
params = list(raw_model.parameters())
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ],
    lr=learning_rate,
    betas=(beta1, beta2),
    fused=True,
)
if init_from == "resume":
    optimizer.load_state_dict(checkpoint.pop("optimizer"))
model = torch.compile(raw_model) if compile else raw_model
if ddp:
    model = DistributedDataParallel(model)


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


@torch.inference_mode()
def estimate_loss() -> dict[str, float]:
    """Cross-entropy of both splits over eval_iters batches, the same ones at every evaluation."""
    raw_model.eval()
    losses = {}
    for part, split in enumerate(data, start=1):
        batches = (get_batch(split, part, k) for k in range(eval_iters))
        losses[split] = torch.stack([cross_entropy(x, y) for x, y in batches]).mean().item()
    raw_model.train()
    return losses


@torch.inference_mode()
def whole_val_loss() -> float:
    """Cross-entropy over all of val.bin, read in consecutive windows of block_size."""
    raw_model.eval()
    tokens = torch.from_numpy(data["val"].astype(np.int64))
    windows = tokens.unfold(0, block_size + 1, block_size)  # each starts at its forerunner's end
    batches = list(windows.split(max(batch_size, 4096 // block_size)))
    rest = tokens[len(windows) * block_size :]
    if len(rest) > 1:
        batches.append(rest[None])
    total = sum(cross_entropy(x, y).item() * x.numel() for x, y in map(to_device, batches))
    raw_model.train()
    return total / (len(tokens) - 1)


def cross_entropy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with autocast:
        return raw_model(x, y).metrics["cross_entropy"]


def get_lr(it: int) -> float:
    """The learning rate of iteration `it`: linear warm-up, cosine decay, then min_lr."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    share = min(1.0, (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters))
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (learning_rate - min_lr)


def save_checkpoint() -> None:
    """Writes out_dir/ckpt.pt aside, then renames it: at every moment a whole one is there."""
    checkpoint = {
        "model": raw_model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": asdict(raw_model.config),
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "tokenizer": meta["tokenizer"],
        "config": settings,
    }
    path = Path(out_dir, "ckpt.pt")
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:
        fail(f"{path}: cannot be written: {error}")


def log_evaluation(**row: float) -> None:
    """Appends a row to out_dir/log.jsonl, and to wandb where asked for."""
    with open(Path(out_dir, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if wandb_log:
        wandb.log(row)


stop_signal = 0


def on_signal(number: int, frame: object) -> None:
    """Remembers to stop after this iteration; a second Ctrl-C ends a single process at once."""
    global stop_signal
    stop_signal = number
    if not ddp:
        signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether any process got a signal; all processes ask at the same iterations."""
    if not ddp:
        return stop_signal != 0
    if iter_num % log_interval:
        return False
    flag = torch.tensor(stop_signal, device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag.item() != 0


if wandb_log and master:
    try:
        import wandb
    except ImportError:
        fail("wandb_log=True needs wandb: pip install wandb, or set --wandb_log=False")
    wandb.init(project=wandb_project, name=wandb_run_name, config=settings)
if master:
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"out_dir={out_dir!r}: cannot be made: {error.strerror}")
    print(
        f"{raw_model.num_params():,} parameters, {arch} on {device} in {dtype}, "
        f"{micro_steps * world_size * batch_size * block_size:,} tokens per iteration"
    )
signal.signal(signal.SIGINT, on_signal)

iter_num = start_iter
start = last = time.perf_counter()
last_iter = iter_num
while True:
    # Evaluate, and save. A resumed run has just done that.
    due = iter_num % eval_interval == 0 or iter_num == max_iters
    if master and (eval_only or (due and (iter_num == 0 or iter_num != start_iter))):
        began = time.perf_counter()
        losses = estimate_loss()
        print(
            f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}",
            flush=True,
        )
        if eval_only:
            break
        seconds = time.perf_counter() - start
        log_evaluation(
            iter=iter_num,
            train_loss=losses["train"],
            val_loss=losses["val"],
            lr=get_lr(iter_num),
            seconds=seconds,
        )
        improved = losses["val"] < best_val_loss
        best_val_loss = min(best_val_loss, losses["val"])
        if iter_num > 0 and (improved or always_save_checkpoint):
            save_checkpoint()
        last += time.perf_counter() - began
    if iter_num >= max_iters or eval_only:
        break

    # One iteration: accumulate the gradient over the micro-steps, then step.
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(micro_steps):
        x, y = get_batch("train", 0, iter_num, micro_step * world_size + rank)
        if ddp:  # the gradients are averaged over the processes once, in the last micro-step
            model.require_backward_grad_sync = micro_step == micro_steps - 1
        with autocast:
            output = model(x, y)
        (output.loss / micro_steps).backward()
        loss_sum += output.metrics["cross_entropy"] / micro_steps
    if grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(params, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    if iter_num % log_interval == 0:
        if ddp:
            dist.all_reduce(loss_sum)
        loss = loss_sum.item() / world_size  # .item() waits for the device
        now = time.perf_counter()
        dt, last, last_iter = (now - last) / (iter_num + 1 - last_iter), now, iter_num + 1
        left = (now - start) / (iter_num + 1 - start_iter) * (max_iters - iter_num - 1)
        tokens_per_second = micro_steps * world_size * batch_size * block_size / dt
        if master:
            print(
                f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, "
                f"{tokens_per_second:,.0f} tok/s, "
                f"mfu {raw_model.estimate_mfu(batch_size * micro_steps, dt):.0%}, "
                f"{left // 60:.0f}:{left % 60:02.0f} left",
                flush=True,
            )
    iter_num += 1
    if stop_requested():
        if master:
            path = Path(out_dir, "ckpt.pt")
            if not always_save_checkpoint and path.exists():
                shutil.copy(path, Path(out_dir, "ckpt_best.pt"))  # the best, no longer the last
            save_checkpoint()
            again = [arg for arg in sys.argv if not arg.startswith("--init_from")]
            print(
                f"stopped after {iter_num} iterations; saved {path}; to go on:\n"
                f"  python {shlex.join(again)} --init_from=resume"
            )
        if ddp:
            dist.barrier()
            dist.destroy_process_group()
        sys.exit(130)

if master:
    took = time.perf_counter() - start
    val_loss = whole_val_loss()
    print(f"whole validation split: loss {val_loss:.4f}, after {iter_num} iterations, {took:.1f} s")
    if not eval_only:
        log_evaluation(iter=iter_num, whole_val_loss=val_loss, seconds=took)
        prompt = "\n" if tokenizer.kind == "gpt2" or "\n" in tokenizer.chars else tokenizer.chars[0]
        prompt = torch.tensor([tokenizer.encode(prompt)], device=device)
        torch.manual_seed(seed)
        text = tokenizer.decode(
            raw_model.generate(prompt, 300, temperature=0.8, top_k=200)[0].tolist()
        )
        print(
            f"\nA sample:\n{text}\n\nMore of it: python sample.py --out_dir={shlex.quote(out_dir)}"
        )
if ddp:
    dist.barrier()  # nobody leaves while the master still evaluates
    dist.destroy_process_group()

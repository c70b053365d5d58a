"""Trains the parallel encoder-decoder, or the decoder-only baseline, on a data set of tokens.

    python train.py config/shakespeare_char.py                            the main job
    python train.py config/shakespeare_char.py --batch_size=32            a setting overridden
    python train.py --init_from=resume --out_dir=out-shakespeare-char     goes on where it stopped
    python train.py --init_from=out-shakespeare-char --out_dir=out-mine --dataset=mine   fine-tunes
    torchrun --standalone --nproc_per_node=2 train.py config/shakespeare_char.py

A flat script to edit: settings, set-up, then the loop. Random numbers depend on the seed, iteration
and micro-step alone. So a resumed run repeats the undisturbed one, on a CPU bit for bit, and two
processes repeat one. (Not with max_seconds, which ties the schedules to the clock.)
"""

import math
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import log
import runtime
from configurator import DTYPES, fail, override, pick_dtype
from model import ModelConfig, ParallelEncoderDecoder, evaluation
from muon import Muon, configure_optimizers, gather, grad_norm, restore
from prepare_shakespeare import consecutive_windows, load_data, prepare_missing, require_vocabulary
from runtime import DDP, MASTER, RANK, WORLD_SIZE, agree, end_run
from view import compiler_works, estimate_mfu, expert_statistics, show_sample

# -----------------------------------------------------------------------------
# input and output
out_dir = "out"  # checkpoints and log.jsonl; sample.py's --out_dir
eval_interval = 250  # iterations between evaluations, each with a checkpoint
log_interval = 10  # iterations between log lines
eval_iters = 20  # batches per split in each evaluation; the last one reads all of val
eval_only = False  # evaluate once, then stop
always_save_checkpoint = True  # False: only when the validation loss improved
init_from = "scratch"  # or resume, out_dir's run; or another run's folder, to begin with its model
wandb_log = False  # needs: pip install wandb
wandb_project = "parallel-encoder-decoder"
wandb_run_name = "run"
# data
dataset = "shakespeare_char"  # the folder below data/; prepare_shakespeare.py makes it
gradient_accumulation_steps = 1  # micro-batches per iteration, over all processes together
batch_size = 12  # sequences in a micro-batch
block_size = 256  # tokens in a sequence
# model: the fields of ModelConfig in model.py; the canonical layer, where the presets set lean
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
penalty_iters = 0  # iterations until they have their full value; 0: max_iters
# the optimizer
optimizer = "muon"  # for the matrices of the layers, AdamW for the rest; or adamw for all
learning_rate = 3e-3  # the largest, of AdamW; smaller models bear larger ones
max_iters = 5000  # the length of the run, and of its schedules
max_seconds = 0.0  # over 0: train that long; max_iters is then the length that schedules assume
weight_decay = 0.1  # on matrices only
muon_lr_ratio = 6.67  # Muon's learning rate over learning_rate: 0.02 over 3e-3
muon_momentum = 0.95  # 0.9 for a short run
muon_weight_decay = 0.0
beta1 = 0.9  # of AdamW
beta2 = 0.95  # 0.99 where a batch has few tokens
grad_clip = 1.0  # the largest norm of the gradient; 0: no limit
# the learning rate: linear warm-up, then down to min_lr
decay_lr = True
lr_schedule = "cosine"  # or linear
warmup_iters = 100
lr_decay_iters = 0  # iterations until it is min_lr; 0: max_iters
min_lr = 3e-4  # usually learning_rate / 10
# system
backend = "auto"  # of torchrun: nccl on CUDA, else gloo
fsdp = False  # under torchrun: each process holds a share of the model and the optimizer, not all
device = "auto"  # CUDA, else MPS, else CPU; or cpu, cuda, cuda:1, mps
dtype = "auto"  # bfloat16 or, without it, float16 on CUDA, else float32; or one of the three
compile = False  # torch.compile: faster steps after a minute of compiling
seed = 1337
# -----------------------------------------------------------------------------
LEAST = dict.fromkeys(("eval_interval", "log_interval", "eval_iters", "batch_size"), 1)
LEAST |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-12, "min_lr": 0.0, "seed": 0}
LEAST |= {"max_iters": 0, "max_seconds": 0.0, "lr_decay_iters": 0, "penalty_iters": 0}
LEAST |= {"weight_decay": 0.0, "muon_lr_ratio": 0.0, "muon_weight_decay": 0.0}
PATHS, ALLOWED = ("out_dir", "dataset", "init_from"), {"optimizer": ("muon", "adamw")}
ALLOWED |= {"lr_schedule": ("cosine", "linear"), "backend": ("auto", "nccl", "gloo")}
ALLOWED |= {"penalty_schedule": ("constant", "linear", "exponential"), "dtype": DTYPES}

# The settings: the defaults above, then config files and --key=value. A resumed run has its own.
settings = override(globals(), sys.argv[1:])
path, resumes = Path(settings["out_dir"], "ckpt.pt"), settings["init_from"] == "resume"
log.lock_folder(settings)
try:
    own = runtime.start_processes(settings["backend"], settings["device"])  # this one's device
    runtime.report_errors(path, resumes)
    saved, source = checkpoint.start_from(path, settings)  # None, None from scratch
    globals().update(settings, device=own, dtype=pick_dtype(settings["dtype"], own))
    lr_decay_iters, penalty_iters = lr_decay_iters or max_iters, penalty_iters or max_iters
    if min_lr > learning_rate:
        fail(f"min_lr={min_lr}: must be at most learning_rate={learning_rate}")
    if max_seconds and not max_iters:
        fail("max_iters=0: must be at least 1 with max_seconds")
    if fsdp and not DDP:
        fail("fsdp=True: shards a model over processes; start them with torchrun, or leave it out")

    device_type, half = device.split(":")[0], dtype != "float32"
    autocast = torch.autocast(device_type, getattr(torch, dtype), half, cache_enabled=not fsdp)
    micro_steps = math.ceil(gradient_accumulation_steps / WORLD_SIZE)
    if (steps := micro_steps * WORLD_SIZE) != gradient_accumulation_steps:
        print(f"gradient_accumulation_steps={steps}, to share among {WORLD_SIZE}")
    tokens_per_iter = steps * batch_size * block_size

    # The data, the model and its optimizers.
    if MASTER:
        prepare_missing(Path("data", dataset))
    agree()  # the others wait for it
    tokenizer, data = load_data(Path("data", dataset), block_size)  # the splits train and val
    torch.manual_seed(seed)
    config = {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}
    if saved is None:
        raw_model = ParallelEncoderDecoder(ModelConfig(vocab_size=tokenizer.vocab_size, **config))
    else:
        require_vocabulary(saved, source, tokenizer, dataset)
        raw_model = checkpoint.build_model(saved, source, **config)
    runtime.place(raw_model, device, fsdp)
    adamw = dict(lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay)
    muon = dict(lr=learning_rate, momentum=muon_momentum, weight_decay=muon_weight_decay)
    optimizers = configure_optimizers(raw_model, adamw, muon if optimizer == "muon" else None)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    if resumes and not eval_only:
        restore(optimizers, saved.pop("optimizers"))
        scaler.load_state_dict(saved["scaler"] or scaler.state_dict())
except (ValueError, OSError, RuntimeError) as error:  # the last: no memory
    if (DDP and "gloo" in str(error)) or getattr(error, "errno", 0) in runtime.UNWRITTEN:
        raise  # another process failed and said why, or stdout did
    fail(error)
model = torch.compile(raw_model) if compile and compiler_works(device) else raw_model
model = DistributedDataParallel(model) if DDP and not fsdp else model
params, has_experts = list(raw_model.parameters()), raw_model.config.n_expert > 0
evaluates = MASTER or fsdp  # a model in shares needs all of them, and all compute the same
statistics = autocast(expert_statistics)  # of the masks, in the precision of training


def get_batch(split: str, *key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and targets, (batch_size, block_size) each; the key seeds dropout, too."""
    rng = np.random.default_rng([seed, *key])
    starts = rng.integers(len(data[split]) - block_size, size=(batch_size, 1))
    torch.manual_seed(int(rng.integers(2**63)))
    return to_device(data[split][starts + np.arange(block_size + 1)])  # one gather


def to_device(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (B, T + 1) of tokens as inputs and targets (B, T) on the device."""
    on_cuda, windows = device_type == "cuda", torch.from_numpy(windows.astype(np.int64))
    windows = (windows.pin_memory() if on_cuda else windows).to(device, non_blocking=on_cuda)
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()  # in inference_mode what fsdp gathers could not be trained
def evaluate(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """The model's metrics in evaluation, their mean over all tokens of the batches."""
    sums, tokens = Counter(), 0
    with evaluation(raw_model.modules()):
        for x, y in batches:
            with autocast:
                metrics = raw_model(x, y).metrics
            tokens += y.numel()
            sums.update({name: value * y.numel() for name, value in metrics.items()})
    return {name: value.item() / tokens for name, value in sums.items()}


def estimate_loss(split: str) -> float:
    """Cross-entropy over eval_iters batches of a split, the same ones at every evaluation."""
    key = 1 + list(data).index(split)  # 0 is training
    loss = evaluate(get_batch(split, key, k) for k in range(eval_iters))["cross_entropy"]
    return agree(loss)[0] if fsdp else loss  # so that all see it improve, or none


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
    share = min(1.0, it / max(1, penalty_iters))
    exponential = math.expm1(5 * share) / math.expm1(5)
    return {"constant": 1.0, "linear": share, "exponential": exponential}[penalty_schedule]


def save_checkpoint(is_best: bool) -> None:
    """Writes out_dir/ckpt.pt. ckpt_best.pt is there where the best one is an older one."""
    global saved_is_best, saved_iter
    state = dict(iter_num=iter_num, seconds=seconds, config=settings, tokenizer=asdict(tokenizer))
    state |= dict(best_val_loss=best[0], best_iter=best[1], is_best=is_best)
    state |= dict(decisions=decisions, measured=measured, model_args=asdict(raw_model.config))
    state |= dict(begun_from=run.get("begun_from", init_from))
    state |= dict(model=raw_model.state_dict(), scaler=scaler.state_dict())
    state |= dict(optimizers=[opt.state_dict() for opt in optimizers])
    state = gather(state, keep=MASTER)  # plain dicts, too
    if MASTER:
        with runtime.writing(path):
            checkpoint.save(path, state, keep_best=saved_is_best and not is_best)
    saved_is_best, saved_iter = is_best, iter_num


def log_iteration(logged: torch.Tensor) -> None:
    """Shows an iteration, with the mean time of those since the last one that was shown."""
    global last, last_iter
    if DDP:
        dist.all_reduce(logged)
    loss, *experts_on = (logged / WORLD_SIZE).tolist()[: 1 + has_experts]  # waits for the device
    now = time.perf_counter()
    dt, last, last_iter = (now - last) / (iter_num + 1 - last_iter), now, iter_num + 1
    left = round(max_seconds - seconds if max_seconds else dt * (max_iters - last_iter))
    done, mfu = schedule_iter / max_iters, estimate_mfu(raw_model, micro_steps * batch_size, dt)
    log.show_iteration(iter_num, loss, dt, tokens_per_iter / dt, mfu, left, done, *experts_on)


def not_finite(what: str, loss: float, may_pass: bool = False) -> None:
    """Says that something is not finite, and ends the run unless it may pass."""
    line = f"iter {iter_num}: the {what} is not finite (loss {loss:.4g}, gradient norm "
    line += f"{norm:.4g}, learning rate {lr:.3g})"
    if not may_pass:
        how = "lower --learning_rate" + (" or --muon_lr_ratio" if optimizer == "muon" else "")
        how = how if iter_num > max(0, resumed_at) else "no step was made: look at its weights"
        end_run(f"{line}; what was saved is as it was; {how}")
    print(f"{line}; step skipped")


# Where the run is: at its start, or where the checkpoint has it.
run = checkpoint.NEW | (saved if saved and (resumes or eval_only) else {})
iter_num, start_seconds = run["iter_num"], run["seconds"]
best = (run["best_val_loss"], run.get("best_iter", 0))  # the validation loss, and its iteration
measured = [zlib.crc32(data["val"]), eval_iters, batch_size, block_size, seed]  # what it stands for
saved_is_best, decisions = run["is_best"], run.get("decisions")  # decisions: which experts were on
resumed_at = saved_iter = iter_num if resumes and not eval_only else -1
if best[0] < math.inf and run.get("measured", measured) != measured and evaluates and not eval_only:
    now, (raw_model, kept) = raw_model, checkpoint.load_best(path, saved_is_best)
    runtime.place(raw_model, device, fsdp)
    best, raw_model = (estimate_loss("val"), kept["iter_num"]), now
    print(f"the evaluation data has changed: at best {best[0]:.4f}, at step {best[1]}")
if not eval_only:
    log.start(settings, iter_num if resumes else None)
size = f"{raw_model.num_params():,} parameters, {arch} on {device} in {dtype}"
passes = f", reads the text {max_iters * tokens_per_iter / len(data['train']):.1f} times"
passes = "" if max_seconds or eval_only else passes
print(f"{size}, {tokens_per_iter:,} tokens per iteration{passes}")
estimate_mfu(raw_model, 1, 1)  # measures the machine's peak, before the clock starts
signals, losses = [] if eval_only else runtime.catch_signals(), {}  # of the last evaluation
start = last = time.perf_counter()
last_iter, bad_steps, norm = iter_num, 0, math.nan  # bad steps in a row
while True:
    stop, seconds = agree(max(signals, default=0), start_seconds + time.perf_counter() - start)
    # Where the schedules are: at this iteration, or as far as the time is spent.
    schedule_iter = max_iters * min(1.0, seconds / max_seconds) if max_seconds else iter_num
    lr, penalty_scale = get_lr(schedule_iter), get_penalty_scale(schedule_iter)
    finished = eval_only or schedule_iter >= max_iters

    # Evaluate, and save.
    due = (finished or iter_num % eval_interval == 0) and iter_num != resumed_at
    if due and evaluates:
        losses = {f"{split}_loss": estimate_loss(split) for split in data}
        shown = ", ".join(f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in losses.items())
        print(f"step {iter_num}: {shown}")
        if not math.isfinite(losses["val_loss"]):
            not_finite("validation loss", losses["val_loss"])
        if not eval_only:
            experts, decisions = statistics(raw_model, data["val"], penalty_scale, decisions)
            log.add(settings, {"iter": iter_num, **losses, "lr": lr, "seconds": seconds, **experts})
            improved = iter_num > 0 and losses["val_loss"] < best[0]
            best = (losses["val_loss"], iter_num) if improved else best
            if improved or (always_save_checkpoint and iter_num > 0):
                save_checkpoint(is_best=improved)
        last, last_iter = time.perf_counter(), iter_num  # an evaluation is not time of training
    if finished or stop:
        break

    # Forward and backward, a micro-step at a time.
    logged = torch.zeros(2, device=device)  # the loss, and the share of experts on
    for micro_step in range(micro_steps):
        x, y = get_batch("train", 0, iter_num, micro_step * WORLD_SIZE + RANK)
        if DDP and not fsdp:  # averages the gradients once, in the last micro-step
            model.require_backward_grad_sync = micro_step == micro_steps - 1
        with autocast:
            output = model(x, y, penalty_scale=torch.full((), penalty_scale, device=device))
        scaler.scale(output.loss / micro_steps).backward()
        for k, name in enumerate(("cross_entropy", "experts_on")[: 1 + has_experts]):
            logged[k] += output.metrics[name] / micro_steps
    for opt in optimizers:
        scaler.unscale_(opt)

    # Step, if the gradient is finite. Its norm is the same in all processes.
    norm = grad_norm(params)
    if math.isfinite(norm):
        bad_steps = 0
        if grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr * muon_lr_ratio if isinstance(opt, Muon) else lr
            opt.step()
    else:
        bad_steps += scaler.get_scale() <= 1  # in float16 what is scaled less may pass
        (bad_loss,) = agree(not math.isfinite(output.loss.item() + logged[0].item()))
        not_finite("loss" if bad_loss else "gradient", logged[0], not bad_loss and bad_steps < 5)
    scaler.update()
    raw_model.zero_grad(set_to_none=True)

    if iter_num % log_interval == 0:
        log_iteration(logged)
    iter_num += 1

runtime.HANDLERS.close()
older = path.with_name("ckpt_best.pt").exists() and not (always_save_checkpoint or saved_is_best)
stop, older = agree(max([stop, *signals]), older)
if stop:
    if evaluates and saved_iter != iter_num:
        save_checkpoint(is_best=False)
    again = log.command_to_resume()
    print(f"stopped after {iter_num} iterations; saved {path}; to go on:\n  {again}")
    runtime.leave(128 + int(stop))
if evaluates:
    if not eval_only and (0 < saved_iter < iter_num or older):  # the end is not worth keeping
        raw_model, kept = checkpoint.load_best(path, saved_is_best, take_back=MASTER)
        runtime.place(raw_model, device, fsdp)
        iter_num, seconds = kept["iter_num"], kept["seconds"]
        print(f"back to step {iter_num}, the best one that {out_dir} has")
    val = evaluate(map(to_device, consecutive_windows(data["val"], block_size, batch_size)))
    loss, took = val.pop("cross_entropy"), f"after {iter_num} iterations, {seconds:.1f} s"
    shown = f"experts on {val['experts_on']:.1%}, " if has_experts else ""
    print(f"whole validation split: loss {loss:.4f}, {shown}{took}")
    if eval_only:
        runtime.leave(0)
    log.add(settings, {"iter": iter_num, "whole_val_loss": loss, **val, "seconds": seconds})
    follows = decay_lr and min_lr < learning_rate and 0 == max_seconds == settings["lr_decay_iters"]
    if follows and losses.get("val_loss", 0.0) > 1.01 * best[0]:
        shorter = f"a run with --max_iters={best[1]} is likely to be better"
        advice = shorter if best[1] >= 2 * warmup_iters else "try more text, or more dropout"
        print(f"the validation loss has risen since step {best[1]}: {advice}")
    if not fsdp:  # which would gather all layers for each token
        show_sample(raw_model, tokenizer, seed)
    if path.exists():
        print("More of it:", log.command_to_sample(out_dir, tokenizer.prompt))
runtime.leave(0)

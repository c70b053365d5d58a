"""Tests of train.py as two processes: DDP and FSDP, beside one process, and under torchrun."""

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from common import (
    LONG,
    ROOT,
    TINY,
    evaluations,
    figures,
    losses,
    run_two,
    start,
    succeed,
    weights,
)

TORCHRUN = (f"{torch.__path__[0]}/distributed/run.py", "--standalone", "--nproc_per_node=2")


def test_two_processes_repeat_one_with_twice_the_accumulation(twice_accumulated):
    folder, args, printed = twice_accumulated
    done = run_two(folder, *args, "--gradient_accumulation_steps=1", "--out_dir=two")
    assert "gradient_accumulation_steps=2, to share among 2" in done.stdout
    for mine, theirs in zip(losses(folder / "two"), losses(folder / "one"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)

    def printed_losses(text):
        return [float(x) for x in re.findall(r"^iter \d+: loss (\S+),", text, re.M)]

    assert printed_losses(done.stdout) == pytest.approx(printed_losses(printed), abs=1.1e-4)
    assert len(printed_losses(printed)) == 20


@pytest.mark.parametrize(
    "fields",
    [
        "--n_layer=2 --n_expert=8 --l1_weight=0.05 --lateral=True --shared_kv=True "
        "--decoder_self_attention=False --position_embedding=rotary --token_shift=True",
        "--n_layer=2 --arch=decoder_only --optimizer=adamw --bias=True",
    ],
)
def test_shards_repeat_ddp_and_their_checkpoints_are_the_same(fields, workplace):
    """fsdp: the first half in shares, the second in one process; then the other way round. Both
    beside one process, and beside DDP, whose first half is that of one process."""
    short = ("--max_iters=10", "--lr_decay_iters=10", "--eval_interval=5")
    args = (*TINY, *short, *fields.split(), "--gradient_accumulation_steps=4")
    half, resumed = (*args, "--max_iters=5"), (*args, "--init_from=resume")
    succeed(workplace, "train.py", *args, "--out_dir=one")
    succeed(workplace, "train.py", *half, "--out_dir=shards_last")
    shutil.copytree(workplace / "shards_last", workplace / "ddp")
    run_two(workplace, *resumed, "--out_dir=ddp")
    printed = run_two(workplace, *half, "--fsdp", "--out_dir=shards_first")
    assert not printed.stderr
    succeed(workplace, "train.py", *resumed, "--out_dir=shards_first")
    run_two(workplace, *resumed, "--fsdp", "--out_dir=shards_last")
    for name, reference in product(("shards_first", "shards_last"), ("one", "ddp")):
        found, expected = evaluations(workplace / name), evaluations(workplace / reference)
        if reference == "one":
            del found[2]  # of the whole split, where the first half ended
        for mine, theirs in zip(found, expected, strict=True):
            for loss in ("train_loss", "val_loss", "whole_val_loss"):
                assert mine.get(loss) == pytest.approx(theirs.get(loss), abs=1e-5)
    assert all(type(w) is torch.Tensor for w in weights(workplace / "shards_last").values())
    last = losses(workplace / "ddp")[-1][-1]
    again = run_two(workplace, *resumed, "--fsdp", "--out_dir=shards_last", "--eval_only")
    shown = re.search(r"^whole validation split: loss (\S+),", again.stdout, re.M)[1]
    assert float(shown) == pytest.approx(last, abs=1e-4)


SHARES = """
import runpy, sys, torch
step, steps = torch.optim.AdamW.step, 0
def counted(self):
    global steps
    step(self)
    steps += 1
    if steps < 2:  # Muon's turn comes after this
        return
    train = sys._getframe(2).f_globals
    params = list(train["raw_model"].parameters())
    held = {"parameters": params, "gradients": [p.grad for p in params if p.grad is not None]}
    held["optimizers"] = [v for opt in train["optimizers"] for of_p in opt.state.values()
                          for v in of_p.values() if v.dim()]
    for name, values in held.items():
        here = sum((v.to_local() if hasattr(v, "to_local") else v).numel() for v in values)
        print(name, here, "of", sum(v.numel() for v in values), file=sys.stderr)
torch.optim.AdamW.step = counted
"""


@pytest.mark.parametrize("args", [("--fsdp",), ()])
def test_each_process_holds_a_share_with_fsdp_and_all_without(args, workplace):
    run_it = f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    (workplace / "shares.py").write_text(SHARES + run_it)
    args = (*TINY, "--max_iters=2", "--n_embd=64", "--gradient_accumulation_steps=2", *args)
    done = run_two(workplace, *args, script=workplace / "shares.py")
    shares = re.findall(r"^(parameters|gradients|optimizers) (\d+) of (\d+)$", done.stderr, re.M)
    assert len(shares) == 2 * 3
    for _, here, whole in shares:
        expected = pytest.approx(0.5, abs=0.02) if "--fsdp" in args else 1
        assert int(here) / int(whole) == expected


@contextlib.contextmanager
def two_that_train(folder, *args):
    """train.py as two processes which train: the torchrun process, and the ids of the two."""
    args = (*TINY, *LONG, "--gradient_accumulation_steps=2", *args)
    torchrun = start(folder, *TORCHRUN, str(ROOT / "train.py"), *args)
    watchdog = threading.Timer(100, torchrun.terminate)  # which it passes on to the two
    watchdog.start()
    try:
        printed = ""
        for line in torchrun.stdout:
            printed += line
            if line.startswith("iter 12:"):
                break
        assert torchrun.poll() is None, printed
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
        yield torchrun, [int(pid) for pid in children.split()]
    finally:
        watchdog.cancel()
        torchrun.terminate()
        torchrun.stdout.read()
        torchrun.wait(60)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_others_and_the_run_resumes(victim, workplace):
    args = ("--eval_interval=10",)
    with two_that_train(workplace, *args) as (torchrun, workers):
        began = time.monotonic()
        os.kill(workers[victim], signal.SIGKILL)
        printed = torchrun.stdout.read()
        assert torchrun.wait(60) != 0 and time.monotonic() - began < 60
    said = (
        f"train.py: process {1 - victim} has lost another one; --init_from=resume goes" in printed
    )
    # Once in some forty times gloo does not tell; then torchrun ends the other one after 30 s.
    assert said or time.monotonic() - began > 29
    saved = torch.load(workplace / "out/ckpt.pt", weights_only=True)["iter_num"]
    args = (*TINY, *LONG, "--gradient_accumulation_steps=2", f"--max_iters={saved + 10}", *args)
    succeed(workplace, "train.py", *args, "--init_from=resume")  # now as one process
    succeed(workplace, "train.py", *args, "--out_dir=undisturbed")
    mine, theirs = figures(workplace / "out"), figures(workplace / "undisturbed")
    for loss in ("train_loss", "val_loss", "whole_val_loss"):
        assert mine[saved + 10][loss] == pytest.approx(theirs[saved + 10][loss], abs=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number, args", [
    (signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGTERM, ("--fsdp",)),
])  # fmt: skip
def test_a_signal_to_torchrun_saves_too(number, args, workplace):
    with two_that_train(workplace, *args) as (torchrun, _):
        torchrun.send_signal(number)
        printed = torchrun.stdout.read()
        assert torchrun.wait(60) != 0
    stopped = int(re.search(r"stopped after (\d+) iterations; saved out/ckpt.pt", printed)[1])
    assert torch.load(workplace / "out/ckpt.pt", weights_only=True)["iter_num"] == stopped
    assert "torchrun --standalone --nproc_per_node=2" in printed and "lost" not in printed
    args = (*LONG, "--gradient_accumulation_steps=2", *args, f"--max_iters={stopped + 2}")
    done = run_two(workplace, *TINY, *args, "--init_from=resume")
    assert f"saved after {stopped} iterations" in done.stdout and "More of it" in done.stdout

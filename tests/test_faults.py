"""Tests of train.py under signals, full disks, read-only folders, locks and divergence."""

import ctypes
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from common import (
    LONG,
    OFFLINE,
    ROOT,
    TINY,
    evaluations,
    fails_with,
    run,
    same_run,
    start,
    start_and_signal,
    succeed,
    weights,
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, workplace):
    printed, status = start_and_signal(workplace, number, *LONG, "--out_dir=out-a")
    assert status == 128 + number and "Traceback" not in printed
    stopped = int(re.search(r"stopped after (\d+) iterations; saved out-a/ckpt.pt", printed)[1])
    command = printed.splitlines()[-1].split()
    assert command[:2] == ["python", str(ROOT / "train.py")] and "--init_from=resume" in command
    end = f"--max_iters={stopped + 5}"
    succeed(workplace, "train.py", *command[2:], end)
    succeed(workplace, "train.py", *TINY, *LONG, "--out_dir=out-b", end)
    assert same_run(workplace / "out-a", workplace / "out-b")


def test_ctrl_c_keeps_the_best_checkpoint(workplace):
    """Where only improvements are saved, what is saved last must not replace the best."""
    args = (*LONG, "--always_save_checkpoint=False", "--eval_interval=300")
    for again in ((), ("--init_from=resume", "--eval_interval=1500")):
        after = "iter " if again else "iter 306:"  # far from the next evaluation
        printed, status = start_and_signal(workplace, signal.SIGINT, *args, *again, after=after)
        assert status == 130
        stopped = int(re.search(r"stopped after (\d+) iterations", printed)[1])
        last, best = (
            torch.load(workplace / "out" / name, weights_only=True)
            for name in ("ckpt.pt", "ckpt_best.pt")
        )
        rows = [row for row in evaluations(workplace / "out") if row["iter"] > 0]
        least = min(rows, key=lambda row: row["val_loss"])
        assert best["iter_num"] == least["iter"] < stopped == last["iter_num"]
        assert last["best_val_loss"] == least["val_loss"]
    args = ("--checkpoint=ckpt_best.pt", "--device=cpu", "--max_new_tokens=5")
    assert succeed(workplace, "sample.py", *args).count("---------------") == 3


def test_a_stop_right_after_the_best_evaluation_saves_nothing_twice(workplace):
    """The best checkpoint stays the only one. The signal comes in an evaluation."""
    args = ("--max_iters=100000", "--eval_interval=1", "--eval_iters=200", "--warmup_iters=100000")
    printed, status = start_and_signal(workplace, signal.SIGTERM, *args, after="step 3:")
    stopped = int(re.search(r"stopped after (\d+) iterations", printed)[1])
    saved = torch.load(workplace / "out/ckpt.pt", weights_only=True)
    assert status == 143 and saved["iter_num"] == stopped
    best = (workplace / "out/ckpt_best.pt").exists()
    rows = evaluations(workplace / "out")
    *before, last = [row["val_loss"] for row in rows if row["iter"] > 0]  # two can be equal
    assert saved["is_best"] == (last < min(before)) != best


def test_kill_9_loses_nothing_that_was_saved(workplace):
    args = (*LONG, "--eval_interval=20")
    printed, status = start_and_signal(
        workplace, signal.SIGKILL, *args, "--out_dir=killed", after="step 40:"
    )
    args = (*TINY, *args)
    assert status == -signal.SIGKILL
    saved = torch.load(workplace / "killed/ckpt.pt", weights_only=True)["iter_num"]
    end = f"--max_iters={saved + 10}"
    succeed(workplace, "train.py", *args, end, "--out_dir=killed", "--init_from=resume")
    succeed(workplace, "train.py", *args, end, "--out_dir=undisturbed")
    assert same_run(workplace / "killed", workplace / "undisturbed")


def limit_files(size):
    """For a child process: files cannot grow beyond `size` bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("full", ["ckpt.pt", "log.jsonl", "no log"])
def test_a_full_disk_leaves_what_was_there(full, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "a", symlinks=True)
    out = tmp_path / "a/whole"
    if full == "no log":
        (out / "log.jsonl").unlink()
    log = (out / "log.jsonl").read_bytes() if full != "no log" else b""
    before = (out / "ckpt.pt").read_bytes()
    size = len(before) // 2 if full == "ckpt.pt" else len(log) + 90  # less than a row
    file = "ckpt.pt" if full == "ckpt.pt" else "log.jsonl"
    fails_with(
        f"whole/{file}: cannot be written: File too large",
        tmp_path / "a", "train.py", *TINY, "--out_dir=whole", "--init_from=resume",
        "--max_iters=40", first=limit_files(size),
    )  # fmt: skip
    assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))
    after = (out / "log.jsonl").read_bytes()
    assert after.startswith(log) if full == "ckpt.pt" else after == log
    assert all(json.loads(row) for row in after.splitlines())


def test_a_full_disk_leaves_no_half_data_set(workplace):
    (workplace / "text.txt").write_text("ab" * 1000)
    (workplace / "data").unlink()
    args = ("--input_file=text.txt", "--dataset=b")
    fails_with("File too large", workplace, "prepare_shakespeare.py", *args,
               first=limit_files(100))  # fmt: skip
    assert not list((workplace / "data/b").iterdir())


def bound_by_permissions():
    """In a child process: root gives up what it may do more than others (Linux, capset(2))."""
    version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(ctypes.byref(version_3), ctypes.byref(none))


@pytest.mark.skipif(sys.platform != "linux", reason="has no capabilities to give up")
def test_a_read_only_folder_leaves_what_was_there(trained, text, tmp_path):
    shutil.copytree(trained[0] / "whole", tmp_path / "out")
    shutil.copytree(trained[0] / "data/shakespeare_char", tmp_path / "data/shakespeare_char")
    (tmp_path / "input.txt").write_text(text[::-1])
    folders, log = (
        (tmp_path / "out", tmp_path / "data/shakespeare_char"),
        tmp_path / "out/log.jsonl",
    )

    def files():
        return {path: path.read_bytes() for f in folders for path in f.iterdir() if path != log}

    before, logged = files(), log.read_bytes()
    for folder in folders:
        folder.chmod(0o555)
    for said, script, *args in (
        ("out/ckpt.pt: cannot be written: Permission denied", "train.py", *TINY,
         "--init_from=resume", "--max_iters=30"),
        ("out: cannot be written: Permission denied", "train.py", *TINY),
        ("Permission denied", "prepare_shakespeare.py", "--input_file=input.txt"),
    ):  # fmt: skip
        fails_with(said, tmp_path, script, *args, first=bound_by_permissions)
        assert files() == before and log.read_bytes().startswith(logged)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line(trained):
    before = (trained[0] / "whole/ckpt.pt").read_bytes()
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--out_dir=whole"]
    env = {name: value for name, value in OFFLINE.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--max_iters=30", "--init_from=resume"], cwd=trained[0], env=env,
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    said = "its output cannot be written; --init_from=resume goes on from whole/ckpt.pt"
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert (trained[0] / "whole/ckpt.pt").read_bytes() == before


def test_a_folder_that_cannot_be_written_gets_one_line(workplace):
    (workplace / "file").write_text("")
    for out_dir in ("file", "/proc/absent"):
        fails_with("out_dir=.*: cannot be used: ", workplace, "train.py", *TINY,
                   f"--out_dir={out_dir}")  # fmt: skip


def test_two_runs_into_one_folder(workplace):
    endless = ("--max_iters=100000000", "--eval_interval=100000000", "--log_interval=100000000")
    first = start(workplace, "train.py", *TINY, *endless)
    try:
        while "iter 0:" not in first.stdout.readline():
            assert first.poll() is None
        fails_with("out_dir='out': another run is writing there", workplace, "train.py", *TINY)
    finally:
        first.kill()
        first.wait(60)
    succeed(workplace, "train.py", *TINY, "--max_iters=1")  # a killed run leaves no lock


POISON = """
import runpy, sys, torch, model
calls, forward = 0, model.ParallelEncoderDecoder.forward
def poisoned(self, idx, targets=None, **how):
    global calls
    output = forward(self, idx, targets, **how)
    if self.training:
        calls += 1
        if calls in {steps}:
            {what}
    return output
model.ParallelEncoderDecoder.forward = poisoned
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAN_GRADIENT = "output = output._replace(loss=output.loss + (self.tok_emb.weight * 0).sum().sqrt())"
NAN_LOSS = "output.metrics['cross_entropy'].fill_(torch.nan); " + NAN_GRADIENT


def poisoned(folder, steps, what, *args):
    """A script that runs train.py with a model which does `what` in these steps of training."""
    argv, script = [str(ROOT / "train.py"), *TINY, *args], folder / "poisoned.py"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    script.write_text(code + POISON.format(steps=steps, what=what, argv=argv), "utf-8")
    return script


def test_a_second_ctrl_c_ends_at_once(trained, workplace):
    """Where the first one waits for an iteration that takes very long."""
    shutil.copytree(trained[0] / "whole", workplace / "out")
    before = (workplace / "out/ckpt.pt").read_bytes()
    more = ("--max_iters=30", "--init_from=resume")
    script = poisoned(workplace, {2}, "__import__('time').sleep(40)", *more)
    printed, status = start_and_signal(
        workplace, signal.SIGINT, after="iter 20:", times=2, script=script
    )
    assert status == -signal.SIGINT and "stopped after" not in printed
    assert (workplace / "out/ckpt.pt").read_bytes() == before
    assert "step 30: " in succeed(workplace, "train.py", *TINY, *more)


def test_a_gradient_that_is_not_finite_skips_its_step(workplace):
    done = run(workplace, poisoned(workplace, {4, 6, 7, 8, 9}, NAN_GRADIENT))
    assert done.returncode == 0, done.stderr
    skipped = re.findall(r"^iter (\d+): the gradient is not finite \(.*\); step skipped$",
                         done.stdout, re.M)  # fmt: skip
    assert skipped == ["3", "5", "6", "7", "8"]  # four in a row are borne
    assert all(w.isfinite().all() for w in weights(workplace / "out").values())


@pytest.mark.parametrize("steps, what, at", [
    ({14, 15, 16, 17, 18}, NAN_GRADIENT, 17), ({16}, NAN_LOSS, 15),
])  # fmt: skip
def test_divergence_stops_the_run_and_keeps_the_checkpoint(steps, what, at, workplace):
    done = run(workplace, poisoned(workplace, steps, what))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    name = "loss" if what is NAN_LOSS else "gradient"
    assert re.search(
        rf"iter {at}: the {name} is not finite \(loss .*, gradient norm nan, learning rate .*\); "
        "what was saved is as it was", line
    )  # fmt: skip
    saved = torch.load(workplace / "out/ckpt.pt", weights_only=True)
    assert saved["iter_num"] == 10 and all(w.isfinite().all() for w in saved["model"].values())

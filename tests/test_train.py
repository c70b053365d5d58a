"""Tests of a run of train.py: what it prints and logs, its schedules, mistakes in one line."""

import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch

from checkpoint import load_checkpoint
from common import (
    LONG,
    ROOT,
    TINY,
    evaluations,
    fails_with,
    losses,
    same_run,
    start_and_signal,
    succeed,
    weights,
)


def test_a_run_shows_what_it_does(trained):
    folder, printed = trained
    steps = re.findall(r"^step (\d+): train loss (\d\.\d{4}), val loss (\d\.\d{4})$", printed, re.M)
    assert [int(step) for step, *_ in steps] == [0, 10, 20]
    assert float(steps[0][2]) == pytest.approx(math.log(vocab_size(folder)), rel=0.03)
    assert float(steps[2][2]) < float(steps[0][2]) - 0.1
    iters = re.findall(
        r"^iter (\d+): loss (\d\.\d{4}), time [\d.]+ms, [\d,]+ tok/s, mfu \d+%, \d+:\d\d left$",
        printed,
        re.M,
    )
    assert [int(i) for i, _ in iters] == list(range(20))
    assert "A sample:\n" in printed and f"python {ROOT}/sample.py --out_dir=whole\n" in printed
    tokens = json.loads((folder / "data/shakespeare_char/meta.json").read_text("utf-8"))["tokens"]
    assert f" per iteration, reads the text {1280 / tokens['train']:.1f} times\n" in printed
    whole = float(re.search(r"^whole validation split: loss (\S+),", printed, re.M)[1])
    rows = evaluations(folder / "whole")
    assert [row["iter"] for row in rows] == [0, 10, 20, 20]
    assert f"{rows[1]['val_loss']:.4f}" == steps[1][2]
    assert rows[-1]["whole_val_loss"] == pytest.approx(whole, abs=1e-4)
    names = {path.name for path in (folder / "whole").iterdir()}
    assert names == {".lock", "ckpt.pt", "log.jsonl"}


def vocab_size(folder):
    return json.loads((folder / "data/shakespeare_char/meta.json").read_text("utf-8"))["vocab_size"]


@torch.no_grad()
def test_the_whole_validation_loss_is_that_of_every_token(trained):
    """Once more, a window at a time; the last window is shorter."""
    folder, _ = trained
    model = load_checkpoint(folder / "whole/ckpt.pt")[0].eval()
    val = np.fromfile(folder / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64)
    val = torch.from_numpy(val)[None]
    total, count = 0.0, 0
    for start in range(0, val.size(1) - 1, 16):
        y = val[:, start + 1 : start + 17]
        total += model(val[:, start : start + y.size(1)], y).loss.item() * y.numel()
        count += y.numel()
    assert count == val.size(1) - 1 and count % 16
    assert evaluations(folder / "whole")[-1]["whole_val_loss"] == pytest.approx(total / count)


def test_same_seed_same_run(trained, workplace):
    whole = trained[0] / "whole"
    succeed(workplace, "train.py", *TINY, "--out_dir=again")
    assert same_run(workplace / "again", whole)
    assert losses(workplace / "again") == losses(whole)
    succeed(workplace, "train.py", *TINY, "--out_dir=other", "--seed=1")
    assert not same_run(workplace / "other", whole)


def test_a_run_logs_what_its_experts_do(twice_accumulated):
    folder, args, printed = twice_accumulated
    shown = re.findall(r"^iter .* left, experts on (\d+\.\d)%$", printed, re.M)
    if "n_expert" not in " ".join(args):
        assert not shown and "entropy" not in evaluations(folder / "one")[1]
        return
    assert len(shown) == 20 and all(0 <= float(share) <= 100 for share in shown)
    stacks = 1 if "decoder_only" in " ".join(args) else 2
    rows = evaluations(folder / "one")
    for row in rows[:3]:
        for name in ("entropy", "l1", "experts_on", "near_one", "near_zero"):
            assert np.shape(row[name]) == (1, stacks) and np.min(row[name]) >= 0
        assert ("changed" in row) == (row["iter"] > 0)
    assert re.search(r"^whole validation split: loss \S+, experts on \d+\.\d%,", printed, re.M)
    for row in rows[:3]:  # the penalties' weights at that time
        s = min(1.0, row["iter"] / 15)
        exponential = (math.exp(5 * s) - 1) / (math.exp(5) - 1)
        growths = {"linear": s, "exponential": exponential}
        growth = next((g for n, g in growths.items() if f"--penalty_schedule={n}" in args), 1.0)
        for name in ("l1_weight", "entropy_weight"):
            weight = float((re.findall(rf"--{name}=(\S+)", " ".join(args)) or [0])[0])
            assert row[name] == pytest.approx(growth * weight)
    # Once more, from the checkpoint, on the batch that train.py has for it.
    model, checkpoint = load_checkpoint(folder / "one/ckpt.pt")
    val = np.fromfile(folder / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64)
    starts = np.random.default_rng(0).integers(len(val) - 16, size=(16, 1))
    r = model.expert_masks(torch.from_numpy(val[starts + np.arange(16)])).used
    expected = (r >= 0.5).float().mean(dim=(2, 3, 4))
    assert np.allclose(rows[2]["experts_on"], expected, atol=1e-6)
    assert torch.equal(checkpoint["decisions"], r >= 0.5)


def test_the_penalties_grow_as_their_schedule_says(workplace):
    """Not grown yet, they are no penalties; and a resumed run keeps its schedule."""
    experts = (*TINY, "--n_expert=8")
    late = ("--l1_weight=5.0", "--penalty_schedule=linear", "--penalty_iters=1000000000000000")
    succeed(workplace, "train.py", *experts, "--out_dir=none")
    succeed(workplace, "train.py", *experts, *late, "--out_dir=late")
    succeed(workplace, "train.py", *experts, "--l1_weight=5.0", "--out_dir=full")
    none, late, full = (weights(workplace / name) for name in ("none", "late", "full"))
    assert all(torch.allclose(none[n], late[n], atol=1e-5) for n in none)
    assert max((none[n] - full[n]).abs().max() for n in none) > 1e-3
    args = ("--out_dir=late", "--init_from=resume", "--max_iters=30")
    printed = succeed(workplace, "train.py", *TINY, *args)
    assert "max_iters=30, not 20: where lr_decay_iters, penalty_iters are 0, they follow" in printed
    assert evaluations(workplace / "late")[-2]["l1_weight"] < 1e-5


def test_max_seconds_bounds_a_run_and_stretches_its_schedule(workplace):
    args = (*TINY, "--max_seconds=2", "--eval_interval=40", "--lr_schedule=linear", "--min_lr=0")
    printed = succeed(workplace, "train.py", *args, "--warmup_iters=0")
    *rows, last, _ = evaluations(workplace / "out")
    assert last["iter"] > 40 and 2 <= last["seconds"] < 60 and last["lr"] == 0
    assert [row["iter"] for row in rows] == list(range(0, last["iter"], 40))
    for row in rows:  # far beyond max_iters = 20, the schedule is where the time is
        assert row["lr"] == pytest.approx(0.03 * (1 - row["seconds"] / 2)) and row["lr"] > 0
    assert re.search(r"^iter 10: .* 0:0[0-2] left$", printed, re.M)
    again = succeed(workplace, "train.py", *args, "--init_from=resume")
    assert not re.search(r"^iter \d+: ", again, re.M)  # its time is spent
    succeed(workplace, "train.py", *args, "--init_from=resume", "--max_seconds=2.5")
    assert evaluations(workplace / "out")[-1]["seconds"] >= 2.5


def test_an_earlier_run_is_kept(workplace, trained):
    shutil.copytree(trained[0] / "whole", workplace / "out")
    (workplace / "out/ckpt_best.pt.old").write_text("of a run before it")
    printed, status = start_and_signal(workplace, signal.SIGINT, *LONG, after="iter 0:")
    assert status == 130 and "out/ckpt.pt, of an earlier run, is now ckpt.pt.old" in printed
    assert not same_run(workplace / "out", trained[0] / "whole")
    assert len(evaluations(workplace / "out")) == 1
    for name in ("ckpt.pt", "log.jsonl"):
        kept = (workplace / "out" / f"{name}.old").read_bytes()
        assert kept == (trained[0] / "whole" / name).read_bytes()
    assert not (workplace / "out/ckpt_best.pt.old").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_as_float32_does(dtype, trained, workplace):
    printed = succeed(workplace, "train.py", *TINY, f"--dtype={dtype}")
    assert f"on cpu in {dtype}" in printed
    scaler = torch.load(workplace / "out/ckpt.pt", weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "float16")
    *_, half = evaluations(workplace / "out")
    *_, full = evaluations(trained[0] / "whole")
    assert half["whole_val_loss"] != full["whole_val_loss"]
    assert half["whole_val_loss"] == pytest.approx(full["whole_val_loss"], rel=0.02)


@pytest.mark.parametrize("fails", ["--beta1=2.0", "--init_from=absent"])
def test_a_run_that_cannot_start_leaves_the_earlier_one(fails, workplace):
    (workplace / "out").mkdir()
    (workplace / "out/ckpt.pt").write_text("of an earlier run")
    fails_with("Invalid beta|init_from='absent'", workplace, "train.py", *TINY, fails)
    assert (workplace / "out/ckpt.pt").read_text() == "of an earlier run"


@pytest.mark.parametrize(
    "args, said",
    [
        (("--n_head=3",), "n_head=3: must be a divisor of n_embd=16"),
        (("--arch=gpt",), "arch='gpt': must be one of parallel, decoder_only"),
        (("--dataset=odd",), "data/odd: val.bin has not as many tokens as meta.json says"),
        (("--dataset=beyond",), "data/beyond: train.bin has ids beyond the vocabulary"),
        (
            ("--dataset=sub/shakespeare_char",),
            "data/sub/shakespeare_char: there is no data set; make",
        ),
        (("--dataset=absent",), "data/absent: there is no data set; make one: python .*prepare_"),
        (("--dataset=cut",), "data/cut: val.bin has not as many tokens as meta.json says; prepare"),
        (("--seed=99999999999999999999999",), "seed=9{23}: must be finite, and below 9.22e"),
        (("--max_seconds=1e999",), "max_seconds=inf: must be finite, and below 1e"),
        (
            ("--out_dir=~nobody-of-this-name/a",),
            "out_dir: '~nobody.*: there is no such",
        ),
        (("--beta1=2.0",), "Invalid beta"),
        (("--weight_decay=-1",), "weight_decay=-1.0: must be at least 0"),
        (("--learning_rate=1e30", "--grad_clip=0"), "iter .*: the .* is not finite .*; lower"),
        (
            ("--learning_rate=1e30", "--optimizer=adamw", "--eval_interval=1"),
            r"iter 1: the validation loss is not finite \(loss (nan|inf), gradient norm "
            r"\d.*, learning rate \S+\); what was saved is as it was; lower",
        ),
        (("--batch_size=1000000000000000",), "not enough memory; lower --batch_size .* allocate"),
        (("--init_from=resume", "--out_dir=absent"), "absent/ckpt.pt: there is no checkpoint"),
        (
            ("--init_from=gpt2",),
            "init_from='gpt2': must be scratch, resume, or the path of a run",
        ),
        (("--device=tpu",), "device='tpu': "),
        (("--optimizer=sgd",), "optimizer='sgd': must be one of muon, adamw"),
        (("--muon_momentum=1.0",), "momentum=1.0: must be at least 0 and less than 1"),
        (("--min_lr=-1.0",), "min_lr=-1.0: must be at least 0"),
        (("--min_lr=1.0",), "min_lr=1.0: must be at most learning_rate=0.03"),
        (("--fsdp",), "fsdp=True: shards a model over processes; start them with torchrun"),
        (("--max_seconds=1.0", "--max_iters=0"), "max_iters=0: must be at least 1 with"),
        (("--lr_schedule=step",), "lr_schedule='step': must be one of cosine, linear"),
        (("--max_seconds=-1",), "max_seconds=-1.0: must be at least 0"),
        (("--batch_size=0",), "batch_size=0: must be at least 1"),
        (("--block_size=9999",), "fewer than block_size"),
    ],
)
def test_a_mistake_in_training_gets_one_line(args, said, tmp_path, prepared):
    workplace, data = tmp_path, tmp_path / "data"
    shutil.copytree(prepared / "data", data)
    shutil.copytree(data / "shakespeare_char", data / "cut")
    (data / "cut/val.bin").write_bytes((data / "cut/val.bin").read_bytes()[:-2])
    for name, part, change in (
        ("odd", "val", lambda ids: ids + b"x"),
        ("beyond", "train", lambda ids: ids[:-2] + b"\xff\xff"),
    ):
        shutil.copytree(data / "shakespeare_char", data / name)
        path = data / name / f"{part}.bin"
        path.write_bytes(change(path.read_bytes()))
    status = 1 if "memory" in said else 2
    fails_with(said, workplace, "train.py", *TINY, *args, status=status)

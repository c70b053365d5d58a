"""Tests of --init_from=resume: it repeats the undisturbed run; and which settings it takes."""

import re
import shutil
import signal
import textwrap

import numpy as np
import pytest
import torch

from common import (
    ROOT,
    TINY,
    evaluations,
    fails_with,
    figures,
    same_run,
    start_and_signal,
    succeed,
    weights,
)


def test_resume_repeats_the_undisturbed_run(twice_accumulated):
    folder, args, _ = twice_accumulated
    succeed(folder, "train.py", *args, "--out_dir=half", "--max_iters=10")
    before = torch.load(folder / "half/ckpt.pt", weights_only=True)["decisions"]
    printed = succeed(folder, "train.py", *args, "--out_dir=half", "--init_from=resume")
    assert "goes on from half/ckpt.pt, saved after 10 iterations" in printed
    assert re.search(r"^iter 10: ", printed, re.M) and not re.search(r"^iter 9: ", printed, re.M)
    assert same_run(folder / "half", folder / "one")
    half, one = figures(folder / "half"), figures(folder / "one")
    assert half.keys() == one.keys() == {0, 10, 20} and half[20] == one[20] and half[0] == one[0]
    if before is not None:
        after = torch.load(folder / "half/ckpt.pt", weights_only=True)["decisions"]
        changed = (after != before).float().mean(dim=(2, 3, 4))
        assert np.allclose(half[20]["changed"], changed, atol=1e-6)


def test_resume_needs_neither_the_preset_nor_its_settings(workplace):
    """The run that is killed goes on bit for bit; its settings stay as they were given."""
    mine = """
        base = "config/shakespeare_char.py"
        on_cpu = {"block_size": 16, "batch_size": 4, "n_embd": 3 * 8, "n_expert": 8, "dropout": 0.2}
        max_iters = 2 * 50
        penalty_schedule = "linear"
        eval_interval = max_iters // 4
        always_save_checkpoint = True
    """
    (workplace / "config").symlink_to(ROOT / "config")
    (workplace / "mine.py").write_text(textwrap.dedent(mine))
    args = ("mine.py", "--device=cpu")
    succeed(workplace, "train.py", *args, "--out_dir=whole")
    printed, status = start_and_signal(
        workplace, signal.SIGKILL, *args, "--out_dir=killed", after="iter 60:", tiny=False
    )
    assert status == -signal.SIGKILL and "step 50: " in printed
    resume = ("--init_from=resume", "--out_dir=killed", "--device=cpu")
    printed = succeed(workplace, "train.py", *resume)
    assert "goes on from killed/ckpt.pt, saved after 50 iterations" in printed
    assert "kept" not in printed and "max_iters" not in printed
    assert same_run(workplace / "killed", workplace / "whole")
    killed, whole = figures(workplace / "killed"), figures(workplace / "whole")
    assert killed == whole and killed.keys() == {0, 25, 50, 75, 100}
    saved = torch.load(workplace / "killed/ckpt.pt", weights_only=True)["config"]
    expected = torch.load(workplace / "whole/ckpt.pt", weights_only=True)["config"]
    of_this_call = {"init_from": "resume", "out_dir": "killed", "wandb_run_name": "run"}
    assert saved == {**expected, **of_this_call} and saved["lr_decay_iters"] == 0
    assert saved["dtype"] == saved["backend"] == "auto" and saved["penalty_iters"] == 0


def test_one_learning_rate_moves_everything(trained, workplace):
    """Resumed with next to none, no weight moves, whichever optimizer it has."""
    shutil.copytree(trained[0] / "whole", workplace / "out")
    before = weights(workplace / "out")
    args = ("--init_from=resume", "--learning_rate=1e-9", "--min_lr=0", "--max_iters=30")
    succeed(workplace, "train.py", *args, "--lr_decay_iters=0", "--device=cpu")
    after = weights(workplace / "out")
    assert max((after[name] - before[name]).abs().max() for name in before) < 1e-6
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_the_length_of_a_run_is_one_number(workplace):
    """Schedules end with the run, also with that of a resumed one that is made longer."""
    args = [arg for arg in TINY if not arg.startswith("--lr_decay_iters")]
    args += ["--min_lr=0", "--n_expert=8", "--l1_weight=1.0", "--penalty_schedule=linear"]
    succeed(workplace, "train.py", *args)
    assert [row["lr"] == 0 for row in evaluations(workplace / "out")[:3]] == [False, False, True]
    more = ("--init_from=resume", "--max_iters=40", "--device=cpu")
    printed = succeed(workplace, "train.py", *more)
    assert "max_iters=40, not 20: where lr_decay_iters, penalty_iters are 0, they follow" in printed
    rows = evaluations(workplace / "out")
    by_iter = {row["iter"]: row for row in rows if "lr" in row}
    assert [by_iter[k]["l1_weight"] for k in (0, 10, 20, 30, 40)] == [0, 0.5, 1, 0.75, 1]
    assert by_iter[30]["lr"] > 0 == by_iter[40]["lr"]


def test_a_resumed_run_may_have_other_settings(workplace):
    experts = ("--n_expert=8", "--out_dir=out", "--max_iters=10")
    succeed(workplace, "train.py", *TINY, *experts)
    more = ("--init_from=resume", "--batch_size=6", "--seed=5", "--max_iters=30", "--min_lr=0")
    printed = succeed(workplace, "train.py", *TINY, *experts, *more)
    assert "step 30: " in printed
    assert "max_iters=30, not 10: where lr_decay_iters, penalty_iters are 0, they follow" in printed


def test_eval_only_writes_nothing(trained):
    folder, printed = trained
    before = {path: path.read_bytes() for path in (folder / "whole").iterdir()}
    args = ("--out_dir=whole", "--init_from=resume", "--eval_only=True")
    again = succeed(folder, "train.py", *TINY, *args)
    line = re.search(r"^step 20: .*$", printed, re.M)[0]
    assert line in again and "iter " not in again.replace("iterations", "")
    assert {path: path.read_bytes() for path in (folder / "whole").iterdir()} == before


@pytest.mark.parametrize(
    "given, kept", [("--optimizer=adamw", "optimizer='muon'"), ("--n_embd=32", "n_embd=16")]
)
def test_resume_cannot_change_the_model_and_its_optimizer(given, kept, trained):
    """On the command line that is a mistake; a config file's setting is not taken, and a line says
    so, also where the run is only evaluated."""
    args = ("--out_dir=whole", "--init_from=resume", "--eval_only=True")
    said = f"{given}: whole/ckpt.pt has {kept}, which cannot change"
    fails_with(re.escape(said), trained[0], "train.py", *TINY, *args, given)
    name, value = given.removeprefix("--").split("=")
    config = trained[0] / "other.py"
    config.write_text(f"{name} = {value if value.isdigit() else repr(value)}\n")
    printed = succeed(trained[0], "train.py", "other.py", *args)
    assert f"the run keeps {kept}, not a config file's; change it by --key=value" in printed
    assert "step 20: " in printed


def test_resume_needs_the_same_vocabulary(trained, tmp_path):
    shutil.copytree(trained[0] / "whole", tmp_path / "whole")
    (tmp_path / "input.txt").write_text("to be or not to be " * 99)
    succeed(tmp_path, "prepare_shakespeare.py", "--input_file=input.txt")
    args = (tmp_path, "train.py", *TINY, "--out_dir=whole", "--init_from=resume")
    said = (
        "data/shakespeare_char: not the vocabulary of whole/ckpt.pt; prepare that run's text again"
    )
    fails_with(said, *args)
    shutil.copytree(tmp_path / "data/shakespeare_char", tmp_path / "data/mine")
    said = "data/mine: .*; prepare that run's text again"  # whose vocabulary is gone
    fails_with(said, *args, "--dataset=mine")

"""Tests of --init_from=resume: it repeats the undisturbed run; and which settings it takes."""

import re
import shutil

import numpy as np
import torch

from common import TINY, fails_with, figures, same_run, succeed


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


def test_a_resumed_run_may_have_other_settings(workplace):
    experts = ("--n_expert=8", "--out_dir=out", "--max_iters=10")
    succeed(workplace, "train.py", *TINY, *experts)
    more = ("--init_from=resume", "--batch_size=6", "--seed=5", "--max_iters=30", "--min_lr=0")
    printed = succeed(workplace, "train.py", *TINY, *experts, *more)
    assert "step 30: " in printed and "the learning rate is 0 from iteration 20 on" in printed


def test_eval_only_writes_nothing(trained):
    folder, printed = trained
    before = {path: path.read_bytes() for path in (folder / "whole").iterdir()}
    args = ("--out_dir=whole", "--init_from=resume", "--eval_only=True")
    again = succeed(folder, "train.py", *TINY, *args)
    line = re.search(r"^step 20: .*$", printed, re.M)[0]
    assert line in again and "iter " not in again.replace("iterations", "")
    assert {path: path.read_bytes() for path in (folder / "whole").iterdir()} == before


def test_resume_needs_the_same_optimizer(trained):
    args = ("--out_dir=whole", "--init_from=resume", "--optimizer=adamw")
    fails_with(
        "optimizer='adamw': whole was trained with 'muon'", trained[0], "train.py", *TINY, *args
    )
    assert "step 20: " in succeed(trained[0], "train.py", *TINY, *args, "--eval_only=True")


def test_resume_needs_the_same_vocabulary(trained, tmp_path):
    shutil.copytree(trained[0] / "whole", tmp_path / "whole")
    (tmp_path / "input.txt").write_text("to be or not to be " * 99)
    succeed(tmp_path, "prepare_shakespeare.py", "--input_file=input.txt")
    args = (tmp_path, "train.py", *TINY, "--out_dir=whole", "--init_from=resume")
    fails_with("not the vocabulary that whole was trained with", *args)


def test_resume_takes_the_model_from_the_checkpoint(trained):
    args = ("--out_dir=whole", "--init_from=resume", "--eval_only=True", "--n_embd=32")
    assert "n_embd=16, as in the checkpoint (not 32)" in succeed(
        trained[0], "train.py", *TINY, *args
    )

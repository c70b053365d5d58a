"""Tests of new runs that begin with the weights of another one, and of runs on small texts."""

import re
import shutil

import numpy as np
import pytest
import torch

import view
from checkpoint import load, load_checkpoint
from common import call, evaluations, press_ctrl_c, weights
from prepare_shakespeare import load_data, prepare


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The working folder: the run a, and the data sets that it learned from, and `mine`, another
    text with the same vocabulary."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0] / "whole", tmp_path / "a")
    shutil.copytree(trained[0] / "data", tmp_path / "data")
    (tmp_path / "mine.txt").write_text("to be or not to be, " * 200)
    prepare(path="mine.txt", name="mine", coder=load_data(tmp_path / "data/shakespeare_char")[0])
    return tmp_path


def saved(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("source", ["a", "a/ckpt.pt", "~/a", "on"])
def test_a_new_run_begins_with_the_weights_of_another(source, place, monkeypatch, capsys):
    """Given as a folder, a file, or in a config file; the run that it comes from is untouched."""
    monkeypatch.setenv("HOME", str(place))
    before = {path.name: path.read_bytes() for path in (place / "a").iterdir()}
    (place / "on.py").write_text("init_from = 'a'\ndataset = 'mine'\n")
    args = ["on.py"] if source == "on" else [f"--init_from={source}", "--dataset=mine"]
    assert call(*args, "--out_dir=b", "--device=cpu", "--eval_iters=50", tiny=False) == 0
    printed = capsys.readouterr().out
    assert "a new run from the weights of " in printed and "saved after 20 iterations" in printed
    first, *_, last, closing = evaluations(place / "b")
    model, val = load(place / "a", device="cpu")[0], load_data(place / "data/mine")[1]["val"]
    idx = torch.from_numpy(val[: len(val) // 16 * 16].astype(np.int64)).view(-1, 16)
    expected = float(model(idx[:, :-1], idx[:, 1:]).metrics["cross_entropy"])
    assert first["iter"] == 0 and first["val_loss"] == pytest.approx(expected, rel=0.05)
    assert first["val_loss"] > last["val_loss"] + 0.3 and last["iter"] == 20
    state = saved(place / "b")
    assert state["model_args"] == saved(place / "a")["model_args"]
    assert state["iter_num"] == state["best_iter"] == 20 and state["is_best"]
    assert state["best_val_loss"] == last["val_loss"] and closing["whole_val_loss"] < expected
    assert state["config"]["batch_size"] == 4 and state["config"]["dataset"] == "mine"
    assert {path.name: path.read_bytes() for path in (place / "a").iterdir()} == before


@pytest.mark.parametrize("how", ["a new run", "resume"])
def test_a_length_in_iterations_takes_the_place_of_one_in_seconds(how, place):
    assert call("--max_seconds=0.1", "--out_dir=timed") == 0
    done = saved(place / "timed")["iter_num"]
    source, out, length = ("resume", "timed", done + 7) if how == "resume" else ("timed", "b", 7)
    args = (f"--init_from={source}", f"--out_dir={out}", "--device=cpu")
    assert call(*args, f"--max_iters={length}", tiny=False) == 0
    assert saved(place / out)["iter_num"] == length


def test_the_advice_on_a_vocabulary_helps(place, capsys):
    """Where the data set of the run has been replaced, or is gone, its vocabulary is not there."""
    prepare(path="mine.txt", name="odd")
    args = ("--init_from=a", "--out_dir=b", "--dataset=odd")
    assert call(*args, tiny=False) == 2
    assert "--vocabulary_of=data/shakespeare_char" in capsys.readouterr().err
    prepare(path="mine.txt", name="shakespeare_char")
    for _ in range(2):
        capsys.readouterr()
        assert call(*args, tiny=False) == 2
        assert capsys.readouterr().err.endswith("; prepare that run's text again\n")
        shutil.rmtree(place / "data/shakespeare_char", ignore_errors=True)


def test_another_run_is_evaluated(place, capsys):
    args = ("--init_from=a", "--eval_only", "--dataset=mine", "--device=cpu")
    assert call(*args, tiny=False) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^step 20: .*\nwhole validation .*, after 20 iterations, ", printed, re.M)
    assert not (place / "out").exists()


def test_a_new_run_takes_training_settings_from_a_config_file_but_no_sizes(place, capsys):
    """A key that names a size is a mistake; what is not of the model may be set by either."""
    config = place / "mine.py"
    config.write_text(
        "batch_size = 3\nn_embd = 32\nl1_weight = 0.5\noptimizer = 'adamw'\nmin_lr = 0.0\n"
    )
    how = ("--init_from=a", "--dataset=mine", "--max_iters=5", "--device=cpu")
    assert call("mine.py", *how, "--out_dir=b", "--dropout=0.1", tiny=False) == 0
    assert "the run keeps n_embd=16, not a config file's\n" in capsys.readouterr().out
    state = saved(place / "b")
    expected = dict(batch_size=3, n_embd=16, l1_weight=0.5, optimizer="adamw", dropout=0.1)
    expected |= dict(learning_rate=0.03, max_iters=5, warmup_iters=2, min_lr=0.0)
    assert {name: state["config"][name] for name in expected} == expected
    assert call(*how, "--out_dir=c", "--n_embd=32", tiny=False) == 2
    said = "--n_embd=32: a/ckpt.pt has n_embd=16, which cannot change"
    assert said in capsys.readouterr().err
    assert call("--init_from=resume", "--out_dir=b", "--max_iters=8", tiny=False) == 0
    assert [row["iter"] for row in evaluations(place / "b")] == [0, 5, 5, 8, 8]


@pytest.mark.parametrize("block_size", [8, 16, 24])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_new_run_may_have_another_block(positions, block_size, place, capsys):
    if positions == "rotary":
        assert call("--position_embedding=rotary", "--out_dir=a") == 0
    before = load(place / "a", device="cpu")[0]
    args = (f"--block_size={block_size}", "--out_dir=b", "--device=cpu", "--max_iters=1")
    args += ("--learning_rate=1e-9", "--min_lr=0", "--weight_decay=0", "--dataset=mine")
    status = call(*args, "--init_from=a", tiny=False)
    if positions == "learned" and block_size > 16:
        said = "--block_size=24: a/ckpt.pt has learned positions for 16 tokens, no more"
        assert status == 2 and said in capsys.readouterr().err
        return
    assert status == 0
    after, idx = load(place / "b", device="cpu")[0], torch.arange(block_size)[None] % 16
    assert after.config.block_size == block_size
    found = after(idx, idx).logits
    before.config.block_size = 24  # rotary positions have no table
    torch.testing.assert_close(found, before(idx, idx).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "args, said",
    [
        (("--init_from=a", "--out_dir=a"), "out_dir='a': a new run from a/ckpt.pt needs another"),
        (("--init_from=a/ckpt.pt", "--out_dir=./a"), "out_dir='./a': a new run from a/ckpt.pt"),
        (("--init_from=absent",), "init_from='absent': must be scratch, resume, or the path"),
        (("--init_from=data",), "init_from='data/ckpt.pt': must be scratch, resume, or the path"),
        (("--init_from=mine.txt",), "mine.txt: not a whole checkpoint of train.py: File is not a"),
        (("--init_from=foreign.pt",), "foreign.pt: not a checkpoint of this model: it lacks "),
        (("--init_from=bare.pt",), "bare.pt: has no entry 'tokenizer'; it was not written by"),
        (("--init_from=a", "--dataset=odd"), "data/odd: not the vocabulary of a/ckpt.pt; prepare "
         "it with --vocabulary_of=data/shakespeare_char"),
    ],
)  # fmt: skip
def test_where_no_run_can_begin_a_line_says_why(args, said, place, capsys):
    torch.save({"weight": torch.zeros(2)}, place / "foreign.pt")
    torch.save({"format": 2} | {k: saved(place / "a")[k] for k in ("model", "model_args")},
               place / "bare.pt")  # fmt: skip
    prepare(path="mine.txt", name="odd")
    capsys.readouterr()
    assert call(*args, tiny=False) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"train.py: {said}"), lines


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.", ""])
def test_weights_of_a_compiled_or_distributed_model_load(prefix, place):
    state = saved(place / "a")
    state["model"] = {prefix + name: weight for name, weight in state["model"].items()}
    torch.save(state, place / "other.pt")
    found, expected = load_checkpoint(place / "other.pt")[0].state_dict(), weights(place / "a")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_trained_in_float32(dtype, place):
    state = saved(place / "a")
    state["model"] = {name: weight.to(dtype) for name, weight in state["model"].items()}
    torch.save(state, place / "half.pt")
    found = load_checkpoint(place / "half.pt")[0].state_dict()
    for name, weight in state["model"].items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weight.float())


def test_a_link_to_a_checkpoint_of_out_dir_is_no_other_folder(place, capsys):
    (place / "link.pt").symlink_to(place / "a/ckpt.pt")
    before = (place / "a/ckpt.pt").read_bytes()
    assert call("--init_from=link.pt", "--out_dir=a", tiny=False) == 2
    said = "out_dir='a': a new run from link.pt needs another folder\n"
    assert capsys.readouterr().err.endswith(said)
    assert (place / "a/ckpt.pt").read_bytes() == before


# ---- small texts ------------------------------------------------------------

OVERFIT = (
    "--max_iters=240 --lr_decay_iters=0 --n_embd=64 --dropout=0.0 --dataset=tiny "
    "--always_save_checkpoint=False --eval_interval=20 --log_interval=50"
).split()


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A folder with a text that is learned by heart soon, and a run on it, in out."""
    folder = tmp_path_factory.mktemp("overfitted")
    ids = np.random.default_rng(0).integers(8, size=800)
    (folder / "tiny.txt").write_text("".join("abcdefg\n"[k] for k in ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(path="tiny.txt", name="tiny")
        assert call(*OVERFIT) == 0
    return folder


def whole_loss(folder, dataset):
    """The loss of the model in the folder over all of val, by one window after the other."""
    model, val = load(folder, device="cpu")[0], load_data(dataset)[1]["val"].astype(np.int64)
    total = 0.0
    for start in range(0, len(val) - 1, 16):
        window = torch.from_numpy(val[start : start + 17])[None]
        loss = model(window[:, :-1], window[:, 1:]).metrics["cross_entropy"]
        total += float(loss) * (window.size(1) - 1)
    return total / (len(val) - 1)


def test_a_run_closes_with_the_checkpoint_that_it_keeps(overfitted, quicker, monkeypatch, capsys):
    monkeypatch.setattr(view, "SAMPLED", quicker)  # as without the tests
    rows = evaluations(overfitted / "out")
    measured = {row["iter"]: row["val_loss"] for row in rows[1:] if "val_loss" in row}
    best = min(measured, key=measured.get)
    assert 0 < best < 240 and measured[240] > 1.01 * measured[best]
    assert saved(overfitted / "out")["iter_num"] == rows[-1]["iter"] == best
    expected = whole_loss(overfitted / "out", overfitted / "data/tiny")
    assert rows[-1]["whole_val_loss"] == pytest.approx(expected, rel=1e-5)
    monkeypatch.chdir(overfitted)
    assert call(*OVERFIT, "--out_dir=again") == 0
    printed = capsys.readouterr().out
    assert f"tokens per iteration, reads the text {240 * 64 / 720:.1f} times\n" in printed
    assert f"back to step {best}, the best one that again has\n" in printed
    assert f"whole validation split: loss {expected:.4f}, after {best} iterations" in printed
    risen = f"risen since step {best}: a run with --max_iters={best} is likely to be better\n"
    assert risen in printed
    model, tokenizer = load(overfitted / "again", device="cpu")
    torch.manual_seed(1337)
    drawn = model.generate(torch.tensor([tokenizer.encode("\n")]), 300, 0.8, top_k=200)
    assert f"A sample:\n{tokenizer.decode(drawn[0].tolist())}\n" in printed
    assert call(*OVERFIT, "--out_dir=early", "--warmup_iters=100") == 0  # and best before 200
    assert "try more text, or more dropout\n" in capsys.readouterr().out


def test_a_run_that_was_stopped_keeps_the_same_checkpoint(overfitted, monkeypatch):
    monkeypatch.chdir(overfitted)
    best = saved(overfitted / "out")["iter_num"]
    press_ctrl_c(overfitted / "stopped/log.jsonl", f'{{"iter": {best + 20},')
    assert call(*OVERFIT, "--out_dir=stopped") == 130
    assert saved(overfitted / "stopped")["iter_num"] > best
    assert saved(overfitted / "stopped").get("is_best") is False
    assert call("--init_from=resume", "--out_dir=stopped", "--device=cpu", tiny=False) == 0
    one, other = weights(overfitted / "out"), weights(overfitted / "stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (overfitted / "stopped/ckpt_best.pt").exists()


def test_a_stop_at_the_very_end_keeps_the_best_checkpoint(overfitted, monkeypatch, capsys):
    """As where the signal came during the last evaluation: the checkpoint of the stop is the
    last."""
    monkeypatch.chdir(overfitted)
    shutil.copytree("out", "late")
    last = saved(overfitted / "out") | {"iter_num": 240, "is_best": False}
    (overfitted / "late/ckpt.pt").rename(overfitted / "late/ckpt_best.pt")
    last["model"] = {name: torch.zeros_like(w) for name, w in last["model"].items()}
    torch.save(last, overfitted / "late/ckpt.pt")
    assert call("--init_from=resume", "--out_dir=late", "--device=cpu", tiny=False) == 0
    best = saved(overfitted / "out")["iter_num"]
    assert f"back to step {best}, the best one that late has\n" in capsys.readouterr().out
    one, other = weights(overfitted / "out"), weights(overfitted / "late")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", ["max_seconds=0.2", "lr_decay_iters=239", "decay_lr=False"])
def test_no_advice_that_cannot_be_followed(how, overfitted, monkeypatch, capsys):
    """With max_seconds the length is not max_iters. A learning rate that does not fall with the
    length makes the shorter run the same one."""
    monkeypatch.chdir(overfitted)
    assert call(*OVERFIT, f"--{how}", "--out_dir=other") == 0
    printed = capsys.readouterr().out
    assert "risen since" not in printed and "whole validation split" in printed
    assert (", reads the text" in printed) == ("max_seconds" not in how)


def test_what_is_kept_last_is_what_a_run_closes_with(overfitted, monkeypatch, capsys):
    monkeypatch.chdir(overfitted)
    assert call(*OVERFIT, "--always_save_checkpoint=True", "--out_dir=last") == 0
    printed = capsys.readouterr().out
    assert "risen since" in printed and "back to step" not in printed
    assert evaluations(overfitted / "last")[-1]["iter"] == 240

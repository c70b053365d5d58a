"""Tests of checkpoints: written whole, and refused where they are damaged, changed or foreign."""

import copy
import math
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import load_best, load_checkpoint, write_whole
from common import TINY, fails_with, succeed


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What is there at each call of fsync and replace: of the file, then of its folder."""
    path, calls = tmp_path / "ckpt.pt", []
    path.write_bytes(b"old")

    def watch(name, call):
        def watched(*args):
            calls.append((name, path.read_bytes()))
            return call(*args)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", os.fsync)
    watch("replace", os.replace)
    write_whole(path, lambda file: file.write(b"new"))
    assert calls == [("fsync", b"old"), ("replace", b"old"), ("fsync", b"new")]


def test_a_file_that_is_no_checkpoint_gets_one_line(trained, tmp_path):
    (tmp_path / "out").mkdir()
    path, whole = tmp_path / "out/ckpt.pt", (trained[0] / "whole/ckpt.pt").read_bytes()
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    tensor = (tmp_path / "tensor.pt").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], tensor):
        path.write_bytes(content)
        fails_with("out/ckpt.pt: not a", tmp_path, "sample.py", "--device=cpu")


CHANGES = [  # of a checkpoint: where in it, what then stands there (... for nothing), what is said
    (
        ("model_args", "n_embd"),
        32,
        "not a checkpoint of this model: size mismatch for tok_emb.weight",
    ),
    (("model_args", "n_embd"), ..., "not a checkpoint of this model: size mismatch for tok_emb"),
    (("format",), ..., "it has format 1, which commit fd66022 reads"),
    (("format",), 3, "not a checkpoint of this model: its format is 3: must be 2"),
    (
        ("model_args", "new"),
        1,
        "not a checkpoint of this model: its model_args have an unknown 'new'",
    ),
    (("model_args", "n_layer"), 10**9, "n_layer=1000000000: it has not as many weights"),
    (("model_args", "n_embd"), 10**6, "size mismatch for tok_emb.weight"),
    (("model_args", "n_layer"), "x", "not a checkpoint of this model: "),
    (("model_args", "entropy_weight"), 10**400, "not a checkpoint of this model: "),
    (("model_args",), None, "not a checkpoint of this model: "),
    (("model",), None, "not a checkpoint of this model: "),
    (("model",), ..., "not a checkpoint of this model: it lacks 'model'"),
    (("model", "tok_emb.weight"), "x", "not a checkpoint of this model: .*tok_emb.weight"),
    (("model", "tok_emb.weight"), ..., "Missing key.* in state_dict: .tok_emb.weight"),
    (("tokenizer",), None, "not a checkpoint of this model: its tokenizer is None"),
]
CHANGES_OF_A_RUN = [  # of what train.py alone looks at
    (("tokenizer",), ..., "has no entry 'tokenizer'"),
    (("tokenizer", "kind"), 3, "tokenizer=3: must be one of char, byte, gpt2"),
    (("tokenizer", "chars"), "ab", "its tokenizer has 2 tokens, its model"),
    (("config", 1), 2, "there is no setting 1"),
    (("seconds",), ..., "out/ckpt.pt: has no entry 'seconds'; it was not written by this"),
    (("seconds",), math.nan, "its seconds is nan"),
    (("iter_num",), "x", "its iter_num is 'x'"),
    (("iter_num",), -5, "its iter_num is -5"),
    (("best_val_loss",), None, "its best_val_loss is None"),
    (("config",), None, "its config is None"),
    (("config", "optimizer"), "x", "out/ckpt.pt: optimizer='x': must be one of muon, adamw"),
    (("config", "optimizer"), "adamw", "the optimizers' state does not fit: "),
    (("config", "new"), 1, "out/ckpt.pt: there is no setting 'new'"),
    (("config", "muon_learning_rate"), 0.02, "'muon_learning_rate' is gone: set muon_lr_ratio"),
    (("scaler",), 5, "its scaler is 5"),
    (("config", "penalty_iters"), "x", "out/ckpt.pt: penalty_iters takes int"),
    (("config", "penalty_iters"), -1, "penalty_iters=-1: must be at least 0"),
    (("config", "penalty_schedule"), None, "out/ckpt.pt: penalty_schedule takes str"),
    (("config", "penalty_schedule"), "x", "penalty_schedule='x': must be one of constant, linear"),
    (("optimizers",), [], "the optimizers' state does not fit: "),
    (("optimizers", 0), 5, "the optimizers' state does not fit: "),
    (("optimizers", 0, "state"), None, "the optimizers' state does not fit: "),
    (("optimizers", 0, "state", 99), {}, "the optimizers' state does not fit: "),
    (("optimizers", 0, "state", 0, "step"), ..., "that of parameter 0 has other names or shapes"),
    (
        ("optimizers", 0, "state", 0, "exp_avg"),
        torch.zeros(1),
        "that of parameter 0 has other names",
    ),
    (
        ("optimizers", 1, "state", 0, "momentum_buffer"),
        torch.zeros(1),
        "that of parameter 0 has other",
    ),
]


def changed(checkpoint, where, value):
    """The checkpoint with another value, or none, at a path of keys."""
    place = checkpoint = copy.deepcopy(checkpoint)
    *path, key = where
    for step in path:
        place = place[step]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return checkpoint


RESUME = ("train.py", "--max_iters=30", "--init_from=resume", "--device=cpu")
LOADED = [(RESUME, *change) for change in CHANGES + CHANGES_OF_A_RUN]
LOADED += [(("sample.py", "--device=cpu"), *change) for change in CHANGES[:5]]


@pytest.mark.parametrize("command, where, value, said", LOADED)
def test_a_checkpoint_of_other_content_gets_one_line(
    command, where, value, said, trained, workplace
):
    """Where its checksums are right: another program wrote it, or somebody."""
    (workplace / "out").mkdir()
    path = workplace / "out/ckpt.pt"
    whole = torch.load(trained[0] / "whole/ckpt.pt", weights_only=True)
    torch.save(changed(whole, where, value), path)
    before = path.read_bytes()
    fails_with(said, workplace, *command)
    assert path.read_bytes() == before


def test_a_field_that_a_checkpoint_lacks_takes_its_default(trained, workplace):
    whole = torch.load(trained[0] / "whole/ckpt.pt", weights_only=True)
    for name in ("qk_norm", "token_shift", "l1_norm", "shared_kv"):
        del whole["model_args"][name]
    del whole["decisions"], whole["config"]["lr_schedule"]
    (workplace / "out").mkdir()
    torch.save(whole, workplace / "out/ckpt.pt")
    model, _ = load_checkpoint(workplace / "out/ckpt.pt")
    assert model.config == load_checkpoint(trained[0] / "whole/ckpt.pt")[0].config
    args = ("--out_dir=out", "--init_from=resume", "--max_iters=21")
    succeed(workplace, "train.py", *TINY, *args)
    assert "qk_norm" in torch.load(workplace / "out/ckpt.pt", weights_only=True)["model_args"]


def test_a_checkpoint_with_another_tokenizer_gets_one_line(trained, tmp_path):
    (tmp_path / "out").mkdir()
    checkpoint = torch.load(trained[0] / "whole/ckpt.pt", weights_only=True)
    checkpoint["tokenizer"]["chars"] += "\u72d0"
    torch.save(checkpoint, tmp_path / "out/ckpt.pt")
    fails_with("its tokenizer has .* tokens, its model", tmp_path, "sample.py", "--device=cpu")
    del checkpoint["tokenizer"]
    torch.save(checkpoint, tmp_path / "out/ckpt.pt")
    fails_with(
        "ckpt.pt: not a checkpoint of this model: it lacks 'tokenizer'",
        tmp_path,
        "sample.py",
        "--device=cpu",
    )


def test_damaged_checkpoints_are_told(trained, tmp_path):
    """Bytes changed, cut out or doubled at random: refused in one line, or without effect."""
    whole, rng = (trained[0] / "whole/ckpt.pt").read_bytes(), np.random.default_rng(0)
    expected, _ = load_checkpoint(trained[0] / "whole/ckpt.pt")
    expected, refused = expected.state_dict(), 0
    for _ in range(200):
        at, length = int(rng.integers(len(whole))), int(rng.integers(1, 100))
        part = (
            bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 : at + length],
            b"", whole[at : at + length] * 2, rng.bytes(length),
        )[rng.integers(4)]  # fmt: skip
        (tmp_path / "ckpt.pt").write_bytes(whole[:at] + part + whole[at + length :])
        try:
            model, _ = load_checkpoint(tmp_path / "ckpt.pt")
        except ValueError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
        else:
            assert all(torch.equal(w, expected[name]) for name, w in model.state_dict().items())
    assert refused > 150


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "out").mkdir()
    for as_zip in (True, False):  # torch.load takes torch's older format, a bare pickle, as well
        torch.save(
            {"model": Evil()}, tmp_path / "out/ckpt.pt", _use_new_zipfile_serialization=as_zip
        )
        fails_with("out/ckpt.pt: not a", tmp_path, "sample.py", "--device=cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("take_back", [False, True])
def test_a_best_checkpoint_that_is_damaged_takes_the_place_of_none(
    take_back, trained, tmp_path, capsys
):
    shutil.copytree(trained[0] / "whole", tmp_path / "out")
    path, whole = tmp_path / "out/ckpt.pt", (tmp_path / "out/ckpt.pt").read_bytes()
    path.with_name("ckpt_best.pt").write_bytes(whole[: len(whole) // 2])
    assert load_best(path, False, take_back)[1]["iter_num"] == 20
    assert path.read_bytes() == whole
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}/out/ckpt_best.pt: not a whole checkpoint of train.py: ")
    assert printed.endswith("; takes the last one in place of the best\n")


def test_several_threads_load(trained):
    """Each a model with its weights; and whatever else is made then starts as it should."""
    path, found = trained[0] / "whole/ckpt.pt", []
    expected = load_checkpoint(path)[0].state_dict()

    def load_some():
        for _ in range(10):
            found.append(load_checkpoint(path)[0].state_dict())

    threads = [threading.Thread(target=load_some) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.nn.Embedding(9, 9).weight.std() > 0.5
    assert len(found) == 30
    assert all(torch.equal(one[name], w) for one in found for name, w in expected.items())


class Other(torch.nn.Linear):
    pass


def test_a_pickled_model_and_an_earlier_run_are_told(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(Other(2, 2), tmp_path / "ckpt.pt")
    said = "ckpt.pt: not a checkpoint of train.py: it holds more than tensors and values"
    with pytest.raises(ValueError, match=said):
        load_checkpoint("~/ckpt.pt")
    whole = torch.load(trained[0] / "whole/ckpt.pt", weights_only=True)
    torch.save(changed(whole, ("model", "ln_out.weight"), ...), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt: not a checkpoint of this model"):
        load_checkpoint("~/ckpt.pt")
    os.rename(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt.old")
    with pytest.raises(ValueError, match=r"there is no checkpoint; .*/ckpt\.pt\.old is of an earl"):
        load_checkpoint("~/ckpt.pt")

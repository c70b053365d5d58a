"""Tests of experiments/ablations.py as a script: its mistakes, and the runs that it starts."""

import ast
import copy
import json
import re
import sys
from functools import partial

import pytest
import torch

import ablations
import model as model_file
from ablation_reference import build, close
from common import ROOT, succeed
from test_ablations import VARIANTS
from test_model import GPT, LEAN, random_ids

# ---- mistakes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text, fields, said",
    [
        ("cross_first()", GPT, "arch='decoder_only': must be 'parallel' in this ablation"),
        ("cross_first()", LEAN, "decoder_self_attention=False: must be True in this ablation"),
        ("n_cross_head(4)", dict(shared_kv=True), "shared_kv=True: must be False in this"),
        ("n_cross_head(4)", dict(position_embedding="rotary"), "='rotary': must be 'learned' in"),
        ("n_cross_head(7)", {}, r"n_cross_head\(7\): must be a divisor of n_embd=24"),
        ("n_cross_head(-1)", {}, r"n_cross_head\(-1\): must be an int, at least 1"),
        ("n_cross_head('4')", {}, r"n_cross_head\('4'\): must be an int"),
        ("w_lat()", dict(lateral=True), "lateral=True: must be False in this ablation"),
        ("attention_encoder()", dict(n_expert=8), "n_expert=8: must be 0 in this ablation"),
        ("swiglu()", dict(n_expert=8), "n_expert=8: must be 0 in this ablation"),
        ("lag(3)", {}, r"lag\(3\): must be at most n_layer=2"),
        ("lag(-1)", {}, r"lag\(-1\): must be an int, not negative"),
        ("lag(1)", GPT, "arch='decoder_only': must be 'parallel' in this ablation"),
        ("yoco()", LEAN, "shared_kv=True: must be False in this ablation"),
        ("yoco()", {}, "lateral=False: must be True in this ablation"),
        ("gqa()", {}, "arch='parallel': must be 'decoder_only' in this ablation"),
        ("gqa()", dict(**GPT, n_head=3), "n_head=3: must be even in this ablation"),
        ("embedding_loss('cos',1)", {}, r"\('cos'\): must be one of mse, cosine, log_cosine"),
        ("embedding_loss('mse',-1)", {}, "weight=-1.: must be finite and not negative"),
        ("embedding_loss('mse',1)", GPT, "='decoder_only': must be 'parallel' in this"),
        ("next_position('multiply')", {}, r"\('multiply'\): must be one of add, subtract"),
        ("next_position('add')", dict(position_embedding="rotary"), "='rotary': must be 'learned'"),
        ("rounding('hard')", {}, r"rounding\('hard'\): must be one of sigmoid, none"),
        ("rounding('sigmoid',-1.0)", {}, "scale=-1.0.: must be finite and not negative"),
        ("rounding('sigmoid',1e999)", {}, "scale=inf.: must be finite and not negative"),
        ("rounding('none')", {}, "n_expert=0: must be at least 1 in this ablation"),
        ("router_detach()", {}, "n_expert=0: must be at least 1 in this ablation"),
        ("embedding_router()", {}, "n_expert=0: must be at least 1 in this ablation"),
        ("top_k(1)", {}, r"top_k\(1\): must be an int, at least 2"),
        ("top_k(9)", dict(n_expert=8), "n_expert=8: must be at least 9 in this ablation"),
        ("gate()", dict(n_head=5), "n_head=5: must be a divisor"),  # as without it
    ],
)
def test_what_an_ablation_does_not_take(text, fields, said):
    with pytest.raises(ValueError, match=said) as error:
        build(text, fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("parallel()", r"no ablation 'parallel' \(all: cross_first, n_cross_head, .*, top_k\)$"),
        ("yocco()", r"no ablation 'yocco'; did you mean yoco\? \(all: cross_first"),
        ("yoco", "'yoco': must be an ablation with its arguments, such as yoco"),
        ("yoco(", "must be an ablation"),
        ("", "'': must be an ablation"),
        ("top_k()", r"'top_k\(\)': missing a required argument: 'k'; it is top_k\(k: int\)"),
        ("top_k(4, 5)", "too many positional arguments; it is top_k"),
        ("w_lat(last=True)", "unexpected keyword argument 'last'; it is w_lat"),
        ("top_k(**{'k': 4})", "it is top_k|must be an ablation"),
        ("top_k(*[4])", "must be an ablation"),
        ("top_k(__import__('os').abort())", "must be an ablation"),
        ("sys.exit()", "must be an ablation"),
        ("(" * 300, "must be an ablation"),
        ("yoco()\0", "must be an ablation"),
        ("top_k(\n1)", "must be an int, at least 2"),
    ],
)
def test_a_wrong_ablation_gets_one_line(text, said, capsys):
    with pytest.raises(SystemExit) as end:
        ablations.main([text])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(said, printed) and printed.count("\n") == 1, printed


# ---- the command line -------------------------------------------------------


def test_all_that_the_results_name_can_be_read():
    lines = (ROOT / "experiments" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    named = {json.loads(line).get("peer") for line in lines} - {None, ""}
    assert {"lag(2)", "yoco()", "attention_encoder()", "top_k(4)"} <= named
    for text in named:
        assert ablations.read(text)


def test_every_ablation_is_tried_and_says_what_it_is(capsys):
    tried = {ast.parse(one).body[0].value.func.id for text, _ in VARIANTS for one in text.split()}
    assert tried == set(ablations.ABLATIONS)
    assert all(ablation.__doc__ for ablation in ablations.ABLATIONS.values())
    ablations.main([])
    printed = capsys.readouterr().out
    assert "top_k(k: int)\n    A mixture of experts" in printed


def test_the_script_gets_the_classes_and_its_arguments(tmp_path, monkeypatch, capsys):
    for name in ("train.py", "sample.py"):
        source = "import sys\nfrom model import Attention, DecoderLayer\n"
        source += "print(sys.argv, Attention.__qualname__, DecoderLayer.__qualname__)"
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    for args, argv, classes in (
        (["gate()", "c.py", "--seed=1"], "['train.py', 'c.py', '--seed=1']", "DecoderLayer"),
        (["gate()", "train.py"], "['train.py']", "DecoderLayer"),
        (["gate()", "w_lat()", "sample.py"], "['sample.py']", "w_lat.<locals>.DecoderLayer"),
    ):
        with ablations.restored():
            ablations.main(args)
        note, printed = capsys.readouterr().out.splitlines()
        assert note.startswith("gate()") and "name it again" in note
        assert printed == f"{argv} gate.<locals>.Attention {classes}"


def test_apply_can_be_undone():
    before = dict(vars(model_file))
    with pytest.raises(ZeroDivisionError), ablations.restored():
        ablations.apply(ablations.yoco())
        assert dict(vars(model_file)) != before
        raise ZeroDivisionError
    assert dict(vars(model_file)) == before


def test_a_model_can_be_copied():
    texts = ("lag(1)", "next_position('add')", "next_position('subtract')", "top_k(2)")
    for text in (*texts, "embedding_router()"):
        model, idx = build(text, {"n_expert": 8}), random_ids(1, 5)
        with torch.no_grad():
            expected = model(idx).logits
            again = copy.deepcopy(model)
            model.tok_emb.weight.zero_()
            model(idx)
            close(again(idx).logits, expected)


def test_trains_and_samples_as_a_user_would(tmp_path):
    (tmp_path / "input.txt").write_text((ROOT / "LICENSE").read_text("utf-8"), "utf-8")
    run = partial(succeed, tmp_path)
    run("prepare_shakespeare.py", "--input_file=input.txt", "--dataset=mine")
    sizes = "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --warmup_iters=2"
    steps = "--max_iters=4 --lr_decay_iters=4 --eval_interval=4 --eval_iters=1 --log_interval=1"
    settings = f"{sizes} {steps} --dataset=mine --out_dir=out --device=cpu".split()
    printed = run("experiments/ablations.py", "lag(2)", *settings)
    assert printed.startswith("lag(2): name it again to resume or to sample")
    assert re.search(r"(?m)^iter 3: loss [34]\.\d{4}, ", printed)
    assert re.search(r"(?m)^whole validation split: loss [34]\.\d{4}", printed)
    assert (tmp_path / "out" / "ckpt.pt").exists()
    with pytest.raises(
        AssertionError, match=r"its ablations are \['lag\(2\)'\], here they are \[\]"
    ):
        run("sample.py", "--out_dir=out", "--device=cpu")
    sampled = run("experiments/ablations.py", "lag(2)", "sample.py", "--out_dir=out",
                  "--device=cpu", "--start=a", "--max_new_tokens=5")  # fmt: skip
    assert sampled.count("---\n") == 3

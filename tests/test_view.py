"""Tests of view.py, and of what sample.py shows with it."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from common import OFFLINE, ROOT, run, start
from configurator import printable
from model import ModelConfig, ParallelEncoderDecoder
from prepare_shakespeare import Tokenizer
from view import DIGITS, Seen, in_colour, page, see, show_sample

CHARACTERS = 'abcdefgh<&"\n\x1b\u202e é'


@pytest.fixture(scope="module", params=["parallel", "decoder_only"])
def model(request):
    torch.manual_seed(0)
    config = ModelConfig(
        arch=request.param, block_size=8, vocab_size=len(CHARACTERS), n_layer=2, n_head=2,
        n_embd=16, n_expert=4,
    )  # fmt: skip
    model = ParallelEncoderDecoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("char", CHARACTERS)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """An out_dir with the model's checkpoint."""
    saved = {
        "format": 2,
        "model": model.state_dict(),
        "model_args": vars(model.config),
        "tokenizer": {"kind": "char", "chars": CHARACTERS},
    }
    (tmp_path / "out").mkdir()
    torch.save(saved, tmp_path / "out/ckpt.pt")
    return tmp_path


def test_a_sample_that_cannot_be_drawn_is_said(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    show_sample(model, Tokenizer("gpt2"), 1)
    said = "no sample: --tokenizer=gpt2 needs tiktoken: pip install tiktoken ("
    assert capsys.readouterr().out.startswith(said)


def test_what_is_seen_is_what_generation_read(model, tokenizer):
    text = model.generate(torch.tensor([[0, 1, 2]]), 20, temperature=0)
    seen = see(model, tokenizer, text)
    assert "".join(seen.tokens) == tokenizer.decode(text[0].tolist()) and len(seen.tokens) == 23
    stacks = 2 if model.config.arch == "parallel" else 1
    assert seen.on.shape == (23, 2, stacks, 4) and 0 < seen.on.float().mean() < 1
    for end in range(3, 23):  # greedy: each token is the likeliest one after those before it
        assert seen.likely[end - 1][0][0] == seen.tokens[end]
        start = 0
        while end - start > 8:
            start += 4
        newest = model.expert_masks(text[:, start:end]).used[:, :, 0, -1]
        assert torch.equal(seen.on[end - 1], newest > 0)
    assert seen.came[2:-1] == [0] * 20 and seen.came[-1] == -1
    assert all(1 >= p >= q >= 0 for after in seen.likely for (_, p), (_, q) in pairwise(after))


def test_looking_leaves_the_mode_as_it_was(model, tokenizer):
    model.train()
    see(model, tokenizer, torch.tensor([[0, 1]]))
    assert model.training
    model.eval()


def test_a_character_of_several_tokens_is_seen_once(model):
    class Bytes:
        decode_bytes = staticmethod(bytes)
        decode = staticmethod(lambda ids: bytes(ids).decode(errors="replace"))

    torch.manual_seed(0)
    config = ModelConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8, n_expert=2)
    text = torch.tensor([list("aéb".encode()) + ["é".encode()[0]]])
    seen = see(ParallelEncoderDecoder(config), Bytes, text)
    assert seen.tokens == ["a", "", "é", "b", "\ufffd"]


def test_control_characters_are_spelled_out():
    assert printable("a\x1b[2J\x07\x9b\u202eé\n\tz") == "a\\x1b[2J\\x07\\x9b\\u202eé\n\tz"
    assert printable("日本\xa0\u3000👍🏽") == "日本\xa0\u3000👍🏽"


def test_colours_by_hand():
    m = torch.tensor([[0.5, 1.0], [0.0, 0.49], [0.9, 0.1]]).reshape(3, 1, 1, 2)
    printed = in_colour(Seen(["a", "b\n", "\x1b"], [], [], [], m))
    text, legend = printed.rsplit("\n", 1)
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == "ab\n\\x1b"
    assert re.findall(r"48;2;([\d;]+)m", text) == ["244;162;58", "38;70;131", "141;116;94"]
    assert re.sub(r"\x1b\[[\d;]*m", "", legend).split() == "experts on: 0% 25% 50% 75% 100%".split()


def data_of(text):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', text)
    return json.loads(data)


def test_the_loss_of_each_token_is_that_of_its_window(model, tokenizer):
    text = torch.randint(len(CHARACTERS), (1, 21), generator=torch.Generator().manual_seed(0))
    loss = see(model, tokenizer, text).loss
    assert loss[0] is None and len(loss) == 21
    for end in range(1, 21):
        start = 0
        while end - start > 8:
            start += 4
        idx, targets = text[:, start:end], text[:, start + 1 : end + 1]
        logs = model(idx, targets).logits[0, -1].log_softmax(dim=-1)
        assert loss[end] == pytest.approx(-logs[text[0, end]].item(), abs=1e-5)


def test_the_page_holds_the_texts_and_no_markup_of_theirs(tmp_path, model, tokenizer):
    text = torch.arange(len(CHARACTERS))[None]
    seen = see(model, tokenizer, text)
    seen.tokens[1] = "</script><script>alert(1)</script><!--"
    seen.tokens[2] = "{{data}}{{sha256}}"
    written = page([seen, seen])
    template = (ROOT / "view.html").read_text("utf-8")
    assert written.count("<") == template.count("<")  # nothing of the text can open a tag
    data = data_of(written)
    assert [t["tokens"] for t in data["texts"]] == [seen.tokens] * 2
    for digits, on, m in zip(data["texts"][0]["m"], seen.on, seen.m, strict=True):
        levels = [DIGITS.index(d) for d in digits]
        assert [level >= 32 for level in levels] == on.flatten().tolist()
        assert torch.tensor(levels) / 63 == pytest.approx(m.flatten(), abs=0.5 / 63 + 1e-6)
    assert (data["layers"], data["experts"]) == (2, 4)
    assert data["stacks"] == (["encoder", "decoder"] if seen.on.size(2) == 2 else ["layer"])
    assert not re.search(r"https?://(?!www.w3.org/)|src=|@import|url\(", written)
    (script,) = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)  # the one that may run
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{sha256}';" in written
    if node := shutil.which("node"):
        (tmp_path / "script.js").write_text(script, "utf-8")
        subprocess.run([node, "--check", tmp_path / "script.js"], check=True)


def sample(folder, *args, **env):
    args = ("--device=cpu", "--max_new_tokens=12", "--start=ab", *args)
    return run(folder, "sample.py", *args, env={**OFFLINE, "FORCE_COLOR": "", **env})


def test_sample_colours_where_it_is_asked_to(folder):
    plain = sample(folder)
    piped = sample(folder, "--show_experts")
    forced = sample(folder, "--show_experts", "--html=page.html", FORCE_COLOR="1")
    assert plain.returncode == piped.returncode == forced.returncode == 0, forced.stderr
    assert piped.stdout == plain.stdout and "\x1b[48;2" not in plain.stdout
    assert piped.stderr.startswith("sample.py: no colours") and len(piped.stderr.splitlines()) == 1
    assert forced.stdout.count("experts on: ") == 3 and "page.html: written" in forced.stderr
    texts = plain.stdout.split("\n---------------\n")[:3]
    data = data_of((folder / "page.html").read_text("utf-8"))
    assert ["".join(t["tokens"]) for t in data["texts"]] == texts


def test_the_first_sample_is_the_same_however_many_there_are(folder):
    args = ("--temperature=2", "--seed=3")
    one, five = (sample(folder, *args, f"--num_samples={n}").stdout for n in (1, 5))
    assert one == five.split("---------------\n")[0] and len(set(five.split("---\n"))) > 2


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_sample_ends_at_its_stop(folder, length, num_samples):
    def texts(*args):
        args += ("--temperature=3", f"--num_samples={num_samples}", "--max_new_tokens=200")
        printed = sample(folder, *args).stdout
        if num_samples == 1:
            return [printed.removesuffix("\n")]
        return printed.split("\n---------------\n")[:num_samples]

    whole = texts()
    stop = whole[0][10 : 10 + length]
    stopped = texts(f"--stop={stop}")
    for short, long in zip(stopped, whole, strict=True):
        found = long.find(stop, 2)
        assert short == (long[: found + len(stop)] if found >= 0 else long)


@pytest.mark.parametrize("coloured", [True, False])
def test_a_terminal_gets_colours_and_no_control_characters(coloured, folder):
    """Several samples with their experts, and a single one as it comes."""
    args = ("--show_experts", "--num_samples=2") if coloured else ("--num_samples=1",)
    ours, theirs = pytest.importorskip("pty").openpty()
    args += ("--device=cpu", "--start=\x1b\u202e<", "--max_new_tokens=200")
    with open(theirs, "wb", buffering=0) as terminal:
        env = {**OFFLINE, "FORCE_COLOR": ""}
        process = start(folder, "sample.py", *args, env=env, output=(terminal, terminal))
    printed = b""
    try:
        while piece := os.read(ours, 4096):
            printed += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    assert process.wait(60) == 0
    text = printed.decode()
    assert text.count("experts on: ") == (2 if coloured else 0)
    assert text.count("\\x1b") > 1 and text.count("\\u202e") > 1  # the prompt's, and more
    assert (
        "\x1b" not in re.sub(r"\x1b\[(0|[34]8;2;\d+;\d+;\d+)m", "", text) and "\u202e" not in text
    )


def test_a_mistake_is_one_line_before_anything_is_drawn(folder):
    for args, words in (
        (["--html=absent/page.html"], "must be a file in a folder that exists"),
        (["--html=out"], "must be a file in a folder that exists"),
        (["--html", "--show_experts"], "--html: has no value"),
        (["--seed=-1"], "seed=-1: must be from 0"),
        (["--start=FILE:absent"], "cannot read the file 'absent'"),
        (["--show_expert"], "did you mean 'show_experts'?"),
        (["--show_experts=2"], "show_experts takes bool"),
    ):
        done = sample(folder, *args)
        assert done.returncode == 2 and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_weights_that_are_not_finite_are_said_in_one_line(folder, model):
    path = folder / "out/ckpt.pt"
    saved = torch.load(path, weights_only=True)
    saved["model"]["ln_out.weight"] = torch.full_like(saved["model"]["ln_out.weight"], float("nan"))
    torch.save(saved, path)
    done = sample(folder)
    assert done.returncode == 2 and "the logits are not finite" in done.stderr
    assert len(done.stderr.splitlines()) == 1

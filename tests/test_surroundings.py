"""Tests of where a run meets the world: terminals, signals, paths, editors, the environment."""

import codecs
import importlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

import configurator
import log
import runtime
from checkpoint import load
from common import (
    LONG,
    OFFLINE,
    ROOT,
    TINY,
    call,
    evaluations,
    press_ctrl_c,
    run,
    start,
    start_and_signal,
    succeed,
)
from log import track
from prepare_shakespeare import load_data, prepare

GLOBALS = {"__doc__": "", "__file__": __file__, "out_dir": "out", "name": "a", "device": "cpu"}
GLOBALS["PATHS"] = ("out_dir",)


# ---- what cannot be shown ---------------------------------------------------

CHINESE = "狐狸跳過了那隻懶狗。" * 60


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    """A run on a Chinese text, and what it printed on a terminal that cannot show one."""
    folder = tmp_path_factory.mktemp("chinese")
    (folder / "狐狸.txt").write_text(CHINESE, "utf-8")
    env = {**OFFLINE, "PYTHONIOENCODING": "cp1252"}
    args = ("--input_file=狐狸.txt", "--dataset=狐")
    succeed(folder, "prepare_shakespeare.py", *args, env=env)
    args = (*TINY, "--dataset=狐", "--out_dir=out-狐")
    return folder, succeed(folder, "train.py", *args, env=env)


def test_what_a_terminal_cannot_show_is_replaced(chinese):
    folder, printed = chinese
    assert "A sample:\n?" in printed and "/sample.py '--out_dir=out-?'" in printed
    assert load_data(folder / "data/狐")[0].chars == "".join(sorted(set(CHINESE)))
    assert json.loads((folder / "data/狐/meta.json").read_text("utf-8"))["source"] == "狐狸.txt"


@pytest.mark.parametrize("encoding, shown", [("utf-8", "狐"), ("cp1252", "?"), ("ascii", "?")])
def test_a_sample_is_printed_in_any_encoding(encoding, shown, chinese):
    env = {**OFFLINE, "PYTHONIOENCODING": encoding}
    args = ("--out_dir=out-狐", "--start=狐", "--max_new_tokens=20", "--device=cpu")
    done = run(chinese[0], "sample.py", *args, env=env)
    assert done.returncode == 0 and done.stdout.startswith(shown) and not done.stderr


# ---- signals ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGHUP", "SIGXCPU", "SIGQUIT", "SIGUSR1"])
def test_whatever_asks_to_stop_saves(name, workplace):
    number = getattr(signal, name)
    printed, status = start_and_signal(workplace, number, *LONG)
    saved = torch.load(workplace / "out/ckpt.pt", weights_only=True)["iter_num"]
    assert status == 128 + number and saved >= 12
    if name != "SIGHUP":  # whose terminal is gone
        assert f"stopped after {saved} iterations" in printed


def test_a_terminal_that_closes_saves(workplace):
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(workplace)
        command = [sys.executable, str(ROOT / "train.py"), *TINY, *LONG, "--log_interval=1"]
        os.execve(sys.executable, command, {**OFFLINE})
    shown = b""
    while b"iter 12:" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert torch.load(workplace / "out/ckpt.pt", weights_only=True)["iter_num"] >= 12
    assert status in (128 + signal.SIGHUP, 128 + signal.SIGPIPE)  # whichever comes first


def test_a_signal_that_is_ignored_stays_ignored(workplace):
    """As by nohup."""
    args = ("--max_iters=60", "--log_interval=6")
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    printed, status = start_and_signal(workplace, signal.SIGHUP, *args, first=ignore)
    assert status == 0 and "whole validation split" in printed and "stopped" not in printed


def test_a_reader_that_goes_away_ends_the_run_with_a_checkpoint(workplace):
    """As head does, and less."""
    process = start(workplace, "train.py", *TINY, *LONG)
    assert any(line.startswith("iter 12:") for line in process.stdout)  # reads no further
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert torch.load(workplace / "out/ckpt.pt", weights_only=True)["iter_num"] > 12


# ---- paths, and files as editors write them ---------------------------------


@pytest.mark.parametrize("how", ["--out_dir=~/a", "--out_dir ~/a", "c.py", "on_cpu", "base"])
def test_the_home_folder_in_a_path(how, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sources = {
        "c.py": "out_dir = '~/a'",
        "on_cpu": "on_cpu = {'out_dir': '~/a'}",
        "base": "base = '~/d.py'",
    }
    (tmp_path / "d.py").write_text("out_dir = '~/a'")
    (tmp_path / "c.py").write_text(sources.get(how, ""))
    argv = ["~/c.py"] if how in sources else how.split()
    found = configurator.override(GLOBALS, [*argv, "--name=~/a"])
    assert found["out_dir"] == str(tmp_path / "a") and found["name"] == "~/a"


def test_the_home_folder_in_every_setting_that_is_a_path(trained, tmp_path, monkeypatch):
    shutil.copytree(trained[0] / "whole", tmp_path / "whole")
    (tmp_path / "prompt.txt").write_bytes(codecs.BOM_UTF8 + b"def \r\n")
    env = {**OFFLINE, "HOME": str(tmp_path)}
    args = ("--out_dir=~/whole", "--start=FILE:~/prompt.txt", "--max_new_tokens=3", "--device=cpu")
    assert succeed(trained[0], "sample.py", *args, env=env).startswith("def \n")
    (tmp_path / "a.txt").write_text("to be or not to be " * 9)
    args = ("--input_file=~/a.txt", "--dataset=~/mine")
    succeed(trained[0], "prepare_shakespeare.py", *args, env=env)
    assert (tmp_path / "mine/meta.json").exists() and not (trained[0] / "~").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/whole")[1] == load(tmp_path / "whole")[1]


EDITORS = ("utf-8", "utf-8-sig", "utf-16")


@pytest.mark.parametrize("encoding", EDITORS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_of_any_editor(encoding, end, tmp_path, monkeypatch):
    """To learn from, and as a prompt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(f"狐狸{end}fox{end}".encode(encoding))
    assert configurator.decode(Path("a.txt").read_bytes()) == "狐狸\nfox\n"
    tokenizer, data = load_data(prepare(path="a.txt", name="a"))
    assert tokenizer.decode([*data["train"], *data["val"]]) == "狐狸\nfox\n"


@pytest.mark.parametrize("encoding", EDITORS)
@pytest.mark.parametrize("start", ["", "# 狐\r\n"])
def test_a_config_file_of_any_editor(start, encoding, tmp_path):
    (tmp_path / "base.py").write_bytes(f"{start}out_dir = 'b'\r\n".encode(encoding))
    source = f"{start}base = 'base.py'\r\nname = out_dir\r\n"
    (tmp_path / "c.py").write_bytes(source.encode(encoding))
    found = configurator.override(GLOBALS, [str(tmp_path / "c.py")])
    assert found["out_dir"] == found["name"] == "b"


def test_a_meta_json_of_any_editor(prepared, tmp_path):
    shutil.copytree(prepared / "data/shakespeare_char", tmp_path / "data")
    meta = tmp_path / "data/meta.json"
    meta.write_bytes(codecs.BOM_UTF8 + meta.read_bytes())
    expected = load_data(prepared / "data/shakespeare_char")[0]
    assert load_data(tmp_path / "data")[0] == expected


@pytest.mark.parametrize(
    "setting, hint",
    [
        ("input_file", "; a text is --input_file=story.txt"),
        ("learning_rate", ""),
        ("start", "; a text is --start=FILE:story.txt"),
    ],
)
@pytest.mark.parametrize("text", ["It was a dark night.", "# nothing", "'a docstring'"])
def test_a_text_in_the_place_of_a_config_file(setting, hint, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text(text)
    with pytest.raises(SystemExit):
        configurator.override({**GLOBALS, setting: ""}, ["story.txt"])
    said = "story.txt: not a config file, which ends in .py (settings are --key=value)"
    assert capsys.readouterr().err.endswith(f": {said}{hint}\n")


def test_a_folder_in_the_place_of_a_config_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out-a").mkdir()
    with pytest.raises(SystemExit):
        configurator.override(GLOBALS, ["out-a"])
    assert capsys.readouterr().err.endswith("; a run is --out_dir=out-a\n")


# ---- the environment --------------------------------------------------------


@pytest.mark.parametrize(
    "half",
    [
        {"WORLD_SIZE": "4"},
        {"RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "3", "MASTER_ADDR": "absent"},
        {"WORLD_SIZE": "four"},
    ],
)
def test_what_torchrun_sets_by_halves_is_not_heeded(half, monkeypatch):
    whole = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    whole |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    try:
        for env, expected in ((half, (False, 0, 1, True)), (whole, (True, 1, 4, False))):
            with monkeypatch.context() as patch:
                for name in whole:
                    patch.delenv(name, raising=False)
                for name, value in env.items():
                    patch.setenv(name, value)
                importlib.reload(runtime)
                found = runtime.DDP, runtime.RANK, runtime.WORLD_SIZE, runtime.MASTER
                assert found == expected
    finally:
        importlib.reload(runtime)


BROKEN = {
    "ImportError: no libwandb": "raise ImportError('no libwandb')",
    "AttributeError: module 'wandb' has no attribute 'init'": None,  # a folder of that name
    "ValueError: no api_key": "def init(**how): raise ValueError('no api_key')",
    "ConnectionError: no network": "def init(**how): pass\n"
    "def log(row): raise ConnectionError('no network\\nand more')",
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_run_goes_on_without_a_wandb_that_does_not_work(reason, tmp_path, monkeypatch, capsys):
    source = BROKEN[reason]
    if source is None:
        (tmp_path / "wandb").mkdir()
    else:
        (tmp_path / "wandb.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    settings = dict(wandb_log=True, wandb_project="p", wandb_run_name="r")
    track(settings)
    for k in range(3):
        track(settings, {"iter": k, "experts_on": [0.5, 1.0]})
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    advice = "; try pip install wandb" * reason.startswith(("ImportError", "AttributeError"))
    said = f"wandb_log=True: goes on without ({reason}){advice}\n"
    assert capsys.readouterr().err == said and not settings["wandb_log"]


def test_wandb_gets_the_settings_and_the_rows(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "rows = []\ndef init(**how): rows.append(how)\ndef log(row): rows.append(row)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    settings = dict(wandb_log=True, wandb_project="p", wandb_run_name="r")
    track(settings)
    track(settings, {"iter": 3, "experts_on": [0.5, 1.0]})
    rows = sys.modules.pop("wandb").rows
    assert rows == [dict(project="p", name="r", config=settings), {"iter": 3, "experts_on": 0.75}]


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_where_compiling_does_not_work_a_run_goes_on_without(
    script, trained, workplace, monkeypatch, capsys
):
    def compile(model, **how):
        raise RuntimeError("No working C++ compiler found\n" + "a traceback\n" * 84)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.chdir(workplace)
    shutil.copytree(trained[0] / "whole", workplace / "whole")
    of_sample = ("--out_dir=whole", "--device=cpu", "--num_samples=1", "--max_new_tokens=20")
    args = ("--max_iters=1",) if script == "train.py" else of_sample
    assert call(*args, script=script, tiny=script == "train.py") == 0
    plain = capsys.readouterr().out
    assert call(*args, "--compile", script=script, tiny=script == "train.py") == 0
    printed = capsys.readouterr()
    said = "compile=True: goes on without (RuntimeError: No working C++ compiler found)\n"
    assert printed.err == said and plain.splitlines()[-1] == printed.out.splitlines()[-1]
    steps = [re.findall(r"(?m)^step .*", out) for out in (plain, printed.out)]
    assert steps[0] == steps[1] and bool(steps[0]) == (script == "train.py")
    assert script == "train.py" or plain == printed.out


@pytest.mark.parametrize("name", ["tiktoken", "requests"])
@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError", "OSError"])
def test_a_broken_package_is_said_in_one_line(kind, name, tmp_path, monkeypatch, capsys):
    """To prepare a text it needs neither of them."""
    (tmp_path / f"{name}.py").write_text(f"raise {kind}('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    (tmp_path / "a.txt").write_text("to be or not to be " * 9)
    args = ("--tokenizer=gpt2", "--input_file=a.txt") if name == "tiktoken" else ()
    assert call(*args, script="prepare_shakespeare.py", tiny=False) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert "no such symbol" in (printed.err if name == "tiktoken" else printed.out)
    args = ("--input_file=a.txt", "--dataset=mine")
    assert call(*args, script="prepare_shakespeare.py", tiny=False) == 0
    assert (tmp_path / "data/mine/meta.json").exists()


@pytest.mark.parametrize(
    "device", ["cuda", "mps", "cuda:7", "xpu", "meta", "hpu", "mkldnn", "privateuseone", "a" * 99]
)
@pytest.mark.parametrize("gpus", [0, 8])
def test_a_device_that_is_not_there(gpus, device, monkeypatch, workplace, capsys):
    """In one line, also from Python."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        configurator.pick_device(device)
    line = str(caught.value)
    assert line.startswith(f"device={device!r:.20}: ") and "\n" not in line and len(line) <= 100
    assert line.endswith("; this machine has cuda:0 to cuda:7, cpu" if gpus else "has cpu")
    monkeypatch.chdir(workplace)
    if not gpus:
        assert call(f"--device={device}") == 2
        assert capsys.readouterr().err == f"train.py: {line}\n"


# ---- inside a process, as a notebook's --------------------------------------


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def state_of_process():
    handlers = [signal.getsignal(n) for n in SIGNALS]
    precision = torch.get_float32_matmul_precision()
    ways = [(s.errors, s.line_buffering) for s in (sys.stdout, sys.stderr)]
    rng = torch.get_rng_state().tolist()
    return [*handlers, sys.excepthook, sys.stdout, sys.stderr, precision, os.getcwd(), ways, rng]


@pytest.mark.parametrize(
    "script, args, status",
    [
        ("train.py", ("--max_iters=2",), 0),
        ("train.py", ("--n_head=3",), 2),
        ("train.py", ("--max_iters=2", "--eval_interval=1", "--learning_rate=1e30"), 2),
        ("train.py", ("--dataset=absent",), 2),
        ("train.py", ("--no_such=1",), 2),
        ("train.py", LONG, 130),
        ("train.py", ("--help",), 0),
        ("sample.py", ("--out_dir=whole", "--max_new_tokens=5", "--device=cpu"), 0),
        ("sample.py", ("--out_dir=absent",), 2),
        ("prepare_shakespeare.py", ("--input_file=absent",), 2),
    ],
)
def test_a_script_leaves_its_process_as_it_was(
    script, args, status, trained, workplace, monkeypatch
):
    """Twice, and then another run writes to the same folder."""
    monkeypatch.chdir(workplace)
    shutil.copytree(trained[0] / "whole", workplace / "whole")
    before = state_of_process()
    for _ in range(2):
        if status == 130:
            log = workplace / "out/log.jsonl"
            log.unlink(missing_ok=True)
            press_ctrl_c(log)
        assert call(*args, script=script, tiny=script == "train.py") == status
        assert state_of_process() == before
    assert call("--max_iters=1") == 0
    assert state_of_process() == before


@pytest.mark.parametrize("script", ["train.py --help", "sample.py --help", "sample.py"])
def test_a_reader_that_goes_away_ends_a_script_quietly(script, trained):
    """As head does."""
    name, *args = script.split()
    args = args or ["--out_dir=whole", "--device=cpu", "--max_new_tokens=9"]
    reads, writes = os.pipe()
    os.close(reads)
    with tempfile.TemporaryFile() as errors, open(writes, "wb") as nowhere:
        process = start(trained[0], name, *args, output=(nowhere, errors))
        assert process.wait(60) == 128 + signal.SIGPIPE
        errors.seek(0)
        assert errors.read() == b""


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_closed_streams_lose_nothing(closed, workplace):
    """As by >&- in a shell, or where a program without a console starts it."""
    close = partial(list, map(os.close, closed))
    done = run(workplace, "train.py", *TINY, "--max_iters=5", first=close, fresh=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert torch.load(workplace / "out/ckpt.pt", weights_only=True)["iter_num"] == 5


def test_after_an_exception_the_next_run_starts_and_ctrl_c_works(workplace, monkeypatch):
    """Which a notebook shows itself: nothing can put the process in order before the next run."""
    monkeypatch.chdir(workplace)
    before = state_of_process()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grads_with_norm_", None)
        with pytest.raises(TypeError):
            call()
    assert call("--max_iters=1") == 0
    assert state_of_process() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# ---- advice -----------------------------------------------------------------


def test_the_commands_that_train_py_prints_work_from_where_it_was_called(tmp_path, text):
    """From another folder, on a text without a line end, whose first characters show nothing."""
    (tmp_path / "a.txt").write_text("\r\x07 to be or not to be, " * 99, newline="")
    args = ("--input_file=a.txt", "--dataset=my text")
    succeed(tmp_path, "prepare_shakespeare.py", *args)
    args = (*TINY, "--dataset=my text", "--out_dir=it's mine")
    more = succeed(tmp_path, "train.py", *args).splitlines()[-1].removeprefix("More of it: python ")
    script, *given = shlex.split(more)
    assert given == ["--out_dir=it's mine", "--start= "]
    assert Path(script) == ROOT / "sample.py"
    assert "to" in succeed(tmp_path, "sample.py", *given, "--max_new_tokens=90", "--device=cpu")


@pytest.mark.parametrize(
    "argv, orig, ablations, expected",
    [
        ("../a/train.py c.py", "python3 -u ../a/train.py c.py", [], "python3 ../a/train.py c.py"),
        ("train.py --init_from=a --out_dir=b", "/usr/bin/python train.py", [],
         "/usr/bin/python train.py --out_dir=b"),
        ("train.py c.py --init_from=resume", "python experiments/ablations.py", ["yoco()"],
         "python experiments/ablations.py 'yoco()' train.py c.py"),
    ],
)  # fmt: skip
def test_the_command_to_resume(argv, orig, ablations, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(sys, "orig_argv", orig.split())
    monkeypatch.setattr(log, "ABLATIONS", ablations)
    assert log.command_to_resume() == f"{expected} --init_from=resume"


# ---- the log, and the best loss ---------------------------------------------


def test_a_log_has_each_iteration_once(workplace):
    """After a crash, and after a run that was finished and is made longer."""
    args = (*TINY, "--max_iters=30", "--always_save_checkpoint=True")
    succeed(workplace, "train.py", *args)
    whole = [row["iter"] for row in evaluations(workplace / "out")]
    ckpt = workplace / "out/ckpt.pt"
    saved = torch.load(ckpt, weights_only=True)
    succeed(workplace, "train.py", *args, "--init_from=resume", "--max_iters=40")
    expected = [0, 10, 20, 30, 30, 40, 40]
    assert [row["iter"] for row in evaluations(workplace / "out")] == expected
    torch.save(saved, ckpt)  # as if the run had been killed before it saved again
    with open(workplace / "out/log.jsonl", "a") as log:
        log.write('{"iter": 50, "val_')
    printed = succeed(workplace, "train.py", *args, "--init_from=resume", "--max_iters=40")
    rows = evaluations(workplace / "out")
    assert [row["iter"] for row in rows] == expected and "step 40: " in printed
    assert [k for k, row in enumerate(rows) if "whole_val_loss" in row] == [4, 6]
    succeed(workplace, "train.py", "--init_from=resume", "--device=cpu")  # nothing left to do
    assert evaluations(workplace / "out") == rows and whole == expected[:5]


@pytest.mark.parametrize("change", ["--eval_iters=7", "--batch_size=9", "--seed=5", None])
def test_a_best_loss_is_that_of_the_best_model_on_what_is_measured_now(
    change, workplace, monkeypatch, capsys
):
    """It is measured anew, and what was kept as the best one is not lost to a worse one."""
    monkeypatch.chdir(workplace)
    kept = "ckpt_best.pt" if change in ("--seed=5", None) else "ckpt.pt"
    assert call("--always_save_checkpoint=False") == 0
    best = torch.load("out/ckpt.pt", weights_only=True)
    if kept == "ckpt_best.pt":  # as if it had been stopped after its best evaluation
        os.rename("out/ckpt.pt", "out/ckpt_best.pt")
        torch.save(best | {"is_best": False, "iter_num": 21}, "out/ckpt.pt")
    capsys.readouterr()
    how = ("--learning_rate=3.0", "--decay_lr=False", "--init_from=resume", "--max_iters=40")
    assert call(*([change] if change else []), *how, tiny=False) == 0  # gets worse
    printed = capsys.readouterr().out
    after = torch.load("out/ckpt.pt", weights_only=True)
    assert all(torch.equal(after["model"][k], w) for k, w in best["model"].items())
    assert after["iter_num"] == best["iter_num"] and not os.path.exists("out/ckpt_best.pt")
    assert bool(change) == ("the evaluation data has changed: at best " in printed)
    if change and kept == "ckpt.pt":
        loss = re.search(r"has changed: at best (\S+), at step 20\n", printed)[1]
        assert call(change, "--init_from=resume", "--eval_only", tiny=False) == 0
        assert f", val loss {loss}\n" in capsys.readouterr().out


def test_a_best_checkpoint_that_a_kill_left_is_not_taken_for_the_best(workplace, monkeypatch):
    """The kill came when the new best one was saved, and the older one not yet removed."""
    monkeypatch.chdir(workplace)
    how = ("--always_save_checkpoint=False", "--out_dir=out")
    assert call(*how) == 0
    best = torch.load("out/ckpt.pt", weights_only=True)
    assert best["is_best"] and best["iter_num"] == 20
    torch.save(best | {"iter_num": 10, "best_val_loss": 9.0, "best_iter": 10}, "out/ckpt_best.pt")
    more = ("--init_from=resume", "--learning_rate=3.0", "--decay_lr=False", "--max_iters=40")
    assert call(*more, tiny=False) == 0
    after = torch.load("out/ckpt.pt", weights_only=True)
    assert after["iter_num"] == 20 and after["is_best"]
    closing = [row["iter"] for row in evaluations(workplace / "out") if "whole_val_loss" in row]
    assert closing == [20]  # of the same weights, once


def test_a_run_that_goes_on_with_another_text_saves_its_best(prepared, tmp_path):
    """Though the text before was easier."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    saving = ("--always_save_checkpoint=False", "--device=cpu")
    succeed(tmp_path, "train.py", *TINY, *saving)
    state = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    state["best_val_loss"] = 0.5
    torch.save(state, tmp_path / "out/ckpt.pt")
    folder, other = (tmp_path / "data" / name for name in ("shakespeare_char", "other"))
    shutil.copytree(folder, other)
    ids = (folder / "val.bin").read_bytes()
    (other / "val.bin").write_bytes(ids[2000:] + ids[:2000])
    args = ("--init_from=resume", "--max_iters=40", "--lr_decay_iters=0", *saving)
    succeed(tmp_path, "train.py", *args)
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["iter_num"] == 20
    printed = succeed(tmp_path, "train.py", *args, "--dataset=other")
    assert "the evaluation data has changed: at best " in printed
    found = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert found["iter_num"] > 20 and found["best_val_loss"] > 0.5 and found["is_best"]

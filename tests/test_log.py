"""Tests of log.py: the log after damage, what is set aside, and the commands that are printed."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

import log
from common import OFFLINE, ROOT, TINY

ROWS = [{"iter": k, "val_loss": 4.0 - k / 100} for k in (0, 10, 20)]
TEXT = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    "raw",
    [
        TEXT,
        TEXT.rstrip(b"\n"),
        b"\xef\xbb\xbf" + TEXT,
        TEXT.replace(b"\n", b"\r\n"),
        TEXT + b'{"iter": 30, "val_loss": 3.0}\n',  # beyond the checkpoint
        TEXT + b'{"iter": 20, "val_\n',
        TEXT + b"\xff\xfe\x00\n",
        TEXT + b'{"iter": "x"}\n{"iter": null}\n[1]\nnull\n{}\n{"iter": NaN}\n\n',
        TEXT + b'{"iter": 1' + b"0" * 400 + b"}\n",
    ],
)
def test_a_resumed_run_goes_on_with_the_rows_that_are_whole(raw, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(raw)
    log.start_log(tmp_path, 20)
    assert (tmp_path / "log.jsonl").read_bytes() == TEXT
    log.append_row(tmp_path / "log.jsonl", {"iter": 30})
    assert log.read_log(tmp_path) == [*ROWS, {"iter": 30}]


def test_a_closing_row_comes_once(tmp_path):
    """Also behind others, and where the last digits differ; another loss is another text's."""
    path, closing = tmp_path / "log.jsonl", {"iter": 20, "whole_val_loss": 3.5}
    for row in (*ROWS, closing, {"iter": 30}, closing, {"iter": 20, "whole_val_loss": 3.5000001}):
        log.append_row(path, row)
    assert log.read_log(tmp_path) == [*ROWS, closing, {"iter": 30}]
    log.append_row(path, other := {"iter": 20, "whole_val_loss": 5.0})
    assert log.read_log(tmp_path)[-1] == other


def test_a_log_that_cannot_be_opened_stays_as_it_is(tmp_path, monkeypatch):
    """As where a process has too many files open."""

    def no_more(*args, **how):
        raise OSError(24, "Too many open files")

    (tmp_path / "log.jsonl").write_bytes(TEXT)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", no_more)
        with pytest.raises(OSError):
            log.append_row(tmp_path / "log.jsonl", {"iter": 30})
    assert (tmp_path / "log.jsonl").read_bytes() == TEXT


def test_what_is_set_aside_is_of_one_run(tmp_path):
    """A run that fails before its first checkpoint takes nothing from the one before it."""

    def run(name, *files):
        log.start_log(tmp_path, None)
        for file in files:
            (tmp_path / file).write_text(name)

    def old():
        return {path.name: path.read_text() for path in tmp_path.glob("*.old")}

    run("a", "ckpt.pt", "ckpt_best.pt", "log.jsonl")
    run("b", "log.jsonl")
    of_a = {f"{name}.old": "a" for name in ("ckpt.pt", "ckpt_best.pt", "log.jsonl")}
    assert old() == of_a
    run("c", "log.jsonl", "ckpt.pt")
    assert old() == of_a
    run("d")
    assert old() == {"ckpt.pt.old": "c", "log.jsonl.old": "c"}


def test_the_log_of_a_finished_run_is_kept_where_its_checkpoint_was_moved_away(tmp_path):
    for name in ("ckpt.pt.old", "log.jsonl.old"):
        (tmp_path / name).write_text("of a run before it")
    (tmp_path / "log.jsonl").write_text('{"iter": 20, "whole_val_loss": 2.5}\n')
    assert log.start_log(tmp_path, None) == [tmp_path / "log.jsonl"]
    assert "2.5" in (tmp_path / "log.jsonl.old").read_text()
    assert not (tmp_path / "ckpt.pt.old").exists()  # of another run


def test_where_stdout_fails_all_files_are_set_aside_or_none(tmp_path, monkeypatch):
    def full(*args, **how):
        raise OSError(28, "No space left on device")

    (tmp_path / "ckpt.pt").write_text("")
    (tmp_path / "log.jsonl").write_bytes(TEXT)
    monkeypatch.setattr("builtins.print", full)
    with pytest.raises(OSError):  # which train.py reports as of its output, not of the folder
        log.start({"out_dir": str(tmp_path), "wandb_log": False}, None)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt.old", "log.jsonl.old"}


def test_commands_where_a_script_is_linked_and_torchrun_is_not_on_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log.sys, "orig_argv", ["/usr/bin/python3", "train.py"])
    monkeypatch.setattr(log.sys, "argv", ["train.py", "a.py"])
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    said = log.command_to_sample("out", "\n")
    assert said == f"/usr/bin/python3 {ROOT / 'sample.py'} --out_dir=out"
    monkeypatch.setattr(log, "DDP", True)
    monkeypatch.setattr(log, "which", lambda name: None)
    said = "--standalone --nproc_per_node=1 train.py a.py --init_from=resume"
    assert log.command_to_resume() == f"/usr/bin/python3 -m torch.distributed.run {said}"
    monkeypatch.setattr(log, "which", lambda name: "/usr/bin/torchrun")
    assert log.command_to_resume() == f"torchrun {said}"


@pytest.mark.parametrize(
    "name", ["a b", "it's", "e\x1bx", "n\nl", "a\u200db", "é", "\\x41", "$HOME"]
)
def test_a_shell_reads_a_printed_command_as_it_was_meant(name):
    line = log.shell(["printf", "%s", name])
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout.decode() == name
    assert "$'" in line or shlex.split(line) == ["printf", "%s", name]


@pytest.mark.parametrize("mfu, shown", [(0.35, ", mfu 35%"), (1.0, ", mfu 100%"), (2.33, "")])
def test_the_line_of_an_iteration(mfu, shown, capsys):
    """As nanoGPT's, and an mfu over 1 is none."""
    log.show_iteration(20, 1.5, 0.25, 12345.6, mfu, 61, 0.1, 0.982)
    line = f"iter 20: loss 1.5000, time 250.00ms, 12,346 tok/s{shown}, 1:01 left, experts on 98.2%"
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    "width, rest",
    [
        (45, "iter 20: l"),
        (60, "iter 20: loss 1.5000"),
        (75, "iter 20: loss 1.5000, experts on 98.2%"),
        (90, "iter 20: loss 1.5000, experts on 98.2%, 12,346 tok/s"),
        (200, "iter 20: loss 1.5000, experts on 98.2%, 12,346 tok/s, mfu 35%"),
    ],
)
def test_a_terminal_shows_what_fits(width, rest, monkeypatch):
    renewed = []
    out = SimpleNamespace(isatty=lambda: True, renew=renewed.append)
    monkeypatch.setattr(log, "get_terminal_size", lambda: os.terminal_size((width, 24)))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        log.show_iteration(20, 1.5, 0.25, 12345.6, 0.35, 61, 0.1, 0.982)
    assert renewed == [f"[##{'.' * 18}] 1:01 left, {rest}"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
def test_a_terminal_renews_one_line(workplace):
    """What is to be seen in the end are the lines of the evaluations, and no iteration's."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(workplace)
        command = [sys.executable, str(ROOT / "train.py"), *TINY]
        os.execve(sys.executable, command, {**OFFLINE, "TERM": "xterm", "COLUMNS": "70"})
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lines = shown.decode().split("\r\n")
    renewed = [part for line in lines for part in line.split("\r\x1b[K")[:-1]]
    bars = [re.match(r"\[(#*)\.*\] \d:\d\d left, iter (\d+): loss \d", part) for part in renewed]
    assert [int(bar[2]) for bar in bars] == list(range(20))
    assert [len(bar[1]) for bar in bars] == list(range(20))  # of 20
    assert all(len(part) < 70 for part in renewed)
    seen = [line.split("\r\x1b[K")[-1] for line in lines]
    assert [s for s in seen if s.startswith("step")] and not [s for s in seen if "iter " in s]

"""A run's folder: its lock, its log (wandb gets it, too), the files of an earlier run; and the
commands that a run prints, to resume it or to sample from it.
"""

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from shlex import quote
from shutil import get_terminal_size, which
from typing import Any, TextIO

import numpy as np

from checkpoint import ABLATIONS, write_whole
from configurator import UNDO, fail, printable
from runtime import DDP, MASTER, WORLD_SIZE, writing

RUN = "torch.distributed.run"  # what torchrun calls


def lock_folder(settings: dict[str, Any]) -> None:
    """Creates out_dir and locks it until the script ends: one run at a time writes there. Without
    file locks, as on Windows, a second run is not noticed."""
    folder, resumes = settings["out_dir"], settings["init_from"] == "resume"
    if not MASTER or settings["eval_only"] or (resumes and not os.path.exists(folder)):
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = UNDO.enter_context(open(Path(folder, ".lock"), "w", encoding="utf-8"))
    except OSError as error:
        fail(f"out_dir={folder!r}: cannot be used: {error.strerror}")
    if is_taken(lock, "LOCK_EX"):
        fail(f"out_dir={folder!r}: another run is writing there; choose another --out_dir")


def is_taken(lock: TextIO, kind: str) -> bool:
    """Locks an open file, unless another process has; whether it has. False without file locks."""
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(lock, getattr(fcntl, kind) | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def is_locked(folder: Path) -> bool:
    """Whether a run is writing there now; False without file locks."""
    with suppress(OSError), open(folder / ".lock", encoding="utf-8") as lock:
        return is_taken(lock, "LOCK_SH")
    return False


def start(settings: dict[str, Any], resumed_at: int | None) -> None:
    """Begins the log of a new run, or of one `resumed_at` an iteration, here and at wandb."""
    if MASTER:
        track(settings)
        with writing(folder := Path(settings["out_dir"])):
            moved = start_log(folder, resumed_at)
        for path in moved:
            print(f"{path}, of an earlier run, is now {path.name}.old")


def show_iteration(
    iter_num: int, loss: float, dt: float, tokens_per_second: float, mfu: float, left: int,
    done: float, experts_on: float | None = None,
) -> None:  # fmt: skip
    """Prints the line of an iteration; in a terminal it takes the place of the one before, with a
    bar for the share of the run that is done. An mfu over 1 is of a peak that was measured while
    something else was running: it is left out."""
    if not MASTER:
        return
    time_left = f"{left // 60}:{left % 60:02} left"
    what = f"iter {iter_num}: loss {loss:.4f}"
    on = [] if experts_on is None else [f"experts on {experts_on:.1%}"]
    speed = [f"{tokens_per_second:,.0f} tok/s", *([f"mfu {mfu:.0%}"] if mfu <= 1 else [])]
    if not sys.stdout.isatty():
        print(", ".join([what, f"time {dt * 1000:.2f}ms", *speed, time_left, *on]))
        return
    bar = "#" * round(20 * done)
    line, width = f"[{bar:.<20}] {time_left}, {what}", get_terminal_size().columns
    for part in (*on, *speed):  # whole parts, as many as fit
        if len(line) + len(part) + 2 >= width:
            break
        line += f", {part}"
    sys.stdout.renew(line[: width - 1])


def add(settings: dict[str, Any], row: dict[str, float | list]) -> None:
    """Appends a row to out_dir/log.jsonl, and sends it to wandb if asked to."""
    if MASTER:
        with writing(path := Path(settings["out_dir"], "log.jsonl")):
            append_row(path, row)
        track(settings, row)


def start_log(folder: Path, resumed_at: int | None) -> list[Path]:
    """For a new run: renames the files of an earlier one to *.old, replacing older ones; returns
    their former names. For a resumed run: removes from the log what it will write again, and
    damaged lines."""
    log, moved = folder / "log.jsonl", []
    if resumed_at is not None:
        rows = [row for row in read_log(folder) if row["iter"] <= resumed_at]
        kept = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        if log.exists() and log.read_bytes() != kept:
            write_whole(log, lambda file: file.write(kept))
        return []
    closed = any("whole_val_loss" in row for row in read_log(folder))
    saved = closed or (folder / "ckpt.pt").exists()
    if not saved and (folder / "ckpt.pt.old").exists() and (folder / "log.jsonl.old").exists():
        log.unlink(missing_ok=True)  # what saved nothing must not displace a run that did
    for name in ("ckpt.pt", "ckpt_best.pt", "log.jsonl"):
        path, old = folder / name, folder / f"{name}.old"
        if saved:  # these names are of one run, or none
            old.unlink(missing_ok=True)
        if path.exists():
            os.replace(path, old)
            moved.append(path)
    return moved


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of the log in a folder; damaged lines are left out."""
    rows, path = [], folder / "log.jsonl"
    raw = path.read_bytes() if path.exists() else b""
    for line in raw.decode("utf-8-sig", "replace").splitlines():
        with suppress(ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            row = json.loads(line)
            rows += [row] if math.isfinite(row["iter"]) else []
    return rows


def append_row(path: Path, row: dict[str, float | list]) -> None:
    """Appends a row of JSON to a file, all of it or nothing; OSError if it cannot. If a finished
    run is closed again, the row is there already."""
    before, name = None, "whole_val_loss"
    for old in read_log(path.parent) if name in row else ():
        same = math.isclose(old.get(name, 0.0), row[name], rel_tol=1e-4)
        if same and old["iter"] == row["iter"]:
            return
    try:
        with open(path, "a", encoding="utf-8") as file:
            before = file.tell()
            file.write(json.dumps(row) + "\n")
    except OSError:
        with suppress(OSError, TypeError):  # the latter where it could not be opened
            os.truncate(path, before)  # no half a line
        raise


def track(settings: dict[str, Any], row: dict[str, Any] | None = None) -> None:
    """Starts a run at wandb if asked to, or sends it a row. If that fails, a line on stderr says
    why, and the run continues: log.jsonl has all rows."""
    if not settings["wandb_log"]:
        return
    try:
        import wandb

        if row is None:
            names = dict(project=settings["wandb_project"], name=settings["wandb_run_name"])
            UNDO.callback(end_tracking)
            wandb.init(**names, config=dict(settings))
        else:
            wandb.log({name: float(np.mean(value)) for name, value in row.items()})
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a broken package raises
        settings["wandb_log"] = False
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        lacks = isinstance(error, (ImportError, AttributeError))  # the latter of a folder wandb/
        advice = "; try pip install wandb" * lacks
        print(f"wandb_log=True: goes on without ({reason:.200}){advice}", file=sys.stderr)


def end_tracking() -> None:
    with suppress(Exception, SystemExit):
        sys.modules["wandb"].finish()


def shell(args: list[str]) -> str:
    """The arguments as one types them in a shell; bytes that a terminal does not show are spelled
    out, as bash and zsh read them."""
    spelled = {b: f"\\x{b:02x}" for b in (*range(32), *b"'\\", *range(127, 256))}

    def quoted(arg: str) -> str:
        if printable(arg) == arg and "\n" not in arg:
            return quote(arg)
        return f"$'{os.fsencode(arg).decode('latin-1').translate(spelled)}'"

    return " ".join(map(quoted, args))


def command(*args: str) -> str:
    """The command that calls a script with this Python, and with the ablations of this run."""
    by = [os.path.relpath(Path(__file__).parent / "experiments/ablations.py")] if ABLATIONS else []
    return shell([sys.orig_argv[0], *by, *ABLATIONS, *args])


def command_to_sample(out_dir: str, prompt: str) -> str:
    """The command that samples from this run."""
    start = [] if prompt == "\n" else [f"--start={prompt}"]
    beside = (Path(path).with_name("sample.py") for path in (sys.argv[0], __file__))
    script = next(filter(Path.exists, beside), "sample.py")  # train.py may be a link
    return command(str(script), f"--out_dir={out_dir}", *start)


def command_to_resume() -> str:
    """The command that goes on with this run."""
    args = [*(arg for arg in sys.argv if not arg.startswith("--init_from=")), "--init_from=resume"]
    if not DDP:
        return command(*args)
    alone = (os.environ.get("LOCAL_WORLD_SIZE") or str(WORLD_SIZE)) == str(WORLD_SIZE)
    how = f"--standalone --nproc_per_node={WORLD_SIZE}" if alone else "(with the options as before)"
    torchrun = "torchrun" if which("torchrun") else f"{shell(sys.orig_argv[:1])} -m {RUN}"
    return f"{torchrun} {how} {shell(args)}"

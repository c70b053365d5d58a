"""What several files of tests use: runs of a script as a user's, and what such a run leaves."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are of CPUs; a forked process cannot use CUDA

import torch  # noqa: E402

torch.set_num_threads(1)  # the tensors are small, and the cores may be shared
ROOT = Path(__file__).parent.parent
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # as in a job in the background
    if signal.getsignal(number) == signal.SIG_IGN:
        by_python = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, by_python)
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
    "--max_iters=20 --lr_decay_iters=20 --warmup_iters=2 --learning_rate=0.03 --muon_lr_ratio=0.7 "
    "--eval_interval=10 --log_interval=1 --eval_iters=2 --device=cpu"
).split()
# A run that is still going when the signal comes, however late this process wakes up.
LONG = ("--max_iters=3000", "--lr_decay_iters=3000", "--eval_interval=1500", "--log_interval=6")
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.preload"])


def become(folder, argv, env, output, first):
    """In a new process: runs the script argv[0] as Python runs it, its output to two files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, file in zip((1, 2), output, strict=True):
        os.dup2(file.fileno(), number)
        file.close()
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (open(k, "w", encoding=encoding, closefd=False) for k in (1, 2))
    sys.argv, sys.orig_argv, sys.path[0] = argv, ["python", *argv], str(ROOT)
    sys.path[1:1] = env.get("PYTHONPATH", "").split(os.pathsep)
    torch.set_num_threads(1)
    try:
        if first is not None:
            first()
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    except KeyboardInterrupt:  # what Python does
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


class Forked:
    """A process of the fork server, with what a subprocess.Popen has."""

    def __init__(self, *args):
        self.process = FORKSERVER.Process(target=become, args=args)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"process {self.pid} took more than {timeout} s")
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def start(folder, script, *args, env=OFFLINE, output=None, first=None, fresh=False):
    """Starts a script of ours in `folder`: in a process of its own, which has torch imported
    already, since that takes longer than most of the tests; it calls `first` first. `output`: the
    files for its stdout and stderr, else both are to be read from its `stdout`. fresh: a process
    which has imported nothing."""
    argv, piped = [str(ROOT / script), *args], None
    if output is None:
        reads, writes = os.pipe()
        piped = open(writes, "wb")
        output = (piped, piped)
    if fresh or sys.platform != "linux":
        process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=folder, env=env, stdout=output[0], stderr=output[1], preexec_fn=first,
        )  # fmt: skip
    else:
        files = [Connection(os.dup(file.fileno()), readable=False) for file in output]
        process = Forked(folder, argv, env, files, first)
    if piped:
        piped.close()
        process.stdout = open(reads, encoding="utf-8")
    return process


def run(folder, script, *args, timeout=120, first=None, **how):
    """Runs a script of ours in `folder`, to its end; see `start`."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        # With a limit to the size of files only the errors are kept, which are short.
        with open(os.devnull, "wb") as nothing:
            output = (stdout if first is None else nothing, stderr)
            process = start(folder, script, *args, output=output, first=first, **how)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        printed = []
        for file in (stdout, stderr):
            file.seek(0)
            printed.append(file.read().decode())
        return subprocess.CompletedProcess([script, *args], process.poll(), *printed)


def succeed(*args, **kwargs):
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails_with(said, *args, status=2, **kwargs):
    """The script ends with one line that matches `said` and a status that is not 0."""
    done = run(*args, **kwargs)
    assert done.returncode == status, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and re.search(said, done.stderr), done.stderr


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


def start_and_signal(
    folder, number, *args, after="iter 12:", times=1, script="train.py", tiny=True, first=None
):
    """Starts train.py, sends it a signal when it has printed `after`; its output and status."""
    process = start(folder, script, *(TINY if tiny else ()), *args, first=first)
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


def call(*args, script="train.py", tiny=True):
    """Runs a script of ours inside this process, in the working folder; its exit status."""
    argv, sys.argv = sys.argv, [str(ROOT / script), *(TINY if tiny else ()), *args]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    return 0


def press_ctrl_c(log, row="", limit=60):
    """In a thread: sends SIGINT to this process once the log is there and has `row`."""

    def wait():
        end = time.monotonic() + limit
        while time.monotonic() < end and not (log.exists() and row in log.read_text()):
            time.sleep(0.002)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


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

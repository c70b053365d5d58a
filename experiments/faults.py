"""What is lost when a run is killed, or its files are damaged? Everything is tried on real files.

    python experiments/faults.py        about twenty minutes; writes experiments/faults.json

- One run is ended again and again, at random moments, and resumed each time.
- A disk is full from one of its writes on, any of them.
- Runs go on with another text, on which they do worse.
- Checkpoints, meta.json and .bin files are damaged at random; checkpoints get other values.
- A text of 100 MB is prepared.

"Fault tests" in docs/running.md says what counts as lost. The exit status is 1 where anything is.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import tables  # noqa: E402
from checkpoint import load_checkpoint  # noqa: E402
from muon import configure_optimizers, restore  # noqa: E402
from prepare_shakespeare import load_data  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
ENDS = {
    "kill -9 while it trains": 50,
    "kill -9 while it writes a checkpoint": 50,
    "SIGINT": 25,
    "SIGTERM": 25,
    "SIGHUP": 25,
    "a broken output pipe": 25,
    "a full disk": 25,
}
FAILING = 50  # writes of a short run that are made to fail
MUTATIONS = 1000
ITERS = 6000
SETTINGS = (
    "--n_layer=1 --n_head=2 --n_embd=64 --n_expert=8 --block_size=16 --batch_size=4 --eval_iters=1 "
    f"--max_iters={ITERS} --lr_decay_iters={ITERS} --eval_interval=5 --log_interval=1000 "
    "--device=cpu"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *args: str, **how: Any) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, *args]
    output = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **output | how)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end, which must come with this status; what was said as an error."""
    stderr = process.communicate()[1].decode()
    if process.returncode != status:
        sys.exit(f"train.py ended with {process.returncode}, not {status}: {stderr}")
    return stderr


def end(kind: str, folder: Path, rng: random.Random) -> bool:
    """Goes on with the run in folder/killed, and ends it; whether something was lost."""
    ckpt = folder / "killed/ckpt.pt"
    before = load_checkpoint(ckpt)[1]["iter_num"] if ckpt.exists() else 0
    at, args = (ckpt.stat().st_mtime_ns if before else 0), ["--out_dir=killed"]
    args += ["--init_from=resume"] if before else []
    if kind == "a full disk":
        room = rng.randrange(1000, ckpt.stat().st_size) if before else 10_000
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
        said = finish(start(folder, *args, preexec_fn=limit), status=2)
        whole = not before or load_checkpoint(ckpt)[1]["iter_num"] == before
        return not whole or len(said.splitlines()) != 1
    how = {}
    if kind == "a broken output pipe":
        args.append("--log_interval=1")
        how["stdout"] = subprocess.PIPE
    process = start(folder, *args, **how)
    while process.poll() is None:  # until it has saved once, so that the run goes on
        if ckpt.exists() and ckpt.stat().st_mtime_ns > at:
            break
        time.sleep(0.002)
    if kind == "kill -9 while it writes a checkpoint":
        aside = ckpt.with_name("ckpt.pt.tmp")  # of this run: it has saved, and renamed an older one
        while process.poll() is None and not aside.exists():
            pass
        time.sleep(rng.random() * 0.002)
    else:
        time.sleep(rng.random() * 0.1)
    if kind == "a broken output pipe":
        process.stdout.close()
        process.stdout, status = None, 128 + signal.SIGPIPE
    else:
        asks = kind.startswith("SIG")
        number = getattr(signal, kind) if asks else signal.SIGKILL
        status = 128 + number if asks else -number
        if process.poll() is None:
            process.send_signal(number)
    finish(process, status)
    if (best := ckpt.with_name("ckpt_best.pt")).exists():
        load_checkpoint(best)  # raises where it is not whole
    return load_checkpoint(ckpt)[1]["iter_num"] <= before


def end_while_it_trains(folder: Path, rng: random.Random) -> dict[str, Counter]:
    """Ends and resumes a run in folder/killed; what was lost, by the kind of the end."""
    ends = [kind for kind, times in ENDS.items() for _ in range(times)]
    rng.shuffle(ends)
    counts = {kind: Counter(tried=0, lost=0) for kind in ENDS}
    for kind in ends:
        counts[kind]["tried"] += 1
        counts[kind]["lost"] += end(kind, folder, rng)
        half = bool(list((folder / "killed").glob("*.tmp")))
        if kind.startswith("kill -9"):
            counts[kind]["left a temporary file"] += half
    finish(start(folder, "--out_dir=killed", "--init_from=resume"))
    return counts


def figures(folder: Path) -> list[dict]:
    """What a run logged but the time that it took, row by row."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


FAILING_WRITE = """
import atexit, builtins, errno, os, runpy, sys
given = left = int(os.environ["WRITE"])
atexit.register(lambda: print(given - left))
class Full:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *how): return self.file.__exit__(*how)
    def write(self, data):
        global left
        left -= 1
        if left < 0: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)
def opened(path, mode="r", *args, real=open, **how):
    file = real(path, mode, *args, **how)
    return Full(file) if "out" in str(path) and set(mode) & set("wa") else file
builtins.open = opened
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def fill_the_disk(folder: Path, rng: random.Random) -> Counter:
    """Of a short run some write to out_dir is the first that fails; it must end with one line, what
    it saved before must be whole, and from there it must come to the usual end."""
    counts, settings = Counter(tried=0, lost=0), ("--max_iters=20", "--eval_interval=10")

    def run(name: str, room: int) -> subprocess.CompletedProcess:
        """A run with room for so many writes."""
        command = [sys.executable, "-c", FAILING_WRITE, str(ROOT / "train.py"), *SETTINGS]
        env = {**ENVIRONMENT, "WRITE": str(room), "PYTHONPATH": str(ROOT)}
        how = dict(cwd=folder, env=env, capture_output=True, text=True)
        return subprocess.run([*command, *settings, f"--out_dir={name}"], **how)

    writes = int(run("outwhole", 10**9).stdout.splitlines()[-1])
    expected = torch.load(folder / "outwhole/ckpt.pt", weights_only=True)["model"]
    for k in sorted({0, 1, writes - 1, *rng.sample(range(writes), FAILING - 3)}):
        out, done = folder / f"out{k}", run(f"out{k}", k)
        counts["tried"] += 1
        counts["lost"] += done.returncode != 2 or len(done.stderr.splitlines()) != 1
        args = ["--init_from=resume"] if (out / "ckpt.pt").exists() else []
        finish(start(folder, f"--out_dir={out.name}", *settings, *args))
        found = torch.load(out / "ckpt.pt", weights_only=True)["model"]
        same = all(torch.equal(found[name], expected[name]) for name in expected)
        counts["lost"] += not same or [row["iter"] for row in figures(out)] != [0, 10, 20, 20]
    return counts


def go_on_with_another_text(folder: Path, rng: random.Random) -> Counter:
    """A run goes on with harder texts, and keeps its best checkpoint alone: it must be the best one
    on the new text, the one that it began with among them, whatever the loss was on the old one."""
    counts = Counter(tried=0, lost=0)
    how = ("--max_iters=20", "--eval_interval=10", "--always_save_checkpoint=False")
    finish(start(folder, "--out_dir=easy", *how))
    chars = load_data(folder / "data/shakespeare_char")[0].chars
    for k in range(10):
        text = "".join(rng.choices(chars, k=5000))
        (folder / "hard.txt").write_text(text, encoding="utf-8", newline="")
        vocabulary = "--vocabulary_of=data/shakespeare_char"
        command = [sys.executable, str(ROOT / "prepare_shakespeare.py"), "--input_file=hard.txt"]
        quiet = dict(cwd=folder, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*command, f"--dataset=hard{k}", vocabulary], **quiet)
        shutil.copytree(folder / "easy", folder / f"hard{k}")
        to = (f"--out_dir=hard{k}", f"--dataset=hard{k}", "--init_from=resume")
        process = start(folder, *how, *to, "--max_iters=40", stdout=subprocess.PIPE)
        printed, said = (text.decode() for text in process.communicate())
        if process.returncode:
            sys.exit(f"train.py ended with {process.returncode}: {said}")
        began = re.search(r"has changed: at best (\S+), at step 20\n", printed)
        losses = {20: float(began[1])} if began else {}
        for row in figures(folder / f"hard{k}"):
            if row["iter"] > 20 and "val_loss" in row:
                losses[row["iter"]] = row["val_loss"]
        saved, best = load_checkpoint(folder / f"hard{k}/ckpt.pt")[1], min(losses, key=losses.get)
        own = best == 20 or saved["best_val_loss"] == losses[best]
        counts.update(tried=1, lost=int(not (began and own and saved["iter_num"] == best)))
        counts["found a better checkpoint"] += best > 20
    return counts


def damage(content: bytes, rng: random.Random) -> bytes:
    """A bit flipped, a piece overwritten, cut out or doubled, or the end cut off."""
    at, length = rng.randrange(len(content)), rng.randint(1, 64)
    before, piece, after = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:]
    choices = (flipped, rng.randbytes(length), b"", piece * 2)
    return before + rng.choice(choices) + (after if rng.random() < 0.9 else b"")


def try_damaged(path: Path, load: Callable[[], bool], rng: random.Random) -> Counter:
    """Damages the file at `path` again and again; what `load`, true for no effect, then does."""
    counts, whole = Counter(tried=MUTATIONS, lost=0), path.read_bytes()
    for _ in range(MUTATIONS):
        path.write_bytes(damage(whole, rng))
        try:
            same = load()
            counts["without effect" if same else "taken with other values"] += 1
            counts["lost"] += not same and path.suffix == ".pt"
        except ValueError as error:
            counts["refused"] += 1
            counts["lost"] += len(str(error).splitlines()) != 1
    path.write_bytes(whole)
    return counts


def places(value: Any) -> Iterator[tuple[dict | list, Any]]:
    """Each place in dicts and lists, as what holds it and its key."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


OTHERS = (None, True, -1, 10**9, 0.5, float("nan"), "x", [], {}, torch.zeros(1), torch.zeros(2, 3))


def try_other_values(out_dir: Path, rng: random.Random) -> Counter:
    """Checkpoints of which one value is another, or gone: loaded, and trained on for a step; each
    twentieth of them by train.py."""
    counts, path = Counter(tried=MUTATIONS, lost=0), out_dir.with_name("other") / "ckpt.pt"
    path.parent.mkdir()
    for k in range(MUTATIONS):
        checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
        holder, key = rng.choice([*places(checkpoint)])
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(OTHERS)
        torch.save(checkpoint, path)
        if k % 20 == 0:
            more = (
                f"--out_dir={path.parent.name}",
                "--init_from=resume",
                f"--max_iters={ITERS + 1}",
            )
            process = start(out_dir.parent, *more)
            said = process.communicate(timeout=120)[1].decode()
            refused = process.returncode == 2 and len(said.splitlines()) == 1
            counts["lost"] += not refused and process.returncode != 0
        else:
            try:
                model, saved = load_checkpoint(path)
                optimizers = configure_optimizers(model, {"betas": (0.9, 0.95)}, {"lr": 0.02})
                restore(optimizers, saved["optimizers"])
                refused = False
            except (ValueError, KeyError) as error:  # train.py makes a line of a KeyError
                refused = True
                counts["lost"] += len(str(error).splitlines()) != 1
            if not refused:  # what fails here ends this program
                idx = torch.randint(model.config.vocab_size, (2, 16))
                model(idx, idx).loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
        counts["refused" if refused else "taken"] += 1
    return counts


def prepare_100_mb(folder: Path) -> Counter:
    """The time and the peak memory that it takes to prepare 100 MB of text (Linux)."""
    text = "".join(path.read_text("utf-8") for path in sorted(ROOT.glob("*.py")))
    text = (text * (10**8 // len(text) + 1))[: 10**8]
    (folder / "large.txt").write_text(text.replace("\n", "\r\n", 1000), "utf-8")
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv = ['prepare_shakespeare.py', '--input_file=large.txt', '--dataset=large']\n"
        f"runpy.run_path({str(ROOT / 'prepare_shakespeare.py')!r}, run_name='__main__')\n"
        "status = open('/proc/self/status').read()\n"
        "print(next(row.split()[1] for row in status.splitlines() if row.startswith('VmHWM')))\n"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    seconds, mib = time.perf_counter() - began, int(done.stdout.split()[-1]) / 1024
    lost = int(seconds > 20 or mib * 2**20 >= 1e9)
    figures = {"MB a second": round(100 / seconds, 1), "MiB at its peak": round(mib, 1)}
    return Counter(tried=1, lost=lost, **figures)


def values(data: Path) -> tuple:
    """All that train.py takes from a data set."""
    tokenizer, tokens = load_data(data)
    return tokenizer, {part: ids.tobytes() for part, ids in tokens.items()}


def main() -> None:
    rng, results = random.Random(0), {}
    for number in (signal.SIGHUP, signal.SIGINT):  # which a job in the background ignores, and with
        signal.signal(number, signal.SIG_DFL)  # it all that it starts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(ROOT / "model.py", folder / "input.txt")  # a text that is always there
        subprocess.run(
            [sys.executable, str(ROOT / "prepare_shakespeare.py"), "--input_file=input.txt"],
            cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        results |= end_while_it_trains(folder, rng)
        finish(start(folder, "--out_dir=alone"))
        states = [torch.load(folder / out / "ckpt.pt", weights_only=True)["model"]
                  for out in ("killed", "alone")]  # fmt: skip
        same = all(torch.equal(states[0][key], states[1][key]) for key in states[1])
        same = same and figures(folder / "killed") == figures(folder / "alone")
        results["all of these in one run: its losses and weights"] = Counter(
            tried=1, lost=int(not same)
        )

        results["the disk fills up at a random write"] = fill_the_disk(folder, rng)
        results["resumed with another text"] = go_on_with_another_text(folder, rng)
        path = folder / "alone/ckpt.pt"
        results["damaged checkpoint"] = try_damaged(
            path,
            lambda: all(torch.equal(w, states[1][key])
                        for key, w in load_checkpoint(path)[0].state_dict().items()),
            rng,
        )  # fmt: skip
        results["checkpoint with one value changed"] = try_other_values(path.parent, rng)
        data = folder / "data/shakespeare_char"
        expected = values(data)
        for file in ("meta.json", "train.bin", "val.bin"):
            results[f"damaged {file}"] = try_damaged(
                data / file, lambda: values(data) == expected, rng
            )
        results["preparing 100 MB of text"] = prepare_100_mb(folder)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(tables.faults())
    sys.exit(any(counts["lost"] for counts in results.values()))


if __name__ == "__main__":
    main()

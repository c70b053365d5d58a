"""What is lost when a run is killed, or its files are damaged? Everything is tried on real files.

    python experiments/faults.py        about twenty minutes; writes experiments/faults.json

One run is killed (kill -9) a hundred times, at random moments, half of them while a checkpoint is
being written, and resumed each time; in the end its losses and weights must be those of a run that
was left alone, bit for bit. A thousand checkpoints, meta.json and .bin files, damaged at random,
must each be refused with one line, or do no harm. A text of 100 MB is prepared: how fast, and in
how much memory?
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import load_checkpoint  # noqa: E402
from prepare_shakespeare import load_data  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
KILLS, MUTATIONS = 100, 1000
ITERS = 1500
SETTINGS = (
    "--n_layer=1 --n_head=2 --n_embd=64 --n_expert=8 --block_size=16 --batch_size=4 --eval_iters=1 "
    f"--max_iters={ITERS} --lr_decay_iters={ITERS} --eval_interval=5 --log_interval=1000 "
    "--device=cpu"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *args: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, *args]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for the end, which must be a good one."""
    stderr = process.communicate()[1].decode()
    if process.returncode:
        sys.exit(f"train.py ended with status {process.returncode}: {stderr}")


def kill_while_it_trains(folder: Path, rng: random.Random) -> Counter:
    """Kills and resumes a run in folder/killed; how often a kill met which state."""
    counts, out = Counter(), folder / "killed"
    for k in range(KILLS):
        resume = ["--init_from=resume"] if (out / "ckpt.pt").exists() else []
        at_writing = k % 2 == 1
        process = start(folder, "--out_dir=killed", *resume)
        last = (out / "ckpt.pt").stat().st_mtime_ns if resume else 0
        while process.poll() is None:  # until it has saved once, so that the run goes on
            if (out / "ckpt.pt").exists() and (out / "ckpt.pt").stat().st_mtime_ns > last:
                break
            time.sleep(0.005)
        if at_writing:
            while process.poll() is None and not list(out.glob("*.tmp")):
                pass
            time.sleep(rng.random() * 0.003)
        else:
            time.sleep(rng.random() * 0.2)
        if process.poll() is not None:
            sys.exit(f"the run ended before kill {k}: {process.communicate()[1].decode()}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        counts["kills"] += 1
        counts["kills with a file half written"] += bool(list(out.glob("*.tmp")))
        load_checkpoint(out / "ckpt.pt")  # raises where it is not whole
    finish(start(folder, "--out_dir=killed", "--init_from=resume"))
    return counts


def figures(folder: Path) -> dict[int, dict]:
    """What a run logged but the time that it took, by iteration; what came last counts."""
    rows = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        del row["seconds"]
        rows.setdefault(row["iter"], {}).update(row)
    return rows


def damage(content: bytes, rng: random.Random) -> bytes:
    """A bit flipped, a piece overwritten, cut out or doubled, or the end cut off."""
    at, length = rng.randrange(len(content)), rng.randint(1, 64)
    before, piece, after = content[:at], content[at : at + length], content[at + length :]
    flipped = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:]
    choices = (flipped, rng.randbytes(length), b"", piece * 2)
    return before + rng.choice(choices) + (after if rng.random() < 0.9 else b"")


def try_damaged(path: Path, load, rng: random.Random) -> Counter:
    """Damages the file at `path` again and again; what `load` then does."""
    counts, whole = Counter(), path.read_bytes()
    for _ in range(MUTATIONS):
        path.write_bytes(damage(whole, rng))
        try:
            counts["without effect" if load() else "values changed, unnoticed"] += 1
        except ValueError as error:
            one_line = len(str(error).splitlines()) == 1
            counts["refused with one line" if one_line else "refused with more"] += 1
    path.write_bytes(whole)
    return counts


def prepare_100_mb(folder: Path) -> dict[str, float]:
    """The time and the peak memory that it takes to prepare 100 MB of text (Linux)."""
    text = "".join(path.read_text("utf-8") for path in sorted(ROOT.glob("*.py")))
    (folder / "large.txt").write_text((text * (10**8 // len(text) + 1))[: 10**8], "utf-8")
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
    seconds = time.perf_counter() - began
    return {"MB a second": 100 / seconds, "MiB at its peak": int(done.stdout.split()[-1]) / 1024}


def values(data: Path) -> tuple:
    """All that train.py takes from a data set."""
    tokenizer, tokens = load_data(data)
    return tokenizer, {part: ids.tobytes() for part, ids in tokens.items()}


def main() -> None:
    rng, results = random.Random(0), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(ROOT / "model.py", folder / "input.txt")  # a text that is always there
        subprocess.run(
            [sys.executable, str(ROOT / "prepare_shakespeare.py"), "--input_file=input.txt"],
            cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        counts = kill_while_it_trains(folder, rng)
        finish(start(folder, "--out_dir=alone"))
        states = [torch.load(folder / out / "ckpt.pt", weights_only=True)["model"]
                  for out in ("killed", "alone")]  # fmt: skip
        same = all(torch.equal(states[0][key], states[1][key]) for key in states[1])
        counts["weights and losses those of a run left alone, bit for bit"] = int(
            same and figures(folder / "killed") == figures(folder / "alone")
        )
        results["kill -9"] = counts

        path = folder / "alone/ckpt.pt"
        results["damaged checkpoint"] = try_damaged(
            path,
            lambda: all(torch.equal(w, states[1][key])
                        for key, w in load_checkpoint(path)[0].state_dict().items()),
            rng,
        )  # fmt: skip
        data = folder / "data/shakespeare_char"
        expected = values(data)
        for file in ("meta.json", "train.bin"):
            results[f"damaged {file}"] = try_damaged(
                data / file, lambda: values(data) == expected, rng
            )
        results["text of 100 MB"] = {k: round(v, 1) for k, v in prepare_100_mb(folder).items()}
    print("| tried | outcome | times |\n| --- | --- | ---: |")
    for what, counts in results.items():
        for outcome, times in counts.items():
            print(f"| {what} | {outcome} | {times} |")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

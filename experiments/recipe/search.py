"""Which settings make the best of two minutes on two cores? Every run goes through train.py.

    python experiments/recipe/search.py         the lines of trials.txt not in results.jsonl yet

A line of trials.txt: settings; patch; seed; max_seconds; threads. Settings follow base.py, or
start with a preset of their own. Runs of one thread go two at a time, runs of two threads alone.
With max_seconds over 0 a run ends after that time, and its schedules follow the clock. A patch
changes what is no setting before train.py runs. Each run adds its line to results.jsonl; the loss
is that of the whole validation split. old.jsonl has the 280 runs of the search before, with the
layer up to commit fd66022, where they can be repeated.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent)]
from run import commit  # noqa: E402

from view import gemm_peak  # noqa: E402

RESULTS = HERE / "results.jsonl"
PATCHES = {
    "": "",
    "2 steps": "steps((7.711, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013))",
    "4 steps": (
        "steps((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518), "
        "(3.3184, -2.4885, 0.5100))"
    ),
}
PRELUDE = """
import runpy, sys, muon
def steps(*coefficients):
    muon.COEFFICIENTS = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in coefficients)
"""
lock = threading.Lock()


def read_trials() -> list[dict]:
    """The runs that trials.txt asks for."""
    trials = []
    for line in (HERE / "trials.txt").read_text(encoding="utf-8").splitlines():
        settings, patch, *numbers = map(str.strip, line.split(";"))
        seed, max_seconds, threads = map(int, numbers)
        trials.append(
            dict(
                settings=settings, patch=patch, seed=seed, max_seconds=max_seconds, threads=threads
            )
        )
    return trials


def run(trial: dict) -> None:
    """One training run, in a folder of its own; appends its figures to the results, with what the
    cores reached in a large matrix product just before."""
    torch.set_num_threads(trial["threads"])
    gemm_peak.cache_clear()
    made_by = {"commit": commit(), "gemm_peak": gemm_peak("cpu")}
    with tempfile.TemporaryDirectory() as out_dir:
        # Without a preset the end alone is of interest.
        base = ["experiments/recipe/base.py", "--eval_interval=1000000"]
        base = [] if re.match(r"\S+\.py", trial["settings"]) else base
        argv = ["train.py", *base, *trial["settings"].split(), f"--seed={trial['seed']}"]
        argv += [f"--max_seconds={trial['max_seconds']}", f"--out_dir={out_dir}", "--device=cpu"]
        patch = PATCHES[trial["patch"]]
        code = f"{PRELUDE}\n{patch}\nsys.argv = {argv}\nrunpy.run_path('train.py')"
        threads = {"OMP_NUM_THREADS": str(trial["threads"]), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{trial}:\n{done.stderr}")
        log = Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
    *evaluations, whole = map(json.loads, log)
    row = {
        **trial,
        **made_by,
        "parameters": int(re.search(r"([\d,]+) parameters", done.stdout)[1].replace(",", "")),
        "iterations": whole["iter"],
        "seconds": whole["seconds"],
        "val_loss": whole["whole_val_loss"],
        "train_loss": evaluations[-1]["train_loss"],
        "experts_on": whole.get("experts_on"),
        "curve": [[e["iter"], round(e["seconds"], 1), e["val_loss"]] for e in evaluations],
    }
    with lock, open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    on = "" if row["experts_on"] is None else f", experts on {row['experts_on']:.0%}"
    print(f"{row['val_loss']:.4f}{on}, {row['iterations']} iterations: {trial}", flush=True)


if __name__ == "__main__":
    done = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in done]
    left = [t for t in read_trials() if not any(t.items() <= row.items() for row in rows)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [trial for trial in left if trial["threads"] == 1]))
    for trial in left:
        if trial["threads"] > 1:
            run(trial)

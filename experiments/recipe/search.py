"""Which settings make the best of a fixed time on two cores? Every run goes through train.py.

    python experiments/recipe/search.py         the lines of trials.txt not in results.jsonl yet

A line of trials.txt: settings; patch; seed; max_seconds; threads. Settings follow base.py, or
start with a preset of their own, with its evaluations. Runs of one thread go two at a time, runs of
two threads alone. A patch changes what is no setting, such as the initialisation, before train.py
runs. slow/ has the presets of the machine on which most of it was run, a third as fast as that of
config/. Each run adds its line to results.jsonl; the loss is that of the whole validation split.
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

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.jsonl"
PATCHES = {
    "": "",
    "zero projections": "after_init(lambda n, p: p.zero_() if n.endswith(ENDS) else p)",
    "embeddings 0.1": "after_init(lambda n, p: p.normal_(std=0.1) if '_emb' in n else p)",
    "embeddings 0.6": "after_init(lambda n, p: p.normal_(std=0.6) if '_emb' in n else p)",
    "ln_out 0.1": "after_init(lambda n, p: p.fill_(0.1) if n == 'ln_out.weight' else p)",
    "ln_out 0.3": "after_init(lambda n, p: p.fill_(0.3) if n == 'ln_out.weight' else p)",
    "no margin": "muon.COEFFICIENTS = four_steps",
    "4 steps": "steps(*four_steps)",
    "2 steps": "steps((7.711, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013))",
    "matrices 0.05": "after_init(lambda n, p: p.mul_(2.5) if is_matrix(n, p) else p)",
    "pos_emb 0.1": "after_init(lambda n, p: p.div_(3) if 'pos_emb' in n else p)",
    "pos_emb 0.03": "after_init(lambda n, p: p.div_(10) if 'pos_emb' in n else p)",
    "pos_emb 0.6": "after_init(lambda n, p: p.mul_(2) if 'pos_emb' in n else p)",
    "sinusoids 0.3": "after_init(lambda n, p: sinusoids(p, 0.3) if 'pos_emb' in n else p)",
    "sinusoids 0.6": "after_init(lambda n, p: sinusoids(p, 0.6) if 'pos_emb' in n else p)",
    "sinusoids 0.6, base 100": (
        "after_init(lambda n, p: sinusoids(p, 0.6, 100) if 'pos_emb' in n else p)"
    ),
    "normuon": "normuon()",
    "router by adamw": "router_by_adamw()",
}
PRELUDE = """
import runpy, sys, torch, model, muon
ENDS = ("proj.weight", "w2.weight", "lateral.weight")
def after_init(change):
    init = model.ParallelEncoderDecoder.init_weights
    def patched(self):
        init(self)
        with torch.no_grad():
            for name, p in self.named_parameters():
                change(name, p)
    model.ParallelEncoderDecoder.init_weights = patched
def sinusoids(p, rms, base=10000):
    T, C = p.shape
    angles = torch.arange(T)[:, None] * base ** (-2 / C * torch.arange(C // 2))
    p.copy_(rms * 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1))
def is_matrix(name, p):
    return p.dim() == 2 and "_emb" not in name and name != "w_in.weight"
four_steps = (
    (8.2872, -23.5959, 17.3004),
    (4.1071, -2.9478, 0.5448),
    (3.9487, -2.9089, 0.5518),
    (3.3184, -2.4885, 0.5100),
)
def steps(*coefficients):
    muon.COEFFICIENTS = tuple((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in coefficients)
def normuon():
    orthogonalize, variance = muon.orthogonalize, {}
    def patched(X):
        tall = X.size(-2) > X.size(-1)
        O = orthogonalize(X.mT).mT if tall else orthogonalize(X)
        rows = O.square().mean(dim=-1, keepdim=True)
        v = variance.setdefault(X.shape, torch.zeros_like(rows)).lerp_(rows, 0.05)
        Y = O / (v.sqrt() + 1e-8)
        return Y * (O.norm(dim=(-2, -1), keepdim=True) / Y.norm(dim=(-2, -1), keepdim=True))
    muon.orthogonalize = patched
def router_by_adamw():
    configure = muon.configure_optimizers
    def patched(given, adamw, of_muon):
        by_adamw, by_muon = configure(given, adamw, of_muon)
        C, groups = given.config.n_embd, by_muon.param_groups
        by_muon.param_groups = [g for g in groups if set(g["rows"]) <= {C, 4 * C}]
        routers = [p for g in groups if not set(g["rows"]) <= {C, 4 * C} for p in g["params"]]
        by_adamw.param_groups[0]["params"] += routers
        return [by_adamw, by_muon]
    muon.configure_optimizers = patched
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
    """One training run, in a folder of its own; appends its figures to the results."""
    with tempfile.TemporaryDirectory() as out_dir:
        # Without a preset the end alone is of interest.
        base = ["experiments/recipe/base.py", "--eval_interval=1000000"]
        base = [] if re.match(r"\S+\.py", trial["settings"]) else base
        argv = ["train.py", *base, *trial["settings"].split(), f"--seed={trial['seed']}"]
        argv += [f"--max_seconds={trial['max_seconds']}", f"--out_dir={out_dir}", "--device=cpu"]
        patches = "\n".join(PATCHES[name] for name in trial["patch"].split(" + "))
        code = f"{PRELUDE}\n{patches}\nsys.argv = {argv}\nrunpy.run_path('train.py')"
        threads = {"OMP_NUM_THREADS": str(trial["threads"]), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{trial}:\n{done.stderr}")
        *_, evaluation, whole = Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
    evaluation, whole = json.loads(evaluation), json.loads(whole)
    row = trial | {
        "parameters": int(re.search(r"([\d,]+) parameters", done.stdout)[1].replace(",", "")),
        "iterations": whole["iter"],
        "seconds": whole["seconds"],
        "val_loss": whole["whole_val_loss"],
        "train_loss": evaluation["train_loss"],
        "experts_on": whole.get("experts_on"),
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

"""Do the experts cost anything? The canonical layer with AdamW, and dense, with equal parameters.

    python experiments/experts.py          two runs at once on one thread each, 3 minutes a run

Every run goes through train.py as a user would start it, on tinyshakespeare, and adds one line to
experiments/experts.jsonl; runs that are there already are not repeated.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "experts.jsonl"
SEEDS = (1, 2, 3)
COMPARED = {  # all within 1 % of 0.97 million parameters
    "dense": "--n_expert=0 --n_embd=130",
    "experts": "",  # 16 experts of 32 hidden units
    "channels": "--n_expert=124 --n_embd=124 --expert_site=output",  # a mask value an output
}
TRIED = (  # on these experts, one seed each: which way to look
    "--l1_weight=0.02",
    "--l1_weight=0.1",
    "--l1_weight=0.2",
    "--entropy_weight=0.02",
    "--router_input=embedding",
    "--router_detach=True",
    "--n_expert=4",
    "--n_expert=64",
    "--n_expert=512",
    "--n_expert=456 --n_embd=114",
    "--n_expert=128 --expert_site=output",
)
RUNS = [(name, args, seed) for seed in SEEDS for name, args in COMPARED.items()]
RUNS += [(args.replace("--", ""), args, 1) for args in TRIED]


def run(name: str, args: str, seed: int) -> None:
    """One training run, in a folder of its own; appends its figures to the results."""
    done = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    if (name, seed) in {(row["name"], row["seed"]) for row in map(json.loads, done)}:
        return
    with tempfile.TemporaryDirectory() as out_dir:
        command = ["train.py", "experiments/base.py", *args.split(), f"--seed={seed}"]
        command += ["--optimizer=adamw", "--device=cpu", "--eval_interval=1000"]
        command += [f"--out_dir={out_dir}"]
        subprocess.run(
            [sys.executable, *command],
            cwd=HERE.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        *_, evaluation, whole = Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
    evaluation, whole = json.loads(evaluation), json.loads(whole)
    row = {
        "name": name,
        "settings": args,
        "seed": seed,
        "iterations": whole["iter"],
        "val_loss": whole["whole_val_loss"],  # over the whole validation split
        "train_loss": evaluation["train_loss"],
        "experts_on": whole.get("experts_on"),
        "entropy": whole.get("entropy"),
        "on_per_layer_and_stack": evaluation.get("experts_on"),
        "changed_per_layer_and_stack": evaluation.get("changed"),
        "seconds": whole["seconds"],
    }
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    on = "" if row["experts_on"] is None else f", experts on {row['experts_on']:.1%}"
    print(f"{name}, seed {seed}: loss {row['val_loss']:.4f}{on}", flush=True)


if __name__ == "__main__":
    meta = HERE.parent / "data/shakespeare_char/meta.json"
    if not meta.exists() or json.loads(meta.read_text("utf-8"))["source"] != "tinyshakespeare":
        sys.exit("data/shakespeare_char must hold tinyshakespeare: see prepare_shakespeare.py")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: run(*job), RUNS))

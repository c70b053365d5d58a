"""The experiments behind docs/results.md: every run goes through train.py.

    python experiments/run.py                   the questions, and what they cost; so does --list
    python experiments/run.py lag curve         runs what these lack, two at once; their tables
    python experiments/run.py --repeat=300      runs line 300 of results.jsonl again, and compares
    python experiments/run.py "config/shakespeare_char.py --n_embd=64,80" --seeds=3
                                                a sweep of your own, into sweeps.jsonl

Each question below is a function that gives its runs, a grid in plain Python. A run is train.py
with a preset and settings, as a user would start it, on one thread, on tinyshakespeare; where a
peer is no setting (serial stacks, a mixture of experts) its code stands in ablations.py. With
`analyse` the trained model is looked into by probes.py. A run adds its line to results.jsonl when
it is done, so that a sweep which was interrupted goes on where it stopped. Losses are those of the
whole validation split, in nats per character. On one kind of CPU a run gives the same losses bit
for bit. The lines of `long` are of another kind than the rest; of three runs on both, the losses
differed by 0.00001 to 0.004.

Each line has its commit. A line of an earlier FORMAT, of another layer or preset, is refused here,
and can be repeated there. This file is not for speed: bench_*.py measure that.
"""

import argparse
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
RESULTS = HERE / "results.jsonl"
SWEEPS = HERE / "sweeps.jsonl"  # of one's own; not committed

# The layer of the presets at 0.33 M parameters, in runs of 1,000 iterations.
PRESENT = (
    "config/shakespeare_char_dense.py --block_size=64 --batch_size=12 --n_head=2 --max_iters=1000 "
    "--lr_decay_iters=1000 --eval_interval=250 --warmup_iters=100 --learning_rate=0.01 "
    "--muon_lr_ratio=2 --muon_weight_decay=0.1"
)
RATE = 0.01  # the learning rate of PRESENT; Muon's goes with it
FULL = "--lateral=False --decoder_self_attention=True --shared_kv=False"  # the canonical stacks
MODELS = {  # settings and peer of the first table's models
    "GPT": ("--arch=decoder_only --n_layer=3 --n_embd=96", ""),
    "GPT, GQA": ("--arch=decoder_only --n_layer=3 --n_embd=100", "gqa()"),
    "canonical": (f"{FULL} --n_embd=76", ""),
    "lean, own keys and values": ("--n_embd=84 --shared_kv=False", ""),
    "lean": ("--n_embd=84", ""),
    "serial": (f"{FULL} --n_embd=76", "lag(2)"),
    "YOCO": ("--n_embd=84 --shared_kv=False", "yoco()"),
    # and two whose prompts cost as much as those of lean
    "GPT, 84 wide": ("--arch=decoder_only --n_layer=3 --n_embd=84", ""),
    "GPT, 2 layers": ("--arch=decoder_only --n_layer=2 --n_embd=116", ""),
}
LEAN = f"{PRESENT} {MODELS['lean'][0]}"
CANONICAL = f"{PRESENT} {FULL} --position_embedding=learned --token_shift=False --n_embd=76"
EXPERTS = (  # penalties as in config/shakespeare_char_sparse.py
    f"{LEAN} --n_expert=16 --router_input=encoder --l1_norm=linear --l1_weight=0.25 "
    "--entropy_weight=0.1 --penalty_schedule=linear"
)


def tuned(name: str) -> str:
    """The settings of one of MODELS, at the learning rate that `rates` finds the best for each. It
    is that of PRESENT, named again, as the runs in results.jsonl have it."""
    return f"{PRESENT} {MODELS[name][0]} --learning_rate={RATE:g}"


def rates() -> Iterator[dict]:
    """Which learning rates suit the models of `glance`, on seeds that it does not report? The rates
    of PRESENT give each model the lowest mean loss of three."""
    for name, (settings, peer) in MODELS.items():
        for factor in (0.6, 1, 1.6):
            rate = f"--learning_rate={factor * RATE:g}"
            yield run(f"{name}, {factor:g}", f"{PRESENT} {settings} {rate}", (100, 101, 102), peer)


def glance() -> Iterator[dict]:
    """Does it beat a plain GPT, or other ways to a cheap prompt? At equal parameters lean is as
    good as a plain GPT; a narrower GPT with a prompt as cheap is behind."""
    for name, (_, peer) in MODELS.items():
        yield run(name, tuned(name), 5, peer)


def lag() -> Iterator[dict]:
    """Does it cost anything to run the stacks side by side, and not one after the other? With
    lateral no: side by side is as good with 2 + 2 layers, and better with 8 + 8."""
    for L, width, lags in ((2, 84, (0, 1, 2)), (4, 60, (0, 1, 2, 3, 4)), (8, 44, (0, 4, 8))):
        size = f"{PRESENT} --n_embd={width} --n_layer={L}"
        for k in lags:
            yield run(f"{L} + {L} layers, lag {k}", size, 5, f"lag({k})")
            plain = f"{L} + {L} layers, lag {k}, not lateral"
            yield run(plain, f"{size} --lateral=False", 3, f"lag({k})")
        yield run(f"{L} + {L} layers, YOCO", f"{size} --shared_kv=False", 5, "yoco()")
        gpt = f"--arch=decoder_only --n_layer={2 * L}"
        yield run(f"{L} + {L} layers, GPT", f"{size} {gpt}", 5)


def passes() -> Iterator[dict]:
    """What do dropout and learned dropout do for a short text that is read 15 times? Dropout lowers
    the best loss, learned dropout hardly; with much L1 it overfits less."""
    learned = "--router_input=encoder --l1_norm=squared --penalty_schedule=exponential"
    few = ("none", "dropout=0.1", "hidden, l1_weight=0.3", "output, l1_weight=0.3")
    for model, C, length, only in (
        ("lean", 84, 50_000, ()),
        ("lean", 84, 200_000, few),
        ("GPT", 96, 50_000, (*few, "dropout=0.2")),
    ):
        of_output = f"--n_expert={C} --expert_site=output --router_n_head=2 "
        sites = {"hidden": "--n_expert=16", "output": f"{of_output} --router_head_dim={C // 2}"}
        ways = {"none": "", "dropout=0.1": "--dropout=0.1", "dropout=0.2": "--dropout=0.2"} | {
            f"{site}, l1_weight={weight}": f"{fields} {learned} --l1_weight={weight}"
            for site, fields in sites.items() for weight in (0.05, 0.3, 1)
        }  # fmt: skip
        # The rate is fixed: each way is compared with none at the same rate.
        steps, rate = 15 * length // (12 * 64), f"--learning_rate={1.6 * RATE:g}"
        how = f"--dataset=shakespeare_first_{length} --max_iters={steps} --eval_iters=50 "
        how += f"--lr_decay_iters={steps} --eval_interval={steps // 8}"
        for way in only or ways:
            settings = f"{PRESENT} {MODELS[model][0]} {rate} {how} {ways[way]}"
            yield run(f"{model}, {length:,}; {way}", settings, 3)


def works() -> Iterator[dict]:
    """Does the first table hold on the complete works, four times as long? On the complete works no
    difference from a plain GPT was found; GPTs with prompts as cheap are behind."""
    for name, (_, peer) in MODELS.items():
        yield run(name, f"{tuned(name)} --dataset=shakespeare_works", 3, peer)


def curve() -> Iterator[dict]:
    """What do experts cost that are off, beside other ways to the same active size? A narrower
    model loses less than experts that L1 switches off, and so does a mixture of experts."""
    for l1_weight in (0, 0.25, 0.5, 1, 2):
        yield run(f"l1_weight={l1_weight:g}", f"{EXPERTS} --l1_weight={l1_weight:g}", 3)
    for n_embd in (84, 68, 52):
        yield run(f"dense, {n_embd} wide", f"{LEAN} --n_embd={n_embd}", 3)
    yield run("no encoder feed-forward", LEAN, 3, "attention_encoder()")
    for k in (4, 8):
        yield run(f"top {k} of 16", f"{LEAN} --n_expert=16", 3, f"top_k({k})")


def variants() -> Iterator[dict]:
    """Which parts of the layer help, one at a time from lean? Rotary positions, token_shift and
    lateral; for most others no difference was found."""
    yield run("lean", LEAN, 5)
    for change in (
        "lateral=False",
        "decoder_self_attention=True",
        "shared_kv=False",
        "position_embedding=learned",
        "token_shift=False",
        "qk_norm=True",
    ):
        yield run(change, f"{LEAN} --{change}", 5 if change == "lateral=False" else 3)
    w_lat = f"{LEAN} --lateral=False --n_embd=80"
    yield run("d = d + W_lat LN(e), 80 wide", w_lat, 5, "w_lat()")
    attentive = f"{LEAN} --decoder_self_attention=True --n_embd=76"
    yield run("decoder_self_attention=True, 76 wide", attentive, 3)
    yield run("canonical", CANONICAL, 3)
    # Each of these beside the one that is named before the semicolon.
    full, learned = "decoder_self_attention=True", "position_embedding=learned"
    own = f"{learned} --shared_kv=False"
    yield run(own.replace(" --", ", "), f"{LEAN} --{own}", 3)
    for base, peer in (
        ("", "embedding_loss('mse', 0.25)"),
        ("", "embedding_loss('cosine', 2)"),
        ("", "embedding_loss('log_cosine', 2)"),
        ("", "swiglu()"),
        ("", "gate()"),
        (full, "cross_first()"),
        (learned, "next_position('add')"),
        (learned, "next_position('subtract')"),
        (own, "n_cross_head(1)"),
        (own, "n_cross_head(4)"),
    ):
        name = f"{base.replace(' --', ', ')}; {peer}" if base else peer
        yield run(name, f"{LEAN} --{base}".removesuffix(" --"), 3, peer)


def sizes() -> Iterator[dict]:
    """Does the answer change from 0.33 to 1 and 3 M parameters? At 0.33 and 1 M no difference from
    a GPT was found, at 3 M lean is as good."""
    for size, heads, layers, width, gpt in (
        ("0.33 M", 2, 2, 84, "--n_layer=3 --n_embd=96"),
        ("1 M", 4, 3, 120, "--n_layer=5 --n_embd=128"),
        ("3 M", 4, 4, 184, "--n_layer=7 --n_embd=192"),
    ):
        ours = f"{PRESENT} --n_head={heads} --n_layer={layers} --n_embd={width}"
        yield run(f"GPT, {size}", f"{PRESENT} --n_head={heads} --arch=decoder_only {gpt}", 3)
        yield run(f"lean, {size}", ours, 3)


def long() -> Iterator[dict]:
    """Does one model have both, a long prompt in about half a GPT's time, and a GPT's loss? With
    1.2 M parameters no difference in loss was found (0.015 ± 0.019 ahead)."""
    size = f"{PRESENT} --block_size=1024 --batch_size=1"
    for name, settings in (
        ("GPT", "--arch=decoder_only --n_layer=12 --n_embd=92"),
        ("lean", "--n_layer=6 --n_embd=96"),
    ):
        yield run(name, f"{size} {settings}", 5)
        for factor in (0.6, 1.6):
            rate = f"--learning_rate={factor * RATE:g}"
            yield run(f"{name}, {factor} times the rate", f"{size} {settings} {rate}", (1,))
    as_cheap = "--arch=decoder_only --n_layer=6 --n_embd=108"  # its prompt, as lean's
    yield run("GPT, 6 layers", f"{size} {as_cheap}", 3)


def inside() -> Iterator[dict]:
    """What do the streams hold, by linear probes and by ablations, and what do the experts respond
    to? Without lateral the stacks specialise, in lean both predict; experts respond to the
    character."""
    for name, settings in {
        "lean": LEAN,
        "lateral=False": f"{LEAN} --lateral=False",
        "canonical": CANONICAL,
        "GPT": f"{PRESENT} {MODELS['GPT'][0]}",
        "experts": EXPERTS,
    }.items():
        yield run(name, settings, 3, analyse=True)


FORMAT = 3  # of these runs; one more where a change of the layer or of a preset changes them
WHAT = ("name", "settings", "peer")  # of a run that a question asks for; each has several seeds
ALL = (rates, glance, lag, passes, works, curve, variants, sizes, long, inside)
QUESTIONS = {question.__name__: question for question in ALL}


def run(
    name: str, settings: str, seeds: int | tuple[int, ...], peer: str = "", analyse: bool = False
) -> dict:
    """What a question asks for: settings of train.py with these seeds, or 1 to `seeds`."""
    settings = " ".join(settings.split())
    seeds = seeds if isinstance(seeds, tuple) else tuple(range(1, seeds + 1))
    return dict(name=name, settings=settings, peer=peer, analyse=analyse, seeds=seeds)


def train(settings: str, peer: str, analyse: bool, seed: int) -> dict:
    """Runs train.py in a folder of its own; gives the figures of results.jsonl."""
    with tempfile.TemporaryDirectory() as out_dir:
        argv = ["train.py", *settings.split(), f"--seed={seed}", f"--out_dir={out_dir}"]
        argv += ["--device=cpu", "--always_save_checkpoint=True"]
        command = [sys.executable, *argv]
        if peer:
            command = [sys.executable, "experiments/ablations.py", peer, *argv[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{settings}, {peer or 'no peer'}, seed {seed}:\n{done.stderr}")
        log = Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()
        *evaluations, whole = map(json.loads, log)
        found = {}
        if not peer:  # whose checkpoint need not fit
            from checkpoint import load_checkpoint  # here: the tables need the grids, but no torch
            from view import estimate_mfu

            model, _ = load_checkpoint(f"{out_dir}/ckpt.pt")
            found["flops_per_token"] = estimate_mfu(model, 1, model.config.block_size, peak_flops=1)
        if analyse:
            command = [sys.executable, "experiments/probes.py", f"{out_dir}/ckpt.pt"]
            said = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
            found.update(json.loads(said))
    last = evaluations[-1]
    kept = ("experts_on",) if peer else ("experts_on", "changed")  # a peer's m is no mask
    per_block = {f"{k}_per_block": last[k] for k in kept if k in last}
    return {
        "parameters": int(re.search(r"([\d,]+) parameters", done.stdout)[1].replace(",", "")),
        "iterations": whole["iter"],
        "val_loss": whole.pop("whole_val_loss"),
        "train_loss": last["train_loss"],
        **{name: value for name, value in whole.items() if name not in ("iter", "seconds")},
        **per_block,
        "curve": [[row["iter"], row["val_loss"]] for row in evaluations],
        "seconds": whole["seconds"],
        **found,
    }


def data_set(settings: str) -> Path:
    """The folder of the data set that they name."""
    named = re.findall(r"--dataset=(\S+)", settings)
    return ROOT / "data" / (named[-1] if named else "shakespeare_char")


def ready(settings: str) -> None:
    """Makes the data set that they name, if it is missing: the first characters of tinyshakespeare
    before the whole validation split, or the complete works."""
    folder, source = data_set(settings), ROOT / "data/shakespeare_char"
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as made:
        if first := re.fullmatch(r"shakespeare_first_(\d+)", folder.name):
            meta = json.loads((source / "meta.json").read_text("utf-8"))
            meta["tokens"]["train"] = int(first[1])
            ids = (source / "train.bin").read_bytes()[: 2 * int(first[1])]
            Path(made, "train.bin").write_bytes(ids)
            shutil.copy(source / "val.bin", made)
            Path(made, "meta.json").write_text(json.dumps(meta), "utf-8")
            shutil.copytree(made, folder)
        elif folder.name == "shakespeare_works":
            from prepare_shakespeare import fetch_complete_works

            text = Path(made, "works.txt")
            text.write_bytes(fetch_complete_works())
            how = [f"--input_file={text}", f"--dataset={folder.name}"]
            subprocess.run([sys.executable, "prepare_shakespeare.py", *how], cwd=ROOT, check=True)


def costs(settings: str, peer: str) -> dict:
    """Operations for each token of a prompt of block_size - 1 tokens, and for the one behind it, as
    torch counts them, attention in full; and the cache's bytes for each token."""
    import torch
    from measuring import fields_of, settings_of
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import ablations
    import model as model_py

    meta, fields = data_set(settings) / "meta.json", fields_of(settings_of(*settings.split()))
    fields["vocab_size"] = json.loads(meta.read_text("utf-8"))["vocab_size"]
    with ablations.restored():
        ablations.apply(ablations.read(peer) if peer else ())
        model = model_py.ParallelEncoderDecoder(model_py.ModelConfig(**fields)).eval()
    T = model.config.block_size
    idx, cache, counts = torch.zeros(1, T, dtype=torch.long), model_py.Cache(model, 1, T), []
    for part in (idx[:, 1:], idx[:, :1]):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            model.step(part, cache)
        counts.append(count.get_total_flops() / part.numel())
    size = sum(4 * x.numel() for buffers in cache.buffers.values() for x in buffers) // T
    return {"prompt_flops": counts[0], "token_flops": counts[1], "cache_bytes": size}


def commit() -> str:
    """The commit that is checked out, with a + where files were changed."""
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    changed = ["git", "status", "--porcelain", "-uno", "--", ".", ":!experiments/*results.jsonl"]
    changed = subprocess.check_output(changed, cwd=ROOT, text=True)
    return head.strip() + ("+" if changed else "")


def read_rows(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def sweep(text: str, seeds: int, peer: str) -> Iterator[dict]:
    """Every combination of the settings, where `--key=a,b` has several values."""
    words = (word.partition("=") for word in text.split())
    choices = [[key + equals + v for v in values.split(",")] for key, equals, values in words]
    for combination in product(*choices):
        several = [word for word, of in zip(combination, choices, strict=True) if len(of) > 1]
        name = ", ".join(word.removeprefix("--") for word in several) or text
        yield run(name, " ".join(combination), seeds, peer)


def index() -> str:
    """The questions, their answers, how many of their runs there are, and their core-hours."""
    from tables import markdown

    rows, lines = read_rows(RESULTS), []
    for name in QUESTIONS:
        of_question = [row for row in rows if row["question"] == name]
        asked = sum(len(each["seeds"]) for each in QUESTIONS[name]())
        hours = sum(row["seconds"] for row in of_question) / 3600
        lines.append((name, *about(name), f"{len(of_question)} of {asked}", f"{hours:.1f}"))
    return markdown("question | it asks | answer | runs: | core-hours:", lines)


def about(name: str) -> tuple[str, str]:
    """What a question asks, and the answer."""
    asks, _, answer = " ".join(QUESTIONS[name].__doc__.split()).partition("? ")
    return f"{asks}?", answer


def work_off(asked: dict[str, list[dict]], path: Path, options: argparse.Namespace) -> None:
    """Runs what the file lacks, and adds it there; seed by seed, so that what there is can be
    compared at any time."""
    rows = read_rows(path)
    jobs = [
        {"question": question, **each, "seed": seed}
        for question, runs in asked.items() for each in runs for seed in each["seeds"]
        if options.name in (None, each["name"]) and options.seed in (None, seed)
        and options.peer in (None, each["peer"])
    ]  # fmt: skip
    if not jobs:
        names = ", ".join(dict.fromkeys(each["name"] for runs in asked.values() for each in runs))
        sys.exit(f"no run has this name, seed and peer; the names are: {names}")
    what = ("question", *WHAT, "seed")
    done = {tuple(row[field] for field in what) for row in rows if row.get("format") == FORMAT}
    jobs = [job for job in jobs if tuple(job[field] for field in what) not in done]
    jobs.sort(key=lambda job: job["seed"])
    earlier = {row["question"] for row in rows if row.get("format") != FORMAT}
    if mixed := {job["question"] for job in jobs} & earlier:
        print(f"{', '.join(sorted(mixed))}: measured with an earlier layer; nothing is run")
        jobs = [job for job in jobs if job["question"] not in mixed]
    models = {(job["settings"], job["peer"]) for job in jobs}
    for settings, _ in models:
        ready(settings)
    # Before the threads: an ablation changes model.py for the whole process.
    cost = {key: costs(*key) for key in models}
    lock = threading.Lock()

    def work(number: int) -> None:
        job = {name: value for name, value in jobs[number].items() if name != "seeds"}
        version = commit()
        figures = train(job["settings"], job["peer"], job["analyse"], job["seed"])
        cost_of = cost[job["settings"], job["peer"]]
        row = {**job, "commit": version, "format": FORMAT, **cost_of, **figures}
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        on = f", experts on {row['experts_on']:.1%}" if "experts_on" in row else ""
        which = f"{row['question']}: {row['name']}, seed {row['seed']}"
        print(f"{number + 1} of {len(jobs)}, {which}: {row['val_loss']:.4f}{on}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(len(jobs))))


def repeat(rows: list[dict], line: int) -> None:
    """Runs a line of the results, counted from 1, again."""
    if not 1 <= line <= len(rows):
        sys.exit(f"--repeat={line}: must be a line of {RESULTS.name}, 1 to {len(rows)}")
    row = rows[line - 1]
    if row.get("format") != FORMAT:
        why = "the layer or the presets have changed since; repeat it at that commit"
        sys.exit(f"--repeat={line}: measured at commit {row['commit']}: {why}")
    ready(row["settings"])
    again = train(row["settings"], row["peer"], False, row["seed"])
    difference = again["val_loss"] - row["val_loss"]
    said = f"differs by {difference:+.2g}" if difference else "equal"
    print(
        f"{row['question']}: {row['name']}, seed {row['seed']}: {row['val_loss']} at "
        f"{row['commit']}, {again['val_loss']} now, at {commit()}: {said}"
    )
    sys.exit(difference != 0)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION",
        help="one or several; or the settings of a sweep, in one argument",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the questions, and what they cost")
    parser.add_argument("--name", help="only the runs of this name")
    parser.add_argument("--seed", type=int, help="only the runs with this seed")
    parser.add_argument(
        "--peer", help="only the runs with this ablation; of a sweep: that of all its runs"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of a sweep: 1 to this number (3)")
    parser.add_argument(
        "--repeat", type=int, metavar="LINE", help=f"runs a line of {RESULTS.name} again"
    )
    options = parser.parse_args(argv)
    options.sweep = [arg for arg in options.questions if arg.startswith("config/")]
    names = [arg for arg in options.questions if arg not in options.sweep]
    if unknown := [name for name in names if name not in QUESTIONS]:
        near = difflib.get_close_matches(unknown[0], QUESTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"there is no question {unknown[0]!r}{hint} (all: {', '.join(QUESTIONS)})")
    if len(options.sweep) > 1 or (options.sweep and names):
        sys.exit(f"{options.questions}: a sweep is one argument, alone; put it in quotes")
    if not 1 <= options.seeds <= 15:  # tables.T_975 ends there
        sys.exit(f"--seeds={options.seeds}: must be at least 1, and at most 15")
    return options


def main(argv: list[str]) -> None:
    import tables  # here: it imports this file

    options = parse(argv)
    if options.list or not options.questions and options.repeat is None:
        print(index())
        return
    meta = ROOT / "data/shakespeare_char/meta.json"
    if not meta.exists() or json.loads(meta.read_text("utf-8"))["source"] != "tinyshakespeare":
        how = "download it, and run prepare_shakespeare.py --input_file=PATH"
        sys.exit(f"data/shakespeare_char must hold tinyshakespeare: {how}")
    if options.repeat is not None:
        repeat(read_rows(RESULTS), options.repeat)
    if options.sweep:
        runs = [*sweep(options.sweep[0], options.seeds, options.peer or "")]
        work_off({"sweep": runs}, SWEEPS, options)
        print(tables.compared(tables.of_runs(read_rows(SWEEPS), runs)))
        return
    asked = {name: [*QUESTIONS[name]()] for name in options.questions}
    work_off(asked, RESULTS, options)
    for name in asked:
        print("\n".join(("", f"{name}: {' '.join(about(name))}", "", tables.of_question(name))))


if __name__ == "__main__":
    main(sys.argv[1:])

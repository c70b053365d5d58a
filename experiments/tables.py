"""The tables of the README and the docs, made from the committed results.

    python experiments/tables.py       rewrites each table, between its two comments in PAGES

A difference is the mean over paired seeds; ± is its 95 % interval, by Student's t. Losses are
those of the whole validation split of tinyshakespeare, in nats per character.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from run import QUESTIONS, WHAT  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    HERE / "README.md",
    HERE / "recipe/README.md",
)


@cache
def read(name: str) -> list | dict:
    """A file of results."""
    text = (HERE / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [*map(json.loads, text.splitlines())]


def runs(question: str) -> dict[str, list[dict]]:
    """The runs of a question by their names, in its order, those of one name by their seeds."""
    rows = [row for row in read("results.jsonl") if row["question"] == question]
    return of_runs(rows, [*QUESTIONS[question]()])


def of_runs(rows: list[dict], asked: list[dict]) -> dict[str, list[dict]]:
    found = {
        run["name"]: sorted_by_seed([
            r for r in rows if r["seed"] in run["seeds"] and all(r[k] == run[k] for k in WHAT)
        ])
        for run in asked
    }  # fmt: skip
    return {name: of_name for name, of_name in found.items() if of_name}


def sorted_by_seed(rows: list[dict]) -> list[dict]:
    if len({row["seed"] for row in rows}) < len(rows):
        raise ValueError(f"{rows[0]['question']}: {rows[0]['name']}: a seed is there twice")
    return sorted(rows, key=lambda row: row["seed"])


def mean(rows: list[dict], field: str = "val_loss") -> float:
    return statistics.mean(row[field] for row in rows)


# Student's t at 97.5 %, by the number of values: scipy.stats.t.ppf(0.975, n - 1)
T_975 = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 6: 2.57058}
T_975 |= {7: 2.44691, 8: 2.36462, 9: 2.30600, 10: 2.26216, 11: 2.22814}
T_975 |= {12: 2.20099, 13: 2.17881, 14: 2.16037, 15: 2.14479}


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of their mean; NaN of a single one."""
    n = len(values)
    return math.nan if n < 2 else T_975[n] * statistics.stdev(values) / n**0.5


def with_interval(values: list[float], digits: int, sign: str = "") -> str:
    """The mean over the seeds, ± its 95 % interval."""
    shown, half = f"{statistics.mean(values):{sign}.{digits}f}", interval(values)
    return shown if math.isnan(half) else f"{shown} ± {half:.{digits}f}"


def differences(rows: list[dict], base: list[dict]) -> list[float]:
    """Of the losses, over the seeds that both have."""
    of_base = {row["seed"]: row["val_loss"] for row in base}
    return [row["val_loss"] - of_base[row["seed"]] for row in rows if row["seed"] in of_base]


def show_difference(rows: list[dict], base: list[dict]) -> str:
    return "" if rows is base else with_interval(differences(rows, base), 3, "+z")


def verdict(values: list[float]) -> str:
    """What the differences of losses say, by their 95 % interval; nothing, of a single one."""
    mean, half = statistics.mean(values), interval(values)
    if math.isnan(half):
        return ""
    if abs(mean) > half:
        return "worse" if mean > 0 else "better"
    return "as good" if abs(mean) + half <= 0.01 else "no difference found"


def judged(rows: list[dict], base: list[dict]) -> tuple[str, str]:
    """The difference to a base, and the verdict; nothing of the base itself, or without one."""
    deltas = [] if rows is base else differences(rows, base)
    return (with_interval(deltas, 3, "+z"), verdict(deltas)) if deltas else ("", "")


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def markdown(heads: str, rows: Iterable[Iterable[str]]) -> str:
    """A table; the heads are separated by |, and one that ends in : is aligned to the right."""
    heads = [head.strip() for head in heads.split("|")]
    lines = [" | ".join(head.removesuffix(":") for head in heads)]
    lines.append(" | ".join("---:" if head.endswith(":") else "---" for head in heads))
    return "\n".join(f"| {line} |" for line in (*lines, *map(" | ".join, rows)))


# Seeds of the presets on fast cores, and on slow ones.
FAST, SLOW = (*range(11, 16),), (*range(21, 26), *range(31, 36), *range(41, 46))


def recipe_runs(seeds: tuple[int, ...] = FAST) -> dict[str, list[dict]]:
    """The runs of presets in recipe/results.jsonl, 120 s each on two threads."""
    found: dict[str, list[dict]] = {}
    for row in read("recipe/results.jsonl"):
        preset = re.fullmatch(r"config/(\w+)\.py(.*)", row["settings"])
        if preset and row["seed"] in seeds and row["max_seconds"] == 120:
            row = row | {"question": "recipe", "name": "".join(preset.groups())}
            found.setdefault(row["name"], []).append(row)
    return {name: sorted_by_seed(rows) for name, rows in found.items()}


def trials(model: str) -> str:
    """The trials of a model in recipe/results.jsonl, those of 1,000 iterations first."""
    lines = []
    for row in sorted(read("recipe/results.jsonl"), key=lambda row: row["max_seconds"]):
        of_experts = re.search(r"--n_expert|shakespeare_char(_sparse)?\.py", row["settings"])
        kind = "GPT" if "decoder_only" in row["settings"] else "experts" if of_experts else "dense"
        if kind == model and row["seed"] < 11:
            changed = [*row["settings"].replace("--", "").split(), row["patch"]]
            changed = [c for c in changed if c and c != "arch=decoder_only"]
            lines.append((
                ", ".join(changed) or "base", f"{row['parameters']:,}", str(row["seed"]),
                f"{row['iterations']:,}", f"{row['val_loss']:.3f}", percent(row["experts_on"]),
            ))  # fmt: skip
    return markdown("| parameters: | seed: | iterations: | loss: | experts on:", lines)


def summary() -> str:
    """The losses of the presets, and what a token of a prompt costs."""
    # In matrices of C x C. A GPT's last layer makes keys and values alone; a router has 48 rows.
    lean, routers = 2 * 10 + 3 * 2, 4 * 48 / 96
    found, lines = recipe_runs(), []
    for preset, label, matrices in (
        ("decoder_only", "plain GPT", 2 * 12 + 2),
        ("decoder_only --n_layer=4", "plain GPT of lean's size", 3 * 12 + 2),
        ("shakespeare_char_dense", "lean, no experts", lean),
        ("shakespeare_char", "lean, 16 experts", lean + routers),
    ):
        rows = found[preset]
        name = f"{label} (`{rows[0]['settings']}`)"
        loss = (f"{mean(rows):.3f}", show_difference(rows, found["decoder_only"]))
        lines.append((name, f"{rows[0]['parameters']:,}", *loss, f"{matrices / lean:.2f}"))
    heads = "trained for two minutes | parameters: | loss: | vs GPT: "
    return markdown(f"{heads}| operations per prompt token, lean = 1:", lines)


def recipe(seeds: tuple[int, ...] = FAST) -> str:
    """The presets, each seed; or the lowest and the highest loss of many."""
    found, few = recipe_runs(seeds), len(seeds) == 5
    lines = []
    for rows in found.values():
        each = [f"{row['val_loss']:.3f}" for row in rows]
        losses = ", ".join(each) if few else f"{len(each)}: {min(each)} to {max(each)}"
        steps = statistics.median(row["iterations"] for row in rows)
        lines.append((
            f"`{rows[0]['settings']}`", f"{rows[0]['parameters']:,}", f"{steps:,.0f}", losses,
            f"{mean(rows):.3f}", show_difference(rows, found["decoder_only"]),
            percent(None if rows[0]["experts_on"] is None else mean(rows, "experts_on")),
        ))  # fmt: skip
    shown = f"seeds {seeds[0]} to {seeds[-1]}" if few else "seeds"
    heads = f"| parameters: | iterations: | {shown} | mean: | vs GPT: | experts on:"
    return markdown(heads, lines)


def training(size: str) -> str:
    """Steps of training, from bench_training.py."""
    of_size = read("bench_training.json")[size]
    rows = of_size["models"].items()
    heads = f"{of_size['C']} wide, {of_size['T']} tokens, batch {of_size['B']} "
    heads += "| layers: | parameters: | ms a step: | tokens/s: | speed: | speed x parameters: "
    return markdown(heads + "| of GEMM peak: | MiB:", (
        (name, str(row["layers"]), f"{row['parameters'] / 1e6:.2f} M", f"{row['ms']:,.0f}",
         f"{row['tokens_per_second']:,.0f}", f"{row['speed']:.3f}",
         f"{row['speed_x_parameters']:.3f}", percent(row["share_of_gemm_peak"]),
         f"{row['peak_memory_mib']:.0f}")
        for name, row in rows
    ))  # fmt: skip


def gpu(part: str) -> str:
    """A part of bench_gpu.py: of prompts and tokens, how fast each model is in each way."""
    rows = read("bench_gpu.json")[part]["rows"]
    if part == "step":
        heads = "width | model | | parameters: | ms a step: | speed: | of GEMM peak: | MiB:"
        return markdown(heads, (
            (f"{row['C']}", row["model"], row["how"], millions(row), f"{row['ms']:.1f}",
             f"{row['speed']:.2f}", percent(row["share_of_gemm_peak"]),
             f"{row['peak_memory_mib']:,.0f}")
            for row in rows
        ))  # fmt: skip
    if part == "preset":
        heads = "preset | parameters: | loss: | at iteration: | after: | experts on:"
        return markdown(heads, (
            (f"`{row['preset']}`", millions(row), f"{row['loss']:.3f}", f"{row['iterations']:,}",
             f"{row['seconds']:.0f} s", percent(row["experts_on"] or 0).removeprefix("0%"))
            for row in rows
        ))  # fmt: skip
    length, found = "prompt" if part == "prompt" else "behind", {}
    for row in rows:
        key = (f"{row['C']}", f"{row[length]:,}", f"{row['texts']}", row["way"])
        found.setdefault(key, {}).setdefault(row["model"], row)
    names = [*dict.fromkeys(name for of in found.values() for name in of if name != "GPT")]
    names.sort(key=lambda name: not name.startswith("lean"))
    return markdown(
        f"width | prompt: | texts: | way | GPT: | {': | '.join(names)}:",
        (
            (*key, f"{of['GPT']['ms']:.2f} ms")
            + tuple(f"{of[name]['speed']:.2f}" if name in of else "" for name in names)
            for key, of in found.items()
        ),
    )


def speeds(part: str) -> dict[tuple[str, ...], list[dict]]:
    """The rows of a part of bench_inference.py, by what the rows of its table begin with."""
    found: dict[tuple[int, str], list[dict]] = {}
    for row in read("bench_inference.json")[part]["rows"]:
        found.setdefault((row["size"], row["model"]), []).append(row)
    first = {size: of[0] for (size, _), of in reversed(found.items())}
    return {
        (
            f"{first[size]['parameters'] / 1e6:.0f} M",
            model,
            str(of[0]["width"]),
            millions(of[0]),
        ): of
        for (size, model), of in found.items()
    }


def millions(row: dict) -> str:
    return f"{row['parameters'] / 1e6:.1f} M"


def time_and_ratio(row: dict) -> str:
    """Milliseconds, and how many times those of lean."""
    digits = 0 if row["ms"] >= 100 else 1
    return f"{row['ms']:,.{digits}f} ({row['times_lean']:.2f})"


def prompt() -> str:
    """Reading a prompt, from bench_inference.py."""
    found = speeds("prompt")
    gpt = {size: of[0] for (size, model, *_), of in found.items() if model == "GPT"}
    heads = "size | model | width: | parameters: | "
    heads += " | ".join(f"{row['prompt']:,} tokens, ms:" for row in next(iter(found.values())))
    lines = []
    for (size, *names), of in found.items():
        cached = [row["cache_bytes_a_token"] for row in (of[0], gpt[size])]
        lines.append((
            size, *names, *map(time_and_ratio, of), f"{cached[0]:,}",
            f"{cached[0] / cached[1]:.2f}",
        ))  # fmt: skip
    return markdown(f"{heads} | cache, bytes a token: | of GPT's:", lines)


def decoding() -> str:
    """Decoding after a prompt, from bench_inference.py."""
    found = speeds("decode")
    number = {1: "one text", 10: "ten texts"}
    heads = "size | model | width: | parameters: | " + " | ".join(
        f"{number[row['texts']]} after {row['behind']:,}, ms:" for row in next(iter(found.values()))
    )
    return markdown(heads, ((*names, *map(time_and_ratio, of)) for names, of in found.items()))


def texts() -> str:
    """Texts of 500 characters, from bench_inference.py."""
    rows: dict[str, dict[int, dict]] = {}
    for row in read("bench_inference.json")["texts"]["rows"]:
        rows.setdefault(row["model"], {})[row["texts"]] = row

    def cells(row: dict) -> tuple[str, str, str]:
        ratios = (f"{row[f'{who}_faster']:.2f}" for who in ("ours_is", "compiled_is"))
        return f"{row['tokens_per_second']:,.0f}", *ratios

    heads = "| parameters: | ten texts, tokens/s: | ours / this: | ours compiled / this: "
    return markdown(heads + "| one text, tokens/s: | ours / this: | ours compiled / this:", (
        (name, f"{of[1]['parameters'] / 1e6:.3f} M", *cells(of[10]), *cells(of[1]))
        for name, of in rows.items()
    ))  # fmt: skip


def sparse() -> str:
    """Experts that are off, from bench_inference.py."""
    heads = "parameters | tokens at once: | experts on: | all computed: | off skipped: "
    heads += "| speed-up: | ideal: | with the rule: | of memory bandwidth:"
    return markdown(heads, (
        (millions(row), str(row["tokens_at_once"]), f"{row['on']} of {row['of']}",
         f"{row['dense_ms']:.1f} ms", f"{row['sparse_ms']:.1f} ms", f"{row['speed_up']:.2f}",
         f"{row['ideal']:.2f}", f"{row['speed_up_by_rule']:.2f}",
         percent(row["share_of_bandwidth"]))
        for row in read("bench_inference.json")["experts"]["rows"]
    ))  # fmt: skip


def faults() -> str:
    """The fault tests, from faults.py."""
    lines = []
    for name, row in read("faults.json").items():
        rest = (f"{k}: {v}" for k, v in row.items() if k not in ("tried", "lost"))
        lines.append((name, f"{row['tried']:,}", str(row["lost"]), ", ".join(rest)))
    return markdown("test | tried: | lost: | what happened", lines)


def compared(found: dict[str, list[dict]]) -> str:
    """Each run beside the first, or beside the one that its name has before a semicolon."""
    first = next(iter(found))
    return markdown(f"| parameters: | seeds: | loss: | vs {first}: |", (
        (name, f"{rows[0]['parameters']:,}", str(len(rows)), f"{mean(rows):.3f}",
         *judged(rows, found.get(name.rpartition("; ")[0] or first, [])))
        for name, rows in found.items()
    ))  # fmt: skip


def rates() -> str:
    """The losses at three learning rates, the mean over seeds that are not reported."""
    found, lines = runs("rates"), {}
    for name, rows in found.items():
        model, _, factor = name.rpartition(", ")
        lines.setdefault(model, {})[factor] = rows
    heads = "learning rate, times | 1: | 0.6: | | 1.6: |"
    return markdown(heads, (
        (name, f"{mean(base):.3f}" if (base := of.get("1", [])) else "",
         *judged(of.get("0.6", []), base), *judged(of.get("1.6", []), base))
        for name, of in lines.items()
    ))  # fmt: skip


def glance() -> str:
    """Loss and costs of the models of one size; operations and bytes are those of a token."""
    found = runs("glance")
    path = {"canonical": 3, "lean, own keys and values": 3, "lean": 3, "serial": 4, "YOCO": 4}
    heads = "| parameters: | loss: | vs GPT: | | operations per prompt token: "
    heads += "| per generated token: | cache, bytes: | layers on the critical path: "
    heads += "| prompt of 4,096 tokens at 79 M, ms (lean = 1): | a token after it:"
    timed, lines = read("bench_inference.json"), []
    prompts = {row["model"]: time_and_ratio(row) for row in timed["prompt"]["rows"]
               if row["size"] == 768 and row["prompt"] == 4096}  # fmt: skip
    tokens = {row["model"]: time_and_ratio(row) for row in timed["decode"]["rows"]
              if (row["size"], row["texts"], row["behind"]) == (768, 1, 4096)}  # fmt: skip
    for name, rows in found.items():
        first = rows[0]
        depth = re.search(r"decoder_only --n_layer=(\d)", first["settings"])
        lines.append((
            name, f"{first['parameters']:,}", f"{mean(rows):.3f}",
            *judged(rows, found["GPT"]),
            f"{first['prompt_flops']:,.0f}", f"{first['token_flops']:,.0f}",
            f"{first['cache_bytes']:,}", depth[1] if depth else str(path[name]),
            prompts.get(name, ""), tokens.get(name, ""),
        ))  # fmt: skip
    return markdown(heads, lines)


def lag() -> str:
    """Layer l of the decoder reads layer l + k of the encoder; in series from k = L on."""
    found, lines = runs("lag"), []
    for name, rows in found.items():
        depth, what = name.split(", ", 1)
        if "not lateral" in what:  # beside the one with lateral
            continue
        L, k = int(depth[0]), re.match(r"lag (\d)", what)
        path = min(L + 1 + int(k[1]), 2 * L) if k else 2 * L
        base, plain = found[f"{depth}, lag 0"], found.get(f"{name}, not lateral", [])
        of_plain = judged(plain, found[f"{depth}, lag 0, not lateral"])
        lines.append((
            name, f"{rows[0]['parameters']:,}", str(path), f"{mean(rows):.3f}", *judged(rows, base),
            f"{mean(plain):.3f}" if plain else "", *of_plain,
        ))  # fmt: skip
    heads = "| parameters: | layers on the critical path: | loss: | vs lag 0: | "
    return markdown(f"{heads} | without lateral: | vs lag 0: |", lines)


def sizes() -> str:
    """Models of several sizes, each beside the GPT of its size."""
    found, lines = runs("sizes"), []
    for name, rows in found.items():
        base = found.get(f"GPT, {name.rpartition(', ')[2]}", [])
        lines.append((
            name, f"{rows[0]['parameters']:,}", str(len(rows)), f"{mean(rows):.3f}",
            *judged(rows, base),
        ))  # fmt: skip
    return markdown("| parameters: | seeds: | loss: | vs GPT: |", lines)


def long() -> str:
    """Models that read 1,024 characters; the other learning rates are of one seed."""
    found, lines = runs("long"), []
    timed = read("bench_inference.json")["prompt"]["rows"]
    times = {row["model"]: f"{row['times_lean']:.2f}" for row in timed
             if (row["size"], row["prompt"]) == (96, 1024)}  # fmt: skip
    for name, rows in found.items():
        if "times the rate" in name:
            continue
        rates = (found.get(f"{name}, {factor} times the rate", []) for factor in (0.6, 1.6))
        lines.append((
            name, f"{rows[0]['parameters']:,}", str(len(rows)), f"{mean(rows):.3f}",
            *judged(rows, found["GPT"]), *(judged(of, rows)[0] for of in rates),
            f"{rows[0]['prompt_flops']:,.0f}", f"{rows[0]['cache_bytes']:,}", times.get(name, ""),
        ))  # fmt: skip
    heads = "| parameters: | seeds: | loss: | vs GPT: | | at 0.6 times the rate: | at 1.6 times: "
    heads += "| operations per prompt token: | cache, bytes: | time of a prompt, lean = 1:"
    return markdown(heads, lines)


def passes() -> str:
    """A short text, read many times: the best loss of the evaluations, and that of the end."""
    found, lines = runs("passes"), []
    best = {
        name: [row | {"val_loss": min(loss for _, loss in row["curve"])} for row in rows]
        for name, rows in found.items()
    }
    for name, rows in found.items():
        text, _, way = name.rpartition("; ")
        on = percent(mean(rows, "experts_on") if "experts_on" in rows[0] else None)
        cells = [text, way, str(len(rows)), on]
        for of in (best, found):
            base = of.get(f"{text}; none", [])
            cells += f"{mean(of[name]):.3f}", *judged(of[name], base)
        lines.append(cells)
    heads = "model, characters | | seeds: | experts on: | best loss: | vs none: | | last loss: "
    return markdown(f"{heads}| vs none: |", lines)


def active(rows: list[dict]) -> float:
    """Parameters that a token meets on the mean, where experts that are off do not count."""
    parameters = rows[0]["parameters"]
    if "experts_on" not in rows[0]:
        return parameters
    width = int(re.findall(r"--n_embd=(\d+)", rows[0]["settings"])[-1])
    return parameters - (1 - mean(rows, "experts_on")) * 4 * 8 * width**2  # four blocks of 8 C^2


def curve() -> str:
    """Active size and loss."""
    found = runs("curve")
    heads = "| seeds: | parameters: | experts on: | active parameters: | loss: | vs dense: |"
    return markdown(heads, (
        (name, str(len(rows)), f"{rows[0]['parameters']:,}",
         percent(mean(rows, "experts_on") if "experts_on" in rows[0] else None),
         f"{active(rows):,.0f}", f"{mean(rows):.3f}", *judged(rows, found["dense, 84 wide"]))
        for name, rows in found.items()
    ))  # fmt: skip


def probes() -> str:
    """The accuracy of a linear probe of each stream for each target, in per cent."""
    found, lines = runs("inside"), []
    majority = found["lean"][0]["probes"]["the commonest"]  # of the text: no seed matters
    for name, rows in found.items():
        of_streams = [row["probes"] for row in rows]
        for stream in of_streams[0]:
            if stream == "the commonest":
                continue
            shares = ([100 * p[stream][target] for p in of_streams] for target in majority)
            lines.append((name, stream, *(with_interval(s, 1) for s in shares)))
    lines.append(("majority baseline", "", *(f"{100 * share:.1f}" for share in majority.values())))
    return markdown("| stream | " + " | ".join(f"{target}, %:" for target in majority), lines)


def cuts(whole: bool) -> str:
    """Ablations at test time: the loss, as a difference from that of the whole model.

    All of them, or the telling ones for docs/results.md.
    """
    found = runs("inside")
    if not whole:
        found = {model: rows for model, rows in found.items() if not model.startswith("experts")}
    names = dict.fromkeys(name for rows in found.values() for name in rows[0]["cuts"])
    telling = r"" if whole else r"nothing|layer|sees (2|8|32)$"

    def said(name: str) -> str:
        name = re.sub("^(cross_attention of layer)", r"without \1", name)
        return re.sub(r"sees (\d+)$", r"sees the last \1", name)

    def cell(rows: list[dict], name: str) -> str:
        if name not in rows[0]["cuts"]:
            return ""
        if name == "nothing":
            return f"{statistics.mean(row['cuts'][name] for row in rows):.3f}"
        values = [row["cuts"][name] - row["cuts"]["nothing"] for row in rows]
        return with_interval(values, 3, "+z")

    return markdown("change | " + " | ".join(f"{model}:" for model in found), (
        (said(name), *(cell(rows, name) for rows in found.values()))
        for name in names if re.search(telling, name)
    ))  # fmt: skip


def use() -> str:
    """What the experts of each block respond to: the mean over all, and the most of one."""
    found = {name: [row["experts"] for row in rows] for name, rows in runs("inside").items()
             if "experts" in rows[0]}  # fmt: skip
    targets = ("current_token", "next_token", "place_in_the_line")
    lines = []
    for name, rows in found.items():
        for b, block in enumerate(rows[0]["blocks"]):
            bits = [[x for row in rows for x in row["entropy_of_decisions"][b]]]
            bits += ([x for row in rows for x in row[f"bits_of_{target}"][b]] for target in targets)
            ends = (", ".join(str(row[w][b]) for row in rows) for w in ("never_on", "always_on"))
            shares = (f"{statistics.mean(of) + 0.0:.2f}, {max(of) + 0.0:.2f}" for of in bits)
            lines.append((name, block, *ends, *shares))
    heads = "| block | never on: | always on: | entropy of the decision: | bits of this character: "
    return markdown(heads + "| of the next one: | of the place in the line:", lines)


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "recipe": recipe,
    "recipe, slow cores": lambda: recipe(SLOW),
    "trials, dense": lambda: trials("dense"),
    "trials, GPT": lambda: trials("GPT"),
    "trials, experts": lambda: trials("experts"),
    "training, 96 wide": lambda: training("C=96"),
    "training, 128 wide": lambda: training("C=128"),
    "training, 384 wide": lambda: training("C=384"),
    "gpu, step": lambda: gpu("step"),
    "gpu, preset": lambda: gpu("preset"),
    "gpu, prompt": lambda: gpu("prompt"),
    "gpu, decode": lambda: gpu("decode"),
    "prompt": prompt,
    "decoding": decoding,
    "texts": texts,
    "sparse": sparse,
    "faults": faults,
    "rates": rates,
    "glance": glance,
    "lag": lag,
    "passes": passes,
    "sizes": sizes,
    "long": long,
    "works": lambda: compared(runs("works")),
    "variants": lambda: compared(runs("variants")),
    "curve": curve,
    "use": use,
    "probes": probes,
    "cuts": lambda: cuts(whole=False),
    "cuts, all": lambda: cuts(whole=True),
}


def of_question(name: str) -> str:
    """The tables of a question of run.py."""
    several = {"inside": ("probes", "cuts, all", "use")}
    return "\n\n".join(
        TABLES[table]() if table in TABLES else compared(runs(table))
        for table in several.get(name, (name,))
    )


def fill(text: str) -> str:
    """The text with its tables as the results have them."""
    pattern = r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")

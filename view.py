"""What runs show: their speed, a sample, what the experts do, and how several runs compare.

    python view.py out-a out-b out-c                        a table of these runs
    python view.py out-a out-b out-c --html=runs.html       and a page with their curves

sample.py shows texts, in a terminal by `--show_experts`, as a page by `--html=FILE`; a notebook
shows that page by view.show(model, tokenizer, text). Probes and figures for the docs are in
experiments/.
"""

import base64
import codecs
import hashlib
import html
import json
import math
import string
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from checkpoint import OF_EACH_CALL
from configurator import fail, pick_dtype, printable
from model import Attention, ParallelEncoderDecoder, evaluation, mask_statistics, window_start
from prepare_shakespeare import Tokenizer

SAMPLED = 300  # tokens, at the end of a run
N_LIKELY = 8  # next tokens that the page shows for each token
DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase + "-_"  # of view.html
OFF, ON = (38, 70, 131), (244, 162, 58)  # RGB of the least and the largest share of experts on


def expert_statistics(
    model: ParallelEncoderDecoder, tokens: np.ndarray, penalty_scale: float, before: Tensor | None
) -> tuple[dict[str, list | float], Tensor | None]:
    """Statistics of the masks per layer and stack, on 16 windows of tokens, the same at each call,
    with the weights that the penalties have now; and the decisions, for the next call. `changed` is
    the share of decisions that differ from those `before`. Empty for a model without experts."""
    c, T = model.config, model.config.block_size
    if c.n_expert == 0:
        return {}, None
    starts = np.random.default_rng(0).integers(len(tokens) - T, size=(16, 1))
    idx = torch.from_numpy(tokens[starts + np.arange(T)].astype(np.int64))
    mask = model.expert_masks(idx.to(model.tok_emb.weight.device))
    stats, decisions = mask_statistics(mask, c.l1_norm), mask.used > 0.5
    if isinstance(before, Tensor) and before.shape == decisions.shape:
        changed = decisions != before.to(decisions.device)
        stats["changed"] = changed.float().mean(dim=(-3, -2, -1))
    weights = {name: penalty_scale * getattr(c, name) for name in ("entropy_weight", "l1_weight")}
    return {name: value.tolist() for name, value in stats.items()} | weights, decisions


def estimate_mfu(
    model: ParallelEncoderDecoder, fwdbwd_per_iter: float, dt: float, peak_flops: float = 0.0
) -> float:
    """Model FLOPs utilisation, 0 to 1 (PaLM, arXiv:2204.02311, B): `fwdbwd_per_iter` sequences of
    block_size in `dt` seconds, against `peak_flops` operations a second; 0: what a GEMM reaches.
    Counts 6 operations per weight and token, and 12 C T per attention and token."""
    C, T = model.config.n_embd, model.config.block_size
    attentions = sum(isinstance(m, Attention) for m in model.modules())  # routers are small
    flops = (6 * model.num_params() + 12 * attentions * C * T) * T * fwdbwd_per_iter
    return flops / dt / (peak_flops or gemm_peak(str(model.tok_emb.weight.device)))


@cache
def gemm_peak(device: str) -> float:
    """Floating-point operations a second of a large matrix product, in the fastest block of 0.2
    seconds: in bfloat16 on a CUDA device that has it, else in float32. Measured once."""
    from torch.utils.benchmark import Timer  # here, as sampling does not need it

    bfloat16 = pick_dtype("auto", device) == "bfloat16"
    n, dtype = (8192, torch.bfloat16) if bfloat16 else (1024, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # leaves the global one as it is
    a = torch.randn(n, n, device=device, dtype=dtype, generator=generator)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.blocked_autorange(min_run_time=0.2).times)


def compiler_works(device: str) -> bool:
    """Whether torch.compile works here; if not, a line on stderr says why."""
    try:
        torch.compile(torch.cos)(torch.ones(64, device=device))
        return True
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"compile=True: goes on without ({reason:.200})", file=sys.stderr)
        return False


def show_sample(model: ParallelEncoderDecoder, tokenizer: Tokenizer, seed: int) -> None:
    """Prints a sample that starts with the tokenizer's prompt; or why there is none, as when
    GPT-2's encoding is not on this machine."""
    try:
        ids = tokenizer.encode(tokenizer.prompt)
    except OSError as error:
        print(f"no sample: {error}")
        return
    idx = torch.tensor([ids], device=model.tok_emb.weight.device)
    torch.manual_seed(seed)
    model.eval()  # or each token would set it, and set it back
    text = model.generate(idx, SAMPLED, temperature=0.8, top_k=200)
    print(f"\nA sample:\n{printable(tokenizer.decode(text[0].tolist()))}\n")


class Seen(NamedTuple):
    """One text of T tokens, and what the model made of each."""

    tokens: list[str]  # a BPE token that ends inside a character is empty, its successor has it
    loss: list[float | None]  # of each token, given those before, in nats; None of the first
    likely: list[list[tuple[str, float]]]  # the likeliest next tokens, with their probabilities
    came: list[int]  # which of them came next; -1: none of them
    m: Tensor  # (T, L, stacks, G): the masks when the token was read; G = 0 without experts

    @property
    def on(self) -> Tensor:
        """(T, L, stacks, G), bool: the experts that were on."""
        return self.m >= 0.5


@torch.inference_mode()
def see(model: ParallelEncoderDecoder, tokenizer: Tokenizer, text: Tensor) -> Seen:
    """Looks at a text (1, T) through the windows in which generation would have read it."""
    ids, length, block_size = text[0].tolist(), text.size(1), model.config.block_size
    starts = [window_start(end, block_size) for end in range(1, length + 1)]
    loss, likely, came, m = [None], [], [], []
    for start in sorted(set(starts)):
        first, last = starts.index(start), length - 1 - starts[::-1].index(start)
        window, new = text[:, start : last + 1], slice(first - start, last + 1 - start)
        if model.config.n_expert > 0:
            masks = model.expert_masks(window).learned[:, :, 0, new]  # (L, stacks, T, G)
            m.append(masks.permute(2, 0, 1, 3).float().cpu())
        logs = all_logits(model, window)[0, new].float().log_softmax(dim=-1)
        after = text[0, first + 1 : last + 2]
        loss += (-logs[: len(after)].gather(1, after[:, None])).flatten().tolist()
        likeliest = logs.exp().topk(min(N_LIKELY, logs.size(-1)))
        for k, (p, of) in enumerate(zip(*map(Tensor.tolist, likeliest), strict=True), first + 1):
            likely.append([(tokenizer.decode([i]), p) for i, p in zip(of, p, strict=True)])
            came.append(of.index(ids[k]) if k < length and ids[k] in of else -1)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = [decoder.decode(tokenizer.decode_bytes([token])) for token in ids]
    tokens[-1] += decoder.decode(b"", final=True)
    return Seen(tokens, loss, likely, came, torch.cat(m) if m else torch.zeros(length, 0, 0, 0))


class Page:
    """What `show` gives: a notebook shows it below the cell."""

    def __init__(self, text: str):
        self.text = text

    def _repr_html_(self) -> str:
        style = "width:100%;height:40rem;border:0"
        return f'<iframe style="{style}" srcdoc="{html.escape(self.text)}"></iframe>'


def show(model: ParallelEncoderDecoder, tokenizer: Tokenizer, text: str) -> Page:
    """The page of `sample.py --html` in a notebook: what the model makes of a text. ValueError for
    an empty one, and for a character that the vocabulary lacks."""
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("text: is empty; give at least one character")
    idx = torch.tensor([ids], device=model.tok_emb.weight.device)
    return Page(page([see(model, tokenizer, idx)]))


def all_logits(model: ParallelEncoderDecoder, window: Tensor) -> Tensor:
    """The logits (1, T, V) at every position of a window (1, T), in evaluation."""
    with evaluation(model.modules()):
        return model(window, window).logits


def in_colour(seen: Seen) -> str:
    """The text for a terminal of 24-bit colours, each token on a background that shows its share of
    experts on, and a legend."""
    share = seen.on.float().mean(dim=(1, 2, 3)).tolist()
    low, high = min(share), max(share)

    def paint(text: str, value: float) -> str:
        x = (value - low) / (high - low) if high > low else 1.0
        rgb = [round(a + x * (b - a)) for a, b in zip(OFF, ON, strict=True)]
        front = "0;0;0" if x > 0.4 else "255;255;255"
        return f"\x1b[48;2;{';'.join(map(str, rgb))}m\x1b[38;2;{front}m{text}\x1b[0m"

    def painted(token: str, value: float) -> str:  # a background must not run over a line's end
        lines = printable(token).split("\n")
        return "\n".join(paint(line, value) if line else "" for line in lines)

    steps = [low + (high - low) * i / 4 for i in range(5)] if high > low else [low]
    legend = "experts on: " + " ".join(paint(f" {value:.0%} ", value) for value in steps)
    return "".join(map(painted, seen.tokens, share)) + "\n" + legend


def page(texts: list[Seen]) -> str:
    """The texts, and view.html, which shows them."""

    words: dict[str, int] = {}
    layers, stacks, experts = texts[0].m.shape[1:]
    data = {
        "layers": layers,
        "stacks": ["encoder", "decoder"] if stacks == 2 else ["layer"] * stacks,
        "experts": experts,
        "texts": [
            {
                "tokens": seen.tokens,
                "loss": [None if x is None else round(x, 3) for x in seen.loss],
                "m": [  # in 64 steps, of which the upper 32 are on
                    "".join(DIGITS[k] for k in of)
                    for of in (63 * seen.m + 0.5).int().flatten(1).tolist()
                ],
                "likely": [
                    [[words.setdefault(t, len(words)), round(1e4 * p)] for t, p in after]
                    for after in seen.likely
                ],
                "came": seen.came,
            }
            for seen in texts
        ],
        "words": [*words],
    }
    return filled("view.html", data)


def filled(template: str, data: dict[str, Any]) -> str:
    """A page that needs nothing else: the template, with the data.

    Of scripts the page runs its own alone, whatever the data hold: the browser checks its hash.
    """
    # As JSON inside a script element, which "<" could end; the page writes text as text alone.
    values = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text.replace("{{sha256}}", sha256, 1).replace("{{data}}", values, 1)


# ---- runs side by side ------------------------------------------------------


def read_run(folder: str) -> dict[str, Any]:
    """What a run has so far; ValueError if its log has no evaluation."""
    import log  # here, since it imports what training stands on

    path = Path(folder).expanduser()
    rows, settings = log.read_log(path), {}
    kept = ("iter", "seconds", "val_loss", "experts_on")
    curve = [{k: row[k] for k in kept if k in row} for row in rows if "val_loss" in row]
    if not curve:
        raise ValueError(f"{folder}: log.jsonl is missing, or has no evaluation yet")
    for name in ("ckpt.pt", "ckpt_best.pt"):  # the settings; a run that just began has none yet
        with suppress(Exception):
            saved = torch.load(path / name, map_location="cpu", weights_only=True, mmap=True)
            settings = {k: v for k, v in saved["config"].items() if k not in OF_EACH_CALL}
            settings["init_from"] = saved.get("begun_from", "?")
            break
    closing = next((row for row in reversed(rows) if "whole_val_loss" in row), {})
    best = min(curve, key=lambda row: row["val_loss"])
    state = "runs" if log.is_locked(path) else "finished" if closing else "stopped"
    return {
        "name": folder, "state": state, "settings": settings, "curve": curve,
        "best": best["val_loss"], "best_iter": best["iter"],
        "whole": closing.get("whole_val_loss"),
        "experts_on": closing.get("experts_on"),
        "tokens": math.prod(
            settings.get(k, 1) for k in ("gradient_accumulation_steps", "batch_size", "block_size")
        ),
    }  # fmt: skip


def differing(runs: list[dict[str, Any]]) -> list[str]:
    """The settings in which runs differ, of those whose settings are known."""
    known = [run["settings"] for run in runs if run["settings"]]
    names = dict.fromkeys(name for settings in known for name in settings)
    return [name for name in names if len({repr(s.get(name)) for s in known}) > 1]


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """What to compare, a row each: its name, and its value for each run."""

    def of_each(run: dict[str, Any]) -> list[str]:
        last, found = run["curve"][-1], [run["name"], run["state"]]
        found += [f"{last['iter']:,}", f"{last['seconds']:,.0f}", f"{run['best']:.4f}"]
        found += [f"{run['best_iter']:,}"]
        found += ["-" if run["whole"] is None else f"{run['whole']:.4f}"]
        found += ["-" if run["experts_on"] is None else f"{run['experts_on']:.1%}"]
        return found + [str(run["settings"].get(name, "?")) for name in names]

    names = differing(runs)
    heads = ["run", "", "step", "seconds", "best loss", "at step", "whole split", "experts on"]
    return [*map(list, zip(heads + names, *map(of_each, runs), strict=True))]


def main(args: list[str]) -> None:
    pages = [arg.removeprefix("--html=") for arg in args if arg.startswith("--html=")]
    folders = [arg for arg in args if not arg.startswith("-")]
    unknown = [arg for arg in args if arg.startswith("-") and not arg.startswith("--html=")]
    if set(unknown) - {"-h", "--help"}:
        fail(f"{unknown[0]}: unknown; there is --html=FILE")
    if unknown or not folders:
        print(__doc__)
        sys.exit(0)
    try:
        runs = [read_run(folder) for folder in folders]
        rows = table(runs)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            print(printable("  ".join(cells).rstrip()))
        for path in pages:
            data = {"runs": runs, "table": rows}
            Path(path).write_text(filled("view_runs.html", data), encoding="utf-8", newline="\n")
            print(f"{path}: written; open it in a browser", file=sys.stderr)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])

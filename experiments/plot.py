"""The figures of the README and of docs/results.md, from experiments/results.jsonl.

    pip install -r requirements-dev.txt
    python experiments/plot.py          draws those of assets/ whose functions stand below

Backgrounds are transparent and the colours of a middle lightness, to be read on light and dark.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from tables import active, differences, interval, mean, recipe_runs, runs

ASSETS = Path(__file__).parent.parent / "assets"
GRAY, BLUE, ORANGE, GREEN, RED = "#808890", "#3b8eea", "#d9822b", "#2f9e63", "#d9534f"
plt.rcParams.update({
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": GRAY, "axes.labelcolor": GRAY, "axes.edgecolor": GRAY, "xtick.color": GRAY,
    "ytick.color": GRAY, "axes.titlecolor": GRAY, "legend.frameon": False, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "figures",
    "lines.linewidth": 1.6, "lines.markersize": 5,
})  # fmt: skip


def save(name: str) -> None:
    plt.savefig(ASSETS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close()


def spread(rows: list[dict]) -> float:
    return interval([row["val_loss"] for row in rows])


def loss() -> None:
    """The validation loss of the presets while they train, each seed a line."""
    labels = {
        "shakespeare_char_dense": (GREEN, "no experts"),
        "shakespeare_char": (BLUE, "16 experts"),
        "decoder_only": (ORANGE, "plain GPT"),
    }
    _, ax = plt.subplots(figsize=(6.4, 3.0))
    for name, (color, label) in labels.items():
        for k, row in enumerate(recipe_runs()[name]):
            _, seconds, losses = zip(*row["curve"], strict=True)
            ax.plot(seconds, losses, color=color, label="" if k else label, linewidth=1)
    ax.axhline(1.886, color=GRAY, linewidth=0.8, linestyle=":")
    ax.text(120, 1.9, "nanoGPT's CPU preset, at its end", ha="right", va="bottom", color=GRAY)
    ax.set_ylim(1.4, 2.6)
    ax.set_xlabel("seconds on two cores")
    ax.set_ylabel("validation loss, nats per character")
    ax.legend()
    save("loss")


def glance() -> None:
    """The loss against what a token of a prompt costs: at equal parameters, and smaller GPTs."""
    found = runs("glance")
    _, ax = plt.subplots(figsize=(5.4, 3.8))
    # Labels that stand on the left, so many points higher than what they name.
    left = {"GPT, 84 wide": 4, "GPT, 2 layers": -3, "YOCO": -2, "lean": -8}
    for name, rows in found.items():
        color = BLUE if name.startswith("GPT") else ORANGE if name in ("YOCO", "serial") else GREEN
        cost, deltas = rows[0]["prompt_flops"] / 1e3, differences(rows, found["GPT"])
        delta, half = statistics.mean(deltas), 0 if name == "GPT" else interval(deltas)
        fill = "none" if name in ("GPT, 84 wide", "GPT, 2 layers") else color
        ax.errorbar(cost, delta, half, fmt="o", color=color, capsize=2, markerfacecolor=fill)
        low = -14 if name == "lean, own keys and values" else -4
        at, side = ((-6, left[name]), "right") if name in left else ((6, low), "left")
        ax.annotate(
            name, (cost, delta), at, textcoords="offset points", ha=side, color=color, fontsize=9
        )
    ax.axhline(0, color=GRAY, linewidth=0.8)
    ax.margins(x=0.35)
    ax.set_xlabel("thousand operations a token of a prompt")
    ax.set_ylabel("loss minus the GPT's, nats per character")
    save("glance")


def lag() -> None:
    """The difference to lag 0, as the decoder runs further behind the encoder; three depths."""
    found = runs("lag")
    _, axes = plt.subplots(2, 1, figsize=(5.4, 5.2), sharex=True, sharey=True)
    for ax, form in zip(axes, ("", ", not lateral"), strict=True):
        for shift, (L, color, style) in enumerate(
            ((2, GREEN, "^-"), (4, BLUE, "o-"), (8, ORANGE, "s-"))
        ):
            names = {k: f"{L} + {L} layers, lag {k}{form}" for k in range(L + 1)}
            lags = [k for k, name in names.items() if name in found]
            deltas = [differences(found[names[k]], found[names[0]]) for k in lags]
            ax.errorbar(
                [k + (shift - 1) * 0.08 for k in lags], [*map(statistics.mean, deltas)],
                [*map(interval, deltas)], fmt=style, color=color, capsize=2,
                label=f"{L} + {L} layers",
            )  # fmt: skip
        ax.axhline(0, color=GRAY, linewidth=0.8)
        ax.set_title("without lateral" if form else "with lateral", fontsize=10)
        ax.set_ylabel("loss minus lag 0's, nats")
    axes[0].legend(fontsize=9)
    axes[1].set_xlabel("lag of the decoder, layers (0: side by side; L: in series)")
    save("lag")


def curve() -> None:
    """Loss against active parameters: learned dropout, top-k experts, smaller dense models."""
    found = runs("curve")
    kinds = {
        "l1_weight=": (BLUE, "o-", "learned dropout, l1_weight swept"),
        "top ": (ORANGE, "s-", "top k of 16 experts"),
        "no encoder": (RED, "d-", "dense, no encoder feed-forward"),
        "dense, ": (GREEN, "^-", "dense, narrower"),
    }
    _, ax = plt.subplots(figsize=(5.4, 3.8))
    for starts, (color, style, label) in kinds.items():
        chosen = [rows for name, rows in found.items() if name.startswith(starts)]
        chosen.sort(key=active)
        ax.errorbar(
            [active(rows) / 1000 for rows in chosen], [mean(rows) for rows in chosen],
            [spread(rows) for rows in chosen], fmt=style, color=color, label=label, capsize=2,
        )  # fmt: skip
    ax.set_xlabel("active parameters per token, thousands")
    ax.set_ylabel("validation loss, nats per character")
    ax.legend(fontsize=9)
    save("curve")


def variants() -> None:
    """The difference of each variant from lean."""
    found = runs("variants")
    base = found.pop("lean")
    found = {name: differences(rows, base) for name, rows in found.items() if "; " not in name}
    found = dict(sorted(found.items(), key=lambda item: -statistics.mean(item[1])))
    _, ax = plt.subplots(figsize=(4, 0.3 * len(found) + 0.8))
    for k, deltas in enumerate(found.values()):
        ax.errorbar(
            statistics.mean(deltas), k, xerr=interval(deltas), fmt="o", color=BLUE, capsize=2
        )
    ax.axvline(0, color=GRAY, linewidth=0.8)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_xlabel("loss minus lean's, nats per character")
    save("variants")


def probes() -> None:
    """How well a linear map of each stream tells the next character, layer by layer."""
    found, target = runs("inside"), "next token"
    lines = {  # (model, stack): how it is drawn
        ("lean", "d"): (GREEN, "s-", "lean, decoder"),
        ("lean", "e"): (GREEN, "o--", "lean, encoder"),
        ("lateral=False", "d"): (BLUE, "s-", "without lateral, decoder"),
        ("lateral=False", "e"): (BLUE, "o--", "without lateral, encoder"),
        ("GPT", "d"): (ORANGE, "^-", "GPT"),
    }
    _, ax = plt.subplots(figsize=(5.4, 3.8))
    for (model, stack), (color, style, label) in lines.items():
        of_streams = [row["probes"] for row in found[model]]
        names = ["E", *(name for name in of_streams[0] if name.startswith(stack))]
        shares = [[100 * p[name][target] for p in of_streams] for name in names]
        ax.errorbar(
            range(len(names)), [statistics.mean(s) for s in shares], [interval(s) for s in shares],
            fmt=style, color=color, label=label, capsize=2,
        )  # fmt: skip
    majority = 100 * found["lean"][0]["probes"]["the commonest"][target]
    ax.axhline(majority, color=GRAY, linewidth=0.8, linestyle=":")
    ax.text(3, majority, "majority baseline", ha="right", va="bottom", color=GRAY, fontsize=9)
    ax.set_xticks(range(4), ["embedding", "layer 1", "layer 2", "layer 3"])
    ax.set_ylabel("accuracy of a linear probe, %")
    ax.legend(fontsize=9)
    save("probes")


def experts() -> None:
    """The share of experts on, by kind of character."""
    found = [row["experts"] for row in runs("inside")["experts"]]
    blocks, kinds = found[0]["blocks"], list(found[0]["on_by_kind"])
    names = [f"{dict(e='encoder', d='decoder')[block[0]]} {block[1:]}" for block in blocks]
    _, ax = plt.subplots(figsize=(4.2, 3))
    share = [
        [100 * statistics.mean(f["on_by_kind"][k][b] for f in found) for b in range(len(blocks))]
        for k in kinds
    ]
    ax.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            ax.text(x, y, f"{value:.0f}", ha="center", va="center",
                    color="white" if value > 55 else "#303030")  # fmt: skip
    ax.set_xticks(range(len(blocks)), names)
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_title("experts on, %, by character and block", fontsize=10)
    save("experts_use")


if __name__ == "__main__":
    for draw in (loss, glance, lag, curve, variants, probes, experts):
        draw()

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
        at, side = ((-6, left[name]), "right") if name in left else ((6, -4), "left")
        ax.annotate(
            name, (cost, delta), at, textcoords="offset points", ha=side, color=color, fontsize=9
        )
    ax.axhline(0, color=GRAY, linewidth=0.8)
    ax.margins(x=0.35)
    ax.set_xlabel("thousand operations a token of a prompt")
    ax.set_ylabel("loss less the GPT's, nats per character")
    save("glance")


def curve() -> None:
    """Loss against active parameters: learned dropout, top-k experts, smaller dense models."""
    found = runs("curve") | runs("experts")  # of the latter those with an entropy penalty
    kinds = {
        "learned dropout, l1_weight swept": (BLUE, "o-", "l1_weight="),
        "learned dropout with an entropy penalty": (BLUE, "P", "entropy_weight="),
        "top k of 16 experts": (ORANGE, "s-", "top "),
        "dense, no encoder feed-forward": (RED, "d-", "no encoder"),
        "dense, narrower": (GREEN, "^-", "dense, 76 wide|dense, 70|dense, 64|dense, 58|dense, 52"),
    }
    _, ax = plt.subplots(figsize=(6.4, 3.6))
    for label, (color, style, starts) in kinds.items():
        chosen = [rows for name, rows in found.items() if name.startswith(tuple(starts.split("|")))]
        chosen.sort(key=active)
        ax.errorbar(
            [active(rows) / 1000 for rows in chosen], [mean(rows) for rows in chosen],
            [spread(rows) for rows in chosen], fmt=style, color=color, label=label, capsize=2,
        )  # fmt: skip
    ax.set_xlabel("active parameters per token, thousands")
    ax.set_ylabel("validation loss, nats per character")
    ax.legend()
    save("curve")


def variants() -> None:
    """The difference of each variant from the canonical layer."""
    found = runs("variants")
    base = found.pop("canonical")
    found = {name: differences(rows, base) for name, rows in found.items()}
    found = dict(sorted(found.items(), key=lambda item: -statistics.mean(item[1])))
    _, ax = plt.subplots(figsize=(6.4, 0.3 * len(found) + 0.8))
    for k, deltas in enumerate(found.values()):
        ax.errorbar(
            statistics.mean(deltas), k, xerr=interval(deltas), fmt="o", color=BLUE, capsize=2
        )
    ax.axvline(0, color=GRAY, linewidth=0.8)
    ax.set_yticks(range(len(found)), list(found))
    ax.set_xlabel(
        "difference of the validation loss from the canonical layer, with its 95 % interval"
    )
    save("variants")


def probes() -> None:
    """Accuracy of linear probes of each stream, layer by layer."""
    found = runs("inside")
    lines = {  # (model, stack): how it is drawn
        ("canonical", "e"): (BLUE, "o-", "encoder"),
        ("canonical", "d"): (ORANGE, "s-", "decoder"),
        ("decoder-only", "d"): (GRAY, "^--", "decoder-only"),
    }
    targets = list(found["canonical"][0]["probes"]["E"])
    fig, axes = plt.subplots(1, len(targets), figsize=(11, 2.6))
    for ax, target in zip(axes, targets, strict=True):
        for (model, stack), (color, style, label) in lines.items():
            of_streams = [row["probes"] for row in found[model]]
            names = ["E", *(name for name in of_streams[0] if name.startswith(stack))]
            layers = [0, *(int(name[1:]) for name in names[1:])]
            shares = [100 * statistics.mean(p[name][target] for p in of_streams) for name in names]
            ax.plot(layers, shares, style, color=color, label=label)
        ax.axhline(
            100 * found["canonical"][0]["probes"]["the commonest"][target],
            color=GRAY, linewidth=0.8, linestyle=":",
        )  # fmt: skip
        ax.set_title(target, fontsize=10)
        ax.set_xticks(range(4))
    axes[0].set_ylabel("accuracy, %")
    fig.supxlabel("after layer (0: E)", fontsize=10, color=GRAY)
    axes[0].legend(fontsize=8, loc="center")
    fig.tight_layout()
    save("probes")


def experts() -> None:
    """The share of experts on, by kind of character and by place in the window."""
    models = {"experts": "canonical", "experts, lateral": "lateral"}
    colors = (BLUE, ORANGE, GREEN, RED)
    _, axes = plt.subplots(1, 3, figsize=(12, 3), width_ratios=(1, 1, 1.1))
    for ax, (name, label) in zip(axes[:2], models.items(), strict=True):
        found = [row["experts"] for row in runs("inside")[name]]
        blocks, kinds = found[0]["blocks"], list(found[0]["on_by_kind"])
        share = [
            [100 * statistics.mean(f["on_by_kind"][k][b] for f in found) for b in range(4)]
            for k in kinds
        ]
        ax.imshow(share, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, row in enumerate(share):
            for x, value in enumerate(row):
                ax.text(x, y, f"{value:.0f}", ha="center", va="center",
                        color="white" if value > 55 else "#303030")  # fmt: skip
        ax.set_xticks(range(4), blocks)
        ax.set_yticks(range(len(kinds)), kinds if ax is axes[0] else [])
        ax.set_title(f"{label}: experts on, %, by character", fontsize=10)
    for b, color in enumerate(colors):  # of the last model, in which no block is off
        places = zip(*(f["on_by_place"][b] for f in found), strict=True)
        share = [100 * statistics.mean(p) for p in places]
        axes[2].plot(range(9, 9 + len(share)), share, color=color, label=blocks[b])
    axes[2].set_xlabel("place in the window")
    axes[2].set_title("lateral: experts on, %, by place", fontsize=10)
    axes[2].legend(fontsize=8, ncols=4)
    axes[2].set_ylim(0, 102)
    save("experts_use")


if __name__ == "__main__":
    for draw in (loss, glance, curve, variants, probes, experts):
        draw()

"""What the streams of a trained model hold, what it needs, and what its experts respond to.

    python experiments/probes.py out-canonical/ckpt.pt          prints JSON; half a minute a stream

All on the validation split, in windows of block_size. The first 8 tokens of each do not count.

Probes: for each stream (E, and the output of each layer of each stack) one linear map of the
standardised vector predicts the current token, the token 8 back, the next token, the speaker (the
ten who speak most; their names do not count) and the place in the line (in groups of 8 characters,
of its first 64). It is trained on every second group of 32 windows, so that the two halves share
hardly any speech. The figure is its accuracy on the other half.
Cuts: the loss without the cross-attention of one layer, and with one kind of attention limited, in
all layers, to the last w tokens.
Experts: the share on by kind of character, by place in the window and by speaker; the entropy of
each decision and its mutual information with the character, in bits; experts that are never or
always on.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as model_file  # noqa: E402
from checkpoint import load_checkpoint  # noqa: E402
from model import Attention, ParallelEncoderDecoder  # noqa: E402
from prepare_shakespeare import load_data  # noqa: E402

SKIPPED, BACK, SPEAKERS = 8, 8, 10
KINDS = {  # of characters
    "lower case": r"[a-z]",
    "capital": r"[A-Z]",
    "space": r" ",
    "new line": r"\n",
    "apostrophe, hyphen": r"['-]",
    "other": r".",
}


def targets_of(tokens: Tensor, text: str) -> dict[str, Tensor]:
    """What the probes predict, for each token; -100 where it does not count."""
    speaker, column = [], []
    spoken, now, before = Counter(), "", "\n"
    for line in text.splitlines(keepends=True):
        found = re.fullmatch(r"([A-Z][A-Za-z -]+):\n", line) if before == "\n" else None
        now, before = found[1] if found else now, line
        speaker += ["" if found else now] * len(line)  # the name itself would give it away
        column += range(len(line))
        spoken[now] += 0 if found else len(line)
    most = {name: k for k, (name, _) in enumerate(spoken.most_common(SPEAKERS))}
    column = torch.tensor(column)
    return {
        "current token": tokens,
        "token 8 back": torch.cat([tokens.new_full((BACK,), -100), tokens[:-BACK]]),
        "next token": torch.cat([tokens[1:], tokens.new_full((1,), -100)]),
        "speaker": torch.tensor([most.get(name, -100) for name in speaker]),
        "place in the line": torch.where(column < 64, column // 8, -100),
    }


@torch.inference_mode()
def streams(model: ParallelEncoderDecoder, idx: Tensor) -> dict[str, Tensor]:
    """E, e1, e2, ..., d1, d2, ... of idx (N, T), each (N, T - SKIPPED, C)."""
    e, d, _ = model.stacks(idx)
    found = {"E": (e or d)[0]}
    found |= {f"e{k}": x for k, x in enumerate(e) if k} | {f"d{k}": x for k, x in enumerate(d) if k}
    return {name: x[:, SKIPPED:].clone() for name, x in found.items()}


def held_out(n: int) -> Tensor:
    """Which of n windows the probes are tested on."""
    return torch.arange(n) // 32 % 2 == 1


def probe(x: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
    """The held-out accuracy, for each target (N, T), of a linear probe of x (N, T, C)."""
    torch.manual_seed(0)
    tested = held_out(len(x))
    train, test = x[~tested].flatten(0, 1), x[tested].flatten(0, 1)
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    sizes = [int(t.max()) + 1 for t in targets.values()]
    linear = nn.Linear(x.size(-1), sum(sizes))
    steps = 120
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    labels = [t[~tested].flatten() for t in targets.values()]
    for _ in range(steps):
        outputs = linear(train).split(sizes, dim=1)
        loss = sum(F.cross_entropy(y, t) for y, t in zip(outputs, labels, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        outputs = linear(test).split(sizes, dim=1)
    right = {}
    for (name, t), y in zip(targets.items(), outputs, strict=True):
        t = t[tested].flatten()
        right[name] = (y.argmax(dim=1) == t)[t >= 0].float().mean().item()
    return right


@contextmanager
def windowed(attentions: list[Attention], window: int) -> Iterator[None]:
    """Inside, these attentions see the last `window` tokens alone, their own one included."""
    usual = model_file.attend

    def attend(q: Tensor, kv: model_file.KV, dropout: float = 0.0) -> Tensor:
        ones = torch.ones(q.size(2), q.size(2), dtype=torch.bool)
        return usual(q, (*kv[:2], ones.tril() & ones.triu(1 - window)), dropout)

    def forward(self: Attention, *args: Tensor, **kwargs: Tensor) -> Tensor:
        model_file.attend = attend
        try:
            return Attention.forward(self, *args, **kwargs)
        finally:
            model_file.attend = usual

    for attention in attentions:
        attention.forward = forward.__get__(attention)
    yield
    for attention in attentions:
        del attention.forward


@contextmanager
def cut(module: nn.Module) -> Iterator[None]:
    """Inside, the module gives zeros."""
    hook = module.register_forward_hook(lambda _, __, y: torch.zeros_like(y))
    yield
    hook.remove()


@torch.inference_mode()
def loss_of(model: ParallelEncoderDecoder, x: Tensor, y: Tensor) -> float:
    """The cross-entropy over the windows, without the skipped tokens."""
    y = y.clone()
    y[:, :SKIPPED] = -1
    parts = zip(x.split(64), y.split(64), strict=True)
    losses = [model(a, b).metrics["cross_entropy"].item() * len(a) for a, b in parts]
    return sum(losses) / len(x)


def cuts(model: ParallelEncoderDecoder, x: Tensor, y: Tensor) -> dict[str, float]:
    """Losses with something left out, at test time alone."""
    losses = {"nothing": loss_of(model, x, y)}
    kinds = {
        "encoder": [layer.attention for layer in getattr(model, "encoder", ())],
        "decoder": [layer.attention for layer in model.decoder],
        "cross_attention": [getattr(layer, "cross_attention", None) for layer in model.decoder],
    }
    for k, layer in enumerate(model.decoder):
        if hasattr(layer, "cross_attention"):
            with cut(layer.cross_attention):
                losses[f"cross_attention of layer {k + 1}"] = loss_of(model, x, y)
    for name, attentions in kinds.items():
        attentions = [attention for attention in attentions if attention is not None]
        for window in (1, 2, 4, 8, 16, 32) if attentions else ():
            with windowed(attentions, window):
                losses[f"{name} sees {window}"] = loss_of(model, x, y)
    return losses


def mutual_information(on: Tensor, classes: Tensor) -> Tensor:
    """In bits, of each decision in `on` (N, G) and the class (N,) of its token: (G,)."""
    each = F.one_hot(classes).to(on.dtype)  # (N, K)
    p_class, p_on = each.mean(dim=0), on.mean(dim=0)
    information = torch.zeros_like(p_on)
    for decision, p in ((on, p_on), (1 - on, 1 - p_on)):
        joint = each.mT @ decision / len(on)  # (K, G)
        term = joint * torch.log2(joint / (p_class[:, None] * p))
        information += torch.where(joint > 0, term, 0.0).sum(dim=0)
    return information


@torch.inference_mode()
def experts(model: ParallelEncoderDecoder, x: Tensor, chars: str, targets: dict) -> dict:
    """What the experts respond to; blocks in the order of layers, the encoder's first."""
    r = torch.cat([model.expert_masks(part).used[..., SKIPPED:, :] for part in x.split(64)], dim=2)
    blocks = [f"{s}{k + 1}" for k in range(r.size(0)) for s in ("e", "d")[-r.size(1) :]]
    r = r.flatten(0, 1)  # (blocks, N, T, G)
    kinds = [next(k for k, p in enumerate(KINDS.values()) if re.match(p, c)) for c in chars]
    x, kind = x[:, SKIPPED:], torch.tensor(kinds)[x[:, SKIPPED:]]
    of_token, speaker = r.mean(dim=-1), targets["speaker"]
    found = {"blocks": blocks}
    found["on_by_kind"] = {
        name: of_token[:, kind == k].mean(dim=1).tolist() for k, name in enumerate(KINDS)
    }
    found["on_by_place"] = of_token.mean(dim=1).tolist()
    found["on_by_speaker"] = [
        of_token[:, speaker == k].mean(dim=1).tolist() for k in range(SPEAKERS)
    ]
    flat = r.flatten(1, 2)  # (blocks, tokens, G)
    found["never_on"] = (flat.amax(dim=1) == 0).sum(dim=1).tolist()
    found["always_on"] = (flat.amin(dim=1) == 1).sum(dim=1).tolist()
    p = flat.double().mean(dim=1)
    entropy = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
    found["entropy_of_decisions"] = entropy.tolist()
    for name in ("current token", "next token", "place in the line"):
        classes = targets[name].flatten()
        counted = classes >= 0
        bits = torch.stack([mutual_information(b[counted], classes[counted]) for b in flat])
        found[f"bits_of_{name.replace(' ', '_')}"] = bits.tolist()
    return found


def main() -> None:
    torch.manual_seed(0)
    try:
        model, saved = load_checkpoint(Path(sys.argv[1]))
        tokenizer, data = load_data(Path("data", saved["config"]["dataset"]))
    except ValueError as error:
        sys.exit(str(error))
    model.eval()
    tokens = torch.from_numpy(data["val"].astype("int64"))
    T = model.config.block_size
    targets = targets_of(tokens, tokenizer.decode(tokens.tolist()))
    n = (len(tokens) - 1) // T
    x, y = (t[: n * T].view(n, T) for t in (tokens, tokens[1:]))
    targets = {name: t[: n * T].view(n, T)[:, SKIPPED:] for name, t in targets.items()}
    found = {"probes": {}, "cuts": cuts(model, x, y)}
    for name, stream in streams(model, x).items():
        found["probes"][name] = probe(stream, targets)
    found["probes"]["the commonest"] = {}
    for name, t in targets.items():
        train, test = t[~held_out(n)], t[held_out(n)]
        share = (test == train[train >= 0].mode().values)[test >= 0].float().mean()
        found["probes"]["the commonest"][name] = share.item()
    if model.config.n_expert:
        found["experts"] = experts(model, x, tokenizer.chars, targets)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Peers that are no setting of train.py, made by a few changes of model.py before it starts.

    python experiments/peers.py "serial()" config/canonical.py --out_dir=out-serial
    python experiments/peers.py "top_k(4)" config/canonical.py --n_expert=16 --out_dir=out-moe

`serial()`: the same two stacks one after the other, as in an encoder-decoder: each layer of the
decoder attends to the encoder's last one. `attention_encoder()`: the encoder without its
feed-forward blocks. `top_k(k)`: a mixture of experts in place of the learned dropout. A linear
router's k largest of the G probabilities, made to sum to k, weigh the experts, which are the same
groups of hidden units; the loss that balances their use, the sum of that of each block with the
weight 0.01, is that of the Switch Transformer (arXiv:2101.03961, 2.2).
"""

import re
import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as model_file
from model import (
    Cache,
    FeedForward,
    Layer,
    Mask,
    ModelConfig,
    ModelOutput,
    ParallelEncoderDecoder,
)


def serial() -> None:
    def stacks(self: ParallelEncoderDecoder, idx: Tensor, cache: Cache | None = None) -> tuple:
        past = 0 if cache is None else cache.length
        emb = self.dropout(self.tok_emb(idx) + self.pos_emb.weight[past : past + idx.size(1)])
        e, d = emb, self.w_in(emb)
        for layer in self.encoder:
            e, _ = layer(e, None, cache=cache)
        for layer in self.decoder:
            d, _ = layer(d, e, cache=cache)
        if cache is not None:
            cache.length = past + idx.size(1)
        return emb, e, d, None

    ParallelEncoderDecoder.stacks = stacks


def attention_encoder() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor, m: Tensor | None = None, cache: Cache | None = None) -> tuple:
            return torch.zeros_like(x), None

    init = Layer.__init__

    def without(self: Layer, config: ModelConfig, cross: bool = False) -> None:
        init(self, config, cross)
        if not cross:
            self.ff = Nothing()

    Layer.__init__ = without


def top_k(k: int) -> None:
    balance: list[Tensor] = []  # the balancing loss of each block, in this forward pass

    class Gate(nn.Module):
        """The weights (B, T, G) of the experts for x (B, T, C): 0 where they are off.

        No nn.Linear, so that AdamW trains it, as an output layer, and not Muon.
        """

        def __init__(self, config: ModelConfig):
            super().__init__()
            self.weight = nn.Parameter(0.02 * torch.randn(config.n_expert, config.n_embd))

        def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
            # / C: at the rate of the embeddings the logits would saturate within a few steps.
            probs = (F.linear(x, self.weight) / x.size(-1)).softmax(dim=-1)
            values, chosen = probs.topk(k, dim=-1)
            on = torch.zeros_like(probs).scatter(-1, chosen, 1.0)
            share = on.flatten(0, -2).mean(dim=0) / k
            balance.append(len(self.weight) * (share * probs.flatten(0, -2).mean(dim=0)).sum())
            return on * probs * (k / values.sum(dim=-1, keepdim=True))

    init, forward = FeedForward.__init__, ParallelEncoderDecoder.forward
    statistics = model_file.mask_statistics

    def with_gate(self: FeedForward, config: ModelConfig) -> None:
        init(self, config)
        self.router = Gate(config)

    def with_balance(self: ParallelEncoderDecoder, *args: Tensor, **kwargs: Tensor) -> ModelOutput:
        balance.clear()
        logits, loss, metrics = forward(self, *args, **kwargs)
        loss = None if loss is None else loss + 0.01 * sum(balance)
        return ModelOutput(logits, loss, metrics)

    FeedForward.__init__ = with_gate
    model_file.round_mask = lambda m, *_: m
    # On is what is not 0, whatever its weight.
    model_file.mask_statistics = lambda mask, norm: statistics(
        Mask(*[(mask.m > 0).float()] * 2), norm
    )
    ParallelEncoderDecoder.forward = with_balance


PEERS = {"serial()": serial, "attention_encoder()": attention_encoder}

if __name__ == "__main__":
    peer, *args = sys.argv[1:] or [""]
    if peer in PEERS:
        PEERS[peer]()
    elif (found := re.fullmatch(r"top_k\((\d+)\)", peer)) and int(found[1]) >= 2:
        top_k(int(found[1]))
    else:
        sys.exit(f"{peer!r}: must be serial(), attention_encoder() or top_k(K), K at least 2")
    print(f"{peer}: a checkpoint does not say so; train.py and sample.py would take it for ours")
    sys.argv = ["train.py", *args]
    runpy.run_path("train.py", run_name="__main__")

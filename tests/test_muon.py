"""Tests of muon.py: against torch.optim.Muon, singular values, and the matrices of a model."""

import copy

import pytest
import torch

import muon
from model import ModelConfig, ParallelEncoderDecoder
from muon import Muon, configure_optimizers, orthogonalize

SHAPES = [(8, 8), (8, 13), (8, 32), (32, 8), (1, 5)]  # square, wide, twice as wide, tall, a row
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # the coefficients that torch.optim.Muon has


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [muon.COEFFICIENTS, QUINTIC])
def test_newton_schulz_acts_on_the_singular_values_alone(shape, coefficients, monkeypatch):
    monkeypatch.setattr(muon, "COEFFICIENTS", coefficients)
    X = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    s = S / (S.square().sum(dim=-1, keepdim=True).sqrt() * 1.01 + 1e-7)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    assert torch.allclose(orthogonalize(X), U * s[..., None, :] @ Vh, atol=1e-6)
    assert torch.allclose(orthogonalize(X.float()).double(), U * s[..., None, :] @ Vh, atol=1e-3)


def test_singular_values_come_close_to_1():
    X = torch.randn(4, 96, 384, generator=torch.Generator().manual_seed(0))
    S = torch.linalg.svdvals(orthogonalize(X))
    assert 0.4 < S.min() and S.max() < 1.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96)])
def test_newton_schulz_keeps_its_bounds_in_any_precision(shape, dtype):
    """Spectra as gradients have them: a few large singular values and a long tail."""
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    tail, one = 1 / torch.arange(1, 97), torch.full((96,), 0.01)
    one[0] = 1.0
    for S in (tail, one, torch.logspace(0, -4, 96)):
        X = orthogonalize((U * S @ Vh)[None].to(dtype))
        assert torch.linalg.svdvals(X.float()).max() < 1.7


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 6)), torch.zeros(1, 4, 6))


def steps(optimizer, weights, gradients):
    for gradient in gradients:
        for weight, grad in zip(weights, gradient, strict=True):
            weight.grad = grad.clone()
        optimizer.step()


def random_weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def random_gradients(count, *shapes):
    return [[w.detach() for w in random_weights(*shapes, seed=1 + k)] for k in range(count)]


def test_muon_equals_torch(monkeypatch):
    """torch.optim.Muon computes Newton-Schulz in bfloat16, hence the tolerance on the updates."""
    monkeypatch.setattr(muon, "COEFFICIENTS", QUINTIC)
    ours, theirs = random_weights(*SHAPES), random_weights(*SHAPES)
    how = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    groups = [{"params": [p], "rows": (len(p),)} for p in ours]
    gradients = random_gradients(4, *SHAPES)
    steps(Muon(groups, **how), ours, gradients)
    steps(torch.optim.Muon(theirs, **how), theirs, gradients)
    for p, q, start in zip(ours, theirs, random_weights(*SHAPES), strict=True):
        moved, expected = (p - start).flatten(), (q - start).flatten()
        assert (moved - expected).norm() < 0.05 * expected.norm()


def test_stacked_matrices_are_updated_one_by_one():
    stacked, (key, value) = random_weights((6, 5)), random_weights((3, 5), (3, 5))
    with torch.no_grad():
        stacked[0].copy_(torch.cat([key, value]))
    gradients = random_gradients(3, (6, 5))
    steps(Muon([{"params": stacked, "rows": (3, 3)}]), stacked, gradients)
    apart = Muon([{"params": [key, value], "rows": (3,)}])
    steps(apart, [key, value], [[g[0][:3], g[0][3:]] for g in gradients])
    assert torch.allclose(stacked[0], torch.cat([key, value]), atol=1e-6)
    together = random_weights((6, 5))
    steps(Muon([{"params": together, "rows": (6,)}]), together, gradients)
    assert not torch.allclose(stacked[0], together[0], atol=1e-3)


def test_a_loaded_state_goes_on_bit_for_bit():
    shapes = [(4, 4), (8, 4)]
    weights, gradients = random_weights(*shapes), random_gradients(6, *shapes)

    def group(weights):
        return [{"params": weights[:1], "rows": (4,)}, {"params": weights[1:], "rows": (4, 4)}]

    optimizer = Muon(group(weights))
    steps(optimizer, weights, gradients[:3])
    others = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    resumed = Muon(group(others))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, weights, gradients[3:])
    steps(resumed, others, gradients[3:])
    assert all(torch.equal(w, o) for w, o in zip(weights, others, strict=True))


ATTENTION = {(16,), (16, 16)}  # query and output; key and value
FF = {(64,), (16,)}


@pytest.mark.parametrize(
    "fields, rows",
    [
        ({}, ATTENTION | FF),
        ({"n_expert": 8}, ATTENTION | FF | {(16, 16, 8)}),  # the router's
        ({"arch": "decoder_only"}, ATTENTION | FF),
        ({"shared_kv": True, "lateral": True, "token_shift": True}, ATTENTION | FF),
    ],
)
def test_the_matrices_of_a_model(fields, rows):
    """Every weight of a layer is there once; query, keys and values are matrices of their own."""
    model = ParallelEncoderDecoder(
        ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=65, bias=True, **fields)
    )
    groups = configure_optimizers(model, {}, {})[1].param_groups
    found = [p for group in groups for p in group["params"]]
    expected = [
        p for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith("emb.weight")
    ]
    assert {id(p) for p in found} == {id(p) for p in expected} and len(found) == len(expected)
    assert {group["rows"] for group in groups} == rows and len(groups) == len(rows)
    assert all(sum(group["rows"]) == len(p) for group in groups for p in group["params"])

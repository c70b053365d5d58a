"""Tests of runtime.py: the share of the peak that a step reaches, by hand."""

import pytest
import torch

from model import Attention
from test_model import build
from view import estimate_mfu


def test_mfu_by_hand():
    model = build()
    assert sum(isinstance(m, Attention) for m in model.modules()) == 6
    per_token = 6 * model.num_params() + 6 * 12 * 24 * 16
    mfu = estimate_mfu(model, fwdbwd_per_iter=5, dt=0.5, peak_flops=1e9)
    assert mfu == pytest.approx(per_token * 16 * 5 / 0.5 / 1e9)
    state = torch.random.get_rng_state()
    assert 0 < estimate_mfu(model, fwdbwd_per_iter=5, dt=0.5) < 1
    assert torch.equal(state, torch.random.get_rng_state())

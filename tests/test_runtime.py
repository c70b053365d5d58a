"""Tests of what a run stands on: signals, torchrun's variables, the share of the peak."""

import builtins
import importlib
import signal
import sys
import threading

import pytest
import torch

import configurator
import runtime
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


# ---- signals ----------------------------------------------------------------

TERM, HUP = signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def handled():
    """What came to the handlers that the signals had before a run, and have after it."""
    came, stdout = [], sys.stdout
    before = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in (TERM, HUP)}
    during = [signal.getsignal(n) for n in before]
    try:
        yield came
        configurator.UNDO.close()
        assert [signal.getsignal(n) for n in before] == during and sys.stdout is stdout
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "sent, caught, passed_on",
    [
        ([TERM], [TERM], []),
        ([TERM, HUP], [TERM, HUP], []),  # as when a terminal closes on a run that is to stop
        ([TERM, TERM], [TERM], [TERM]),
        ([TERM, HUP, TERM, HUP], [TERM, HUP], [TERM, HUP]),
    ],
)
def test_a_signal_is_a_request_the_first_time(sent, caught, passed_on, handled):
    found, stdout = runtime.catch_signals(), sys.stdout
    for number in sent:
        signal.raise_signal(number)
    assert (found, handled) == (caught, passed_on)
    assert (sys.stdout is stdout) == (not passed_on)  # a caller may go on


def test_a_signal_is_no_request_once_its_script_has_ended(handled):
    def script():
        return runtime.catch_signals()

    found = script()
    signal.raise_signal(TERM)
    assert (found, handled) == ([], [TERM])


def test_in_a_thread_signals_stay_as_they_are(handled):
    found = []
    thread = threading.Thread(target=lambda: found.append(runtime.catch_signals()))
    thread.start()
    thread.join()
    signal.raise_signal(TERM)
    assert (found, handled) == ([[]], [TERM])


def test_a_notebook_gets_its_process_back_after_a_cell(monkeypatch):
    class Shell:
        def __init__(self):
            self.events, self.hooks = self, []

        def register(self, name, hook):
            self.hooks.append((name, hook))

        def unregister(self, name, hook):
            self.hooks.remove((name, hook))

    shell, stdout = Shell(), sys.stdout
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    configurator.override({"__doc__": "", "__file__": __file__}, [])
    runtime.catch_signals()
    ((name, hook),) = shell.hooks
    assert name == "post_execute" and sys.stdout is not stdout
    hook()  # also where the cell ended with an error
    assert not shell.hooks and sys.stdout is stdout


# ---- what torchrun says -----------------------------------------------------


@pytest.mark.parametrize(
    "changed, said",
    [
        ({}, None),
        ({"RANK": ""}, None),  # as where a script of a cluster leaves it empty
        ({"WORLD_SIZE": "two"}, "'WORLD_SIZE': 'two'"),
        ({"WORLD_SIZE": "9" * 20}, "9999"),
        ({"RANK": "2"}, "'RANK': '2'"),
        ({"LOCAL_RANK": "-1"}, "'LOCAL_RANK': '-1'"),
        ({"MASTER_PORT": "x"}, "'MASTER_PORT': 'x'"),
    ],
)
def test_variables_that_are_not_as_torchrun_sets_them(changed, said, monkeypatch, capsys):
    whole = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    try:
        with monkeypatch.context() as patch:
            for name, value in (whole | changed).items():
                patch.setenv(name, value)
            if said is None:
                importlib.reload(runtime)
                assert runtime.DDP == (not changed)
            else:
                with pytest.raises(SystemExit):
                    importlib.reload(runtime)
                (line,) = capsys.readouterr().err.splitlines()
                assert said in line and "not as torchrun sets them" in line
    finally:
        importlib.reload(runtime)

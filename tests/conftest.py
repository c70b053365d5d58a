"""Fixtures: a text, a data set prepared from it, and runs that went from start to end."""

import contextlib
import sys
from multiprocessing import forkserver

import pytest

import configurator
import view
from common import ROOT, TINY, succeed


@pytest.fixture(scope="session", autouse=True)
def quicker():
    """Starts the fork server where it finds what it is to import first. Samples are short here,
    too; gives their usual length."""
    usual, view.SAMPLED = view.SAMPLED, 30
    if sys.platform == "linux":
        with contextlib.chdir(ROOT):
            forkserver.ensure_running()
    return usual


@pytest.fixture(autouse=True)
def streams_are_put_back():
    """What a test changed in its process by parts of a script, without the script's end."""
    yield
    configurator.UNDO.close()


@pytest.fixture(scope="session")
def text():
    """A real text that is always at hand: this project's own."""
    names = ("model.py", "train.py", "LICENSE")
    text = "".join((ROOT / name).read_text("utf-8") for name in names)
    return text[:50_000]  # so that its validation split does not end with a whole window


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "input.txt").write_text(text, "utf-8")
    succeed(folder, "prepare_shakespeare.py", "--input_file=input.txt")
    return folder


@pytest.fixture
def workplace(tmp_path, prepared):
    """A folder with a prepared data set, as a fresh clone has after its first run."""
    (tmp_path / "data").symlink_to(prepared / "data")
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, prepared):
    """A folder where one run went from start to end, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(prepared / "data")
    printed = succeed(folder, "train.py", *TINY, "--out_dir=whole")
    return folder, printed


# Dense, and three settings that have every value of every field of learned dropout among them.
RUNS = {
    "dense": "",
    "stochastic": "--n_expert=8 --l1_norm=squared --l1_weight=0.1 --entropy_weight=0.05 "
    "--penalty_schedule=linear --penalty_iters=15",
    "lean": "--n_expert=16 --expert_site=output --router_input=encoder --router_n_head=2 "
    "--router_head_dim=4 --lateral=True --decoder_self_attention=False --shared_kv=True "
    "--position_embedding=rotary --qk_norm=True --token_shift=True "
    "--shift_init=1.5 --l1_weight=0.1 --penalty_schedule=exponential --penalty_iters=15",
    "gpt": "--arch=decoder_only --n_expert=4 --entropy_weight=0.1 --optimizer=adamw",
}


@pytest.fixture(scope="session", params=RUNS)
def twice_accumulated(request, tmp_path_factory, prepared):
    """A folder where a run of one process and two micro-steps went to its end; its arguments."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "data").symlink_to(prepared / "data")
    args = (*TINY, "--gradient_accumulation_steps=2", *RUNS[request.param].split())
    printed = succeed(folder, "train.py", *args, "--out_dir=one")
    return folder, args, printed

"""Tests of `python view.py out-a out-b`: runs that ended, crashed, are going on; and its page."""

import json
import shutil
import signal

import pytest
import torch

from common import OFFLINE, TINY, evaluations, run, start, succeed
from test_page import LEAST_CONTRAST, browser, needs_chromium  # noqa: F401

EXPERTS = ("--n_expert=8", "--l1_weight=0.1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prepared):
    """A folder with four runs: one that ended; one that was killed, then resumed; one whose log
    ends within a line; and one that is still going, but stands still while it is looked at."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").symlink_to(prepared / "data")
    succeed(folder, "train.py", *TINY, *EXPERTS, "--out_dir=done")
    killed = start(folder, "train.py", *TINY, *EXPERTS, "--dropout=0", "--out_dir=resumed")
    for line in killed.stdout:
        if line.startswith("iter 15:"):
            killed.kill()
    killed.wait(60)
    succeed(folder, "train.py", "--init_from=resume", "--out_dir=resumed")
    shutil.copytree(folder / "done", folder / "damaged")
    log = folder / "damaged/log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    how = ("--max_iters=100000", "--lr_decay_iters=100000", "--eval_interval=5", "--n_embd=32")
    going = start(folder, "train.py", *TINY, *how, "--out_dir=going")
    for line in going.stdout:
        if line.startswith("iter 12:"):
            going.send_signal(signal.SIGSTOP)
            break
    yield folder
    going.kill()
    going.wait(60)


NAMES = ("done", "resumed", "damaged", "going")
STATES = ["finished", "finished", "stopped", "runs"]


def rows(folder):
    """The evaluations in a log, but for a line that is not whole."""
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, (s for s in lines if s[-1] == "}")) if "val_loss" in row]


def test_a_table_of_runs(runs):
    printed = succeed(runs, "view.py", *NAMES)
    head, states, *lines = (line.split() for line in printed.splitlines())
    assert head == ["run", *NAMES] and states == STATES
    found = {" ".join(words[:-4]): words[-4:] for words in lines}
    for k, name in enumerate(NAMES):
        best = min(rows(runs / name), key=lambda row: row["val_loss"])
        assert found["step"][k] == str(rows(runs / name)[-1]["iter"])
        assert found["best loss"][k] == f"{best['val_loss']:.4f}"
        assert found["at step"][k] == str(best["iter"])
    assert found["whole split"][0] == f"{evaluations(runs / 'done')[-1]['whole_val_loss']:.4f}"
    assert found["whole split"][2:] == found["experts on"][2:] == ["-", "-"]
    assert {"dropout", "n_embd", "n_expert", "l1_weight", "max_iters"} <= found.keys()
    assert "seed" not in found and "out_dir" not in found
    assert found["dropout"] == ["0.2", "0.0", "0.2", "0.2"]


def test_a_run_shows_what_it_was_fine_tuned_from(runs):
    how = ("--max_iters=2", "--lr_decay_iters=2", "--eval_interval=2", "--warmup_iters=1")
    succeed(runs, "train.py", "--init_from=done", "--out_dir=tuned", *how)
    succeed(runs, "train.py", "--init_from=resume", "--out_dir=tuned", "--max_iters=4")
    lines = succeed(runs, "view.py", "done", "resumed", "tuned").splitlines()
    found = [line.split()[1:] for line in lines if line.startswith("init_from")]
    assert found == [["scratch", "scratch", "done"]]


@pytest.mark.parametrize(
    "args, said",
    [
        (["done", "--htm=a"], "--htm=a: unknown; there is --html=FILE"),
        (["nowhere"], "nowhere: log.jsonl is missing, or has no evaluation yet"),
        (["done", "--html=nowhere/a.html"], "No such file or directory"),
    ],
)
def test_a_mistake_gets_one_line(args, said, runs):
    done = run(runs, "view.py", *args)
    assert done.returncode != 0 and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_curves_end_where_the_logs_do(runs, browser, width, tmp_path):  # noqa: F811
    succeed(runs, "view.py", *NAMES, "--html=runs.html", env=OFFLINE)
    how = dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)
    browser.get((runs / "runs.html").as_uri())
    assert not browser.get_log("browser")
    for along in ("iter", "seconds", "tokens"):
        browser.execute_script(f"document.getElementById('along').value = '{along}'; draw()")
        ends = browser.execute_script(
            "return [...document.querySelectorAll('#loss circle')].map("
            "c => [c.dataset.name, +c.dataset.x, +c.dataset.y])"
        )
        for name, (found, x, y) in zip(NAMES, ends, strict=True):
            last = rows(runs / name)[-1]
            scale = 4 * 16 if along == "tokens" else 1
            assert found == name and y == last["val_loss"]
            assert x == last["seconds" if along == "seconds" else "iter"] * scale
    wide, inner = browser.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert wide <= inner == width
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#table tr')].map("
        "r => [...r.children].map(c => c.textContent))"
    )
    assert shown[:2] == [["run", *NAMES], ["", *STATES]]
    contrast, where = browser.execute_script(LEAST_CONTRAST)
    assert contrast >= 4.5, where
    charts = browser.find_elements("css selector", "#on svg[role=img]")
    assert len(charts) == 3  # of the runs with experts
    last = rows(runs / "done")[-1]["experts_on"]
    ends = browser.execute_script(
        "return [...document.querySelectorAll('#on .card')[0].querySelectorAll('circle')].map("
        "c => +c.dataset.y)"
    )
    assert ends == pytest.approx([100 * x for layer in last for x in layer])


@pytest.mark.browser
@needs_chromium
def test_the_best_loss_is_bold_where_losses_compare(runs, browser):  # noqa: F811
    shutil.copytree(runs / "done", other := runs / "other")
    saved = torch.load(other / "ckpt.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"dataset": "another"}}, other / "ckpt.pt")
    cases = [(NAMES, "best loss"), (NAMES[:2], "whole split"), (("done", "other"), None)]
    for names, row in cases:
        succeed(runs, "view.py", *names, "--html=bold.html", env=OFFLINE)
        browser.get((runs / "bold.html").as_uri())
        cells = browser.execute_script(
            "return [...document.querySelectorAll('#table tr')].map("
            "r => [...r.children].map(c => [c.textContent, c.className]))"
        )
        found = {of[0][0]: [text for text, name in of[1:] if name == "best"] for of in cells}
        least = [min(text for text, _ in of[1:]) for of in cells if of[0][0] == row]
        assert len(least) == (row is not None)
        assert [{*texts} for texts in found.values() if texts] == [{x} for x in least]


def test_what_the_page_holds_is_no_markup(runs):
    strange = runs / "<b>&"
    if not strange.exists():
        shutil.copytree(runs / "done", strange)
    succeed(runs, "view.py", "<b>&", "--html=strange.html")
    page = (runs / "strange.html").read_text("utf-8")
    (data,) = [line for line in page.splitlines() if 'id="data"' in line]
    held = data.partition(">")[2].rpartition("</script>")[0]
    assert "<" not in held and json.loads(held)["runs"][0]["name"] == "<b>&"

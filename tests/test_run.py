"""Tests of experiments/run.py: what it runs, prints and refuses; and of the figures."""

import array
import json
import re
import statistics

import pytest
import run
from run import PRESENT

import tables
from prepare_shakespeare import load_data


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """run.py with results of its own, and losses that are made up: 1.5 + 0.1 n_layer + noise."""
    calls, noise = [], {1: 0.010, 2: -0.004, 3: 0.002}

    def train(settings, peer, analyse, seed):
        calls.append((settings, peer, seed))
        layers = int(re.findall(r"--n_layer=(\d+)", settings)[-1])
        return {
            "val_loss": 1.5 + layers / 10 * (1 + noise[seed]),
            "parameters": 1000 * layers,
            "seconds": 0,
        }

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    for name in ("RESULTS", "SWEEPS"):
        monkeypatch.setattr(run, name, tmp_path / f"{name.lower()}.jsonl")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    meta = tmp_path / "data/shakespeare_char/meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text('{"source": "tinyshakespeare", "vocab_size": 65}', "utf-8")
    monkeypatch.setattr(tables, "read", lambda name: run.read_rows(run.RESULTS))
    return calls


def depth():
    """How deep? Not very."""
    for layers in (1, 2):
        yield run.run(f"{layers} layers", f"config/canonical.py --n_layer={layers}", 3)


def test_a_question_is_asked_once_and_prints_its_table_each_time(trained, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUESTIONS", {"depth": depth})
    monkeypatch.setattr(tables, "QUESTIONS", run.QUESTIONS)
    run.main(["depth", "--seed=2"])
    assert sorted(seed for *_, seed in trained) == [2, 2]
    run.main(["depth", "--name=1 layers"])
    assert sorted(seed for *_, seed in trained) == [1, 2, 2, 3]
    run.main(["depth"])
    assert len(trained) == len(set(trained)) == 6
    capsys.readouterr()
    for _ in range(2):
        run.main(["depth"])
        assert len(trained) == 6
        half = 4.302653 * statistics.stdev([0.001, -0.0004, 0.0002]) / 3**0.5
        assert capsys.readouterr().out.splitlines() == [
            "",
            "depth: How deep? Not very.",
            "",
            "|  | parameters | seeds | loss | vs 1 layers |  |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
            "| 1 layers | 1,000 | 3 | 1.600 |  |  |",
            f"| 2 layers | 2,000 | 3 | 1.701 | +0.100 ± {half:.3f} | worse |",
        ]
    for listed in (["--list"], []):
        run.main(listed)
        assert capsys.readouterr().out.endswith("| How deep? | Not very. | 6 of 6 | 0.0 |\n")


def test_a_name_with_a_semicolon_is_beside_what_stands_before_it():
    losses = {"lean": (1.6, 1.5), "wide": (1.4, 1.6), "wide; peer": (1.3, 1.4)}
    found = {
        name: [dict(seed=s, parameters=9, val_loss=loss) for s, loss in enumerate(of_name)]
        for name, of_name in losses.items()
    }
    *_, wide, peer = tables.compared(found).splitlines()
    half = 12.7062 * 0.1 / 2
    assert wide == f"| wide | 9 | 2 | 1.500 | -0.050 ± {3 * half:.3f} | no difference found |"
    assert peer == f"| wide; peer | 9 | 2 | 1.350 | -0.150 ± {half:.3f} | no difference found |"


def test_a_sweep_of_ones_own(trained, capsys):
    settings = "config/canonical.py --n_layer=2,3 --dropout=0.1,0.2 --bias=True"
    run.main([settings, "--seeds=2", "--peer=lag(1)"])
    fixed = [f"config/canonical.py --n_layer={n} --dropout=0.{d} --bias=True"
             for n in (2, 3) for d in (1, 2)]  # fmt: skip
    assert sorted(trained) == sorted((f, "lag(1)", seed) for f in fixed for seed in (1, 2))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| n_layer=3, dropout=0.2 | 3,000 | 2 | 1.801 | +0.100 ± 0.")
    run.main([settings, "--seeds=3", "--peer=lag(1)"])
    assert len(trained) == 12 and not run.RESULTS.exists()  # with the third seed


def test_repeat_says_whether_the_loss_is_equal(trained, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUESTIONS", {"depth": depth})
    monkeypatch.setattr(tables, "QUESTIONS", run.QUESTIONS)
    run.main(["depth"])
    made = []
    monkeypatch.setattr(run, "ready", made.append)
    for change, said, status in ((0.0, "now, at abc1234: equal", 0), (0.25, "differs by -0.25", 1)):
        rows = run.read_rows(run.RESULTS)
        rows[2]["val_loss"] += change
        run.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        with pytest.raises(SystemExit) as end:
            run.main(["--repeat=3"])
        assert end.value.code == status and said in capsys.readouterr().out
        assert made.pop() == rows[2]["settings"]  # the data set, which may be missing


@pytest.mark.parametrize(
    "argv, said",
    [
        (["lagg"], r"no question 'lagg'; did you mean lag\? \(all: rates, "),
        (["lag", "config/canonical.py"], "a sweep is one argument, alone"),
        (["config/canonical.py", "--seeds=0"], "--seeds=0: must be at least 1"),
        (["config/canonical.py", "--seeds=16"], "--seeds=16: must be .* at most 15"),
        (["lag", "--name=lag"], "no run has this name, seed and peer; the names are: 2"),
        (["--repeat=7"], "--repeat=7: must be a line of results.jsonl, 1 to 0"),
        (["--repeat=0"], "--repeat=0: must be a line of results.jsonl, 1 to 0"),
    ],
)
def test_a_mistake_gets_one_line(argv, said, trained):
    with pytest.raises(SystemExit) as end:
        run.main(argv)
    assert re.search(said, end.value.code) and "\n" not in end.value.code and not trained


def test_runs_of_an_earlier_layer_are_not_mixed_with_new_ones(trained, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUESTIONS", {"depth": depth})
    monkeypatch.setattr(tables, "QUESTIONS", run.QUESTIONS)
    run.main(["depth", "--seed=1"])
    rows = [row | {"format": 2, "commit": "old1234"} for row in run.read_rows(run.RESULTS)]
    run.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    capsys.readouterr(), trained.clear()
    run.main(["depth"])
    assert "depth: measured with an earlier layer; nothing is run" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="measured at commit old1234: the layer or the presets"):
        run.main(["--repeat=1"])
    assert not trained


@pytest.mark.usefixtures("trained")
def test_costs_by_hand():
    """Two operations a weight and token; of an attention 4 C for each pair of positions."""
    T, C, V, L = 63, 84, 65, 2
    unread = f"{PRESENT} --n_embd=84"
    lean = run.costs(unread, "")
    encoder = L * (20 * C**2 + 4 * T * C) + (L + 1) * 4 * C**2
    decoder = L * (20 * C**2 + 4 * T * C) + 2 * V * C  # of the last position alone
    assert lean["prompt_flops"] == pytest.approx(encoder + decoder / T, rel=1e-12)
    assert lean["token_flops"] == pytest.approx(encoder + decoder + 2 * L * 4 * C, rel=1e-12)
    assert lean["cache_bytes"] == (L + 1) * 2 * C * 4
    gpt = run.costs(f"{unread} --arch=decoder_only --n_layer=3", "")
    read = 2 * (24 * C**2 + 4 * T * C) + 4 * C**2
    last = 20 * C**2 + 4 * T * C + 2 * V * C
    assert gpt["prompt_flops"] == pytest.approx(read + last / T, rel=1e-12)
    assert gpt["cache_bytes"] == 3 * 2 * C * 4
    assert run.costs(f"{unread} --shared_kv=False", "yoco()")["prompt_flops"] == pytest.approx(
        lean["prompt_flops"], rel=1e-12
    )


@pytest.mark.parametrize(
    "values, mean, half, said",
    [
        # half: scipy.stats.t.interval(0.95, n - 1, mean, stats.sem(values))
        ([0.01, 0.02, 0.03], 0.02, 0.024841, "no difference found"),
        ([0.019, 0.02, 0.021], 0.02, 0.0024841, "worse"),
        ([-0.019, -0.02, -0.021], -0.02, 0.0024841, "better"),
        ([0.002, -0.001, 0.001, -0.002, 0.0], 0.0, 0.0019633, "as good"),
    ],
)
def test_what_differences_say(values, mean, half, said):
    assert statistics.mean(values) == pytest.approx(mean)
    assert tables.interval(values) == pytest.approx(half, rel=1e-4)
    assert tables.verdict(values) == said


def test_a_single_difference_says_nothing():
    assert tables.verdict([0.5]) == "" and tables.with_interval([0.5], 1) == "0.5"


def test_learning_rates_are_the_best_of_three():
    """Those of `glance` are what `rates` found."""
    found = {}
    for name, rows in tables.runs("rates").items():
        model, _, factor = name.rpartition(", ")
        found.setdefault(model, {})[float(factor)] = tables.mean(rows)
    assert set(found) == set(run.MODELS) or not tables.runs("glance")
    seeds = {tuple(row["seed"] for row in rows) for rows in tables.runs("rates").values()}
    assert seeds == {(100, 101, 102)}
    for name, losses in found.items():
        assert len(losses) == 3 and min(losses, key=losses.get) == 1, name


def test_a_short_text_is_the_beginning_of_the_training_split(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    source = tmp_path / "data/shakespeare_char"
    source.mkdir(parents=True)
    for name, ids in (("train", range(900)), ("val", range(100))):
        (source / f"{name}.bin").write_bytes(array.array("H", (k % 65 for k in ids)).tobytes())
    chars = "".join(chr(40 + k) for k in range(65))
    meta = {"tokenizer": {"kind": "char", "chars": chars}, "vocab_size": 65}
    meta |= {"source": "tinyshakespeare", "tokens": {"train": 900, "val": 100}}
    (source / "meta.json").write_text(json.dumps(meta), "utf-8")
    for _ in range(2):
        run.ready("config/x.py --dataset=shakespeare_first_500 --n_embd=8")
    _, data = load_data(tmp_path / "data/shakespeare_first_500")
    assert data["train"].tolist() == [k % 65 for k in range(500)]
    assert data["val"].tolist() == [k % 65 for k in range(100)]
    run.ready("config/x.py --n_embd=8")
    assert len([*tmp_path.glob("data/*")]) == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "--repeat LINE" in printed and "a sweep of your own" in printed

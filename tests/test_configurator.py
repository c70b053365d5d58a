"""Tests of the settings: the command line, config files, the presets in config/."""

import contextlib
import io
import json
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
from common import ROOT, fails_with, succeed
from model import ModelConfig, ParallelEncoderDecoder

sys.path.append(str(ROOT / "experiments"))
from measuring import fields_of, settings_of  # noqa: E402

GLOBALS = {
    "__doc__": "A script.",
    "__file__": __file__,
    "n_layer": 4,
    "learning_rate": 1e-3,
    "compile": False,
    "dataset": "a",
    "device": "cpu",
    "_private": 1,
    "CONSTANT": 1,
    "function": print,
}


def test_the_last_override_wins(tmp_path):
    first, second = tmp_path / "1.py", tmp_path / "2.py"
    first.write_text('"""Doc."""\nn_layer = 5  # more\nlearning_rate = 1\ndataset = "b"\n')
    second.write_text("n_layer = 6\n")
    argv = [str(first), "--n_layer=7", str(second), "--compile=true", "--dataset", "c=d"]
    assert configurator.override(GLOBALS, argv) == {
        "n_layer": 6,
        "learning_rate": 1.0,
        "compile": True,
        "dataset": "c=d",
        "device": "cpu",
    }
    assert configurator.override(GLOBALS, []) == configurator.Settings(GLOBALS)


def test_a_config_file_calculates_and_has_a_base(tmp_path):
    """It is read as if the base's lines stood in it; on_cpu and on_cuda merge by key."""
    (tmp_path / "root.py").write_text(
        "n_layer = 2 * 3\non_cpu = {'learning_rate': 1, 'n_head': 2}\n"
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/mine.py").write_text(
        "base = '../root.py'\non_cpu = {'n_head': n_head * n_layer}\nmax_iters = -(7 - 19) // 5\n"
        "learning_rate = learning_rate / max_iters + 1.5\ndataset = 'b'\n"
    )
    globals_ = {**GLOBALS, "n_head": 1, "max_iters": 9}
    found = configurator.override(globals_, [str(tmp_path / "deep/mine.py"), "--max_iters=3*4"])
    assert found["n_layer"] == 6 and found["n_head"] == 12 and found["max_iters"] == 12
    assert found["learning_rate"] == 1 / 2 + 1.5 and found["dataset"] == "b"
    assert found.where["n_layer"].endswith("root.py:1") and "compile" not in found.where
    assert found.where["max_iters"] == "--max_iters=3*4"
    assert found.where["n_head"].endswith("deep/mine.py:2")


def test_settings_of_the_device(tmp_path):
    path = tmp_path / "c.py"
    path.write_text('on_cuda = {"n_layer": 8}\non_cpu = {"n_layer": 2}\n')

    def n_layer(*argv):
        return configurator.override(GLOBALS, [str(path), *argv])["n_layer"]

    assert n_layer() == 2
    assert n_layer("--device=cuda:1") == 8
    path.write_text('on_cuda = {"n_layer": +8, "device": "cuda:1"}\non_cpu = {"n_layer": 2}\n')
    assert n_layer() == 2  # what is for a GPU alone does not choose one
    assert n_layer("--device=cuda") == 8
    assert n_layer("--device=mps") == 2
    assert n_layer("--n_layer=9") == 9
    assert n_layer("--device=auto") == (8 if torch.cuda.is_available() else 2)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--n_layers=5", r"no setting 'n_layers'; did you mean 'n_layer'\?"),
        ("--zzz=5", r"no setting 'zzz' \(--help lists all\)"),
        ("--_private=5", "no setting '_private'"),
        ("--function=5", "no setting 'function'"),
        ("--n_layer=six", r"n_layer takes int \(such as 4\), not 'six'"),
        ("--n_layer=2.5", "n_layer takes int .*, not 2.5"),
        ("--n_layer=True", "n_layer takes int .*, not True"),
        ("--compile=1", "compile takes bool .*, not 1"),
        ("--learning_rate=fast", "learning_rate takes float .*, not 'fast'"),
        ("--learning_rate=__import__('os').abort()", "learning_rate takes float"),
        ("--n_layer", "--n_layer: has no value"),
        ("--n_layer={[]:1}", "n_layer takes int"),
        ("--on_cpu=5", "on_cpu: takes a dict of settings, not 5"),
        ("--CONSTANT=5", "no setting 'CONSTANT'"),
        ("absent.py", "absent.py: cannot read this config file: No such file"),
        (
            "n_layer=5",
            r"n_layer=5: not a config file, which ends in .py \(settings are --key=value",
        ),
    ],
)
def test_a_wrong_argument_gets_one_line(argument, said, capsys):
    with pytest.raises(SystemExit) as end:
        configurator.override(GLOBALS, [argument])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(said, printed) and printed.count("\n") == 1


TRAIN = {**GLOBALS, "out_dir": "out", "init_from": "scratch"}
SAMPLE = {**GLOBALS, "out_dir": "out", "start": ""}
PREPARE = {"input_file": "", "dataset": ""}


@pytest.mark.parametrize(
    "script_globals, argument, hint",
    [
        (TRAIN, "a run", "; a run is --init_from=resume --out_dir='a run'"),
        (TRAIN, "a run/ckpt.pt", "; a run is --init_from=resume --out_dir='a run'"),
        (TRAIN, "a.txt", "; a text is prepared by prepare_shakespeare.py --input_file=a.txt"),
        (TRAIN, "data", ""),  # no run, though a folder
        (TRAIN, "absent", ""),
        (SAMPLE, "a run", "; a run is --out_dir='a run'"),
        (SAMPLE, "a.txt", "; a text is --start=FILE:a.txt"),
        (SAMPLE, "To be", "; a text is --start='To be'"),
        (PREPARE, "a.txt", "; a text is --input_file=a.txt"),
        (PREPARE, "absent", "; a text is --input_file=absent"),
    ],
)
def test_what_is_no_config_file_is_known_for_what_it_is(
    script_globals, argument, hint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("a run/ckpt.pt", "a.txt", "data/input.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(SystemExit):
        configurator.override(script_globals, [argument])
    said = f"{argument}: not a config file, which ends in .py (settings are --key=value){hint}\n"
    assert capsys.readouterr().err.endswith(f": {said}")


@pytest.mark.parametrize(
    "source, said",
    [
        ("n_layer = 5\nn_layers = 5", r"c.py:2: there is no setting 'n_layers'; did you mean"),
        ("n_layer = 5\nn_layer = = 5", r"c.py:2: not valid Python"),
        ("n_layer = 2 ** 3", r"c.py:1: n_layer: takes a value, or numbers with .*, not '2 \*\* 3'"),
        ("n_layer = open('x', 'w')", r"c.py:1: n_layer: takes a value, or numbers with"),
        ("import os", "c.py:1: a config file only assigns values"),
        ("n_layer, compile = 1, True", "c.py:1: a config file only assigns values"),
        ("print(1)", "c.py:1: a config file only assigns values"),
        ("on_cpu = 5", "c.py:1: on_cpu: takes a dict of settings, not 5"),
        ("on_cpu = {'n_layer': 'x'}", "c.py:1: n_layer takes int"),
        ("on_cuda = {'n_layers': 5}", "c.py:1: there is no setting 'n_layers'"),
        ("n_layer = {[]: 1}", "c.py:1: n_layer: takes a value, or numbers with"),
        ("device = 5", "c.py:1: device takes str"),
        ("n_layer = 5\0", "c.py:1: not valid Python"),
        ("n_layer = " + "(" * 300, "c.py:?1?: not .*"),
        ("n_layer = " + "-" * 99999 + "1", "c.py: not a config file: .* nested too deeply"),
        ("n_layer = " + "-" * 300 + "x", "c.py:1: n_layer: 'x' is not set before this line"),
        ("n_layer = " + "1 + " * 900 + "1", "c.py:1: n_layer: .*recursion"),
        ("n_layer = 5\nn_layer = n_layer / 2", r"c.py:2: n_layer takes int .*, not 2.5"),
        ("n_layer = 5 // 0", "c.py:1: n_layer: .*by zero"),
        ("n_layer = True + 1", "c.py:1: n_layer: only numbers can be calculated with, not True"),
        ("dataset = 'a' * 3", "c.py:1: dataset: only numbers can be calculated with, not 'a'"),
        ("n_layer = learning_rate", "c.py:1: n_layer: 'learning_rate' is not set before this line"),
        ("on_cpu = {\n 'dataset': 'b',\n 'n_layers': 2}", "c.py:3: there is no setting 'n_layers'"),
        ("on_cpu = {\n 'n_layer': 2,\n **{}}", "c.py:3: {}: takes a value, or"),
        ("base = 5", "c.py:1: base: takes the name of a file beside this one"),
        ("n_layer = 5\nbase = 'absent.py'", "c.py:2: base='absent.py': .*absent.py: cannot read"),
        ("base = 'c.py'", "c.py:1: base='c.py': a file cannot be its own base"),
        ("base = 'd.py'", "d.py:2: base='c.py': a file cannot be its own base"),
        ("base = 'e.py'", "e.py:1: there is no setting 'n_layers'; did you mean 'n_layer'"),
    ],
)
def test_a_wrong_config_file_gets_its_file_and_line(source, said, tmp_path, capsys):
    (tmp_path / "c.py").write_text(source)
    (tmp_path / "d.py").write_text("n_layer = 2\nbase = 'c.py'")
    (tmp_path / "e.py").write_text("n_layers = 2")
    with pytest.raises(SystemExit) as end:
        configurator.override(GLOBALS, [str(tmp_path / "c.py")])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and re.search(said, printed) and printed.count("\n") == 1


executed = []  # what was run as code, or started as a process, while `watched` was set
watched = False


def audit(event, args):
    if watched and event in ("exec", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        executed.append((event, args))


sys.addaudithook(audit)
SOME_KEYS = st.sampled_from([*GLOBALS, "on_cuda", "on_cpu", "n_layers"]) | st.text(max_size=9)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
SOME_VALUES = (
    st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(PLAIN, v, max_size=3))
    .map(repr)
    .__or__(st.text(max_size=20))
    .__or__(
        st.sampled_from(["__import__('os').abort()", "exec('1')", "(" * 300, "9" * 5000, "1e999"])
    )
)


@given(st.lists(st.tuples(SOME_KEYS, SOME_VALUES, st.sampled_from(["=", " ", "file"])), max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_override_is_a_value_of_its_type_or_one_line(tmp_path_factory, items):
    """Whatever the keys and values are; and none of it is run as code."""
    global watched
    argv, lines, stderr = [], [], io.StringIO()
    for key, value, how in items:
        if how == "file":
            lines.append(f"{key} = {value}\n")
        else:
            argv += [f"--{key}={value}"] if how == "=" else [f"--{key}", value]
    if lines:
        path = tmp_path_factory.getbasetemp() / "config.py"
        path.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
        argv.append(str(path))
    argv = [arg for arg in argv if arg not in ("--help", "-h", "--device=auto")]
    executed.clear()
    watched = True
    try:
        with contextlib.redirect_stderr(stderr):
            found = configurator.override(GLOBALS, argv)
    except SystemExit as end:
        assert end.code == 2 and len(stderr.getvalue().splitlines()) == 1
    else:
        defaults = configurator.Settings(GLOBALS)
        assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in defaults.items()}
    finally:
        watched = False
    assert not executed


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare_shakespeare.py"])
def test_help_prints_every_setting(script, tmp_path):
    printed = succeed(tmp_path, script, "--help")
    section = (ROOT / script).read_text("utf-8").split("# " + "-" * 77)[1]
    expected = [f"  --{n}={value}" for n, value in re.findall(r"^(\w+) = (.*)$", section, re.M)]
    assert len(expected) >= 3
    assert [line for line in printed.splitlines() if line.startswith("  --")] == expected


def test_every_field_of_the_model_is_a_setting_with_its_default():
    source = (ROOT / "train.py").read_text("utf-8")
    for name, value in vars(ModelConfig()).items():
        if name not in ("vocab_size",):
            value = json.dumps(value) if isinstance(value, str) else str(value)
            assert re.search(rf"^{name} = {re.escape(value)}(\s|$)", source, re.M), name


def of_preset(name, device, *argv):
    """The settings of train.py with a preset."""
    return settings_of(str(ROOT / "config" / f"{name}.py"), f"--device={device}", *argv)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_valid_and_the_baseline_has_as_many_parameters(device):
    def size(preset, *argv):
        fields = fields_of(of_preset(preset, device, *argv))
        return ParallelEncoderDecoder(ModelConfig(**fields, vocab_size=65)).num_params()

    sizes = {path.stem: size(path.stem) for path in (ROOT / "config").glob("[!_]*.py")}
    dense = sizes["shakespeare_char_dense"]
    assert sizes["canonical"] == pytest.approx(dense, rel=0.025)
    if device == "cuda":
        assert sizes["decoder_only"] == pytest.approx(dense, rel=0.025)
    else:  # the GPT has the size that is best in the same time
        assert 0.75 * dense < sizes["decoder_only"] < dense
        assert size("decoder_only", "--n_layer=4") == pytest.approx(dense, rel=0.05)
    assert sizes["shakespeare_char_dense"] < sizes["shakespeare_char"]
    assert sizes["shakespeare_char"] < 1.1 * sizes["shakespeare_char_dense"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_dense_preset_is_the_main_job_without_experts(device):
    main, dense = of_preset("shakespeare_char", device), of_preset("shakespeare_char_dense", device)
    ours = {"n_expert", "router_input", "l1_norm", "l1_weight", "penalty_schedule"}
    assert dense["lateral"] and dense["shared_kv"] and not dense["decoder_self_attention"]
    length = {"max_iters"} if device == "cpu" else set()  # the same time
    differ = {name for name in dense if main[name] != dense[name]}
    assert differ == ours | {"out_dir", "wandb_run_name"} | length
    assert main["max_iters"] <= dense["max_iters"] and dense["n_expert"] == 0
    assert main["lr_decay_iters"] == main["penalty_iters"] == dense["lr_decay_iters"] == 0
    assert main["router_input"] == "encoder"  # so that a prompt costs the encoder alone


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_sparse_preset_is_the_main_job_with_another_penalty(device):
    main = of_preset("shakespeare_char", device)
    sparse = of_preset("shakespeare_char_sparse", device)
    differ = {name for name in main if sparse[name] != main[name]}
    penalties = {"l1_norm", "l1_weight", "entropy_weight", "penalty_schedule"}
    assert differ == penalties | {"out_dir", "wandb_run_name"}


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--cross_first=True", "'cross_first' is gone: run it by experiments/ablations.py"),
        ("--n_cross_head=4", "'n_cross_head' is gone: run it by experiments/ablations.py"),
        ("--next_position=add", "'next_position' is gone: run it by experiments/ablations.py"),
        ("--rounding=none", "'rounding' is gone: run it by experiments/ablations.py"),
        ("--rounding_scale=6.0", "'rounding_scale' is gone: run it by experiments/ablations.py"),
        ("--router_detach", "'router_detach' is gone: run it by experiments/ablations.py"),
        (
            "--router_input=embedding",
            "router_input='embedding' is gone: run it by experiments/ablations.py",
        ),
        ("--encoder_loss=mse", "'encoder_loss' is gone: commit fd66022 has it"),
        ("--encoder_loss_weight=2", "'encoder_loss_weight' is gone: commit fd66022 has it"),
        ("--muon_learning_rate=0.02", "'muon_learning_rate' is gone: set muon_lr_ratio"),
        ("--penalty_schedule=cosine", "penalty_schedule='cosine': must be one of constant, linear"),
        ("--penalty_iters=-1", "penalty_iters=-1: must be at least 0"),
    ],
)
def test_a_setting_that_was_retired_says_where_it_went(argument, said, tmp_path):
    fails_with(re.escape(said), tmp_path, "train.py", argument)

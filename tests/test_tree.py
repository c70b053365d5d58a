"""Tests of what the tree promises to its readers: sizes, one place for each thing, headers."""

import ast
import re
import subprocess

import pytest

from common import ROOT

FOLDERS = ("*.py", "tests/*.py", "config/*.py", "experiments/**/*.py")
FILES = [path for folder in FOLDERS for path in ROOT.glob(folder)]


def lines(name):
    return (ROOT / name).read_text("utf-8").splitlines()


def test_model_py_keeps_to_its_size_and_attends_at_one_place():
    source = (ROOT / "model.py").read_text("utf-8")
    assert len(source.splitlines()) <= 650 and source.count("# fmt: skip") <= 1
    name = "scaled_dot_product" + "_attention"
    assert [path.name for path in FILES if name in path.read_text("utf-8")] == ["model.py"]


def test_train_py_is_a_script_that_one_can_read():
    train = lines("train.py")
    loop = train.index("while True:") + 1
    end = next(k for k in range(loop, len(train)) if train[k] and not train[k].startswith(" "))
    assert len(train) <= 380 and loop <= 300
    assert len("\n".join(train[loop - 1 : end]).rstrip().splitlines()) <= 60
    others = ("runtime.py", "checkpoint.py", "configurator.py")
    assert len(train) + sum(len(lines(name)) for name in others) <= 1150


def test_pages_and_tests_are_short():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 250 and len(readme.split()) <= 2400
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")]
    text = [line for page in pages for line in page.read_text("utf-8").splitlines()]
    assert sum(len(line.split()) for line in text if not line.startswith("|")) <= 8000
    assert all(len(path.read_text("utf-8").splitlines()) <= 550 for path in ROOT.glob("tests/*.py"))


def test_each_file_has_a_header():
    sources = {path: path.read_text("utf-8") for path in FILES}
    assert len(sources) > 40
    for path, source in sources.items():
        assert ast.get_docstring(ast.parse(source)) or re.match(r"# \w", source), path


def test_imports_go_one_way():
    """From the text to the tokens, the model, the checkpoint, the script."""
    order = "configurator prepare_shakespeare model muon checkpoint runtime log view train"
    order = [*order.split(), "sample"]
    for k, name in enumerate(order):
        found = re.findall(
            r"(?m)^\s*(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text("utf-8")
        )
        assert not set(order[k:]) & set(found), name


def test_the_top_of_the_tree_is_what_the_readme_lists():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    top = {name.split("/")[0] for name in listed.split()}
    if not top:
        pytest.skip("not a clone")
    files = "README.md model.py train.py sample.py prepare_shakespeare.py muon.py configurator.py"
    files += " checkpoint.py runtime.py log.py view.py view.html view_runs.html config tests docs"
    files += " test_model.py experiments assets .ci .github LICENSE pyproject.toml .gitignore"
    files += " requirements.txt"
    assert top == {*files.split(), "requirements-dev.txt"}

"""Tests of the READMEs: their tables and the files that they name; and of model.py's size."""

import re

import pytest

import tables
from common import ROOT


@pytest.mark.parametrize("path", tables.READMES, ids=["README", "experiments"])
def test_tables_are_those_of_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert tables.fill(text) == text, "run python experiments/tables.py"
    assert re.search(r"(?m)^\| .*\d", text)  # they are filled


def test_each_table_is_somewhere():
    texts = "".join(path.read_text(encoding="utf-8") for path in tables.READMES)
    assert set(re.findall(r"<!-- table: (.+) -->", texts)) == set(tables.TABLES)


def test_a_number_that_was_changed_is_found():
    for path in tables.READMES:
        text = path.read_text(encoding="utf-8")
        start = text.index("<!-- table:")
        digit = re.compile(r"\d(?=[^\n]*\n<!-- end -->)").search(text, start)
        changed = f"{text[: digit.start()]}{9 - int(digit[0])}{text[digit.end() :]}"
        assert tables.fill(changed) == tables.fill(text) != changed


@pytest.mark.parametrize("path", tables.READMES, ids=["README", "experiments"])
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:experiments|config|assets)/[\w./]+\.\w+)`", text)
    commands = re.findall(r"python ((?:experiments/)?[\w/]+\.py)", text)
    here = {path.parent, ROOT}
    missing = [f for f in (*links, *named, *commands) if not any((h / f).exists() for h in here)]
    assert not missing


def test_model_py_keeps_to_its_size_and_attends_at_one_place():
    source = (ROOT / "model.py").read_text("utf-8")
    assert len(source.splitlines()) <= 650 and source.count("# fmt: skip") <= 1
    folders = ("*.py", "tests/*.py", "config/*.py", "experiments/**/*.py")
    files = [path for folder in folders for path in ROOT.glob(folder)]
    name = "scaled_dot_product" + "_attention"
    assert [path.name for path in files if name in path.read_text("utf-8")] == ["model.py"]

"""Tests of the README and the docs: tables are those of the results, files and questions exist."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "experiments"))
import tables  # noqa: E402

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in tables.PAGES}
MARKER = r"<!-- table: (.+) -->"


def test_the_pages_are_those_that_are_written():
    docs = {f"docs/{name}.md" for name in ("results", "settings", "running")}
    assert {"README.md", "experiments/README.md", "experiments/recipe/README.md"} | docs == {*PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_results(name):
    assert tables.fill(PAGES[name]) == PAGES[name], "run python experiments/tables.py"


def test_each_table_is_somewhere():
    assert set(re.findall(MARKER, "".join(PAGES.values()))) == set(tables.TABLES)
    assert re.findall(MARKER, PAGES["README.md"]) == ["summary"]


@pytest.mark.parametrize("name", [name for name in PAGES if re.search(MARKER, PAGES[name])])
def test_a_number_that_was_changed_is_found(name):
    text = PAGES[name]
    start = text.index("<!-- table:")
    digit = re.compile(r"\d(?=[^\n]*\n<!-- end -->)").search(text, start)
    changed = f"{text[: digit.start()]}{9 - int(digit[0])}{text[digit.end() :]}"
    assert tables.fill(changed) == tables.fill(text) != changed


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    text, folder = PAGES[name], (ROOT / name).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (folder / link).exists()]
    named = re.findall(r"`((?:experiments|config|assets|docs)/[\w./]+\.\w+)`", text)
    commands = re.findall(r"python ((?:experiments/)?[\w/]+\.py)", text)
    missing += [file for file in (*named, *commands) if not (ROOT / file).exists()]
    assert not missing


@pytest.mark.parametrize("name", PAGES)
def test_headings_that_are_linked_exist(name):
    for file, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", PAGES[name]):
        target = (ROOT / name).parent / file if file else ROOT / name
        headings = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
        slugs = [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]
        assert heading in slugs, f"{file}#{heading}"


def test_the_index_names_each_question():
    index = PAGES["experiments/README.md"].split("\n## ")[1]
    rows = [line for line in index.splitlines() if line.startswith("| `")]
    named = {re.match(r"\| `([^`]+)`", row)[1] for row in rows}
    lines = (ROOT / "experiments/results.jsonl").read_text(encoding="utf-8").splitlines()
    benchmarks = {"bench_training", "bench_inference", "faults", "recipe/search", "probes"}
    assert named == {json.loads(line)["question"] for line in lines} | benchmarks
    known = {question.__name__ for question in tables.QUESTIONS}
    assert {json.loads(line)["question"] for line in lines} <= known

"""Tests of the README and the docs: tables are those of the results, files and questions exist, and
commands and code run."""

import json
import re
import shlex
import shutil
import sys

import pytest

from common import ROOT, TINY, run_two, succeed

sys.path.insert(0, str(ROOT / "experiments"))
from run import about  # noqa: E402

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
    benchmarks = {"bench_training", "bench_inference", "bench_gpu", "faults", "recipe/search"}
    assert named == {json.loads(line)["question"] for line in lines} | benchmarks | {"probes"}
    answers = {row.split("`")[1]: row.split(" | ")[1] for row in rows}
    for name in named & set(tables.QUESTIONS):
        assert answers[name] == about(name)[1], name
    known = set(tables.QUESTIONS)
    assert {json.loads(line)["question"] for line in lines} <= known


def blocks(name, language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", PAGES[name])


# What is appended to a command, so that it takes a second.
SMALL = {"train.py": TINY, "sample.py": ["--max_new_tokens=20", "--device=cpu"]}
SMALL |= {"prepare_shakespeare.py": [], "view.py": []}


@pytest.mark.parametrize("name", ["README.md", "docs/settings.md", "docs/running.md"])
def test_commands_and_code_run(name, prepared, tmp_path, monkeypatch):
    """All that a page has in sh blocks, in order, made small; then its Python code."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for code in blocks("docs/settings.md", "python"):  # the config file that it shows
        (tmp_path / "config/longer.py").write_text(code, "utf-8")
    for text in ("README.md", "LICENSE"):
        shutil.copy(ROOT / text, tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path / "story.txt")
    shutil.copy(ROOT / "model.py", tmp_path / "data/shakespeare.txt")  # as it was fetched before
    lines = "".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(command) for line in lines for command in line.split(" && ")]
    assert len(commands) > 3
    for program, *args in commands:
        if program == "pip" or args[:2] == ["-m", "pytest"]:  # .ci/run runs these two
            assert program != "pip" or (ROOT / args[-1]).exists()
            continue
        while args[0].startswith("--"):  # of torchrun
            assert program == "torchrun" and args.pop(0) in ("--standalone", "--nproc_per_node=2")
        script, *args = args
        small = SMALL[script] if "--help" not in args else []
        if "--init_from=resume" in args:
            small = ["--max_iters=21"] * any(arg.startswith("--max_iters") for arg in args)
        if any(arg.startswith("--max_seconds") for arg in args):
            small = [*small, "--max_seconds=0.5"]
        if program == "torchrun":
            run_two(tmp_path, *args, *small, script=script)
        else:
            succeed(tmp_path, script, *args, *small)
    if name == "README.md":
        monkeypatch.chdir(tmp_path)
        for code in blocks(name, "python"):
            exec(code, {})


@pytest.mark.parametrize("name", PAGES)
def test_questions_that_are_asked_exist(name):
    known = set(tables.QUESTIONS)
    asked = re.findall(r"python experiments/run\.py ([a-z ]+)", PAGES[name])
    assert {question for words in asked for question in words.split()} <= known

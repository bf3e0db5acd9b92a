"""The pages: links, navigation, generated parts, and the names in commands. test_readme.py runs the commands."""

import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import subprocess

import forks
import pytest
from pages import DOCS, README, ROOT, blocks, commands, headings, prose

from t5x_lite import options
from t5x_lite.cli import gin_files, main

PAGES = [README, *sorted(DOCS.rglob("*.md"))]
# gin files that a conversion, a run or the reader writes.
WRITTEN = {"model.gin", "config.gin", "reviews.gin"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: pathlib.Path) -> str:
    """All shell commands and inline code of a page."""
    return "\n".join([*commands(page), *re.findall(r"`([^`\n]+)`", prose(page))])


def anchors(page: pathlib.Path) -> set[str]:
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings(page)}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 170


@each_page
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if page != README:
            assert file.is_relative_to(DOCS), f"{target}: the built pages have only what is under docs/"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading"


def test_every_page_is_in_the_navigation():
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1])
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page != README)


@each_page
def test_gin_files_and_options_in_commands_exist(page):
    parts = gin_files.configurables()
    declared = {field.name.upper() for section in options.SECTIONS for field in options.options(section)}
    for name in re.findall(r"--gin_file=([^\s\"'`$]+\.gin)", code(page)):
        found = any((folder / name).exists() for folder in (ROOT / "gin_configs", ROOT))
        assert found or pathlib.Path(name).name in WRITTEN, f"no gin file {name}"
    for name in set(re.findall(r"--gin\.([\w.]+)=", code(page))) - {"NAME"}:
        part, _, parameter = name.rpartition(".")
        known = inspect.signature(parts[part]).parameters if part else declared
        assert parameter in known, f"no option {name}"
    for command in commands(page):
        if command.startswith("python run.py"):
            main.parse_flags(shlex.split(command)[1:])


@each_page
def test_programs_in_commands_exist(page):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for target in re.findall(r"^make ([\w-]+)", code(page), re.MULTILINE):
        assert target in targets[1].split(), f"no target {target}"
    for module in re.findall(r"python[\d.]* -m ([\w.]+)", code(page)):
        path = ROOT.joinpath(*module.split("."))
        ours = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert ours or importlib.util.find_spec(module.split(".")[0], None), f"no module {module}"
        assert ours or not module.startswith(("t5x_lite", "tasks")), f"{module} is not a program"
    for script in re.findall(
        r"(?:^|python |sbatch .*)((?:scripts|benchmarks|tests)/\w+\.(?:py|sh|sbatch))", code(page)
    ):
        assert (ROOT / script).exists(), f"no file {script}"


@each_page
def test_files_of_the_repository_that_a_page_names_exist(page):
    for name in re.findall(r"`([\w./-]+/[\w./-]*)`", prose(page)):
        if name.startswith(("t5x_lite/", "tasks/", "tests/", "scripts/", "benchmarks/", "gin_configs/", "docs/")):
            assert (ROOT / name).exists(), f"no file {name}"
        elif name.endswith(".gin") and pathlib.Path(name).name not in WRITTEN:
            assert (ROOT / "gin_configs" / name).exists(), f"no gin file {name}"


@each_page
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        compile("\n".join(line for line in block.splitlines() if not line.startswith("include ")), page.name, "exec")


@pytest.mark.slow
def test_the_page_of_tasks_is_made_from_the_registry():
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "T5X_LITE_DATA_DIR": "/nonexistent"}
    command = [*forks.python(), "-m", "tasks"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    page = (DOCS / "reference" / "tasks.md").read_text()
    assert page == done.stdout, "python -m tasks > docs/reference/tasks.md"

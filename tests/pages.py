"""README.md and the pages under docs/ as tests see them: their sections, code blocks and commands."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = DOCS / "guides"
README = ROOT / "README.md"


def _lines(page: Path) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is in a code block (its fences included)."""
    fenced = False
    for line in page.read_text().splitlines():
        is_fence = line.startswith("```")
        yield line, fenced or is_fence
        fenced ^= is_fence


def headings(page: Path) -> list[str]:
    return [line.lstrip("# ") for line, in_code in _lines(page) if line.startswith("#") and not in_code]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return "\n".join(line for line, in_code in _lines(page) if not in_code)


def blocks(page: Path, language: str, heading: str | None = None) -> list[str]:
    """The code blocks of a language; with a heading, those between it and the next one."""
    lines, inside = [], heading is None
    for line, in_code in _lines(page):
        if heading is not None and line.startswith("#") and not in_code:
            inside = line.lstrip("# ") == heading
        if inside:
            lines.append(line)
    return re.findall(rf"^```{language}\n(.*?)^```", "\n".join(lines) + "\n", re.DOTALL | re.MULTILINE)


def commands(page: Path, heading: str | None = None) -> list[str]:
    """The shell commands in their order, each in one line, without comments."""
    lines = "".join(blocks(page, "sh", heading)).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]

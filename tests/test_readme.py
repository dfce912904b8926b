"""Python of README and guides runs as it stands, in order, in one process; commands exist; links lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
README, GUIDES = "README.md", "recipes/README.md"
PAGES = (README, GUIDES, "recipes/benchmarks/README.md", "recipes/benchmarks/gpu/README.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_the_readme_is_short():
    assert len((ROOT / README).read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("page", [README, GUIDES])
def test_python_blocks_run(page, tmp_path, compressed_dir):
    code = "\n".join(blocks(page, "python"))
    assert "merge_and_unload" in code
    shutil.copytree(compressed_dir, tmp_path / "small")  # what the README's first command makes
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([warm.python("torch"), script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_commands_exist():
    from cluscomp_peft.cli import _parser

    lines = [
        line.removeprefix("$ ")
        for page in (README, GUIDES)
        for kind in ("sh", "console")
        for block in blocks(page, kind)
        for line in block.splitlines()
    ]
    named = {line.split()[1] for line in lines if line.startswith("cluscomp ")}
    known = set(_parser()._subparsers._group_actions[0].choices)
    assert named == known
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in lines:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link

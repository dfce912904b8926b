"""DEVELOPMENT.md names files that are there, and every folder and module of the package is on it or under what is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cluscomp_peft"
NAMED = set(re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "DEVELOPMENT.md").read_text(encoding="utf-8")))


def test_every_path_exists():
    assert len(NAMED) > 30
    absent = {name for name in NAMED if not (PACKAGE / name).exists() and not (ROOT / name).exists()}
    assert not absent


def test_every_room_of_the_tuner_is_on_the_way_of_an_adapter():
    rooms = {f"tuner/{path.name}" for path in (PACKAGE / "tuner").glob("*.py") if path.name != "__init__.py"}
    assert rooms <= NAMED

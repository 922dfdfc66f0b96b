"""A few of the attacks of tools/attack_files.py and of the kills of tools/kill_writers.py, in seconds."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.attacks import FORMATS, Format, attack, mutated, unharmed
from tests.killing import WRITERS, kill


@pytest.mark.parametrize("name", FORMATS)
def test_attacked_files_are_refused_or_loaded_and_nothing_else(name: str, tmp_path: Path) -> None:
    found = attack(FORMATS[name], tmp_path / "files", 20 if name == "pipeline" else 40, seed=1)
    assert not found.failures
    assert found.refused > found.attacks / 3 and found.refused + found.accepted == found.attacks


def test_a_reader_that_checks_nothing_fails_the_attack(tmp_path: Path) -> None:
    """The attack can fail: on a file whose digest nobody looks at, and on a reader that lets its errors out."""
    plan = FORMATS["plan"]
    careless = Format("careless", plan.file, plan.kind, plan.make, lambda path: path.read_bytes())
    assert any("accepted" in text for text in attack(careless, tmp_path / "a", 50).failures)

    def load(path: Path) -> None:
        if path.read_bytes() != (path.parent / f"good-{plan.file}").read_bytes():
            raise ZeroDivisionError

    raw = Format("raw", plan.file, plan.kind, plan.make, load)
    assert all("ZeroDivisionError" in text for text in attack(raw, tmp_path / "b", 20).failures)


@pytest.mark.parametrize("name", FORMATS)
def test_mutations_differ_and_are_the_same_for_a_seed(name: str, tmp_path: Path) -> None:
    kind, path = FORMATS[name], tmp_path / FORMATS[name].file
    kind.make(path)
    data = path.read_bytes()
    some = [mutated(data, kind, random.Random(seed)) for seed in range(60)]
    assert some == [mutated(data, kind, random.Random(seed)) for seed in range(60)]
    assert len({made for made, _, _ in some}) > 40 and len({how for _, how, _ in some}) > 4
    assert unharmed(data, data, kind)
    assert not kind.digest or not unharmed(data[:-40], data, kind)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("name", ["save", "Plan.save", "Sensitivity.save", "LatencyTable.save"])
def test_killed_writers_leave_a_whole_file(name: str, tmp_path: Path) -> None:
    found = kill(WRITERS[name], tmp_path / "files", 4, seed=1)
    assert not found.failures and found.old + found.new == found.kills == 4

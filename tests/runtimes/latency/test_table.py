"""The table: interpolation, files, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphprune import GraphPruneError
from graphprune.runtimes.latency.context import Context
from graphprune.runtimes.latency.kernels import Kernel, Sample
from graphprune.runtimes.latency.table import LatencyTable
from tests.sealing import sealed_json

from .law import law, table

CONV = Kernel("conv", (1, 14, 14), (3, 3), (1, 1), (1, 1), (1, 1))
KERNELS = [
    CONV,
    Kernel("depthwise", (2, 7, 7), (5, 5), (2, 2), (2, 2), (1, 1), multiplier=2),
    Kernel("grouped", (1, 7, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    Kernel("conv", (1, 7, 7), (2, 2), (2, 2), (0, 0), (1, 1), transposed=True, output_padding=(1, 1)),
    Kernel("linear"),
    Kernel("matmul"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernels_survive_as_texts(kernel: Kernel) -> None:
    assert Kernel.parse(str(kernel)) == kernel


WRONG = ["", "conv", "dance[]", "conv[shape=1x]", "conv[sha=1]", "conv[shape=-1]", "conv[op=1]x"]


@pytest.mark.parametrize("text", WRONG)
def test_other_texts_are_no_kernels(text: str) -> None:
    with pytest.raises(GraphPruneError, match="no computation"):
        Kernel.parse(text)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_time_linear_in_every_length_is_interpolated_exactly(kernel: Kernel) -> None:
    rng = np.random.default_rng(0)
    full = tuple(int(n) for n in rng.integers(20, 200, len(kernel.lengths)))
    surface = table().surface(kernel, full, (True,) * len(full))
    for _ in range(20):
        at = tuple(int(rng.integers(1, n + 1)) for n in full)
        assert float(surface(at)) == pytest.approx(law(Sample(kernel, at)), rel=1e-9)


def test_lengths_that_are_fixed_are_measured_once() -> None:
    made = table()
    made.surface(CONV, (3, 64), (False, True))
    assert {at[0] for at in made.points[CONV]} == {3} and len(made.points[CONV]) == 5


def test_stairs_are_stairs_in_the_surface() -> None:
    surface = table(16).surface(CONV, (64, 64), (False, True))
    found = [float(surface((64, n))) for n in range(1, 65)]
    assert found == pytest.approx([law(Sample(CONV, (64, n)), 16) for n in range(1, 65)], rel=1e-9)


def test_arrays_and_numbers_give_the_same() -> None:
    surface = table(8).surface(CONV, (64, 48), (True, True))
    widths = np.arange(1, 49)
    assert surface((40, widths)) == pytest.approx([float(surface((40, int(w)))) for w in widths])


def test_a_full_width_between_steps_is_its_own_time() -> None:
    surface = table(16).surface(CONV, (24, 24), (True, True))
    assert float(surface((24, 24))) == pytest.approx(law(Sample(CONV, (24, 24)), 16))


def test_round_trip(tmp_path: Path) -> None:
    made = table(8)
    made.surface(CONV, (64, 64), (True, True))
    made.contexts["abc"] = Context(0.25, 0.01, 0.002, {Sample(CONV, (64, 64)): 1.25}, 0.75)
    back = LatencyTable.load(made.save(tmp_path / "t.json"))
    assert back.points == made.points and back.stairs == made.stairs and back.contexts == made.contexts
    assert back.about == made.about and back.meter is None


def test_what_a_foreign_table_lacks_is_an_error(tmp_path: Path) -> None:
    made = table(8)
    made.surface(CONV, (64, 64), (True, True))
    back = LatencyTable.load(made.save(tmp_path / "t.json"))
    back.surface(CONV, (64, 64), (True, True))
    with pytest.raises(GraphPruneError, match=r"no time of .*latency_table"):
        back.surface(CONV, (128, 64), (True, True))
    del back.stairs["linear"]
    with pytest.raises(GraphPruneError, match="no stairs of kind 'linear'"):
        back.surface(Kernel("linear"), (8, 8, 8), (True, True, True))


NUMBERS = {"wall": 1.0, "light": 0.0, "fixed": 0.0, "other": 1.0}


def damages() -> list[Any]:
    def change(path: str, value: Any) -> Any:
        def apply(document: dict[str, Any]) -> Any:
            *parents, last = path.split("/")
            inside: Any = document
            for key in parents:
                inside = inside[key]
            if value is KeyError:
                del inside[last]
            else:
                inside[last] = value
            return document

        return pytest.param(apply, id=f"{path}={str(value)[:20]}")

    return [
        change("format", "other"),
        change("points", KeyError),
        change("points", []),
        change("points", {"conv[shape=1x2]": 3}),
        change("points", {"linear[]": {"1x2": 0.5}}),
        change("points", {"linear[]": {"1x2x3": "0.5"}}),
        change("points", {"linear[]": {"1x2x3": -0.5}}),
        change("points", {"linear[]": {"1x2x3": 1e300}}),
        change("stairs/conv/steps", [0.5]),
        change("points", {"linear[]": {"1x2x999999999999": 0.5}}),
        change("points", {"__import__[]": {}}),
        change("stairs/conv/steps", []),
        change("stairs/conv/steps", ["a"]),
        change("stairs/other", {"steps": [0], "penalty": [1.0] * 64}),
        change("contexts", {"a": {**NUMBERS, "wall": -1.0, "factors": []}}),
        change("contexts", {"a": {**NUMBERS, "light": "much", "factors": []}}),
        change("contexts", {"a": {**NUMBERS, "factors": [["linear[]", [1], "x"]]}}),
        change("contexts", {"a": 3}),
        change("about", 3),
    ]


@pytest.mark.parametrize("damage", damages())
def test_damaged_files_are_refused(tmp_path: Path, damage: Any) -> None:
    made = table(8)
    made.surface(CONV, (64, 64), (True, True))
    path = made.save(tmp_path / "t.json")
    path.write_text(sealed_json(damage(json.loads(path.read_text()))))
    with pytest.raises(GraphPruneError, match="latency table") as caught:
        LatencyTable.load(path)
    assert "digest" not in str(caught.value)


def test_tables_that_were_changed_or_have_no_digest(tmp_path: Path) -> None:
    made = table(8)
    made.surface(CONV, (64, 64), (True, True))
    path = made.save(tmp_path / "t.json")
    text = path.read_text()
    path.write_text(text.replace('"steps"', '"steps" ', 1))  # white space says nothing
    assert LatencyTable.load(path).points == made.points
    data = json.loads(text)
    kernel, found = next(iter(data["points"].items()))
    data["points"][kernel] = {at: 2 * seconds for at, seconds in found.items()}
    path.write_text(json.dumps(data))
    with pytest.raises(GraphPruneError, match="changed since it was written"):
        LatencyTable.load(path)
    del data["digest"]
    path.write_text(json.dumps(data))
    with pytest.raises(GraphPruneError, match="has no digest"):
        LatencyTable.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "null", "3"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(GraphPruneError, match="latency table"):
        LatencyTable.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match=r"none\.json"):
        LatencyTable.load(tmp_path / "none.json")

from __future__ import annotations

from graphprune.runtimes.adapters.shares import Share


def test_one_type() -> None:
    found = Share.of([("a", "int8"), ("b", "int8")])
    assert str(found) == "int8" and found.notes("int8") == []
    assert str(Share.of([])) == "" and Share.of([]).notes("int8") == []


def test_a_remainder_is_counted_and_named() -> None:
    found = Share.of([("a", "int8"), *((f"f{i}", "float32") for i in range(4)), ("h", "float16")])
    assert str(found) == "4 of 6 layers float32, 1 of 6 layers int8, 1 of 6 layers float16"
    assert found.notes("int8") == ["5 of 6 layers stay float32 and float16: f0, f1, f2, ..."]
    assert found.notes("float32") == ["2 of 6 layers stay int8 and float16: a, h"]

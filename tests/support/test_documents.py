"""JSON of others: what is read, what is refused, and digests against those of a plain computation."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphprune import GraphPruneError
from graphprune.support.documents import DEEPEST, digest_of, from_json, read_document, to_json, write_document
from tests.sealing import sealed_json

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_what_is_written_is_read(data: Any) -> None:
    assert from_json(to_json(data)) == data
    assert from_json(json.dumps(data, ensure_ascii=False).encode()) == data


def as_json_reads_it(text: str) -> Any:
    """What JSON says, where integers of more than 64 bits are errors."""

    def integer(digits: str) -> int:
        if not -(2**63) <= int(digits) < 2**64:
            raise ValueError(digits)
        return int(digits)

    return json.loads(text, parse_int=integer)


@given(st.text() | st.integers(-(2**70), 2**70).map(str))
@example(str(2 * 10**19))
@example(str(2**64 - 1))
def test_a_text_is_read_as_json_reads_it_or_refused(text: str) -> None:
    try:
        expected = as_json_reads_it(text)
    except ValueError:
        with pytest.raises(GraphPruneError, match="no JSON"):
            from_json(text)
    else:
        if not isinstance(expected, float) or math.isfinite(expected):
            assert from_json(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NaN", "NaN is no number of JSON"),
        ("[Infinity]", "Infinity is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("1e400", "no finite number"),
        ("[-1e999]", "no finite number"),
        ("9" * 400 + ".0", "no finite number"),
        (str(2**64), "no number of 64 bits"),
        (str(-(2**63) - 1), "no number of 64 bits"),
        ("9" * 10**6, "no number of 64 bits"),
        ('{"a": 1, "a": 1}', "a name appears twice"),
        ('[{"b": {"a": 1, "c": 2, "a": 3}}]', "a name appears twice"),
        ("[" * 10**6, "nested more than"),
        ('{"a":' * 10**5, "nested more than"),
        ('["' + "]" * 500 + '",' + "[" * 200 + "]" * 200 + "]", "nested more than"),
        ('"\\' + '"\\' * 10**5, "no JSON"),
        ('"' + "[" * 500, "no JSON"),
        ("", "no JSON"),
        ("\ufeff1", "no JSON"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(GraphPruneError, match=message):
        from_json(text)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(GraphPruneError, match="UTF-8"):
        from_json(b'"\xff"')
    with pytest.raises(GraphPruneError, match="UTF-8"):
        from_json('"\ud800"')


def test_limits_are_exact() -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert from_json(deep) == json.loads(deep)
    with pytest.raises(GraphPruneError, match="nested"):
        from_json(f"[{deep}]")
    assert from_json('"' + "[" * 500 + '"') == "[" * 500
    assert from_json('"\\"' + "{" * 500 + '"') == '"' + "{" * 500
    assert from_json(f"[{2**64 - 1},{-(2**63)},1e-400,1.5e300]") == [2**64 - 1, -(2**63), 0.0, 1.5e300]


@pytest.mark.parametrize("data", [math.inf, [math.nan], {"a": {1: object()}}, [[[[]]] * 3] * 2 + [{(1,): 2}]])
def test_what_is_no_json_is_not_written(data: Any) -> None:
    with pytest.raises(GraphPruneError, match="cannot be written as JSON"):
        to_json(data)


def test_what_is_too_deep_is_not_written() -> None:
    deep: Any = 0
    for _ in range(DEEPEST + 1):
        deep = [deep]
    with pytest.raises(GraphPruneError, match="nested"):
        to_json(deep)


@given(st.dictionaries(st.text(), PLAIN))
def test_the_digest_is_that_of_the_sorted_text(data: dict[str, Any]) -> None:
    rest = {name: data[name] for name in sorted(data) if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert digest_of(data) == hashlib.sha256(text.encode()).hexdigest()
    assert digest_of(dict(reversed(list(data.items())))) == digest_of(data)
    assert digest_of(json.loads(sealed_json(data))) == json.loads(sealed_json(data))["digest"]


def test_documents(tmp_path: Path) -> None:
    path, data = tmp_path / "a.json", {"b": [1, 2.5, None], "a": "x"}
    assert read_document(write_document(path, data), "thing") == data
    written = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(written.items())), indent=3))
    assert read_document(path, "thing") == data  # order and white space say nothing
    path.write_text(json.dumps(written | {"a": "y"}))
    with pytest.raises(GraphPruneError, match=r"the thing .*a\.json is damaged: it was changed.*make it again"):
        read_document(path, "thing")
    with pytest.raises(GraphPruneError, match=r"removes the entry \"digest\""):
        read_document(path, "thing", edited=True)
    path.write_text(json.dumps(data))
    with pytest.raises(GraphPruneError, match="has no digest"):
        read_document(path, "thing")
    assert read_document(path, "thing", edited=True) == data
    path.write_text("[3]")
    assert read_document(path, "thing") == [3]
    path.write_text("[NaN]")
    with pytest.raises(GraphPruneError, match=r"the thing .*a\.json is no JSON \(NaN"):
        read_document(path, "thing")
    with pytest.raises(GraphPruneError, match=r"the thing .*none: cannot be read: .*there is no such file"):
        read_document(tmp_path / "none", "thing")

"""Factoring, against partitions worked out element by element."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.dependency.dims import DimTable
from graphprune.dependency.state import Mixed, Partial, Refine, axis_groups, concatenate, multiplicity, separate


def same_partition(a: list[int], b: list[int]) -> bool:
    """Equal in the one exactly where equal in the other."""
    return all((a[i] == a[j]) == (b[i] == b[j]) for i, j in itertools.combinations(range(len(a)), 2))


@settings(max_examples=150)
@given(data=st.data(), size=st.integers(2, 12), factors=st.integers(1, 3))
def test_a_refined_axis_has_the_partitions_of_the_columns(data: st.DataObject, size: int, factors: int) -> None:
    table = DimTable()
    table.add_root("other", 0, 5)
    ((dim, _),) = table.add_root("weight", 1, size).items()
    column = st.lists(st.integers(-1, 3), min_size=size, max_size=size)
    columns = [np.asarray(data.draw(column), np.int64) for _ in range(factors)]
    before = table.total
    assert table.refine(Refine(dim, tuple(columns))) == ("weight", 1)
    axis_map = table.roots[("weight", 1)]
    assert dim not in axis_map and table.size[dim] == 0
    vectors = dict(axis_map)
    expected = 0
    for present in {tuple(c[i] >= 0 for c in columns) for i in range(size)}:
        inside = [i for i in range(size) if tuple(c[i] >= 0 for c in columns) == present]
        mine = [v for v in vectors.values() if {i for i in range(size) if v[i] >= 0} == set(inside)]
        chosen = [[int(c[i]) for i in inside] for c, here in zip(columns, present, strict=True) if here]
        if not chosen:  # what no column speaks of can still go one by one
            chosen = [list(range(len(inside)))]
        elif len(chosen) > 1:
            chosen = [values for values in chosen if len(set(values)) > 1]
        expected += len(chosen)
        for values in chosen:
            # one new Dim splits these indices as the column does, and numbers its positions without gaps
            matching = [v for v in mine if same_partition([int(v[i]) for i in inside], values)]
            assert matching
            assert sorted(set(matching[0][inside].tolist())) == list(range(len(set(values))))
    assert len(vectors) == expected
    assert all(table.size[d] == len(set(v[v >= 0].tolist())) for d, v in vectors.items())
    # global numbers are new ones, and of different Dims differ
    numbers = [set(table.positions(d).tolist()) for d in vectors]
    assert all(min(n) >= before for n in numbers if n)
    assert sum(map(len, numbers)) == len(set().union(*numbers))
    assert next(iter(table.roots[("other", 0)].values())).tolist() == list(range(5))


SHAPES = [(12,), (3, 4), (4, 3), (2, 6), (6, 2), (2, 2, 3), (2, 3, 2), (3, 2, 2), (1, 12), (12, 1)]


@settings(max_examples=200)
@given(
    source=st.sampled_from(SHAPES), axis=st.integers(0, 2), target=st.sampled_from(SHAPES), seed=st.integers(0, 1000),
    order=st.integers(0, 5),
)  # fmt: skip
def test_separate_finds_the_axis_or_the_factors(
    source: tuple[int, ...], axis: int, target: tuple[int, ...], seed: int, order: int
) -> None:
    axis %= len(source)
    size = source[axis]
    view = [1] * len(source)
    view[axis] = size
    array = np.broadcast_to(np.arange(size).reshape(view), source).reshape(target)
    permutations = list(itertools.permutations(range(len(target))))
    array = array.transpose(permutations[order % len(permutations)])
    found = separate(7, size, array)
    varying = [a for a in range(array.ndim) if not (array == array.take([0], axis=a)).all()]
    if not varying:
        assert found is None
    elif len(varying) == 1:
        assert isinstance(found, tuple)
        where, vector = found
        assert where == varying[0]
        spread = [1] * array.ndim
        spread[where] = -1
        assert (vector.reshape(spread) == array).all()
    elif isinstance(found, Refine):
        assert found.dim == 7
        # each column follows from the position, and with the axes that do, tells no two equal positions apart
        for column in found.columns:
            assert (column[np.unique(array)] >= 0).all() and len(np.unique(column)) > 1
        homes = [a for a in varying if follows(array, a)]
        assert len(homes) == len(found.columns)
        for a, column in zip(homes, found.columns, strict=True):
            classes = [tuple(array.take(i, axis=a).reshape(-1)) for i in range(array.shape[a])]
            for place in np.ndindex(*array.shape):
                for other in np.ndindex(*array.shape):
                    same = column[array[place]] == column[array[other]]
                    assert same == (classes[place[a]] == classes[other[a]])
    else:
        assert isinstance(found, Mixed) and not any(follows(array, a) for a in varying)


def test_an_axis_that_holds_a_dim_in_some_slices_only_is_named() -> None:
    for array in ([[0, 1, 2], [-1, -1, -1]], [[0, 1, 2], [0, 1, -1]]):
        for turned, axis in ((np.array(array), 1), (np.array(array).T, 0)):
            found = separate(7, 3, turned)
            assert isinstance(found, Partial) and (found.dim, found.axis) == (7, axis)
            assert np.array_equal(found.array, turned)


def follows(array: np.ndarray, axis: int) -> bool:
    """Does the slice along `axis` follow from the position alone (slices that are alike count as one)?"""
    classes: dict[tuple[int, ...], int] = {}
    seen: dict[int, int] = {}
    for place in np.ndindex(*array.shape):
        slice_ = tuple(array.take(place[axis], axis=axis).reshape(-1).tolist())
        number = classes.setdefault(slice_, len(classes))
        if seen.setdefault(int(array[place]), number) != number:
            return False
    return len(classes) > 1


@settings(max_examples=100)
@given(before=st.sampled_from(SHAPES), after=st.sampled_from(SHAPES))
def test_reshapes_fall_into_parts_of_equal_size(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    groups = axis_groups(before, after)
    assert [a for left, _ in groups for a in left] == list(range(len(before)))
    assert [b for _, right in groups for b in right] == list(range(len(after)))
    for left, right in groups:
        assert math.prod(before[a] for a in left) == math.prod(after[b] for b in right)
        for i, j in itertools.product(range(1, len(left)), range(1, len(right))):  # and no part could be cut further
            assert math.prod(before[a] for a in left[:i]) != math.prod(after[b] for b in right[:j])


def test_axes_laid_side_by_side() -> None:
    first, second = {0: np.array([0, 1]), 1: np.array([0, -1])}, {0: np.array([1, -1, 0])}
    joined = concatenate([(first, 2), (second, 3), ({}, 1)])
    assert {d: v.tolist() for d, v in joined.items()} == {0: [0, 1, 1, -1, 0, -1], 1: [0, -1, -1, -1, -1, -1]}
    assert multiplicity(joined, 6).tolist() == [2, 1, 1, 0, 1, 0]

"""The pool of rows that examples point at."""

from __future__ import annotations

import numpy as np

from polyseme.capture.pool import Pool


def row(key: int) -> list[int]:
    return [key, 10 * key]


def filled(*batches: list[int]) -> Pool:
    pool = Pool()
    for keys in batches:
        pool.add(np.array(keys, np.int64), np.array([row(key) for key in keys]).reshape(-1, 2))
    return pool


def assert_holds(pool: Pool, keys: list[int]) -> None:
    found, rows = pool.sorted()
    assert found.tolist() == keys
    assert len(pool) == len(keys)
    assert rows is not None
    assert rows.tolist() == [row(key) for key in keys]


def test_rows_come_back_by_key() -> None:
    assert_holds(filled([5, 2], [], [9], [1, 7]), [1, 2, 5, 7, 9])


def test_an_empty_pool_has_no_rows() -> None:
    pool = filled([], [])
    keys, rows = pool.sorted()
    assert len(keys) == 0
    assert rows is None
    assert "rows" not in pool.state()
    pool.keep(np.array([3]))
    assert len(pool) == 0


def test_only_what_is_live_stays() -> None:
    pool = filled([5, 2], [9, 4])
    pool.keep(np.array([9, 2, 1000]))
    assert_holds(pool, [2, 9])
    pool.add(np.array([3]), np.array([row(3)]))
    assert_holds(pool, [2, 3, 9])
    pool.keep(np.array([], np.int64))
    assert_holds(pool, [])


def test_it_is_bloated_at_twice_what_was_live() -> None:
    pool = filled(list(range(200)))
    pool.keep(np.arange(100))
    pool.add(np.arange(1000, 1356), np.zeros((356, 2), int))
    assert not pool.is_bloated
    pool.add(np.array([5000]), np.zeros((1, 2), int))
    assert pool.is_bloated
    pool.keep(np.arange(100))
    assert not pool.is_bloated


def test_goes_on_from_a_state() -> None:
    pool = filled([5, 2], [9])
    state = pool.state()
    pool.keep(np.array([9]))
    other = Pool()
    other.restore(state)
    assert_holds(other, [2, 5, 9])
    other.add(np.array([1]), np.array([row(1)]))
    assert_holds(other, [1, 2, 5, 9])
    assert state["keys"].tolist() == [5, 2, 9]
    empty = Pool()
    empty.restore(Pool().state())
    assert empty.sorted()[1] is None

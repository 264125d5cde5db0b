"""The pool of rows that examples point at."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from polyseme.capture.pool import Pool
from polyseme.errors import RunError


def row(key: int) -> list[int]:
    return [key, 10 * key]


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Pool]:
    """Pools with rows of some keys, in memory and in a file each."""
    numbers = itertools.count()

    def filled(*batches: list[int]) -> Pool:
        pool = Pool(tmp_path / f"{next(numbers)}" / "rows" if request.param == "file" else None)
        for keys in batches:
            pool.add(np.array(keys, np.int64), np.array([row(key) for key in keys]).reshape(-1, 2))
        return pool

    return filled


Make = Callable[..., Pool]


def assert_holds(pool: Pool, keys: list[int]) -> None:
    assert pool.keys.tolist() == keys
    assert len(pool) == len(keys)
    # In another order than they came.
    asked = np.array(keys[::-1], np.int64)
    rows = pool.take(asked)
    assert rows is not None
    assert rows.tolist() == [row(key) for key in keys[::-1]]
    some = pool.take(np.array(keys[1::2], np.int64))
    assert some is not None
    assert some.tolist() == [row(key) for key in keys[1::2]]


def test_rows_come_back_by_key(make: Make) -> None:
    assert_holds(make([1, 2], [], [5], [7, 9]), [1, 2, 5, 7, 9])


def test_an_empty_pool_has_no_rows(make: Make) -> None:
    pool = make([], [])
    assert len(pool) == 0
    assert pool.take(np.empty(0, np.int64)) is None
    assert pool.state().keys() == {"keys"}
    pool.keep(np.array([3]))
    assert len(pool) == 0


def test_only_what_is_live_stays(make: Make) -> None:
    pool = make([2, 4], [5, 9])
    pool.keep(np.array([9, 2, 1000]))
    assert_holds(pool, [2, 9])
    pool.add(np.array([13]), np.array([row(13)]))
    assert_holds(pool, [2, 9, 13])
    pool.keep(np.array([], np.int64))
    assert_holds(pool, [])


def test_rows_of_more_than_one_block(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyseme.capture.pool._BLOCK_BYTES", 48)  # three rows
    pool = make(list(range(7)), [8], list(range(10, 30)))
    keys = [*range(7), 8, *range(10, 30)]
    assert_holds(pool, keys)
    for modulus in (3, 5):
        keys = [key for key in keys if key % modulus]
        pool.keep(np.array(keys))
        assert_holds(pool, keys)
    pool.add(np.array([40]), np.array([row(40)]))
    assert_holds(pool, [*keys, 40])


def test_a_pool_is_bloated_at_twice_its_live_rows(make: Make) -> None:
    pool = make(list(range(200)))
    pool.keep(np.arange(100))
    pool.add(np.arange(1000, 1356), np.zeros((356, 2), int))
    assert not pool.is_bloated
    pool.add(np.array([5000]), np.zeros((1, 2), int))
    assert pool.is_bloated
    pool.keep(np.arange(100))
    assert not pool.is_bloated


def test_wider_rows_widen_it_and_narrow_ones_do_not(make: Make) -> None:
    pool = make([])
    pool.add(np.array([1]), np.array([[0.1]], np.float16))
    pool.add(np.array([2]), np.array([[1e9]], np.float32))
    pool.add(np.array([3]), np.array([[0.2]], np.float16))
    rows = pool.take(np.array([1, 2, 3]))
    assert rows is not None
    assert rows.dtype == np.float32
    assert rows[:, 0].tolist() == [np.float16(0.1), 1e9, np.float16(0.2)]


def test_goes_on_from_a_state() -> None:
    pool = Pool()
    pool.add(np.array([2, 5]), np.array([row(2), row(5)]))
    state = pool.state()
    pool.keep(np.array([5]))
    other = Pool()
    other.restore(state)
    assert_holds(other, [2, 5])
    other.add(np.array([11]), np.array([row(11)]))
    assert_holds(other, [2, 5, 11])
    assert state["keys"].tolist() == [2, 5]
    empty = Pool()
    empty.restore(Pool().state())
    assert empty.take(np.empty(0, np.int64)) is None


def test_files_go_on_from_their_last_state(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    pool = Pool(file)
    pool.add(np.array([2, 5]), np.array([row(2), row(5)]))
    state = pool.state()
    pool.forget()
    # Whatever is done later, appended or dropped, is undone.
    pool.add(np.array([7]), np.array([row(7)]))
    pool.keep(np.array([7]))
    pool.keep(np.array([], np.int64))
    other = Pool(file)
    other.restore(state)
    assert_holds(other, [2, 5])
    assert len(list(tmp_path.iterdir())) == 1
    other.keep(np.array([5]))
    state = other.state()
    assert len(list(tmp_path.iterdir())) == 2
    other.forget()
    assert len(list(tmp_path.iterdir())) == 1
    again = Pool(file)
    again.restore(state)
    assert_holds(again, [5])
    # A new one begins anew.
    fresh = Pool(file)
    fresh.add(np.array([1]), np.array([row(1)]))
    assert_holds(fresh, [1])


def test_files_that_are_gone_or_short(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    pool = Pool(file)
    pool.add(np.array([2, 5]), np.array([row(2), row(5)]))
    state = pool.state()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    for work in (lambda: Pool(file).restore(state), lambda: pool.take(np.array([2, 5]))):
        with pytest.raises(RunError, match=r"rows\.0 is shorter than when it was written; start"):
            work()
    path.unlink()
    for work in (lambda: Pool(file).restore(state), lambda: pool.take(np.array([2, 5]))):
        with pytest.raises(RunError, match=r"rows\.0 cannot be read or written: No such file or d"):
            work()


def test_rows_that_have_left_memory_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyseme.capture.pool._BEHIND_BYTES", 0)
    rows = np.random.default_rng(0).normal(size=(600, 1000))
    pool = Pool(tmp_path / "rows")
    for at in range(0, 600, 50):
        pool.add(np.arange(at, at + 50), rows[at : at + 50])
    kept = np.arange(0, 600, 3)
    pool.keep(kept)
    pool.add(np.array([700]), rows[:1])
    again = Pool(tmp_path / "rows")
    again.restore(pool.state())
    for one in (pool, again):
        found = one.take(np.append(kept, 700))
        np.testing.assert_array_equal(found, rows[np.append(kept, 0)])


def test_little_is_sorted_out_while_more_is_expected() -> None:
    pool = Pool(expected=500)
    pool.add(np.arange(1000), np.zeros((1000, 2)))
    assert not pool.is_bloated
    pool.keep(np.arange(10))
    pool.add(np.arange(2000, 3000), np.zeros((1000, 2)))
    assert not pool.is_bloated
    pool.add(np.arange(4000, 5000), np.zeros((1000, 2)))
    assert pool.is_bloated


def test_parts_are_merged_in_whatever_order_their_keys_are(make: Make) -> None:
    pool = make([5, 6], [9])
    pool.merge(make([12, 14]).part())
    pool.merge(make([1, 7, 13]).part())
    pool.merge(make().part())
    assert_holds(pool, [1, 5, 6, 7, 9, 12, 13, 14])
    empty = make()
    empty.merge(pool.part())
    empty.add(np.array([20]), np.array([row(20)]))
    assert_holds(empty, [1, 5, 6, 7, 9, 12, 13, 14, 20])


def test_rows_that_are_missing_are_not_made_up(make: Make) -> None:
    for key in (0, 4, 9):
        with pytest.raises(RunError, match="Rows that examples refer to are missing"):
            make([3, 5]).take(np.array([3, key]))

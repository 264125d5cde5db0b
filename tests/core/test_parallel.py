"""Work in threads: who is told what, and that limits are put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from polyseme.core import parallel
from polyseme.core.parallel import in_threads


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 2)
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with threadpool_limits(2):
        torch.set_num_threads(2)
        yield
    torch.set_num_threads(before)


def blas_threads() -> list[int]:
    return [
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    ]


def test_each_chunk_is_worked_on_once_by_several_threads() -> None:
    found = np.zeros(50, np.int64)
    together = threading.Barrier(2, timeout=10)

    def work(chunk: int) -> None:
        if chunk < 2:
            together.wait()  # one thread alone would wait in vain
        found[chunk] += chunk

    in_threads(work, range(50))
    np.testing.assert_array_equal(found, np.arange(50))


def test_work_within_work_is_done_in_one_thread() -> None:
    threads: list[set[int]] = []

    def work(_: int) -> None:
        mine: set[int] = set()
        in_threads(lambda _: mine.add(threading.get_ident()), range(4))
        assert mine == {threading.get_ident()}
        threads.append(mine)

    in_threads(work, range(4))
    assert len(threads) == 4


def test_libraries_have_one_thread_in_each_and_get_theirs_back() -> None:
    torch = pytest.importorskip("torch")
    before, blas = torch.get_num_threads(), blas_threads()
    assert before == 2
    seen: list[tuple[int, set[int]]] = []
    in_threads(lambda _: seen.append((torch.get_num_threads(), set(blas_threads()))), range(3))
    assert seen == [(1, {1})] * 3
    assert (torch.get_num_threads(), blas_threads()) == (before, blas)

    def fail(chunk: int) -> None:
        raise ValueError(f"in chunk {chunk}")

    with pytest.raises(ValueError, match="in chunk 0"):
        in_threads(fail, range(3))
    assert (torch.get_num_threads(), blas_threads()) == (before, blas)


def test_two_callers_at_a_time_put_back_what_there_was() -> None:
    torch = pytest.importorskip("torch")
    before, blas = torch.get_num_threads(), blas_threads()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first(chunk: int) -> None:
        first_in.set()
        assert second_in.wait(10)

    def second(chunk: int) -> None:
        second_in.set()
        assert first_out.wait(10)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(in_threads, first, range(2))
        assert first_in.wait(10)
        other = pool.submit(in_threads, second, range(2))
        one.result(10)
        first_out.set()
        other.result(10)
    assert (torch.get_num_threads(), blas_threads()) == (before, blas)
    # A thread that is new to torch begins with what was set last.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


def test_a_limit_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no such library")

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "_blas", fail)
        with pytest.raises(OSError, match="no such library"):
            in_threads(print, range(3))
    test_libraries_have_one_thread_in_each_and_get_theirs_back()

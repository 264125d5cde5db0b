"""The pass over the data, for all sites at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.capture import (
    AboveFraction,
    Batch,
    Collected,
    Collector,
    FirstActive,
    Selector,
    Stratified,
    TopK,
)
from polyseme.capture.accumulate import N_BACKGROUND
from polyseme.capture.pool import Pool
from polyseme.errors import InputError
from polyseme.sites import find_sites
from reference import oracles
from sites.models import SAE

N = 500
SEED = 5
N_RANDOM = 6
SIZES = (64, 1, 100, 3, 32)
CONV = {"out_channels": 4, "kernel": (3, 2), "padding": (1, 0), "groups": 2}

SELECTORS: list[tuple[Selector, Callable[..., list[int]]]] = [
    (TopK(5), partial(oracles.top_k, k=5)),
    (FirstActive(7, 2.0), partial(oracles.first_active, n=7, minimum=2.0)),
    (AboveFraction(0.6, 9), partial(oracles.above_fraction, fraction=0.6, max_examples=9)),
    (Stratified(6, 3), partial(oracles.stratified, k=6, bins=3, seed=0)),
]


class Net(nn.Module):
    """One site of each kind, with whole numbers all through: no rounding, and many ties."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2), padding=(1, 0), groups=2)
        self.hidden = nn.Linear(4 * 4 * 2, 6)
        self.sae = SAE(6, 8)
        rng = np.random.default_rng(1)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.from_numpy(rng.integers(-2, 3, tuple(tensor.shape))))
            self.hidden.bias[2] = -10_000  # a dead neuron

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.conv(x))
        h = F.relu(self.hidden(maps.flatten(1)))
        self.sae(h)
        return h


def data(n: int = N) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(-1, 3, (n, 2, 4, 3)).astype(np.float32), rng.integers(0, 10, n)


def batches(x: np.ndarray, labels: np.ndarray | None, sizes: tuple[int, ...]) -> list[Batch]:
    out, at, turn = [], 0, 0
    while at < len(x):
        part = slice(at, at + sizes[turn % len(sizes)])
        raw = (x[part] + 7).astype(np.uint8)
        out.append(Batch(torch.from_numpy(x[part]), raw, None if labels is None else labels[part]))
        at, turn = part.stop, turn + 1
    return out


def truth(model: Net, x: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each site all activations (n, positions, neurons), and what its layer was handed."""
    with torch.no_grad():
        maps = F.relu(model.conv(torch.from_numpy(x)))
        flat = maps.flatten(1)
        h = F.relu(model.hidden(flat))
        a = F.relu(model.sae.encoder(h - model.sae.decoder.bias))
    return {
        "conv": (maps.flatten(2).transpose(1, 2).numpy(), x),
        "hidden": (h[:, None].numpy(), flat.numpy()),
        "sae": (a[:, None].numpy(), h.numpy()),
    }


def vector(name: str, inputs: np.ndarray, index: int, neuron: int, position: int) -> np.ndarray:
    if name == "conv":
        patch = oracles.conv_patch(inputs[index], neuron, position, **CONV)  # type: ignore[arg-type]
        return np.array(patch, np.float32)
    assert position == 0
    return inputs[index]


def collector(model: Net, select: Selector, sites: str = "*") -> Collector:
    found = find_sites(model, sites)
    return Collector(model, found, select, n_random=N_RANDOM, seed=SEED)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit."""
    results_a, inputs_a = a
    results_b, inputs_b = b
    assert inputs_a.keys() == inputs_b.keys()
    for name in inputs_a:
        assert inputs_a[name].dtype == inputs_b[name].dtype
        assert inputs_a[name].tobytes() == inputs_b[name].tobytes(), name
    for one, two in zip(results_a, results_b, strict=True):
        parts = [(one.statistics[k], two.statistics[k]) for k in one.statistics]
        for selection in ("examples", "random"):
            for field in ("neuron", "index", "position", "activation", "counts"):
                pair = (getattr(getattr(r, selection), field) for r in (one, two))
                parts.append(tuple(pair))  # type: ignore[arg-type]
        fields = ("vectors", "vector", "background")
        parts.append((one.neurons.weights, two.neurons.weights))
        parts += [(getattr(one, field), getattr(two, field)) for field in fields]
        for left, right in parts:
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()


def run(work: Collector, parts: list[Batch]) -> tuple[list[Collected], dict[str, np.ndarray]]:
    assert list(work.run(parts))[-1:] == [work.n_inputs][: len(parts)]
    return work.result()


@pytest.mark.parametrize(("select", "oracle"), SELECTORS)
def test_all_of_it_equals_the_oracle(select: Selector, oracle: Callable[..., list[int]]) -> None:
    model = Net()
    x, labels = data()
    results, inputs = run(collector(model, select), batches(x, labels, SIZES))
    expected = truth(model, x)
    assert [found.site.name for found in results] == list(expected)
    pointed_at: set[int] = set()
    for found in results:
        name = found.site.name
        every, handed = expected[name]
        strongest = every.max(axis=1)
        for selection, choose in (
            (found.examples, lambda values, _: oracle(values)),
            (found.random, lambda values, j: oracles.random_active(values, N_RANDOM, SEED, j)),
        ):
            wanted = [choose(strongest[:, j].tolist(), j) for j in range(strongest.shape[1])]
            assert selection.counts.tolist() == [len(chosen) for chosen in wanted]
            assert selection.index.tolist() == [i for chosen in wanted for i in chosen]
            rows = (selection.index, selection.neuron)
            assert np.array_equal(selection.activation, strongest[rows])
            at = every[selection.index, selection.position, selection.neuron]
            assert np.array_equal(at, strongest[rows])
            pointed_at |= set(selection.index.tolist())
        # Each example's vector is what its neuron read, and what gives its activation.
        for e in range(len(found.examples.index)):
            i, j, p = (
                int(getattr(found.examples, field)[e]) for field in ("index", "neuron", "position")
            )
            row = found.vectors[found.vector[e]]
            assert np.array_equal(row, vector(name, handed, i, j, p))
        bias = {
            "conv": model.conv.bias,
            "hidden": model.hidden.bias,
            "sae": model.sae.encoder.bias - model.sae.encoder.weight @ model.sae.decoder.bias,
        }[name].detach()
        weights = found.neurons.weights[found.examples.neuron]
        again = (found.vectors[found.vector] * weights).sum(axis=1)
        again = again + bias.numpy()[found.examples.neuron]
        assert np.array_equal(np.maximum(again, 0), found.examples.activation)
        # Neurons that meet at a place share one vector, and none is left over.
        assert np.array_equal(np.unique(found.vector), np.arange(len(found.vectors)))
        keys = set(
            zip(
                found.examples.index.tolist(),
                found.site.place(
                    torch.from_numpy(found.examples.position),
                    torch.from_numpy(found.examples.neuron),
                ).tolist(),
                strict=True,
            )
        )
        assert len(keys) == len(found.vectors)
        for j in range(strongest.shape[1]):
            for key, value in oracles.statistics(strongest[:, j].tolist()).items():
                assert found.statistics[key][j].tolist() == pytest.approx(value), key
    assert results[1].examples.counts[2] == 0
    # The inputs that examples point at, and no others.
    assert inputs["index"].tolist() == sorted(pointed_at)
    assert np.array_equal(inputs["rows"], (x[inputs["index"]] + 7).astype(np.uint8))
    assert np.array_equal(inputs["labels"], labels[inputs["index"]])


def test_the_background_is_a_random_sample_of_what_neurons_read() -> None:
    model = Net()
    x, _ = data()
    results, _ = run(collector(model, TopK(2)), batches(x, None, SIZES))
    chosen = sorted(range(N), key=lambda i: oracles.priority(i, SEED))[:N_BACKGROUND]
    for found in results:
        name, site = found.site.name, found.site
        every, handed = truth(model, x)[name]
        assert found.background.shape == (site.n_groups, N_BACKGROUND, site.d_in)
        per_group = site.n_neurons // site.n_groups
        for row, i in enumerate(chosen):
            j = oracles.priority(i, SEED) % site.n_neurons
            fired = every[i, :, j]
            places = np.flatnonzero(fired == fired.max())
            for group in range(site.n_groups):
                options = [vector(name, handed, i, group * per_group, int(p)) for p in places]
                assert any(np.array_equal(found.background[group, row], o) for o in options)


@pytest.mark.parametrize("select", [selector for selector, _ in SELECTORS])
def test_batches_do_not_matter(select: Selector) -> None:
    for n, several in ((N, [SIZES, (30, 200)]), (30, [(1, 2)])):
        x, labels = data(n)
        whole = run(collector(Net(), select), batches(x, labels, (n,)))
        for sizes in several:
            assert_same(run(collector(Net(), select), batches(x, labels, sizes)), whole)


def rounded_data() -> tuple[np.ndarray, np.ndarray]:
    """Data with rounding: the same batches give the same bytes all the same."""
    x, labels = data()
    return x + np.random.default_rng(3).normal(size=x.shape).astype(np.float32), labels


@cache
def in_one_go(select: Selector) -> tuple[list[Collected], dict[str, np.ndarray]]:
    return run(collector(Net(), select), batches(*rounded_data(), SIZES))


@pytest.mark.parametrize("select", [selector for selector, _ in SELECTORS])
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_goes_on_from_any_state_to_the_same_bytes(select: Selector, stop: int) -> None:
    x, labels = rounded_data()
    parts = batches(x, labels, SIZES)
    first = collector(Net(), select)
    list(first.run(parts[:stop]))
    state = first.state()
    kept = {name: array.copy() for name, array in state.items()}
    uninterrupted = run(first, parts[stop:])
    assert all(np.array_equal(state[name], array) for name, array in kept.items())
    second = collector(Net(), select)
    second.restore(state)
    assert second.n_inputs == sum(len(part.raw) for part in parts[:stop])
    assert_same(run(second, parts[stop:]), uninterrupted)
    assert (second.low, second.high) == (first.low, first.high) == (x.min(), x.max())
    assert_same(in_one_go(select), uninterrupted)


def test_without_labels_there_are_none() -> None:
    x, _ = data(20)
    _, inputs = run(collector(Net(), TopK(2)), batches(x, None, (20,)))
    assert set(inputs) == {"index", "rows"}


def test_no_data_at_all() -> None:
    results, inputs = run(collector(Net(), TopK(2)), [])
    assert inputs["index"].tolist() == []
    for found in results:
        assert found.examples.counts.tolist() == [0] * found.site.n_neurons
        assert found.vectors.shape == (0, found.site.d_in)
        assert found.background.shape == (found.site.n_groups, 0, found.site.d_in)


def test_a_site_that_nothing_activates() -> None:
    model = Net()
    with torch.no_grad():
        model.hidden.bias.fill_(-10_000)
    x, _ = data(40)
    ((found,), inputs) = run(collector(model, TopK(2), "hidden"), batches(x, None, (40,)))
    assert found.examples.counts.tolist() == [0] * 6
    assert found.vectors.shape == (0, 32)
    assert inputs["index"].tolist() == []
    assert found.background.shape == (1, 40, 32)


def test_pools_stay_near_the_size_of_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    added: dict[Pool, list[int]] = {}
    plain = Pool.add

    def counted(self: Pool, keys: np.ndarray, rows: np.ndarray) -> None:
        added.setdefault(self, []).append(len(keys))
        plain(self, keys, rows)

    monkeypatch.setattr(Pool, "add", counted)
    model, n = Net(), 8000
    # Ever stronger inputs, so that every batch brings new examples.
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 3, (n, 2, 4, 3)) * (1.001 ** np.arange(n))[:, None, None, None]
    work = collector(model, TopK(5))
    live: dict[Pool, int] = {}
    for _ in work.run(batches(x.astype(np.float32), np.zeros(n, int), (80,))):
        # What the selectors' buffers hold on to at the moment.
        indices = []
        now: dict[Pool, int] = {}
        for part in work._collectors.values():
            neurons, index, positions = part.examples.held()
            indices += [index, part.random.held()[1]]
            places = torch.stack([index, part.site.place(positions, neurons)])
            now[part.vectors] = torch.unique(places, dim=1).shape[1]
        now[work._inputs] = now[work._labels] = len(torch.unique(torch.cat(indices)))
        for pool, number in now.items():
            live[pool] = max(live.get(pool, 0), number)
            assert len(pool) <= 2 * live[pool] + 256
    # Far more has passed through at least one pool of vectors, and through that of the inputs.
    assert sum(added[work._inputs]) > 1.5 * (2 * live[work._inputs] + 256)
    conv = work._collectors["conv"].vectors
    assert sum(added[conv]) > 1.5 * (2 * live[conv] + 256)
    results, inputs = work.result()
    assert len(inputs["index"]) <= 18 * (5 + N_RANDOM)
    assert all(found.examples.counts.max() == 5 for found in results)


# --- rows in files, float16, and a device that runs out of memory --------------------------------


@pytest.mark.parametrize("stop", [0, 3, 9])
def test_rows_in_files_are_those_in_memory(tmp_path: Path, stop: int) -> None:
    x, labels = data()
    parts = batches(x, labels, SIZES)
    in_memory = run(collector(Net(), TopK(5)), parts)

    def in_files() -> Collector:
        model = Net()
        return Collector(
            model, find_sites(model, "*"), TopK(5), n_random=N_RANDOM, seed=SEED, files=tmp_path
        )

    first = in_files()
    list(first.run(parts[:stop]))
    state = first.state()
    first.saved()
    # What comes after the state is lost, as when the process is killed.
    list(first.run(parts[stop : stop + 4]))
    second = in_files()
    second.restore(state)
    assert_same(run(second, parts[stop:]), in_memory)


def test_vectors_of_half_the_size() -> None:
    x, _ = data()
    model = Net()
    sites = find_sites(model, "*")
    options: dict[str, Any] = {"n_random": N_RANDOM, "seed": SEED}
    plain, _ = run(Collector(model, sites, TopK(5), **options), batches(x, None, SIZES))
    half, _ = run(Collector(model, sites, TopK(5), half=True, **options), batches(x, None, SIZES))
    for one, two in zip(plain, half, strict=True):
        assert two.vectors.dtype == np.float16
        assert np.array_equal(one.vectors.astype(np.float16), two.vectors)
        assert np.array_equal(one.vector, two.vector)


@pytest.mark.parametrize("sizes", [(50,), (7, 1, 20)])
@pytest.mark.parametrize("stays", [True, False])
def test_vectors_that_do_not_fit_into_float16(sizes: tuple[int, ...], stays: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
    x = torch.full((50, 2), 0.1)
    x[:, 0] = torch.arange(1, 51) * 0.3
    # One that is too large for float16: an example at the end, or only until better ones come.
    x[3] = torch.tensor([100.0 if stays else 1.0, 1e6])
    work = Collector(model, find_sites(model, "0"), TopK(5), n_random=1, half=True)
    parts = [
        Batch(part, np.zeros((len(part), 0), np.uint8))
        for part in torch.split(x, list(sizes) if len(sizes) == 1 else [7, 1, 20, 22])
    ]
    ((found,), _) = run(work, parts)
    chosen = x.numpy()[found.examples.index]
    held = found.vectors[found.vector]
    with np.errstate(over="ignore"):
        rounded = chosen.astype(np.float16)
    if stays:
        assert held.dtype == np.float32
        assert held[0].tolist() == [100.0, 1e6]
        # The others are what they would be without it.
        assert np.array_equal(held[1:], rounded[1:].astype(np.float32))
    else:
        assert held.dtype == np.float16
        assert np.array_equal(held, rounded)


class Small(Net):
    """Runs out of memory on more than a few inputs: at its beginning, or after two sites."""

    most, late = 10, False

    def __init__(self) -> None:
        super().__init__()
        self.sae.register_forward_pre_hook(lambda _, args: self.allocate(args[0]))

    def allocate(self, x: Tensor) -> None:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, x: Tensor) -> Tensor:
        if not self.late:
            self.allocate(x)
        return super().forward(x)


@pytest.mark.parametrize("late", [False, True])
def test_a_device_without_memory_for_a_batch_gets_smaller_ones(late: bool) -> None:
    x, labels = data()
    parts = batches(x, labels, (64, 100, 3))
    expected = run(collector(Net(), TopK(5)), parts)
    model = Small()
    model.late = late
    work = collector(model, TopK(5))
    said: list[int] = []
    work.on_smaller_batch = said.append
    assert_same(run(work, parts), expected)
    assert said == [32, 16, 8]


def test_a_device_that_runs_out_of_memory_while_a_site_is_read() -> None:
    # Whatever a site has not taken in as a whole it takes in again.
    x, labels = data()
    parts = batches(x, labels, (64, 100, 3))
    expected = run(collector(Net(), TopK(5)), parts)
    model = Net()
    sites = find_sites(model, "*")
    gathers: list[int] = []
    plain = sites[1].gather

    def gather(inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        gathers.append(len(inputs))
        if len(inputs) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(inputs, rows, places)

    sites[1].gather = gather  # type: ignore[method-assign]
    work = Collector(model, sites, TopK(5), n_random=N_RANDOM, seed=SEED)
    assert_same(run(work, parts), expected)
    gathers = [n for n in gathers if n > 3]  # without those of the proof
    assert gathers[0] == 64
    assert max(gathers[3:]) <= 16


def test_a_device_without_memory_for_a_single_input() -> None:
    x, labels = data(5)
    model = Small()
    model.most = 0
    work = collector(model, TopK(5))
    # The sites have proved themselves, so that nothing is run before the first batch.
    work._batch_number = 1
    with pytest.raises(
        InputError, match=r"^The device 'cpu' ran out of memory on a single input: "
    ):
        run(work, batches(x, labels, (5,)))
    assert not work.is_whole

"""The active pairs of a batch, and the two products over them that make up the NE loss.

They are, for each pair (input, neuron), the inner product of the input with a row of the neuron,
and for each neuron, a weighted sum of the inputs that it is paired with. No tensor here has a row
of d_in numbers per pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

# Neurons processed at once, which bounds memory.
_CHUNK = 8192
# Share of the batch above which dense products over the whole batch are faster for a neuron.
_DENSE = 1 / 8

# Maximum bytes of a part of the inputs, and the fewest columns worth a part.
_CACHE = 1_600_000
_NARROWEST = 64

# The gradient of a weighted embedding bag in its weights: for pair p, the inner product
# rows[owner[p]]·inputs[index[p]]. No public function of torch is as fast: with 2,048 inputs, 4,096
# neurons and 32 pairs per input, torch.sparse.sampled_addmm took twice as long, and products of
# gathered rows 20 times.
_sampled_product = torch.ops.aten._embedding_bag_per_sample_weights_backward


Parts = list[Tensor]
"""A matrix, split into parts of some columns each."""


def _column_parts(inputs: Tensor) -> list[slice]:
    """Columns of each part.

    A product over a pattern reads inputs in random order, so it is at least twice as fast if the
    part that it reads stays in a core's cache.
    """
    n_inputs, width = inputs.shape
    if inputs.device.type == "cpu":
        fitting = max(_CACHE // max(1, n_inputs * inputs.element_size()), _NARROWEST)
        width = -(-width // -(-width // fitting)) if width else 0
    return [slice(k, k + width) for k in range(0, inputs.shape[1], max(1, width))]


class Memory:
    """Tensors reused from step to step: allocating memory costs more than filling it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of the given shape, with arbitrary values."""
        kept = self._kept.get(name)
        fits = kept is not None and kept.dtype == dtype and kept.device == like.device
        if kept is None or not fits or len(kept) < like.numel():
            kept = self._kept[name] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return kept[: like.numel()].view(like.shape)

    def copy(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy, in memory reused under that name."""
        return self.take(name, x, dtype).copy_(x)

    def products(self, name: str, x: Parts, y: Parts) -> Parts:
        """x ∘ y, in memory reused under that name."""
        return [
            torch.mul(x[k], y[k], out=self.take(f"{name}{k}", x[k], x[k].dtype))
            for k in range(len(x))
        ]


class PairBatch:
    """Inputs and their squares, in parts of some columns each."""

    def __init__(self, h: Tensor, name: str, memory: Memory, like: PairBatch | None = None) -> None:
        self.n_inputs, self.dtype = len(h), h.dtype
        self.columns: list[slice] = _column_parts(h) if like is None else like.columns
        self.inputs: Parts = [
            memory.copy(f"{name}{part.start}", h[:, part], h.dtype) for part in self.columns
        ]
        self._name, self._memory = name, memory

    @cached_property
    def squares(self) -> Parts:
        """The square of each number."""
        return self._memory.products(f"{self._name}²", self.inputs, self.inputs)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Sum of temporary tensors, accumulated in the first."""
    first, *others = terms
    for other in others:
        first += other
    return first


def row_products(x: Parts, y: Parts) -> Tensor:
    """Row-wise inner products of two matrices."""
    rows = torch.arange(len(x[0]), device=x[0].device)
    return sum_of(_sampled_product(p, q, rows, rows, rows, 0) for p, q in zip(x, y, strict=True))


@dataclass(frozen=True)
class Block:
    """Some neurons and their pairs, neuron by neuron, with inputs in ascending order."""

    neurons: slice | Tensor
    """The neurons of the layer: a range, or their numbers."""
    pairs: slice | Tensor
    """The pairs, among all pairs of the layer."""
    inputs: Tensor
    """Input number of each pair."""
    owners: Tensor
    """Neuron number of each pair, within the block."""
    offsets: Tensor
    """Start of each neuron's pairs, then the number of pairs."""
    dense: bool
    """Whether products are computed over the whole batch."""
    complete: bool = False
    """Whether every neuron is paired with every input."""

    @property
    def counts(self) -> Tensor:
        """Number of each neuron's pairs in this block."""
        return self.offsets.diff()

    def rows_of(self, rows: Tensor) -> Tensor:
        """Rows of these neurons: a view for a range, otherwise a copy."""
        return rows[self.neurons]

    def products(self, inputs: Parts, rows: Parts) -> Tensor:
        """For each pair, the inner product of its input's row and its neuron's row."""
        pairs = zip(inputs, rows, strict=True)
        if self.dense:
            out = sum_of((y @ x.T).view(-1) for x, y in pairs)
            return out if self.complete else out[self._cells(len(inputs[0]))]
        bags = (self.inputs, self.offsets[:-1], self.owners)
        return sum_of(_sampled_product(y, x, *bags, 0) for x, y in pairs)

    def sums(self, inputs: Parts, factors: Tensor) -> Iterator[Tensor]:
        """For each neuron, the sum over its pairs of factor · input, part by part."""
        if not self.dense:
            for x in inputs:
                yield embedding_bag(
                    self.inputs,
                    x,
                    self.offsets,
                    mode="sum",
                    per_sample_weights=factors,
                    include_last_offset=True,
                )
            return
        n_inputs, n_neurons = len(inputs[0]), len(self.offsets) - 1
        if not self.complete:
            cells = factors.new_zeros(n_neurons * n_inputs)
            factors = cells.index_copy_(0, self._cells(n_inputs), factors)
        for x in inputs:
            yield factors.view(n_neurons, n_inputs) @ x

    def _cells(self, n_inputs: int) -> Tensor:
        return self.owners * n_inputs + self.inputs


def every_pair(n_neurons: int, n_inputs: int, device: torch.device) -> Block:
    """A block in which every neuron is paired with every input."""
    numbers = torch.arange(n_neurons * n_inputs, device=device)
    return Block(
        neurons=slice(None),
        pairs=slice(None),
        inputs=numbers % n_inputs,
        owners=numbers // n_inputs,
        offsets=torch.arange(n_neurons + 1, device=device) * n_inputs,
        dense=True,
        complete=True,
    )


class ActivePairs:
    """The pairs (input, neuron) with a positive activation, found once for a training step.

    Attributes
    ----------
    n_inputs, n_neurons : int
        Shape of the activations.
    inputs, neurons : Tensor
        int64 (P,): the pairs, ordered by neuron, then by input.
    counts : Tensor
        int64 (n_neurons,): active inputs of each neuron.
    """

    def __init__(self, activations: Tensor) -> None:
        if activations.layout not in (torch.strided, torch.sparse_coo):
            activations = activations.to_sparse(layout=torch.sparse_coo)
        self.n_inputs, self.n_neurons = activations.shape
        self._activations = activations
        with torch.no_grad():
            inputs, neurons = self._find(activations.detach())
        self.inputs, self.neurons = inputs, neurons
        self.counts = torch.bincount(neurons, minlength=self.n_neurons)
        self._blocks: list[Block] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def values(self) -> Tensor:
        """Activation of each pair, differentiable."""
        a = self._activations
        if a.layout is torch.strided:
            return a[self.inputs, self.neurons]
        a = a.coalesce()
        _, columns = a.indices()
        order = _order(columns, self.n_neurons)
        return a.values()[order[(a.values().detach() > 0)[order]]]

    def blocks(self) -> list[Block]:
        """Blocks that cover every neuron once: sparse neurons in ranges, then dense ones by number.

        A range also spans its dense neurons, without their pairs, so ranges come first.
        """
        if self._blocks is None:
            self._blocks = list(self._make_blocks())
        return self._blocks

    def _make_blocks(self) -> Iterator[Block]:
        counts, inputs, pairs = self.counts, self.inputs, None
        is_dense = counts > self.n_inputs * _DENSE
        some_dense = bool(is_dense.any())
        if some_dense:
            kept = ~is_dense[self.neurons]
            pairs = kept.nonzero().view(-1)
            inputs, counts = inputs[pairs], counts * ~is_dense
        yield from self._ranges(counts, inputs, pairs)
        if some_dense:
            yield from self._groups(is_dense.nonzero().view(-1))

    def _ranges(self, counts: Tensor, inputs: Tensor, pairs: Tensor | None) -> Iterator[Block]:
        offsets = _offsets(counts)
        n_blocks = max(1, -(-self.n_neurons // _CHUNK))
        edges = [k * self.n_neurons // n_blocks for k in range(n_blocks + 1)]
        starts = offsets[edges].tolist()
        for k in range(len(edges) - 1):
            neurons, part = slice(edges[k], edges[k + 1]), slice(starts[k], starts[k + 1])
            yield Block(
                neurons=neurons,
                pairs=part if pairs is None else pairs[part],
                inputs=inputs[part],
                owners=_owners(counts[neurons], part.stop - part.start),
                offsets=offsets[edges[k] : edges[k + 1] + 1] - starts[k],
                dense=False,
            )

    def _groups(self, dense: Tensor) -> Iterator[Block]:
        starts = _offsets(self.counts)
        for numbers in torch.split(dense, _CHUNK):
            counts = self.counts[numbers]
            offsets = _offsets(counts)
            owners = _owners(counts, int(offsets[-1]))
            pairs = torch.arange(len(owners), device=owners.device)
            pairs += (starts[numbers] - offsets[:-1])[owners]
            yield Block(numbers, pairs, self.inputs[pairs], owners, offsets, dense=True)

    def _find(self, a: Tensor) -> tuple[Tensor, Tensor]:
        if a.layout is not torch.strided:
            return self._find_sparse(a)
        if a.device.type != "cpu":
            neurons, inputs = (a.T > 0).nonzero().unbind(1)
            return inputs, neurons
        # NumPy's comparison and search are several times faster than torch's on the CPU.
        values = (a.float() if a.dtype is torch.bfloat16 else a).numpy()
        flat = np.flatnonzero(values > 0)
        rows = flat // max(1, self.n_neurons)
        columns = flat - rows * self.n_neurons
        order = _radix_order(columns, self.n_neurons)
        return torch.from_numpy(rows[order]), torch.from_numpy(columns[order])

    def _find_sparse(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The same from stored entries; duplicates are summed."""
        order = self._ascending(a)
        if order is None:
            a = a.coalesce()
            order = self._ascending(a)
            assert order is not None
        rows, columns = a._indices()
        order = order[(a._values() > 0)[order]]
        return rows[order], columns[order]

    def _ascending(self, a: Tensor) -> Tensor | None:
        """Stable order of the stored entries by neuron; None if inputs are then not ascending."""
        rows, columns = a._indices()
        order = _order(columns, self.n_neurons)
        cells = (columns * self.n_inputs + rows)[order]
        return order if bool((cells[1:] > cells[:-1]).all()) else None


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _owners(counts: Tensor, total: int) -> Tensor:
    numbers = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(numbers, counts, output_size=total)


def _order(neurons: Tensor, n_neurons: int) -> Tensor:
    """Stable order by neuron."""
    if neurons.device.type != "cpu":
        return torch.argsort(neurons, stable=True)
    return torch.from_numpy(_radix_order(neurons.numpy(), n_neurons))


def _radix_order(keys: NDArray[np.int64], n_keys: int) -> NDArray[np.int64]:
    """Stable order of integers below ``n_keys``, sorting 16 bits at a time.

    NumPy radix-sorts this type, which is many times faster than torch's sort.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if n_keys > 1 << 16:
        order = order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
    return order

"""Whatever holds inputs becomes the same stream of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from polyseme.core.arrays import to_numpy
from polyseme.data import Images
from polyseme.data.sources import as_source
from polyseme.errors import InputError

N = 23
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 4, 5), dtype=np.uint8)
FLOATS = np.random.default_rng(1).normal(size=(N, 4, 5)).astype(np.float32)
LABELS = np.arange(N) % 3


class Items(Dataset):
    """A torch data set; without labels, items are inputs."""

    def __init__(self, inputs, labels=None):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return self.inputs[i] if self.labels is None else (self.inputs[i], self.labels[i])


class Singles(IterableDataset):
    def __iter__(self):
        return iter(FLOATS)

    def __len__(self):
        return N


def sevens(inputs, labels=None):
    for at in range(0, N, 7):
        part = inputs[at : at + 7]
        yield part if labels is None else (part, labels[at : at + 7])


def read(source, size=6, start=0):
    """Model inputs and labels of a whole stream."""
    parts = list(source.batches(size, start))
    inputs = [source.to_input(stored) for stored, _ in parts]
    assert all(array.dtype == np.float32 for array in inputs)
    labels = [label for _, label in parts]
    assert len({label is None for label in labels}) <= 1
    return (
        np.concatenate(inputs),
        None if labels[0] is None else np.concatenate(labels),
    )


def sources(tmp_path):
    np.savez(tmp_path / "d.npz", images=FLOATS, labels=LABELS)
    np.savez(tmp_path / "u.npz", images=PIXELS, labels=LABELS)
    tensor = torch.from_numpy(FLOATS)
    scaled = (PIXELS.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.25)
    unit = PIXELS.astype(np.float32) / np.float32(255)
    labels = torch.from_numpy(LABELS)
    return {
        "float array": (as_source(FLOATS), FLOATS, False),
        "float64": (as_source(FLOATS.astype(np.float64)), FLOATS, False),
        "uint8 array": (as_source(PIXELS), unit, False),
        "uint8 tensor": (as_source(torch.from_numpy(PIXELS)), unit, False),
        "labels": (as_source(PIXELS, LABELS), unit, True),
        "labels as a list": (as_source(FLOATS, LABELS.tolist()), FLOATS, True),
        "tensor": (as_source(tensor), FLOATS, False),
        "tensor with a gradient": (as_source(tensor.clone().requires_grad_()), FLOATS, False),
        "pair": (as_source((tensor, labels)), FLOATS, True),
        "list pair": (as_source([PIXELS, LABELS]), unit, True),
        "Images": (as_source(Images(PIXELS, LABELS, 0.5, 0.25)), scaled, True),
        "Images and labels": (as_source(Images(PIXELS, mean=0.5, std=0.25), LABELS), scaled, True),
        "path": (as_source(tmp_path / "d.npz"), FLOATS, True),
        "path as text": (as_source(str(tmp_path / "u.npz")), unit, True),
        "data set": (as_source(Items(FLOATS)), FLOATS, False),
        "labelled data set": (as_source(Items(tensor, LABELS)), FLOATS, True),
        "uint8 data set": (as_source(Items(PIXELS, labels)), unit, True),
        "TensorDataset": (as_source(TensorDataset(tensor)), FLOATS, False),
        "labelled TensorDataset": (as_source(TensorDataset(tensor, labels)), FLOATS, True),
        "list of inputs": (as_source(list(FLOATS)), FLOATS, False),
        "list of pairs": (as_source(list(zip(FLOATS, LABELS, strict=True))), FLOATS, True),
        "loader": (as_source(DataLoader(Items(FLOATS), batch_size=7)), FLOATS, False),
        "loader of TensorDataset": (
            as_source(DataLoader(TensorDataset(tensor), batch_size=7)),
            FLOATS,
            False,
        ),
        "labelled loader": (
            as_source(DataLoader(TensorDataset(tensor, labels), batch_size=7)),
            FLOATS,
            True,
        ),
        "generator": (as_source(sevens(FLOATS)), FLOATS, False),
        "labelled generator": (as_source(sevens(PIXELS, LABELS)), unit, True),
        "generator of tensors": (as_source(sevens(tensor, labels)), FLOATS, True),
        "booleans": (as_source(FLOATS > 0), FLOATS > 0, False),
        "list of booleans": (as_source(list(FLOATS > 0)), FLOATS > 0, False),
        "table": (as_source(pd.DataFrame(FLOATS[:, 0])), FLOATS[:, 0], False),
        "table and column": (
            as_source((pd.DataFrame(FLOATS[:, 0]), pd.Series(LABELS))),
            FLOATS[:, 0],
            True,
        ),
        "lists of two numbers": (as_source(FLOATS[:, 0, :2].tolist()), FLOATS[:, 0, :2], False),
        "half precision": (
            as_source(tensor.bfloat16()),
            tensor.bfloat16().float().numpy(),
            False,
        ),
    }


NAMES = [
    *("float array", "float64", "uint8 array", "uint8 tensor", "labels", "labels as a list"),
    *("tensor", "tensor with a gradient", "pair", "list pair", "Images", "Images and labels"),
    *("path", "path as text", "data set", "labelled data set", "uint8 data set"),
    *("TensorDataset", "labelled TensorDataset", "list of inputs", "list of pairs", "loader"),
    *("loader of TensorDataset", "labelled loader", "generator", "labelled generator"),
    *("generator of tensors", "booleans", "list of booleans", "table", "table and column"),
    *("lists of two numbers", "half precision"),
]


def test_every_source_is_tested(tmp_path):
    assert list(sources(tmp_path)) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [0, 5, 7, N - 1])
def test_the_same_inputs_in_the_same_order(tmp_path, name, start):
    source, expected, labelled = sources(tmp_path)[name]
    inputs, labels = read(source, start=start)
    np.testing.assert_allclose(inputs, expected[start:], rtol=1e-6, atol=1e-7)
    if labelled:
        assert labels.dtype == np.int64
        assert labels.tolist() == LABELS[start:].tolist()
    else:
        assert labels is None


def test_lengths_names_and_identities(tmp_path):
    made = {name: source for name, (source, *_) in sources(tmp_path).items()}
    assert made["data set"].length == made["tensor"].length == N
    assert made["generator"].length is None
    assert made["path"].name == "d.npz"
    assert made["labelled loader"].name == "DataLoader"
    assert made["tensor"].identity() == made["float array"].identity()
    assert made["labels"].identity() != made["uint8 array"].identity(), "labels belong to it"
    assert made["Images"].identity() != made["list pair"].identity(), "and so does the scaling"
    changed = FLOATS.copy()
    changed[-1, -1, -1] += 1
    assert as_source(changed).identity() != made["float array"].identity()


def test_batches_that_are_empty_are_passed_over():
    source = as_source(iter([FLOATS[:0], FLOATS[:3], FLOATS[:0], FLOATS[3:]]))
    np.testing.assert_array_equal(read(source)[0], FLOATS)


def test_a_stream_that_ends_too_early():
    with pytest.raises(InputError, match=r"ended 2 inputs before the point .* a new iterator"):
        list(as_source(sevens(FLOATS)).batches(6, N + 2))
    assert list(as_source(sevens(FLOATS)).batches(6, N)) == []


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (3, r"data is a int; expected an array, tensor or table \(n, \.\.\.\)"),
        (None, r"data is a NoneType; expected an array"),
        ({"images": FLOATS}, r"data is a dict; give one of .* \(data\['images'\]\): an array,"),
        ({}, r"data is a dict; .*it is empty"),
        (Singles(), r"is an IterableDataset, .*DataLoader\(data, batch_s"),
        (scipy.sparse.eye(5, format="csr"), r"without a length .* give data\.toarray\(\)"),
        (
            torch.eye(3).to_sparse(),
            r"layout torch.sparse_coo .* does not convert to an array; .*to_dense",
        ),
        (torch.eye(3, device="meta"), r"on meta does not convert to an array; expected a dense"),
        (
            torch.zeros(3, 2, dtype=torch.int64),
            r"array: the values have dtype int64, .*x\.long\(\)",
        ),
        (b"bytes", r"data is a bytes; expected an array"),
        ({1, 2}, r"data is a set; expected an array"),
        ([], r"data set list is empty; expected at least one input"),
        (FLOATS[:0], r"is empty; expected at least one input"),
        (np.arange(5), r"the values have dtype int"),
        ("no/such/place.npz", r"'no/such/place\.npz' does not exist"),
        ((FLOATS, LABELS[:4]), r"labels have shape \(4,\) for 23 inputs"),
        ((FLOATS, LABELS + 0.5), r"labels have dtype float64; .* 0\.5 is not a class"),
    ],
)
def test_as_source_rejects_invalid_data(data, match):
    with pytest.raises(InputError, match=match):
        as_source(data)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (["a", "b"], r"yields a str: the values have dtype <U1; expected uint8"),
        ([1.0, 2.0], r"yields a float, a single number; .*Give a single input x as \[x\]"),
        (
            [{"image": 1, "label": 2}],
            r"a dict with the keys 'image', 'label' for each item; .* "
            r"\[\(item\['image'\], item\['label'\]\) for item in data\]",
        ),
        (iter([{"x": FLOATS}]), r"'x' for each batch; .* \(batch\['x'\] for batch in data\)"),
        (
            [FLOATS[0], FLOATS[1, :2], FLOATS[2]],
            r"different shapes, \(2, 5\) and \(4, 5\); expected one shape",
        ),
        ([(FLOATS[0], 1, 2)], r"3 values for each item; .* \[item\[:2\] for item in data\]"),
        (iter([[FLOATS, LABELS, LABELS]]), r"\(\(batch\[0\], batch\[1\]\) for batch in data\)"),
        ([(FLOATS[0], 0.5)], r"labels have dtype float64; .* 0\.5 is not a class"),
        ([(FLOATS[0], "cat")], r"labels have dtype <U3; .* np\.unique"),
        ([(FLOATS[0], np.eye(3, dtype=int)[0])], r"labels have shape \(1, 3\) .* one-hot"),
        ([(FLOATS[0], 1), FLOATS[1]], r"Only some of the inputs have a label"),
        ([FLOATS[1], *[(FLOATS[0], 1)] * 2], r"Only some of the inputs have a label"),
        (iter([(FLOATS, LABELS), FLOATS]), r"Only some of the inputs have a label"),
        (iter([(FLOATS, LABELS[:5])]), r"labels have shape \(5,\) for 23 inputs"),
        (iter([(FLOATS, FLOATS[:, 0, 0])]), r"labels have dtype float32; expected integers"),
        (iter([FLOATS[0, 0]]), r"array of shape \(5,\); expected batches .* give list\(data\)"),
        (iter(["text"]), r"yields a str: the values have dtype <U4"),
        ([np.zeros(3, int)], r"yields a ndarray: the values have dtype int64"),
    ],
)
def test_items_that_are_no_inputs(data, match):
    with pytest.raises(InputError, match=match):
        read(as_source(data))


def test_a_stream_has_a_fixed_order():
    steady = DataLoader(Items(FLOATS), batch_size=7)
    assert as_source(steady).identity()["name"] == "DataLoader"
    assert as_source(sevens(FLOATS)).identity() == as_source(sevens(FLOATS)).identity()
    augmented = Items(FLOATS)
    augmented.__class__ = type("Augmented", (Items,), {"__getitem__": lambda *_: torch.rand(3)})
    for data in (DataLoader(Items(FLOATS), batch_size=7, shuffle=True), augmented):
        with pytest.raises(InputError, match=r"yields different inputs each time .* shuffle=False"):
            as_source(data).identity()


def test_class_names_of_a_stream():
    source = as_source(Items(FLOATS, LABELS), class_names=["a", "b"])
    with pytest.raises(InputError, match=r"highest label is 2, but there are 2 class_names"):
        read(source)
    read(as_source(Items(FLOATS, LABELS), class_names=["a", "b", "c"]))


def test_labels_given_twice_or_to_what_brings_its_own():
    with pytest.raises(InputError, match=r"labels were given with a pair .* give them once"):
        as_source((FLOATS, LABELS), LABELS)
    with pytest.raises(InputError, match=r"labels were given with a Items; .*pairs \(input, l"):
        as_source(Items(FLOATS), LABELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_peek_uses_nothing_up(tmp_path, name):
    source, expected, _ = sources(tmp_path)[name]
    first = source.peek(4)
    np.testing.assert_allclose(source.to_input(first), expected[: len(first)], atol=1e-6)
    np.testing.assert_allclose(read(source, start=3)[0], expected[3:], atol=1e-6)


def test_a_peek_passes_over_empty_batches():
    source = as_source(iter([FLOATS[:0], FLOATS[:3]]))
    assert len(source.peek(4)) == 3
    assert as_source(iter([FLOATS[:0]])).peek(4) is None


RAGGED = [torch.ones(2, 3), torch.ones(1, 3)]
UNUSUAL = {
    "sparse": lambda: torch.ones(4, 3).to_sparse(),
    "compressed": lambda: torch.ones(4, 3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor(RAGGED),
    "jagged": lambda: torch.nested.nested_tensor(RAGGED, layout=torch.jagged),
    "meta": lambda: torch.ones(4, 3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that it may change these
@pytest.mark.parametrize("name", UNUSUAL)
def test_a_tensor_that_makes_no_array_is_explained(name):
    tensor = UNUSUAL[name]()
    message = (
        r"A tensor of layout torch\.\w+ and dtype torch\.\w+ on \w+ does not convert to an array"
    )
    for read in (
        as_source,
        Images,
        to_numpy,
        lambda labels: as_source(np.zeros((4, 3), np.float32), labels),
        lambda item: next(as_source([item, item]).batches(2)),
        lambda batch: next(as_source(iter([batch])).batches(2)),
    ):
        with pytest.raises(InputError, match=message):
            read(tensor)


def test_tensors_that_numpy_does_not_have_as_they_are():
    plain = torch.tensor([[0.5, -2.0], [8.0, 0.0]])
    for tensor in (
        plain.bfloat16(),
        plain.to(torch.float8_e4m3fn),
        plain.to(torch.float8_e5m2),
        plain.clone().requires_grad_(),
        torch._neg_view(-plain),
    ):
        assert as_source(tensor).images.pixels.tolist() == plain.tolist()
        assert Images(tensor).pixels.tolist() == plain.tolist()
        assert to_numpy(tensor).tolist() == plain.tolist()

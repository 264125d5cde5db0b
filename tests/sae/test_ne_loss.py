from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from polyseme.errors import InputError  # noqa: E402
from polyseme.sae.ne_loss import FORMS, NETerm, RunningMeans, ne_loss  # noqa: E402
from polyseme.sae.pairs import ActivePairs  # noqa: E402
from reference import ne as reference  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")

Tensor = Any
pairs_module = importlib.import_module("polyseme.sae.pairs")

# Sizes at which every path is taken by small tensors: several parts, blocks of few neurons,
# and sparse neurons beside dense ones.
SMALL = {"_CHUNK": 3, "_CACHE": 64, "_NARROWEST": 3}


def paths(small: bool, dense: float) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.multiple(pairs_module, _DENSE=dense, **(SMALL if small else {}))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Inputs, weights, activations and means, with what may go wrong in some of them."""
    B, S, d = draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def chance(*shape: int, p: float) -> Tensor:
        return torch.rand(shape, generator=g) < p

    h, W, means = normal(B, d), normal(S, d), normal(S, d)
    if draw(st.booleans()):  # of one sign, as after a ReLU, and with zeros
        h = h.relu()
    if draw(st.booleans()):
        h += 2 * normal(1, d)
    density = draw(st.sampled_from([0.0, 0.05, 0.2, 0.6, 1.0]))
    a = torch.where(chance(B, S, p=density), normal(B, S).abs() + 0.01, 0)
    a -= torch.where(chance(B, S, p=draw(st.sampled_from([0.0, 0.2]))), 1, 0)
    W *= 10 ** (draw(st.sampled_from([0, 1, 20])) * normal(S, 1).clamp(-1, 1))
    if draw(st.booleans()):
        zero = chance(S, p=0.3)
        W[zero] = 0
        means[chance(S, p=0.3)] = 0
        h[chance(B, p=0.2)] = 0
    if draw(st.booleans()):  # one-hot rows
        some = chance(S, p=0.3)
        W[some] *= torch.nn.functional.one_hot(torch.tensor(d - 1), d)
    h, W, a, means = (x.to(dtype) for x in (h, W, a, means))
    if draw(st.booleans()):  # as in a training step
        running = RunningMeans(S, d, dtype=dtype)
        running.update(h, a)
        means = running.means
    if draw(st.booleans()):  # as an encoder of shape (d_in, d_sae) is read
        W = W.T.contiguous().T
    return {"h": h, "W": W, "a": a, "means": means}


def as_layout(a: Tensor, layout: str) -> Tensor:
    if layout == "dense":
        return a
    if layout == "csr":
        return a.to_sparse_csr()
    coo = a.to_sparse_coo()
    if layout == "coo":
        return coo
    indices, values = coo.indices(), coo.values()
    if layout == "rows":  # as SAELens's TopK gives it: in order of rows, zeros stored as well
        rows, columns = torch.cartesian_prod(*map(torch.arange, a.shape)).reshape(-1, 2).T
        mixed = torch.randperm(a.shape[1])
        columns = mixed[columns]
        return torch.sparse_coo_tensor(
            torch.stack([rows, columns]), a[rows, columns], a.shape, check_invariants=True
        )
    order = torch.randperm(len(values)).repeat(2)  # in disorder, each in two halves
    return torch.sparse_coo_tensor(
        indices[:, order], values[order] / 2, a.shape, check_invariants=True
    )


LAYOUTS = ("dense", "coo", "csr", "rows", "halves")


def assert_equal(given: Tensor, expected: Tensor, scale: Tensor | float) -> None:
    """To 1e-5 relative; where terms cancel, to the rounding of terms of this scale."""
    rounding = 64 * torch.finfo(given.dtype).eps
    error = (given.double() - expected).abs()
    bound = 1e-5 * expected.abs() + rounding * torch.as_tensor(scale).double()
    assert (error <= bound).all(), (given, expected)


def natural_scale(W: Tensor, a: Tensor) -> Tensor:
    """Bound of a term of the gradient: share of the neuron's pairs over its row's entries."""
    share = (a > 0).sum(0) / max(1, int((a > 0).sum()))
    return share[:, None] / torch.where(W == 0, torch.inf, W.double().abs())


@settings(max_examples=250)
@given(
    problem=problems(),
    form=st.sampled_from(FORMS),
    layout=st.sampled_from(LAYOUTS),
    small=st.booleans(),
    dense=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_loss_and_gradient_are_those_of_the_definition(
    problem: dict[str, Tensor], form: str, layout: str, small: bool, dense: float
) -> None:
    h, W, a, means = problem.values()
    W, W_ref = (W.clone().requires_grad_() for _ in range(2))
    a, a_ref = (a.clone().requires_grad_() for _ in range(2))
    expected = reference.loss(h, W_ref, a_ref, means, form)
    by_W, by_a = torch.autograd.grad(expected, (W_ref, a_ref), allow_unused=True)
    with paths(small, dense):
        loss = ne_loss(h, W, as_layout(a, layout), means, form=form)
    assert loss.shape == ()
    assert loss.dtype == W.dtype
    assert_equal(loss, expected, 1.0)
    if form == "unweighted":
        assert_equal(torch.autograd.grad(loss, a)[0], by_a, 1 / float(a.detach().relu().sum() or 1))
    else:
        assert_equal(torch.autograd.grad(loss, W)[0], by_W, natural_scale(W.detach(), a))


@pytest.mark.parametrize("form", ["weighted", "calibrated"])
@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_gradient_is_that_of_differences(form: str, dense: float) -> None:
    h, W, m = (torch.randn(n, 4, dtype=torch.float64) for n in (9, 5, 5))
    a = torch.randn(9, 5).relu()
    with paths(True, dense):
        assert torch.autograd.gradcheck(
            lambda w: 3 * ne_loss(h, w, a, m, form=form), W.requires_grad_()
        )


def test_unweighted_gradient_is_that_of_differences() -> None:
    h, W, m = (torch.randn(n, 4, dtype=torch.float64) for n in (9, 5, 5))
    a = torch.rand(9, 5, dtype=torch.float64).add_(0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ne_loss(h, W, x, m, form="unweighted"), a)


def test_the_background_may_be_given() -> None:
    h, W, m, background = (torch.randn(n, 6) + 0.5 for n in (12, 5, 5, 3))
    a = torch.randn(12, 5).relu()
    given = ne_loss(h, W, a, m, form="calibrated", background=background)
    assert_equal(given, reference.loss(h, W, a, m, "calibrated", background), 1.0)


@pytest.mark.parametrize("n", [63, 64, 65, 100])
def test_the_background_is_of_32_inputs_at_most(n: int) -> None:
    h, W, m = (torch.randn(rows, 6) + 0.5 for rows in (n, 5, 5))
    a = torch.randn(n, 5).relu()
    given = ne_loss(h, W, a, m, form="calibrated")
    assert_equal(given, reference.loss(h, W, a, m, "calibrated"), 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_only_what_a_form_differentiates_gets_a_gradient(form: str) -> None:
    h, W, m = (torch.randn(n, 4, requires_grad=True) for n in (9, 5, 5))
    a = torch.randn(9, 5).relu().requires_grad_()
    ne_loss(h, W, a, m, form=form).backward()
    assert h.grad is None
    assert m.grad is None
    assert (a.grad is None) == (form != "unweighted")
    assert (W.grad is None) == (form == "unweighted")
    with torch.no_grad():
        assert not ne_loss(h, W, a, m, form=form).requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(form: str, dtype: torch.dtype) -> None:
    h, W, m = (torch.randn(n, 4).to(dtype) for n in (9, 5, 5))
    a = torch.randn(9, 5).relu().to(dtype).requires_grad_()
    loss = ne_loss(h, W.requires_grad_(), a, m, form=form)
    assert loss.dtype == torch.float32
    assert_equal(loss, reference.loss(h, W, a, m, form), 1.0)
    loss.backward()
    changed = a if form == "unweighted" else W
    assert changed.grad.dtype == dtype


@pytest.mark.parametrize("n_neurons", [300, 70_000])
def test_pairs_are_in_order_of_neurons_then_inputs(n_neurons: int) -> None:
    a = torch.rand(5, n_neurons) - 0.9
    a[:, ::50] = 1
    neurons, inputs = (a.T > 0).nonzero().unbind(1)
    for layout in ("dense", "coo", "halves"):
        pairs = ActivePairs(as_layout(a, layout))
        assert torch.equal(pairs.inputs, inputs)
        assert torch.equal(pairs.neurons, neurons)
        assert torch.equal(pairs.counts, (a > 0).sum(0))


# The running means.


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    small=st.booleans(),
    dense=st.sampled_from([0.0, 0.3, 1.0]),
    layout=st.sampled_from(["dense", "coo"]),
)
def test_running_means_are_those_of_the_definition(
    seed: int, momentum: float, sizes: list[int], small: bool, dense: float, layout: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    S, d = 7, 8
    running = RunningMeans(S, d, momentum, dtype=torch.float64)
    plain = reference.RunningMeans(S, d, momentum)
    for B in sizes:
        h = torch.randn(B, d, generator=g, dtype=torch.float64)
        a = (torch.randn(B, S, generator=g) - torch.arange(S) / 3).relu()
        with paths(small, dense):
            running.update(h, as_layout(a, layout))
        plain.update(h, a)
    torch.testing.assert_close(running.means, plain.tensor())
    assert running.seen.tolist() == [mean is not None for mean in plain.means]


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, float("nan"), "0.9", None])
def test_momentum_out_of_range(momentum: Any) -> None:
    with pytest.raises(
        InputError, match=r"momentum is .*; expected a number of at least 0 and below 1"
    ):
        RunningMeans(3, 2, momentum)
    with pytest.raises(InputError, match="momentum"):
        NETerm(1.0, 3, 2, momentum)


def test_state_goes_round() -> None:
    h, a = torch.randn(2, 6, 4), torch.randn(2, 6, 5).relu()
    a[:, :, 0] = 0
    first, second = NETerm(1.0, 5, 4), NETerm(1.0, 5, 4)
    first.running.update(h[0], a[0])
    state = first.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "means": torch.float32,
        "seen": torch.bool,
    }
    kept = {name: value.clone() for name, value in state.items()}
    second.load_state_dict(state)
    for term in (first, second):
        term.running.update(h[1], a[1])
    assert torch.equal(first.running.means, second.running.means)
    assert torch.equal(first.running.seen, second.running.seen)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    with pytest.raises(InputError, match=r"no 'seen', only \['means'\]"):
        second.load_state_dict({"means": state["means"]})
    with pytest.raises(InputError, match=r"'means' has shape \(5, 4\); expected \(6, 4\)"):
        NETerm(1.0, 6, 4).load_state_dict(state)


# A training step.


@pytest.mark.parametrize("form", FORMS)
def test_a_step_updates_the_means_and_gives_the_loss(form: str) -> None:
    d, S = 6, 20
    term, running = NETerm(0.5, S, d, 0.8, form), RunningMeans(S, d, 0.8)
    W = torch.randn(d, S, requires_grad=True)
    for B in (30, 9, 40):
        h = torch.randn(B, d)
        a = ((h @ W).detach() - 2).relu().requires_grad_()
        running.update(h, a)
        expected = ne_loss(h, W.T, a, running.means, form=form)
        loss = term.step(h, W.T, a)
        assert torch.equal(term.running.means, running.means)
        torch.testing.assert_close(loss, expected)
        leaf = a if form == "unweighted" else W
        torch.testing.assert_close(
            torch.autograd.grad(2 * loss, leaf), torch.autograd.grad(2 * expected, leaf)
        )


def test_gradients_of_steps_add_up() -> None:
    term = NETerm(1.0, 5, 4)
    W, total = torch.randn(5, 4, requires_grad=True), torch.zeros(5, 4)
    for _ in range(3):
        h, a = torch.randn(6, 4), torch.randn(6, 5).relu()
        term.step(h, W, a).backward()
        total += torch.autograd.grad(ne_loss(h, W, a, term.running.means), W)[0]
    torch.testing.assert_close(W.grad, total)


def test_a_steps_gradient_is_given_once() -> None:
    W = torch.randn(5, 4, requires_grad=True)
    loss = NETerm(1.0, 5, 4).step(torch.randn(6, 4), W, torch.ones(6, 5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_means_move_to_a_device() -> None:
    term = NETerm(1.0, 5, 4)
    term.to("meta")
    assert {value.device.type for value in term.state_dict().values()} == {"meta"}


# What it takes.


class _Sizes(TorchDispatchMode):
    """Numbers of elements of all tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.layout is torch.strided:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_no_tensor_of_pairs_times_dimensions(form: str, density: float) -> None:
    B, S, d = 96, 80, 64
    h, W = torch.randn(B, d), torch.randn(d, S, requires_grad=True)
    a = torch.rand(B, S) * (torch.rand(B, S) < density)
    a.requires_grad_()
    term = NETerm(1.0, S, d, form=form)
    with _Sizes() as sizes:
        term.step(h, W.T, a).backward()
    assert 0 < sizes.largest <= max(B * S, B * d, S * d)
    assert sizes.largest < (a > 0).sum() * d
    with _Sizes() as sizes:
        reference.loss(h, W.T, a, term.running.means, form)
    assert sizes.largest >= B * S * d


# The trap.


def collapsing(n_inputs: int = 600, d: int = 24) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows on their way to one coordinate, on inputs that have no behaviours to find."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        h = torch.randn(n_inputs, d, generator=g, dtype=torch.float64)
        towards = torch.zeros(d, dtype=torch.float64)
        towards[seed] = 1
        rest = torch.randn(d, generator=g, dtype=torch.float64) / d**0.5
        rest[seed] = 0
        W = (towards + rest)[None].requires_grad_()
        yield h, W, (h @ W.T).detach().relu(), rest


def test_collapse_pays_in_the_weighted_form_and_not_in_the_calibrated_one() -> None:
    for h, W, a, rest in collapsing():
        running = RunningMeans(1, h.shape[1], dtype=h.dtype)
        running.update(h, a)
        pays = {
            form: float(
                torch.autograd.grad(ne_loss(h, W, a, running.means, form=form, **extra), W)[0][0]
                @ rest
            )
            for form, extra in (("weighted", {}), ("calibrated", {"background": h}))
        }
        # Downhill is towards one coordinate, by the weighted form.
        assert pays["weighted"] > 0.05
        assert pays["calibrated"] < 0.2 * pays["weighted"]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), signed=st.booleans())
def test_a_one_hot_row_has_no_loss_and_earns_nothing(seed: int, signed: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(50, 6, generator=g, dtype=torch.float64)
    h = h if signed else h.abs()
    W = torch.zeros(6, 6, dtype=torch.float64)
    W.diagonal().copy_(torch.randn(6, generator=g, dtype=torch.float64))
    a = (h @ W.T).relu()
    running = RunningMeans(6, 6, dtype=h.dtype)
    running.update(h, a)
    for form in ("weighted", "calibrated"):
        W.requires_grad_()
        loss = ne_loss(h, W, a, running.means, form=form)
        assert abs(loss.item()) < 1e-12
        (gradient,) = torch.autograd.grad(loss, W)
        assert gradient.abs().max() < 1e-12


# Bad input.


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((9,), (5, 4), (9, 5), (5, 4)),
            r"h has shape \(9,\); expected two dimensions \(inputs, d_in\)",
        ),
        (
            ((9, 4), (5, 4), (5,), (5, 4)),
            r"a has shape \(5,\); expected two dimensions \(inputs, d_sae\)",
        ),
        (
            ((9, 4), (5, 4), (8, 5), (5, 4)),
            r"a has shape \(8, 5\) and h has shape \(9, 4\); expected the same",
        ),
        (((9, 4), (4, 5), (9, 5), (5, 4)), r"W has shape \(4, 5\); .* = \(5, 4\).* Transpose it"),
        (
            ((9, 4), (6, 4), (9, 5), (5, 4)),
            r"W has shape \(6, 4\); expected \(d_sae, d_in\) = \(5, 4\)",
        ),
        (((9, 4), (5, 4), (9, 5), (5, 3)), r"means has shape \(5, 3\); .* match h of shape"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ne_loss(*(torch.ones(shape) for shape in shapes))


def test_other_bad_input() -> None:
    h, W, a, m = (torch.ones(shape) for shape in ((9, 4), (5, 4), (9, 5), (5, 4)))
    with pytest.raises(InputError, match=r"Unknown form of the NE loss: 'weigthed'. Did you mean"):
        ne_loss(h, W, a, m, form="weigthed")
    with pytest.raises(InputError, match="Must be one of: weighted, unweighted, calibrated"):
        NETerm(1.0, 5, 4, form="?")
    with pytest.raises(InputError, match="only form='calibrated' uses one"):
        ne_loss(h, W, a, m, background=h)
    with pytest.raises(InputError, match=r"background has shape \(9, 3\); .* = \(K, 4\)"):
        ne_loss(h, W, a, m, form="calibrated", background=torch.ones(9, 3))
    with pytest.raises(InputError, match=r"means has shape \(5, 4\); .* = \(6, 4\)"):
        RunningMeans(5, 4).update(h, torch.ones(9, 6))

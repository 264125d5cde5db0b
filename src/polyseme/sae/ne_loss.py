"""The neuron embedding (NE) loss, computed on active pairs only.

Source: A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
A pair (b, j) is active where the activation a_bj of neuron j on input h_b is positive, P is
the number of active pairs, w_j is row j of W, and m_j the running mean of the inputs that
activated neuron j. With D(x, y) = 1 - cos(x, y), and D = 1 where x or y is zero:

``"weighted"``, the paper's
    L = 1/P · Σ_bj D(h_b ⊙ w_j, m_j ⊙ w_j). It is 0 for a row with one non-zero entry,
    whatever activates its neuron, so rows can satisfy it by collapsing.
``"unweighted"``, a remedy
    L = Σ_bj a_bj D(h_b, m_j) / Σ_bj a_bj. The weights are not in the distance, so nothing is
    gained by a collapse; the gradient reaches the SAE through the activations. Scoring the
    inputs as they are, weighted by the activation, is the idea of MonoLoss (A. Nasiri-Sarvi
    et al., arXiv 2602.12403, 2026), which compares inputs of one batch in pairs.
``"calibrated"``, a remedy
    L = 1/P · Σ_bj [D(h_b ⊙ w_j, m_j ⊙ w_j) - D'_j], where D'_j is the same quantity on K
    background inputs h'_k, which carry no signal: with s_kj = sign(w_j·h'_k), which turns an
    input to the side that activates the neuron, and r_j = 1/K · Σ_k s_kj h'_k,
    D'_j = 1/K · Σ_k D(s_kj h'_k ⊙ w_j, r_j ⊙ w_j). A row with one non-zero entry has D'_j = 0
    too, so it earns nothing. Without the turning, inputs of both signs would have D'_j near 1
    there, and a collapse would pay.

No gradient flows through h, m or the background. With W2 = W ∘ W and, for each pair,
N = h_b·(W2_j ∘ m_j), A² = h_b²·W2_j, B² = m_j²·W2_j, the cosine is N/(AB) and the gradient

    dL/dW2_j = 1/P · Σ_b [ -h_b ∘ m_j / (AB) + N/(2A³B) h_b² + N/(2AB³) m_j² ],
    dL/dW_j = 2 W_j ∘ dL/dW2_j,

so that all is made of two products over the pattern of active pairs: of each pair the inner
product of a row of one matrix and a row of another, and of each neuron a weighted sum of
inputs (`polyseme.sae.pairs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyseme.errors import InputError, one_of
from polyseme.sae.pairs import ActivePairs, Block, Parts, column_parts, every_pair, split

FORMS = ("weighted", "unweighted", "calibrated")

# Rows of the default background of the calibrated form.
BACKGROUND = 32


class _Memory:
    """Tensors that one step leaves to the next: taking new memory costs more than filling it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Any values in the shape of a tensor, in one piece."""
        kept = self._kept.get(name)
        fits = kept is not None and kept.dtype == dtype and kept.device == like.device
        if kept is None or not fits or len(kept) < like.numel():
            kept = self._kept[name] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return kept[: like.numel()].view(like.shape)

    def copy(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy, kept for the next of that name."""
        return self.take(name, x, dtype).copy_(x)

    def product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """x ∘ y, kept for the next of that name."""
        return torch.mul(x, y, out=self.take(name, x, x.dtype))


@dataclass
class _Compared:
    """Pairs whose vectors were compared, with what their gradient is made of."""

    pairs: Block
    distances: Tensor
    cosines: Tensor
    inverse: Tensor
    """1/(AB) of each pair, with the sign of its side."""
    inverse_a2: Tensor
    inverse_b2: Tensor
    """1/B² of each neuron."""

    def gradient(
        self, inputs: Parts, squares: Parts, means: Parts, share: Tensor
    ) -> Iterator[Tensor]:
        """2 · dL/dW2, part by part, where each pair's distance counts in L with its share."""
        by_inputs = -2 * share * self.inverse
        by_norms = share * self.cosines
        by_means = torch.zeros_like(self.inverse_b2).index_add_(0, self.pairs.owners, by_norms)
        by_means = by_means.mul_(self.inverse_b2)[:, None]
        of_inputs = self.pairs.sums(inputs, by_inputs)
        of_squares = self.pairs.sums(squares, by_norms.mul_(self.inverse_a2))
        for first, second, m in zip(of_inputs, of_squares, means, strict=True):
            yield second.addcmul_(first.addcmul_(m, by_means), m)


def _compare(
    pairs: Block,
    inputs: Parts,
    squares: Parts,
    w2: Parts | None,
    means: Parts,
    memory: _Memory,
    side: Tensor | None = None,
) -> _Compared:
    """Distance of each pair, weighted by ``w2``, or as they are without it.

    ``side`` is -1, 0 or 1 for each pair, and turns its input.
    """
    if w2 is None:
        numerator = pairs.products(inputs, means)
        a2 = _total([x.sum(1) for x in squares])[pairs.inputs]
        b2 = _total([m.square().sum(1) for m in means])
    else:
        scaled = [
            memory.product(f"scaled{k}", w, m)
            for k, (w, m) in enumerate(zip(w2, means, strict=True))
        ]
        numerator = pairs.products(inputs, scaled)
        a2 = pairs.products(squares, w2)
        b2 = _total([w.mul_(m).sum(1) for w, m in zip(scaled, means, strict=True)])
    # Where a vector is zero, so are the cosine and all its derivatives.
    inverse_a2 = torch.where(a2 > 0, 1 / a2, 0)
    inverse_b2 = torch.where(b2 > 0, 1 / b2, 0)
    inverse = inverse_a2.sqrt().mul_(inverse_b2.sqrt()[pairs.owners])
    if side is not None:
        inverse *= side
    cosines = (numerator * inverse).clamp_(-1, 1)
    return _Compared(pairs, 1 - cosines, cosines, inverse, inverse_a2, inverse_b2)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def _raw_distances(pairs: ActivePairs, h: Tensor, means: Tensor, memory: _Memory) -> Tensor:
    """(P,): D(h_b, m_j) of each active pair."""
    columns = column_parts(h)
    inputs, squares = split(h, columns), split(h.square(), columns)
    out = h.new_empty(len(pairs))
    for block in pairs.blocks():
        if len(block.inputs):
            m = split(block.of(means), columns)
            out[block.pairs] = _compare(block, inputs, squares, None, m, memory).distances
    return out


def _weighted_loss(
    pairs: ActivePairs,
    h: Tensor,
    W: Tensor,
    means: Tensor,
    background: Tensor | None,
    memory: _Memory,
    differentiate: bool,
) -> tuple[Tensor, Tensor | None]:
    """The weighted form, less that of the background if there is one, and its gradient by W."""
    loss = h.new_zeros(())
    gradient = torch.empty_like(W, dtype=h.dtype) if differentiate else None
    columns = column_parts(h)
    inputs, squares = split(h, columns), split(h.square(), columns)
    if background is not None:
        noise, noise_squares = split(background, columns), split(background.square(), columns)
    share = 1 / max(1, len(pairs))
    for block in pairs.blocks():
        if not len(block.inputs):
            if gradient is not None:
                gradient[block.neurons] = 0
            continue
        # A cosine does not depend on the length of a row; this keeps the squares in range.
        w = [memory.copy(f"w{k}", block.of(W[:, part]), h.dtype) for k, part in enumerate(columns)]
        length = torch.stack([torch.maximum(x.amax(1), -x.amin(1)) for x in w]).amax(0)
        length = torch.where(length > 0, length, 1)
        w2 = [memory.product(f"w2{k}", x.div_(length[:, None]), x) for k, x in enumerate(w)]
        m = [block.of(means)[:, part] for part in columns]
        compared = _compare(block, inputs, squares, w2, m, memory)
        loss += share * compared.distances.sum()
        changes = (
            compared.gradient(inputs, squares, m, (share / length)[block.owners])
            if differentiate
            else None
        )
        if background is not None:
            every = every_pair(len(length), len(background), h.device)
            side = _total([x @ y.T for x, y in zip(w, noise, strict=True)]).sign_()
            turned = [side @ x / len(background) for x in noise]
            shares = block.of(pairs.counts) * (-share / len(background))
            compared = _compare(every, noise, noise_squares, w2, turned, memory, side.view(-1))
            loss += compared.distances @ shares[every.owners]
            less = compared.gradient(noise, noise_squares, turned, (shares / length)[every.owners])
            if changes is not None:
                changes = (x.add_(y) for x, y in zip(changes, less, strict=True))
        if gradient is not None and changes is not None:
            for part, change, x in zip(columns, changes, w, strict=True):
                gradient[block.neurons, part] = change.mul_(x)
    return loss, gradient


class _Known(torch.autograd.Function):
    """A value whose gradient was computed together with it."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, value: Tensor, gradient: Tensor, once: bool) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.once, ctx.dtype = once, W.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        # Changed in place it cannot be given again: torch refuses what was saved and changed.
        (gradient,) = ctx.saved_tensors
        gradient = gradient.mul_(upstream) if ctx.once else gradient * upstream
        return gradient.to(ctx.dtype), None, None, None


def ne_loss(
    h: Tensor,
    W: Tensor,
    a: Tensor | ActivePairs,
    means: Tensor,
    *,
    form: str = "weighted",
    background: Tensor | None = None,
) -> Tensor:
    """How unlike the inputs that activate a neuron are, as the neuron reads them.

    Parameters
    ----------
    h : Tensor
        (B, d) inputs.
    W : Tensor
        (S, d) rows of the encoder.
    a : Tensor
        (B, S) activations, dense or sparse. Only the positive ones count. `ActivePairs` of
        them will do, so that a training step finds them once.
    means : Tensor
        (S, d) running means of the inputs that activated each neuron; zero for none yet.
    form : {"weighted", "unweighted", "calibrated"}
        The paper's loss, or a remedy against the collapse of rows to one coordinate: see the
        formulas at the top of this module.
    background : Tensor, optional
        (K, d) inputs for the calibrated form, taken without regard to the activations.
        Without it, 32 rows of ``h`` at even distances.

    Returns
    -------
    Tensor
        A scalar, 0 if nothing is active. Differentiable in ``W``; the unweighted form in ``a``
        instead.

    Raises
    ------
    InputError
        If shapes do not fit, or the form is unknown.
    """
    _check(h, a, W, means)
    if form not in FORMS:
        raise InputError(one_of("form of the NE loss", str(form), FORMS))
    if background is not None:
        _check_background(background, form, h.shape[1])
    return _ne_loss(h, W, a, means, form, background)


def _ne_loss(
    h: Tensor,
    W: Tensor,
    a: Tensor | ActivePairs,
    means: Tensor,
    form: str,
    background: Tensor | None,
    memory: _Memory | None = None,
) -> Tensor:
    """`ne_loss`; with a memory, which is for one step at a time, its gradient is given once."""
    once = memory is not None
    memory = memory or _Memory()
    pairs = a if isinstance(a, ActivePairs) else ActivePairs(a)
    dtype = torch.promote_types(torch.promote_types(W.dtype, h.dtype), torch.float32)
    means = means.detach().to(dtype)
    h = h.detach().to(dtype)
    if form == "unweighted":
        with torch.no_grad():
            distances = _raw_distances(pairs, h, means, memory)
        values = pairs.values().to(dtype)
        return values @ distances / values.sum() if len(pairs) else values.sum()
    if form == "calibrated":
        if background is None:
            background = h[:: max(1, len(h) // BACKGROUND)][:BACKGROUND]
        background = background.detach().to(dtype)
    differentiate = W.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        loss, gradient = _weighted_loss(
            pairs, h, W.detach(), means, background, memory, differentiate
        )
    if gradient is None:
        return loss
    return cast(Tensor, _Known.apply(W, loss, gradient, once))  # type: ignore[no-untyped-call]


def _check(h: Tensor, a: Tensor | ActivePairs, *rows: Tensor) -> None:
    """Shapes of inputs (B, d), activations (B, S), and weights and means (S, d)."""
    shape = (a.n_inputs, a.n_neurons) if isinstance(a, ActivePairs) else tuple(a.shape)
    for name, given in (("h", tuple(h.shape)), ("a", shape)):
        if len(given) != 2:
            axes = "(inputs, d_in)" if name == "h" else "(inputs, d_sae)"
            raise InputError(f"{name} has shape {given}; two dimensions {axes} are expected.")
    if shape[0] != len(h):
        raise InputError(
            f"a has shape {shape} and h has shape {tuple(h.shape)}; as many rows in both are "
            "expected, one for each input."
        )
    for name, x in zip(("W", "means") if len(rows) == 2 else ("means",), rows, strict=True):
        expected = (shape[1], h.shape[1])
        if tuple(x.shape) != expected:
            hint = ""
            if tuple(x.shape) == expected[::-1]:
                hint = " Transpose it: a row for each neuron."
            raise InputError(
                f"{name} has shape {tuple(x.shape)}; (d_sae, d_in) = {expected} is expected, to "
                f"go with h of shape {tuple(h.shape)} and a of shape {shape}.{hint}"
            )


def _check_background(background: Tensor, form: str, d_in: int) -> None:
    if form != "calibrated":
        raise InputError(
            f"background was given with form={form!r}; only form='calibrated' has one."
        )
    if background.ndim != 2 or background.shape[1] != d_in or not len(background):
        raise InputError(
            f"background has shape {tuple(background.shape)}; (K, d_in) = (K, {d_in}) with K of "
            "at least 1 is expected."
        )


class RunningMeans:
    """Of each neuron, the running mean of the inputs that activate it.

    A neuron's first active batch sets its mean; each later one moves it:
    ``momentum · mean + (1 - momentum) · mean of the batch's inputs that activate it``. A
    neuron that is not active in a batch keeps its mean.

    Parameters
    ----------
    d_sae, d_in : int
        Numbers of neurons and of their inputs.
    momentum : float, default 0.9
        In [0, 1).
    device, dtype : optional
        Of the means; torch's defaults without them.

    Attributes
    ----------
    means : Tensor
        (d_sae, d_in); zero for a neuron that was never active.
    seen : Tensor
        (d_sae,) bool: which neurons were ever active.
    """

    def __init__(
        self,
        d_sae: int,
        d_in: int,
        momentum: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (isinstance(momentum, int | float) and 0 <= momentum < 1):
            raise InputError(
                f"momentum is {momentum!r}; a number of at least 0 and below 1 is expected: the "
                "share of the old mean that stays. The published value is 0.9."
            )
        self.momentum = float(momentum)
        self.means = torch.zeros((d_sae, d_in), device=device, dtype=dtype)
        self.seen = torch.zeros(d_sae, dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, h: Tensor, a: Tensor | ActivePairs) -> None:
        """Take in a batch: (B, d_in) inputs and (B, d_sae) activations, dense or sparse."""
        _check(h, a, self.means)
        pairs = a if isinstance(a, ActivePairs) else ActivePairs(a)
        h = h.detach().to(self.means.dtype)
        columns = column_parts(h)
        inputs, one = split(h, columns), h.new_ones(len(pairs))
        active = pairs.counts > 0
        kept = torch.where(self.seen, self.momentum, 0.0).to(h.dtype)
        kept = torch.where(active, kept, 1)[:, None]
        each = (1 - kept) / pairs.counts.clamp(min=1)[:, None]
        for block in pairs.blocks():
            if not len(block.inputs):
                continue
            old, new = block.of(kept), block.of(each)
            for part, total in zip(columns, block.sums(inputs, one[block.pairs]), strict=True):
                means = block.of(self.means[:, part]).mul_(old).addcmul_(total, new)
                if isinstance(block.neurons, Tensor):
                    self.means[block.neurons, part] = means
        self.seen |= active

    def to(self, device: torch.device | str) -> None:
        """Move the means."""
        self.means, self.seen = self.means.to(device), self.seen.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of ``means`` and ``seen``."""
        return {"means": self.means.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        InputError
            If a tensor is missing or of another shape.
        """
        for name, own in (("means", self.means), ("seen", self.seen)):
            if name not in state:
                raise InputError(
                    f"The state of the running means has no {name!r}, only {sorted(state)}; load "
                    "what state_dict() gave."
                )
            if state[name].shape != own.shape:
                raise InputError(
                    f"The state's {name!r} has shape {tuple(state[name].shape)}; "
                    f"{tuple(own.shape)} is expected: it belongs to an SAE of another size."
                )
        self.means.copy_(state["means"])
        self.seen.copy_(state["seen"])


class NETerm:
    """The NE loss as a term of a training loss, with the running means that it needs.

    Parameters
    ----------
    coefficient : float
        Factor of the loss, for the caller to apply. It may change between steps.
    d_sae, d_in, momentum, device, dtype
        As for `RunningMeans`.
    form : {"weighted", "unweighted", "calibrated"}
        As for `ne_loss`.

    Attributes
    ----------
    running : RunningMeans
        The running means.
    """

    def __init__(
        self,
        coefficient: float,
        d_sae: int,
        d_in: int,
        momentum: float = 0.9,
        form: str = "weighted",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if form not in FORMS:
            raise InputError(one_of("form of the NE loss", str(form), FORMS))
        self.coefficient = coefficient
        self.form = form
        self.running = RunningMeans(d_sae, d_in, momentum, device, dtype)
        self._memory = _Memory()

    def step(self, h: Tensor, W: Tensor, a: Tensor) -> Tensor:
        """Take the batch into the means, then give the loss.

        Parameters
        ----------
        h, W, a : Tensor
            (B, d_in) inputs, (d_sae, d_in) rows of the encoder, (B, d_sae) activations.

        Returns
        -------
        Tensor
            The loss, to be added to the training loss times ``coefficient``.
        """
        _check(h, a, W, self.running.means)
        pairs = ActivePairs(a)
        self.running.update(h, pairs)
        return _ne_loss(h, W, pairs, self.running.means, self.form, None, self._memory)

    def to(self, device: torch.device | str) -> None:
        """Move the running means."""
        self.running.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the running means."""
        return self.running.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.running.load_state_dict(state)

"""The neuron embedding (NE) loss, computed on active pairs only.

Source: A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
A pair (b, j) is active if the activation a_bj of neuron j on input h_b is positive, P is the number
of active pairs, w_j is row j of W, and m_j is the running mean of the inputs that activated neuron
j. With D(x, y) = 1 - cos(x, y), and D = 1 if x or y is zero:

``"weighted"``, the paper's
    L = 1/P · Σ_bj D(h_b ⊙ w_j, m_j ⊙ w_j). It is 0 for a row with one non-zero entry,
    whatever activates its neuron, so rows can satisfy it by collapsing.
``"unweighted"``, a remedy
    L = Σ_bj a_bj D(h_b, m_j) / Σ_bj a_bj. The distance does not involve the weights, so a collapse
    gains nothing; the gradient reaches the SAE through the activations. Scoring raw inputs,
    weighted by activation, is the idea of MonoLoss (A. Nasiri-Sarvi et al., arXiv 2602.12403,
    2026), which compares pairs of inputs in a batch.
``"calibrated"``, a remedy
    L = 1/P · Σ_bj [D(h_b ⊙ w_j, m_j ⊙ w_j) - D'_j], where D'_j is the same quantity on K background
    inputs h'_k, which carry no signal: with s_kj = sign(w_j·h'_k), which flips an input to the side
    that activates the neuron, and r_j = 1/K · Σ_k s_kj h'_k, D'_j = 1/K · Σ_k D(s_kj h'_k ⊙ w_j,
    r_j ⊙ w_j). A row with one non-zero entry has D'_j = 0 too, so it gains nothing. Without the
    sign flip, inputs of both signs would have D'_j near 1 there, and a collapse would pay off.

No gradient flows through h, m or the background. With W2 = W ∘ W and, for each pair,
N = h_b·(W2_j ∘ m_j), A² = h_b²·W2_j, B² = m_j²·W2_j, the cosine is N/(AB) and the gradient

    dL/dW2_j = 1/P · Σ_b [ -h_b ∘ m_j / (AB) + N/(2A³B) h_b² + N/(2AB³) m_j² ],
    dL/dW_j = 2 W_j ∘ dL/dW2_j,

so two products over the active pairs are enough (`polyseme.sae.pairs`): for each pair, the inner
product of a row of one matrix and a row of another; for each neuron, a weighted sum of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from polyseme.errors import InputError, one_of
from polyseme.sae.pairs import (
    ActivePairs,
    Block,
    Memory,
    PairBatch,
    Parts,
    every_pair,
    row_products,
    sum_of,
)

FORMS = ("weighted", "unweighted", "calibrated")

# Number of rows of the calibrated form's default background.
BACKGROUND = 32


@dataclass
class _Compared:
    """Compared pairs, with the quantities that make up their gradient."""

    pairs: Block
    batch: PairBatch
    means: Parts
    a2: Tensor
    b2: Tensor
    cosines: Tensor
    inverse_a: Tensor
    inverse: Tensor
    """1/(AB) of each pair, with the sign of its input's side."""

    def out_of_range(self) -> bool:
        """Whether squares are so small or large that precision may be lost; includes zeros."""
        kind = torch.finfo(self.inverse.dtype)
        least, most = (float(end) for end in torch.aminmax(self.inverse))
        return not kind.max**-0.75 <= least <= most <= kind.tiny**-0.75

    def gradient(self, share: Tensor | float) -> Iterator[Tensor]:
        """2 · dL/dW2, part by part, with each pair's distance weighted by its share in L."""
        by_norms = self.cosines * share
        by_means = torch.zeros_like(self.b2).index_add_(0, self.pairs.owners, by_norms)
        by_means = torch.where(self.b2 > 0, by_means / self.b2, 0)[:, None]
        of_inputs = self.pairs.sums(self.batch.inputs, self.inverse * (share * -2))
        of_squares = self.pairs.sums(
            self.batch.squares, by_norms.mul_(self.inverse_a).mul_(self.inverse_a)
        )
        for first, second, m in zip(of_inputs, of_squares, self.means, strict=True):
            yield second.addcmul_(first.addcmul_(m, by_means), m)


def _compare(
    pairs: Block,
    batch: PairBatch,
    w2: Parts | None,
    means: Parts,
    memory: Memory,
    side: Tensor | None = None,
) -> _Compared:
    """Cosine of each pair, weighted by ``w2`` if given.

    ``side`` is -1, 0 or 1 for each pair, and multiplies its input.
    """
    scaled = means if w2 is None else memory.products("scaled", w2, means)
    numerator = pairs.products(batch.inputs, scaled)
    b2 = row_products(scaled, means)
    if w2 is None:
        a2 = row_products(batch.inputs, batch.inputs)[pairs.inputs]
    else:
        a2 = pairs.products(batch.squares, w2)
    # If a vector is zero, so are the cosine and all its derivatives.
    inverse_a, inverse_b = (x.rsqrt().nan_to_num_(nan=torch.nan, posinf=0) for x in (a2, b2))
    inverse = inverse_b[pairs.owners].mul_(inverse_a)
    if side is not None:
        inverse *= side
    cosines = numerator.mul_(inverse).clamp_(-1, 1)
    return _Compared(pairs, batch, means, a2, b2, cosines, inverse_a, inverse)


def _rescaled(rows: Parts) -> tuple[Parts, Tensor]:
    """Rows divided by their largest entries, and these; cosines do not change."""
    length = torch.stack([x.abs().amax(1) for x in rows]).amax(0)
    length = torch.where(length > 0, length, 1)
    return [x / length[:, None] for x in rows], length


def _raw_distances(pairs: ActivePairs, batch: PairBatch, means: Tensor, memory: Memory) -> Tensor:
    """(P,): D(h_b, m_j) of each active pair."""
    out = means.new_empty(len(pairs))
    for block in pairs.blocks():
        if len(block.inputs):
            m = [block.rows_of(means[:, part]) for part in batch.columns]
            out[block.pairs] = 1 - _compare(block, batch, None, m, memory).cosines
    return out


def _weighted_loss(
    pairs: ActivePairs,
    batch: PairBatch,
    W: Tensor,
    means: Tensor,
    background: PairBatch | None,
    memory: Memory,
    differentiate: bool,
) -> tuple[Tensor, Tensor | None]:
    """The weighted form, minus that of the background if given, and its gradient in W."""
    gain = means.new_zeros(())  # mean cosine, minus that of the background
    gradient = torch.empty_like(W, dtype=batch.dtype) if differentiate else None
    share = 1 / max(1, len(pairs))
    for block in pairs.blocks():
        if not len(block.inputs):
            if gradient is not None:
                gradient[block.neurons] = 0
            continue
        w = [block.rows_of(W[:, part]).to(batch.dtype) for part in batch.columns]
        # Every neuron is paired with the background, active or not, so its row is rescaled
        # beforehand.
        length: Tensor | float = 1.0
        if background is not None:
            w, length = _rescaled(w)
        w2 = memory.products("w²", w, w)
        m = [block.rows_of(means[:, part]) for part in batch.columns]
        compared = _compare(block, batch, w2, m, memory)
        if background is None and compared.out_of_range():
            w, length = _rescaled(w)
            w2 = memory.products("w²", w, w)
            compared = _compare(block, batch, w2, m, memory)
        gain += share * compared.cosines.sum()
        shares = share / length
        each = shares[block.owners] if isinstance(shares, Tensor) else shares
        changes = compared.gradient(each)
        if background is not None:
            noise = every_pair(len(compared.b2), background.n_inputs, W.device)
            side = sum_of(x @ y.T for x, y in zip(w, background.inputs, strict=True)).sign_()
            turned = [side @ x / background.n_inputs for x in background.inputs]
            compared = _compare(noise, background, w2, turned, memory, side.view(-1))
            weights = block.counts.to(batch.dtype) * (-share / background.n_inputs)
            gain += compared.cosines @ weights[noise.owners]
            less = compared.gradient((weights / length)[noise.owners])
            changes = (x.add_(y) for x, y in zip(changes, less, strict=True))
        if gradient is not None:
            for part, change, x in zip(batch.columns, changes, w, strict=True):
                if isinstance(block.neurons, slice):
                    # Transposed, as SAELens stores W so: writes are then contiguous.
                    torch.mul(change.T, x.T, out=gradient.T[part, block.neurons])
                else:
                    gradient.T[part, block.neurons] = change.mul_(x).T
    constant = 0 if background is not None or not len(pairs) else 1
    return constant - gain, gradient


class _Known(torch.autograd.Function):
    """A value with a precomputed gradient."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, value: Tensor, gradient: Tensor, once: bool) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.once, ctx.dtype = once, W.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        # Changed in place, so it cannot be returned twice: torch refuses saved tensors that
        # changed.
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
    """Mean distance between a neuron's activating inputs and their mean, as the neuron reads them.

    Parameters
    ----------
    h : Tensor
        (B, d) inputs.
    W : Tensor
        (S, d) rows of the encoder.
    a : Tensor
        (B, S) activations, dense or sparse. Only positive ones count. `ActivePairs` are also
        accepted, so that a training step finds them only once.
    means : Tensor
        (S, d) running means of the inputs that activated each neuron; zero if none yet.
    form : {"weighted", "unweighted", "calibrated"}
        The paper's loss, or a remedy against the collapse of rows to one coordinate: see the
        formulas at the top of this module.
    background : Tensor, optional
        (K, d) inputs for the calibrated form, chosen independently of the activations; by default,
        32 evenly spaced rows of ``h``.

    Returns
    -------
    Tensor
        A scalar, 0 if nothing is active. Differentiable in ``W``, or in ``a`` for the unweighted
        form.

    Raises
    ------
    InputError
        If shapes do not match, or the form is unknown.
    """
    _check(h, a, W, means)
    if form not in FORMS:
        raise InputError(one_of("form of the NE loss", str(form), FORMS))
    if background is not None:
        _check_background(background, form, h.shape[1])
    pairs = a if isinstance(a, ActivePairs) else ActivePairs(a)
    return _ne_loss(h, W, pairs, means, form, background, Memory())


def _ne_loss(
    h: Tensor,
    W: Tensor,
    pairs: ActivePairs,
    means: Tensor,
    form: str,
    background: Tensor | None,
    memory: Memory,
    batch: PairBatch | None = None,
    *,
    once: bool = False,
) -> Tensor:
    """`ne_loss`, reusing a step's memory and, if given, its batch.

    With ``once``, the gradient can be taken only once, which saves a copy of it.
    """
    dtype = torch.promote_types(torch.promote_types(W.dtype, h.dtype), torch.float32)
    means = means.detach().to(dtype)
    if batch is None or batch.dtype != dtype:
        batch = PairBatch(h.detach().to(dtype), "h", memory)
    if form == "unweighted":
        with torch.no_grad():
            distances = _raw_distances(pairs, batch, means, memory)
        values = pairs.values().to(dtype)
        return values @ distances / values.sum() if len(pairs) else values.sum()
    noise = None
    if form == "calibrated":
        if background is None:
            background = h[:: max(1, len(h) // BACKGROUND)][:BACKGROUND]
        noise = PairBatch(background.detach().to(dtype), "background", memory, batch)
    differentiate = W.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        loss, gradient = _weighted_loss(
            pairs, batch, W.detach(), means, noise, memory, differentiate
        )
    if gradient is None:
        return loss
    return cast(Tensor, _Known.apply(W, loss, gradient, once))  # type: ignore[no-untyped-call]


def _check(h: Tensor, a: Tensor | ActivePairs, *rows: Tensor) -> None:
    """Check the shapes of inputs (B, d), activations (B, S), and weights and means (S, d)."""
    shape = (a.n_inputs, a.n_neurons) if isinstance(a, ActivePairs) else tuple(a.shape)
    for name, dims in (("h", tuple(h.shape)), ("a", shape)):
        if len(dims) != 2:
            axes = "(inputs, d_in)" if name == "h" else "(inputs, d_sae)"
            raise InputError(f"{name} has shape {dims}; expected two dimensions {axes}.")
    if shape[0] != len(h):
        raise InputError(
            f"a has shape {shape} and h has shape {tuple(h.shape)}; expected the same number of "
            f"rows, one per input."
        )
    for name, x in zip(("W", "means") if len(rows) == 2 else ("means",), rows, strict=True):
        expected = (shape[1], h.shape[1])
        if tuple(x.shape) != expected:
            hint = ""
            if tuple(x.shape) == expected[::-1]:
                hint = " Transpose it: one row per neuron."
            raise InputError(
                f"{name} has shape {tuple(x.shape)}; expected (d_sae, d_in) = {expected}, to match "
                f"h of shape {tuple(h.shape)} and a of shape {shape}.{hint}"
            )


def _check_background(background: Tensor, form: str, d_in: int) -> None:
    if form != "calibrated":
        raise InputError(
            f"background was given with form={form!r}; only form='calibrated' uses one."
        )
    if background.ndim != 2 or background.shape[1] != d_in or not len(background):
        raise InputError(
            f"background has shape {tuple(background.shape)}; expected (K, d_in) = (K, {d_in}) "
            "with K at least 1."
        )


class RunningMeans:
    """Running mean of the inputs that activate each neuron.

    A neuron's first active batch sets its mean; each later one updates it: ``momentum · mean + (1 -
    momentum) · mean of the batch's inputs that activate it``. A neuron that is inactive in a batch
    keeps its mean.

    Parameters
    ----------
    d_sae, d_in : int
        Number of neurons, and length of their inputs.
    momentum : float, default 0.9
        In [0, 1).
    device, dtype : optional
        Of the means; torch's defaults if not given.

    Attributes
    ----------
    means : Tensor
        (d_sae, d_in); zero for a neuron that was never active.
    seen : Tensor
        (d_sae,) bool: which neurons have ever been active.
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
                f"momentum is {momentum!r}; expected a number of at least 0 and below 1, the share "
                f"of the old mean that is kept. The published value is 0.9."
            )
        self.momentum = float(momentum)
        self.means = torch.zeros((d_sae, d_in), device=device, dtype=dtype)
        self.seen = torch.zeros(d_sae, dtype=torch.bool, device=device)

    @torch.no_grad()
    def update(self, h: Tensor, a: Tensor | ActivePairs) -> None:
        """Add a batch: (B, d_in) inputs and (B, d_sae) activations, dense or sparse."""
        _check(h, a, self.means)
        pairs = a if isinstance(a, ActivePairs) else ActivePairs(a)
        self._update(pairs, PairBatch(h.detach().to(self.means.dtype), "h", Memory()))

    @torch.no_grad()
    def _update(self, pairs: ActivePairs, batch: PairBatch) -> None:
        for block in pairs.blocks():
            if not len(block.inputs):
                continue
            old = torch.where(block.rows_of(self.seen), self.momentum, 0.0).to(batch.dtype)
            old = torch.where(block.counts > 0, old, 1)
            new = ((1 - old) / block.counts.clamp(min=1))[block.owners]
            old = old[:, None]
            for part, change in zip(batch.columns, block.sums(batch.inputs, new), strict=True):
                means = self.means[:, part]
                if isinstance(block.neurons, slice):
                    torch.addcmul(change, block.rows_of(means), old, out=block.rows_of(means))
                else:
                    means[block.neurons] = change.addcmul_(block.rows_of(means), old)
        self.seen |= pairs.counts > 0

    def to(self, device: torch.device | str) -> None:
        """Move the means to a device."""
        self.means, self.seen = self.means.to(device), self.seen.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of ``means`` and ``seen``."""
        return {"means": self.means.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state from `state_dict`.

        Raises
        ------
        InputError
            If a tensor is missing or has another shape.
        """
        for name, current in (("means", self.means), ("seen", self.seen)):
            if name not in state:
                raise InputError(
                    f"The state of the running means has no {name!r}, only {sorted(state)}; load "
                    f"the result of state_dict()."
                )
            if state[name].shape != current.shape:
                raise InputError(
                    f"The state's {name!r} has shape {tuple(state[name].shape)}; expected "
                    f"{tuple(current.shape)}. It belongs to an SAE of another size."
                )
        self.means.copy_(state["means"])
        self.seen.copy_(state["seen"])


class NETerm:
    """The NE loss as a term of a training loss, with its running means.

    Parameters
    ----------
    coefficient : float
        Factor of the loss, which the caller applies. It may change between steps.
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
        self._memory = Memory()

    def step(self, h: Tensor, W: Tensor, a: Tensor) -> Tensor:
        """Update the means with the batch, then compute the loss.

        Its gradient can be taken only once.

        Parameters
        ----------
        h, W, a : Tensor
            (B, d_in) inputs, (d_sae, d_in) rows of the encoder, (B, d_sae) activations.

        Returns
        -------
        Tensor
            The loss, to be multiplied by ``coefficient`` and added to the training loss.
        """
        _check(h, a, W, self.running.means)
        pairs, running = ActivePairs(a), self.running
        batch = PairBatch(h.detach().to(running.means.dtype), "h", self._memory)
        running._update(pairs, batch)
        return _ne_loss(h, W, pairs, running.means, self.form, None, self._memory, batch, once=True)

    def to(self, device: torch.device | str) -> None:
        """Move the running means to a device."""
        self.running.to(device)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the running means."""
        return self.running.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state from `state_dict`."""
        self.running.load_state_dict(state)

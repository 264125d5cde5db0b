"""Token importances, against a loop that masks one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.attribution.token_importances import token_importances
from polyseme.errors import InputError, SiteError
from polyseme.sites import Feed, MLPSite, evaluating, find_mlp_sites, find_sites, prove_sites
from polyseme.sites.attach import WithSAE
from polyseme.sites.layers import LinearSite
from sites.models import ParameterSAE

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, D, N_NEURONS, MASK = 40, 16, 16, 20, 0


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=D, n_layer=3, n_head=2, n_inner=N_NEURONS
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=N_NEURONS,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=N_NEURONS,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


def made(kind: str) -> tuple[nn.Module, MLPSite]:
    """A random model, whose weights are large enough for attention to do something."""
    model = {"gpt2": gpt2, "llama": llama, "bert": bert}[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model, find_mlp_sites(model)[1]


def contexts(m: int = 6, *, padded: bool = True) -> tuple[np.ndarray, ...]:
    """Ids, attention, positions, neurons; places near both ends; padding on the right."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (m, LENGTH))
    lengths = rng.integers(3, LENGTH + 1, m) if padded else np.full(m, LENGTH)
    lengths[0] = LENGTH
    attention = np.arange(LENGTH) < lengths[:, None]
    ids[~attention] = MASK
    positions = rng.integers(lengths // 2, lengths)
    positions[:3] = 0, lengths[1] - 1, lengths[2] // 2
    return ids, attention, positions, rng.integers(0, N_NEURONS, m)


def last(steps: Iterator[tuple[float, Any]]) -> np.ndarray:
    found = list(steps)
    shares = [share for share, _ in found]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(result is None for _, result in found[:-1])
    assert found[-1][1].dtype == np.float32
    return found[-1][1]


@torch.no_grad()
def activations_of(model: nn.Module, site: Any, ids: np.ndarray) -> np.ndarray:
    """All activations of one unpadded context (L, n_neurons), by running all of the model."""
    seen: list[Tensor] = []
    handle = site.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()
    model(torch.from_numpy(ids)[None])
    handle.remove()
    return seen[0][0].numpy().astype(float)


def drops_by_masking(
    model: nn.Module, site: Any, ids: np.ndarray, p: int, j: int
) -> tuple[float, list[float]]:
    """The activation, and how much it drops if each token of the context is masked."""
    activation = activations_of(model, site, ids)[p, j]
    drops = []
    for t in range(len(ids)):
        masked = ids.copy()
        masked[t] = MASK
        drops.append(activation - activations_of(model, site, masked)[p, j])
    return activation, drops


def oracle(
    drops_of: Any,
    model: nn.Module,
    site: Any,
    data: tuple[np.ndarray, ...],
    before: int,
    after: int,
) -> np.ndarray:
    out = np.full((len(data[0]), before + 1 + after), np.nan)
    for row, (ids, attention, p, j) in enumerate(zip(*data, strict=True)):
        ids = ids[: attention.sum()]
        activation, drops = drops_of(model, site, ids, p, j)
        for column in range(before + 1 + after):
            t = p + column - before
            if not 0 <= t < len(ids):
                continue
            if t == p:
                out[row, column] = 1
            elif drops[p] > 1e-4 * abs(activation):
                out[row, column] = min(max(drops[t] / drops[p], 0), 1)
            elif activation > 0:
                out[row, column] = min(max(drops[t] / activation, 0), 1)
            else:
                out[row, column] = 0
    return out


# --- by masking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_importances_equal_a_loop_over_the_tokens(kind: str) -> None:
    model, site = made(kind)
    data = contexts()
    for row, (ids, attention, p, _) in enumerate(zip(*data, strict=True)):
        data[3][row] = activations_of(model, site, ids[: attention.sum()])[p].argmax()
    options = {"mask_id": MASK, "before": 5, "after": 3, "causal": kind != "bert"}
    found = last(token_importances(model, site, *data, **options, batch_size=7))
    expected = oracle(drops_by_masking, model, site, data, 5, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    # It is no trivial agreement: some are between the ends, and some were clipped to them.
    others = np.delete(found, 5, axis=1)
    assert ((others > 0.01) & (others < 0.99)).sum() > 5
    assert (others == 0).any()
    if kind == "bert":
        assert (found[:, 6:] > 0).any()
    else:
        after = found[:, 6:]
        assert (after[np.isfinite(after)] == 0).all()


def test_the_window_is_twenty_before_and_ten_after() -> None:
    model, site = made("gpt2")
    ids, attention, positions, neurons = contexts(padded=False)
    positions[:] = 14
    found = last(token_importances(model, site, ids, attention, positions, neurons, mask_id=MASK))
    assert found.shape == (6, 31)
    assert np.isfinite(found[:, 6:22]).all()
    assert (found[:, 20] == 1).all()
    assert np.isnan(found[:, :6]).all()
    assert np.isnan(found[:, 22:]).all()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_batches_do_not_matter(kind: str) -> None:
    model, site = made(kind)
    options = {"mask_id": MASK, "causal": kind != "bert"}
    whole = last(token_importances(model, site, *contexts(), **options, batch_size=1000))
    for batch_size in (1, 13):
        found = last(token_importances(model, site, *contexts(), **options, batch_size=batch_size))
        np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_a_causal_model_what_comes_after_need_not_be_run(kind: str) -> None:
    model, site = made(kind)
    longest: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: longest.append(args[0].shape[-1])
    )
    data = contexts()
    cut = last(token_importances(model, site, *data, mask_id=MASK, causal=True, batch_size=1))
    assert {1} < set(longest) <= {1, *(data[2] + 1)}
    longest.clear()
    whole = last(token_importances(model, site, *data, mask_id=MASK, causal=False, batch_size=1))
    assert set(longest) <= {1, *data[1].sum(axis=1)}
    longest.clear()
    np.testing.assert_allclose(cut, whole, rtol=1e-3, atol=1e-5)


def test_padding_is_as_if_it_were_not_there() -> None:
    for kind in ("gpt2", "bert"):
        model, site = made(kind)
        ids, attention, positions, neurons = contexts()
        options = {"mask_id": MASK, "causal": kind == "gpt2"}
        found = last(token_importances(model, site, ids, attention, positions, neurons, **options))
        for row, length in enumerate(attention.sum(axis=1)):
            alone = (ids[[row], :length], attention[[row], :length])
            example = (positions[[row]], neurons[[row]])
            expected = last(token_importances(model, site, *alone, *example, **options))
            np.testing.assert_allclose(found[[row]], expected, rtol=1e-3, atol=1e-5)


class Summing(nn.Module):
    """A neuron whose drive is the sum of what its own token and those before it are worth."""

    def __init__(self, worth: list[float], *, own: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(
            torch.tensor(worth).float()[:, None], freeze=False
        )
        self.hidden = nn.Linear(1, 1, bias=False)
        self.own = own
        nn.init.ones_(self.hidden.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return F.relu(self.hidden(x.cumsum(dim=1) - (1 - self.own) * x))


def importances_of_sums(
    worth: list[float], ids: list[int], p: int, *, own: float = 1.0
) -> list[float]:
    model = Summing(worth, own=own)
    sites = find_sites(model, "hidden")
    data = np.array([ids])
    with evaluating(model):
        prove_sites(model, sites, Feed(model), data)
    found = last(
        token_importances(
            model, sites[0], data, np.ones_like(data), [p], [0], mask_id=0, before=p, after=0
        )
    )
    return found[0].tolist()


def test_the_definition_by_hand() -> None:
    # Masked is worth 0. A drop by 4 is the measure, and what drives down is 0.
    assert importances_of_sums([0, 1, 2, -1, 4], [1, 2, 3, 4], 3) == [0.25, 0.5, 0, 1]
    # A token worth more than the one at p is clipped.
    assert importances_of_sums([0, 8, 2, -1, 4], [1, 2, 3, 4], 3) == [1, 0.5, 0, 1]


def test_a_token_that_carries_nothing_itself() -> None:
    # The neuron reads only the tokens before: shares of its activation, 8.
    assert importances_of_sums([0, 2, 6, 4], [1, 2, 3], 2, own=0) == [0.25, 0.75, 1]
    # The token at p drives the neuron down.
    assert importances_of_sums([0, 2, 6, -4], [1, 2, 3], 2) == [0.5, 1, 1]
    # It is the mask token itself.
    assert importances_of_sums([0, 2, 6], [1, 2, 0], 2) == [0.25, 0.75, 1]
    # The neuron is not active at all.
    assert importances_of_sums([0, 2, -6], [1, 2, 2], 2) == [0, 0, 1]


def test_tokens_that_are_the_mask_already_are_not_run() -> None:
    model, site = made("llama")
    ids, attention, positions, neurons = contexts(4, padded=False)
    ids[:, ::2] = MASK
    rows: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    positions[:] = 15
    found = last(
        token_importances(
            model, site, ids, attention, positions, neurons, mask_id=MASK, before=9, after=0
        )
    )
    assert sum(rows) == 4 * (1 + 5)
    assert (found[:, ::2] == 0).sum() == 4 * 5


def test_later_layers_and_the_head_are_not_run_and_the_model_is_left_as_it_was() -> None:
    model, site = made("llama")
    model.train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    late: list[int] = []
    handles = [
        module.register_forward_hook(lambda *_: late.append(1))
        for module in (model.model.layers[2], model.lm_head)
    ]
    last(token_importances(model, site, *contexts(), mask_id=MASK))
    assert not late
    for handle in handles:
        handle.remove()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_linear_site_is_read_through_its_activation() -> None:
    model, site = made("gpt2")
    data = contexts()
    linear = LinearSite("c_fc", model.transformer.h[1].mlp.c_fc)
    with evaluating(model):
        prove_sites(model, [linear], Feed(model), {"input_ids": data[0]})
    expected = last(token_importances(model, site, *data, mask_id=MASK))
    found = last(token_importances(model, linear, *data, mask_id=MASK))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_the_latents_of_an_sae_in_a_wrapped_model() -> None:
    model, _ = made("gpt2")
    data = contexts()
    sae = ParameterSAE(D, N_NEURONS)
    sae.decode = lambda latents: latents @ sae.W_dec + sae.b_dec
    wrapped = WithSAE(model, "transformer.h.1.mlp.c_proj", sae, torch.from_numpy(data[0]))
    (site,) = find_sites(wrapped, "sae")
    found = last(token_importances(wrapped, site, *data, mask_id=MASK, before=5, after=3))
    expected = oracle(drops_by_masking, wrapped, site, data, 5, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert ((found > 0) & (found < 1)).any()


def test_an_sae_without_a_decoder_module_is_read_by_its_encode() -> None:
    class Coded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.sae = nn.Embedding(VOCABULARY, 4), ParameterSAE(4, N_NEURONS)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, ids: Tensor) -> Tensor:
            return self.sae(self.table(ids).cumsum(dim=1))

    model = Coded()
    data = contexts()
    (site,) = find_sites(model, "sae")

    @torch.no_grad()
    def drops_of(model: Any, _: Any, ids: np.ndarray, p: int, j: int) -> tuple[float, list[float]]:
        def activation(ids: np.ndarray) -> float:
            return float(model.sae.encode(model.table(torch.from_numpy(ids)).cumsum(dim=0))[p, j])

        masked = [np.where(np.arange(len(ids)) == t, MASK, ids) for t in range(len(ids))]
        return activation(ids), [activation(ids) - activation(other) for other in masked]

    found = last(token_importances(model, site, *data, mask_id=MASK, before=5, after=3))
    expected = oracle(drops_of, model, site, data, 5, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert ((found > 0) & (found < 1)).any()


def test_no_examples() -> None:
    model, site = made("gpt2")
    none = np.empty((0, 5), int), np.empty((0, 5), bool), np.empty(0, int), np.empty(0, int)
    assert last(token_importances(model, site, *none, mask_id=MASK)).shape == (0, 31)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, np.zeros((2, 9)), r"ids has shape \(2, 9\) \(float64\), attention \(2, 4\), pos"),
        (1, np.ones((2, 3)), r"attention \(2, 3\), positions \(2,\) \(int64\) and neurons \(2,\)"),
        (2, np.array([0, 4]), r"positions\[1\] is 4, which is padding or outside its context of 4"),
        (2, np.array([0, 3]), r"positions\[1\] is 3, which is padding or outside its context of 4"),
        (2, np.array([-1, 0]), r"positions\[0\] is -1, which is padding"),
        (
            3,
            np.array([0, 20]),
            r"neurons\[1\] is 20, but site '.*mlp' has 20 neurons, numbered from",
        ),
    ],
)
def test_examples_that_do_not_fit(at: int, value: Any, message: str) -> None:
    model, site = made("gpt2")
    attention = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    data = [np.ones((2, 4), int), attention, np.array([0, 1]), np.array([0, 1])]
    data[at] = value
    with pytest.raises(InputError, match=message):
        last(token_importances(model, site, *data, mask_id=MASK))


def test_sizes_that_do_not_fit() -> None:
    model, site = made("gpt2")
    for name in ("mask_id", "before", "after"):
        with pytest.raises(InputError, match=f"{name} is -1; expected 0 or more"):
            last(token_importances(model, site, *contexts(), **{"mask_id": 0, name: -1}))


def test_sites_that_do_not_fit() -> None:
    model, _ = made("gpt2")
    data = contexts()
    away = MLPSite("away", [nn.Linear(2, N_NEURONS)], nn.Linear(N_NEURONS, 2), F.relu)
    with pytest.raises(SiteError, match="does not run site 'away' on token ids; name a layer that"):
        last(token_importances(model, away, *data, mask_id=MASK))

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden = nn.Embedding(VOCABULARY, 3), nn.Linear(3, 5)

        def forward(self, ids: Tensor) -> Tensor:
            with torch.no_grad():
                return self.hidden(self.table(ids).mean(dim=1))

    pooled = Pooled()
    (site,) = find_sites(pooled, "hidden")
    one = np.ones((1, 4), int), np.ones((1, 4), bool), [2], [0]
    with pytest.raises(
        SiteError,
        match=r"Site 'hidden' has activations of shape \(4, 5\) for token ids of shape \(4, 3\); "
        r"expected \(4, 3, 5\)\. Name a layer that runs on each token",
    ):
        last(token_importances(pooled, site, *one, mask_id=MASK))


def test_a_mask_that_the_model_does_not_know() -> None:
    model, site = made("gpt2")
    with pytest.raises(InputError, match=r"The model does not accept a batch of input_ids"):
        last(token_importances(model, site, *contexts(), mask_id=VOCABULARY))


def test_a_plain_module_takes_no_padding() -> None:
    model = Summing([0.0, 1.0, 2.0])
    (site,) = find_sites(model, "hidden")
    data = np.array([[1, 2, 0]]), np.array([[True, True, False]]), [1], [0]
    assert last(token_importances(model, site, *data, mask_id=0, before=1, after=1))[0, 0] == 0.5
    left = np.array([[0, 2, 1]]), np.array([[False, True, True]]), [1], [0]
    with pytest.raises(
        InputError, match=r"hold padding, but a Summing is called with token ids al"
    ):
        last(token_importances(model, site, *left, mask_id=0))


def test_activations_that_are_not_finite() -> None:
    model, site = made("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = torch.inf
    with pytest.raises(
        InputError,
        match=r"The activation of neuron \d+ in example 0, or in a masked copy of it, is",
    ):
        last(token_importances(model, site, *contexts(), mask_id=MASK))

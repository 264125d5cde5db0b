"""What a run of images holds beside its features: pictures of examples, directions of latents."""

from __future__ import annotations

import numpy as np
import pytest

import polyseme as ps

from .small import MLP, SAE, ConvNet, WithSAE, flat_inputs, make, rgb_inputs


@pytest.mark.parametrize(
    ("kind", "inputs", "site"),
    [(MLP, flat_inputs, "first"), (ConvNet, rgb_inputs, "grouped"), (WithSAE, flat_inputs, "sae")],
)
def test_pictures_show_the_angles_between_examples(tmp_path, kind, inputs, site):
    run = ps.analyse(
        make(kind), inputs(), sites=site, out=tmp_path / "run", panels=False, progress=False
    )
    seen = 0
    for neuron in range(run.site(site).n_neurons):
        mine = run.neuron(site, neuron)
        for array, rows in (("layout", mine.embeddings), ("layout_input", mine.vectors)):
            stored = run.folder.site_rows(0, array, neuron, neuron + 1)
            assert stored.shape == (len(rows), 2)
            if len(rows) < 2:
                continue
            length = np.linalg.norm(rows, axis=1, keepdims=True)
            unit = rows / np.where(length > 0, length, 1)
            _, values, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
            assert (stored**2).sum() == pytest.approx((values[:2] ** 2).sum(), rel=1e-3)
            seen += 1
    assert seen > 2


def test_decoder_rows_are_stored_for_latents(tmp_path):
    model = make(WithSAE)
    run = ps.analyse(
        model, flat_inputs(), sites=["hidden", "sae"], out=tmp_path / "run", progress=False
    )
    assert isinstance(model.sae, SAE)
    assert "decoder" not in run.folder.site(0)
    written = run.folder.site_rows(1, "decoder", 3, 5)
    np.testing.assert_array_equal(written, model.sae.decoder.weight.detach().numpy().T[3:5])


def test_the_medoid_of_a_feature_says_where_it_is(tmp_path):
    run = ps.analyse(make(MLP), flat_inputs(), sites="first", out=tmp_path / "run", progress=False)
    examples = run.folder.examples.set_index(["neuron", "example"])
    for row in run.folder.features.itertuples():
        assert row.input == examples.loc[(row.neuron, row.medoid), "input"]
        assert row.position == examples.loc[(row.neuron, row.medoid), "position"]
    counts = run.folder.random.groupby("neuron").size()
    assert run.folder.neurons["n_random"].tolist() == [counts.get(n, 0) for n in range(8)]

"""Packs: everything that the pages show of a few consecutive neurons, in one file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import RunError
from polyseme.explorer.page_errors import page_message
from polyseme.explorer.pictures import Pictures, kernel_shape, kernels
from polyseme.explorer.run_texts import RunTexts
from polyseme.explorer.tensors import encode
from polyseme.store import RunFolder, SiteInfo
from polyseme.store.format import neuron_offsets

Array = NDArray[Any]

SIMILAR_WINDOW = (8, 4)
"""Tokens before and after the maximum in a sample of a similar feature."""
_LARGEST_KERNEL = 1152
"""Longest input vector of a convolution whose examples' embeddings are included."""


class Pack:
    """Neurons ``start`` to ``stop - 1`` of a site.

    Parameters
    ----------
    folder : RunFolder
    site : SiteInfo
    start, stop : int
    content : RunTexts, Pictures or None
        Of the same run; None if the inputs are damaged.
    """

    def __init__(
        self,
        folder: RunFolder,
        site: SiteInfo,
        start: int,
        stop: int,
        content: RunTexts | Pictures | None,
    ) -> None:
        self._folder = folder
        self._site = site
        self._range = (start, stop)
        first = folder.first_neuron(site.number)
        self._rows = (first + start, first + stop)  # in the table of neurons
        self._content = content
        self._arrays: dict[str, Array] = {}
        self._tokens: dict[str, Array] = {}
        self._metadata: dict[str, Any] = {}
        #: sentences about damage found in the run
        self.damage: list[str] = []

    def encode(self) -> bytes:
        """The pack as a file; what is damaged is left out and named in its metadata."""
        for section in self._sections():
            try:
                section()
            except RunError as error:
                # Without the folder's path, which the pages must not reveal.
                problem = page_message(error)
                if problem not in self.damage:
                    self.damage.append(problem)
        if isinstance(self._content, RunTexts):
            local, words = self._content.local(self._tokens)
            self._arrays |= local
            self._metadata["vocabulary"] = words
        if self.damage:
            self._metadata["damage"] = self.damage
        return encode(self._arrays, self._metadata)

    def _sections(self) -> list[Callable[[], None]]:
        shared = [
            self._add_neurons,
            self._add_examples,
            self._add_random,
            self._add_features,
            self._add_site,
        ]
        if isinstance(self._content, RunTexts):
            return [
                *shared,
                self._add_windows,
                self._add_shades,
                self._add_logits,
                self._add_similar,
            ]
        if isinstance(self._content, Pictures) and self._content.shape is not None:
            return [*shared, self._add_weights, self._add_pictures]
        return shared

    # ------------------------------------------------------------------ all kinds of run

    def _add_neurons(self) -> None:
        neurons = self._folder.rows("neurons", *self._rows)
        self._arrays["counts"] = neurons["n_examples"].to_numpy()
        self._arrays["feature_counts"] = neurons["n_clusters"].to_numpy()
        for name, values in neurons.items():
            if values.dtype.kind == "f":
                self._arrays[f"neuron_{name}"] = values.to_numpy(np.float32)

    def _add_examples(self) -> None:
        examples = self._folder.rows("examples", *self._rows)
        numbers = examples["input"].to_numpy(np.int64)
        self._arrays |= {
            "input": self._input_rows(numbers),
            "input_number": numbers,
            "position": examples["position"].to_numpy(),
            "activation": examples["activation"].to_numpy(),
            "feature": examples["feature"].to_numpy(),
        }
        if "meaning" in examples:
            self._arrays["meaning"] = examples["meaning"].to_numpy()

    def _add_random(self) -> None:
        start, stop = self._rows
        random = self._folder.rows("random", start, stop)
        numbers = random["input"].to_numpy(np.int64)
        self._arrays |= {
            "random_counts": np.diff(self._folder.offsets("random")[start : stop + 1]),
            "random_input": self._input_rows(numbers),
            "random_input_number": numbers,
            "random_position": random["position"].to_numpy(),
            "random_activation": random["activation"].to_numpy(),
        }

    def _add_features(self) -> None:
        features = self._folder.rows("features", *self._rows)
        self._arrays["feature_sizes"] = features["n_examples"].to_numpy()
        self._arrays["feature_medoid"] = features["medoid"].to_numpy()
        if "label" in features and features["label"].dtype.kind != "f":
            self._metadata["labels"] = features["label"].fillna("").tolist()

    def _add_site(self) -> None:
        tree = self._part("tree")
        if tree is not None:
            self._arrays["tree_nodes"] = tree[:, :2].astype(np.int64)
            self._arrays["tree_heights"] = tree[:, 2]
        meanings, overlap = self._part("meaning_tree"), self._part("meaning_overlap")
        if meanings is not None and overlap is not None:
            self._arrays["meaning_nodes"] = meanings[:, :2].astype(np.int64)
            self._arrays["meaning_overlap"] = overlap
        for name in ("layout", "layout_input"):
            layout = self._part(name)
            if layout is not None:
                self._arrays[name] = layout.astype(np.float16)
        histogram, upper = self._part("histogram"), self._part("histogram_upper")
        if histogram is not None and upper is not None:
            self._arrays["histogram"] = histogram
            self._arrays["histogram_upper"] = upper.astype(np.float32)
        for name in ("logit_gradient", "logit_ablation"):
            effects = self._part(name)
            if effects is not None:
                self._arrays[name] = effects

    # ---------------------------------------------------------------------------- texts

    def _add_windows(self) -> None:
        assert isinstance(self._content, RunTexts)
        for prefix, name in (("", "window_tokens"), ("random_", "random_tokens")):
            if f"{prefix}input" in self._arrays:
                self._tokens[name] = self._content.windows(
                    self._arrays[f"{prefix}input"], self._arrays[f"{prefix}position"]
                )

    def _add_shades(self) -> None:
        assert isinstance(self._content, RunTexts)
        for name in ("windows", "importances"):
            values = self._part(name)
            if values is not None and values.shape[1] == sum(self._content.window) + 1:
                self._arrays["window_shares" if name == "windows" else name] = values

    def _add_logits(self) -> None:
        for side in ("promoted", "suppressed"):
            tokens, logits = self._part(f"{side}_tokens"), self._part(f"{side}_logits")
            if tokens is not None and logits is not None:
                self._tokens[f"{side}_tokens"] = tokens
                self._arrays[f"{side}_logits"] = logits

    def _add_similar(self) -> None:
        """The most similar features anywhere in the model, each with a sample of its text."""
        assert isinstance(self._content, RunTexts)
        rows = self._part("similar_features")
        similarity = self._part("similar_similarity")
        if rows is None or similarity is None:
            return
        there = rows >= 0
        chosen = rows[there].astype(np.int64)
        ends = self._folder.offsets("features")
        neuron = np.searchsorted(ends, chosen, side="right") - 1
        first = neuron_offsets(self._folder.sites)
        site = np.searchsorted(first, neuron, side="right") - 1
        self._arrays |= {
            "similar_counts": there.sum(axis=1),
            "similar_site": site,
            "similar_neuron": neuron - first[site],
            "similar_feature": chosen - ends[neuron],
            "similar_similarity": similarity[there].astype(np.float32),
        }
        samples = self._content.samples(chosen, *SIMILAR_WINDOW)
        if samples is not None:
            self._tokens["similar_tokens"] = samples

    # --------------------------------------------------------------------------- images

    def _add_weights(self) -> None:
        assert isinstance(self._content, Pictures)
        kernel = kernel_shape(self._site)
        weights = self._part("weights")
        if weights is not None and kernel:
            self._arrays["kernel"] = kernels(weights, kernel)
        elif weights is not None and self._site.extra.get("reads_inputs"):
            self._arrays["weights"] = self._content.arrays(weights)
        drawn = self._part("activation_map")
        if drawn is not None:
            self._arrays["activation_map"] = self._content.arrays(drawn)

    def _add_pictures(self) -> None:
        assert isinstance(self._content, Pictures)
        inputs = self._folder.inputs
        examples, random = (self._arrays.get(f"{prefix}input") for prefix in ("", "random_"))
        shown = [numbers for numbers in (examples, random) if numbers is not None]
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *shown]))
        self._arrays["thumbs"] = self._content.thumbs(rows)
        for name, numbers in (("thumb", examples), ("random_thumb", random)):
            if numbers is not None:
                self._arrays[name] = np.searchsorted(rows, numbers)
        if "labels" in inputs:
            for name, numbers in (("class", examples), ("random_class", random)):
                if numbers is not None:
                    self._arrays[name] = inputs.take("labels", numbers)
        kernel = kernel_shape(self._site)
        if kernel and examples is not None and self._site.d_in <= _LARGEST_KERNEL:
            vector = self._folder.rows("examples", *self._rows)["vector"]
            patches = self._folder.site(self._site.number).take("vectors", vector)
            weights = self._part("weights")
            if weights is not None:
                neuron = np.repeat(np.arange(len(weights)), self._arrays["counts"])
                # Summed over channels: one picture per example, however many channels it has.
                embeddings = patches.astype(np.float32) * weights[neuron]
                pictures = kernels(embeddings, kernel).sum(axis=3, keepdims=True)
                self._arrays["embedding"] = pictures.astype(np.float16)

    # -------------------------------------------------------------------------- reading

    def _part(self, name: str) -> Array | None:
        """The rows of a site's array for these neurons; None if there is no such array."""
        if name not in self._folder.site(self._site.number):
            return None
        return self._folder.site_rows(self._site.number, name, *self._range)

    def _input_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.searchsorted(self._folder.inputs["index"], numbers)
        return np.asarray(rows, dtype=np.int64)

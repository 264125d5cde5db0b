"""Contexts of tokens as data of an analysis: logit effects, importances, labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from polyseme.analysis.describe import few_tokens
from polyseme.analysis.importances import estimated_seconds, mask_token, site_importances
from polyseme.analysis.kinds import Array, Arrays, Attributed, Data, Engine, Selected, Work
from polyseme.analysis.progress import duration
from polyseme.analysis.settings import Settings
from polyseme.analysis.words import Wording, readings, token_index
from polyseme.attribution.logits import LogitLens
from polyseme.capture import Batch, Collected
from polyseme.data.contexts import Contexts
from polyseme.data.token_texts import pieces
from polyseme.errors import InputError
from polyseme.sites import Site
from polyseme.sites.language import loaded_name
from polyseme.sites.transformer import check_whole
from polyseme.sites.unembedding import unembedding
from polyseme.store import vocabulary_arrays

_TOKENS_AT_ONCE = 4096
# Tokens for timing the model: more would take longer and add nothing.
_TRIED = 1024
_LOGITS = 10


class TextData(Data):
    """Texts as data of an analysis, see `Data`; an input is a context.

    It is stored as its tokens followed by their number.
    """

    kind, noun, again = "texts", "context", "a list or a file"
    half = in_files = True

    def __init__(self, model: nn.Module, contexts: Contexts, settings: Settings) -> None:
        _check_length(model, contexts)
        check_whole(model, self.kind)
        # Now, because a missing mask token would otherwise show only after the pass.
        pieces(contexts.tokenizer, [0])
        exact = settings.importances == "exact"
        mask_id = mask_token(contexts.tokenizer) if exact else None
        self.model, self.contexts = model, contexts
        self.few = few_tokens(model, contexts.length)
        self.settings = replace(settings, mask_id=mask_id)
        self.window = settings.window or (0, 0)
        self.repeatable = contexts.texts.reiterable
        self.places = contexts.length
        self.row_bytes = 4 * (contexts.length + 1)
        self.n_tried = max(1, _TRIED // contexts.length)
        self.total, self.amount = None, "text of unknown length"
        if contexts.max_tokens is not None:
            special = contexts.settings()["special_ids"]
            room = contexts.length - sum(special[end] is not None for end in ("begin", "end"))
            # Fewer if the text ends.
            self.total = -(-contexts.max_tokens // room)
            self.amount = f"{contexts.max_tokens:,} tokens in {self.total:,} contexts"

    @staticmethod
    def default_batch_size(contexts: Contexts) -> int:
        return max(1, _TOKENS_AT_ONCE // contexts.length)

    def identity(self) -> dict[str, Any]:
        return self.contexts.identity()

    def count(self) -> int:
        return self.contexts.count()

    def batches(self, size: int, start: int) -> Iterator[Batch]:
        for batch in self.contexts.batches(size, start):
            lengths = batch.attention.sum(axis=1, keepdims=True)
            inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)}
            row = np.concatenate([batch.ids, lengths], axis=1).astype(np.int32)
            yield Batch(inputs, row, mask=batch.mask)

    def working_bytes(self, sites: Sequence[Site]) -> int:
        # A few tensors of the widest layer exist at a time.
        widest = max(6 * site.n_neurons + 20 * site.d_in for site in sites)
        return 4 * self.settings.batch_size * self.contexts.length * widest

    def attribute(self, selected: Selected, work: Work, engine: Engine) -> Attributed:
        """Logit effects of all neurons and, if requested, token importances."""
        with work.stages("logits"):
            logits = self._logits(selected.sites, work)
        inputs, words = self._inputs(selected.inputs, logits)
        with work.stages("importances"):
            importances = self._importances(selected, inputs, work, engine)
        of_sites = [
            {**tokens, **shares} for tokens, shares in zip(logits, importances, strict=True)
        ]
        return Attributed(inputs, of_sites, Wording(inputs, words, self.window))

    def _inputs(self, kept: Arrays, logits: list[Arrays]) -> tuple[Arrays, list[str]]:
        """The contexts that examples refer to, and the text of every token in the run."""
        rows = kept.get("rows", np.empty((0, self.contexts.length + 1), np.int32))
        tokens, lengths = rows[:, :-1], rows[:, -1]
        named = [arrays[name].ravel() for arrays in logits for name in arrays if "tokens" in name]
        used = np.unique(
            np.concatenate([tokens[np.arange(tokens.shape[1]) < lengths[:, None]], *named])
        )
        words = readings(self.contexts.tokenizer, used.tolist())
        arrays = {
            "index": kept["index"],
            "tokens": tokens,
            "lengths": lengths,
            **vocabulary_arrays(used, words),
        }
        return arrays, words

    def _importances(
        self, selected: Selected, inputs: Arrays, work: Work, engine: Engine
    ) -> list[Arrays]:
        """Token importances of each site, if requested; otherwise report their cost."""
        if self.settings.mask_id is None:
            # The estimate needs the time of the whole pass, in this process.
            took = work.stages.seconds.get("reading")
            if took is not None and work.shown and not work.writer.resumed:
                n_tokens = selected.n_inputs * self.contexts.length
                seconds = estimated_seconds(
                    inputs["lengths"],
                    n_tokens,
                    took,
                    window=self.window,
                )
                work.say(
                    f"Token importances were not computed; importances='exact' (--importances "
                    f"exact) would take about {duration(seconds)}."
                )
            return [{} for _ in selected.sites]
        task = work.bars.add_task("Token importances", total=len(inputs["index"]))
        importances = site_importances(
            self.model,
            selected.sites,
            [chosen for _, chosen in selected.examples],
            inputs,
            work.writer,
            engine,
            mask_id=self.settings.mask_id,
            window=self.window,
            show=lambda done: work.bars.update(task, completed=done),
        )
        return [{"importances": array} for array in importances]

    def _logits(self, sites: Sequence[Site], work: Work) -> list[Arrays]:
        """Tokens that each site's neurons promote and suppress most, if the model has a head."""
        if unembedding(self.model) is None:
            return [{} for _ in sites]
        task = work.bars.add_task("Logit effects", total=len(sites))
        lens = LogitLens(self.model)
        arrays = []
        for site in sites:
            arrays.append(_top_tokens(lens, site))
            work.bars.update(task, advance=1)
        return arrays

    def label(self, tables: dict[str, pd.DataFrame], wording: Wording) -> Array:
        with_words = wording.site(tables["examples"], tables["features"])
        tables["features"]["label"] = pd.array(with_words.labels, pd.StringDtype("pyarrow"))
        return with_words.found_by

    def index(self, inputs: Arrays, labelled: list[tuple[int, Any]]) -> Arrays:
        words, n_before = [], 0
        for n_features, found_by in labelled:
            words.append(found_by + np.array([0, n_before, 0]))
            n_before += n_features
        return token_index(words, len(inputs["vocabulary"]))

    def site_info(self, collected: Collected, threshold: float, inputs: Arrays) -> dict[str, Any]:
        site = collected.site
        return {
            "name": site.name,
            "kind": site.kind,
            "n_neurons": site.n_neurons,
            "d_in": site.d_in,
            "activation": site.activation.name,
            "gate": collected.neurons.gate,
            "threshold": threshold,
            "n_moments": collected.n_moments,
            **site.metadata(collected.neurons),
        }

    def metadata(
        self, model: dict[str, Any], identity: dict[str, Any], selected: Selected
    ) -> dict[str, Any]:
        return {
            "model": {**model, "name": loaded_name(self.model)},
            "data": {"kind": "text", "n_inputs": selected.n_inputs, **identity},
        }


def _check_length(model: nn.Module, contexts: Contexts) -> None:
    """Refuse contexts longer than the model supports, which some models accept regardless."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and contexts.length > limit > 0:
        raise InputError(
            f"The contexts have {contexts.length:,} tokens, but the model accepts at most "
            f"{limit:,}; give Contexts(..., length={limit}) or less (--context)."
        )


def _top_tokens(lens: LogitLens, site: Site) -> Arrays:
    with torch.no_grad():
        directions = site.residual_directions()
    if directions is None or not lens.takes(directions, _LOGITS):
        return {}
    top = lens.top(directions, _LOGITS)
    return {
        "promoted_tokens": np.asarray(top.promoted_ids, np.int32),
        "promoted_logits": np.asarray(top.promoted, np.float32),
        "suppressed_tokens": np.asarray(top.suppressed_ids, np.int32),
        "suppressed_logits": np.asarray(top.suppressed, np.float32),
    }

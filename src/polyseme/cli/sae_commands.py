"""The commands about sparse autoencoders."""

from __future__ import annotations

import argparse
import shlex
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
from polyseme.errors import InputError


def _common(commands: Any, name: str, run: Any, text: str) -> Any:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, command=command)
    return command


def _add_source(command: Any) -> None:
    command.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--site", required=True, metavar="NAME", help="the layer whose activations the SAE reads"
    )
    command.add_argument(
        "--data", required=True, metavar="PATH", help="images, as for polyseme analyse"
    )
    add_data_options(command)


def _add_training(command: Any) -> None:
    training = command.add_argument_group("training")
    training.add_argument("--d-sae", type=int, required=True, metavar="N", help="latents")
    training.add_argument(
        "--architecture",
        default="standard",
        metavar="NAME",
        help="standard, topk, batchtopk, jumprelu, gated or matryoshka_batchtopk; "
        "default: %(default)s",
    )
    training.add_argument("--k", type=int, help="active latents, for the TopK architectures")
    training.add_argument("--epochs", type=float, default=10, help="default: %(default)s")
    training.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    training.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    training.add_argument("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    training.add_argument("--momentum", type=float, default=0.9, help="default: %(default)s")
    training.add_argument(
        "--ne-start", type=int, default=0, metavar="STEP", help="step from which the NE loss is on"
    )
    training.add_argument("--device", default=None, help="cpu, cuda, mps")
    training.add_argument("--quiet", action="store_true", help="no progress")


def add_train_sae(commands: Any) -> None:
    """``polyseme train-sae``."""
    command = _common(
        commands,
        "train-sae",
        _train_sae,
        "Train a sparse autoencoder on the activations of a layer, with the NE loss or without.",
    )
    command.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}. {LANGUAGE_MODEL_HELP}")
    command.add_argument(
        "--site",
        required=True,
        metavar="NAME",
        help="the layer whose activations the SAE reads; with --text also any hook point of "
        "TransformerLens, such as blocks.5.hook_resid_post",
    )
    command.add_argument("--data", metavar="PATH", help="images, as for polyseme analyse")
    add_data_options(command)
    add_text_options(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder or URL of the SAE")
    command.add_argument(
        "--ne", type=float, default=0.0, metavar="C", help="NE coefficient; default: %(default)s"
    )
    command.add_argument(
        "--form",
        default="weighted",
        help="of the NE loss: weighted, unweighted or calibrated; default: %(default)s",
    )
    command.add_argument("--l1", type=float, metavar="C", help="L1 coefficient, if it has one")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    _add_training(command)
    command.add_argument("--overwrite", action="store_true", help="replace an SAE that exists")
    command.add_argument("--resume", action="store_true", help="resume an interrupted training")


def add_compare(commands: Any) -> None:
    """``polyseme compare``."""
    command = _common(
        commands,
        "compare",
        _compare,
        "Put SAEs of one layer side by side: what the NE loss gains, and what it costs.",
    )
    command.add_argument(
        "saes",
        nargs="+",
        metavar="SAE",
        help="folder, state dict or URL of one; the first is the reference",
    )
    command.add_argument(
        "--model", metavar="MODEL", help="MODULE:NAME or FILE.py:NAME of the model"
    )
    command.add_argument("--site", metavar="NAME", help="default: the one in the SAE's metadata")
    command.add_argument("--data", required=True, metavar="PATH", help="images, with labels")
    add_data_options(command)
    command.add_argument(
        "--out", default="runs/compare", metavar="DIR", help="default: %(default)s"
    )
    command.add_argument("--quiet", action="store_true", help="no progress")
    command.add_argument("--overwrite", action="store_true", help="replace runs that exist")
    command.add_argument("--resume", action="store_true", help="keep what is there")


def add_sweep(commands: Any) -> None:
    """``polyseme sweep``."""
    command = _common(
        commands,
        "sweep",
        _sweep,
        "Train SAEs over coefficients and seeds; goes on where it stopped.",
    )
    _add_source(command)
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the sweep")
    command.add_argument("--ne", type=numbers, default=(0, 20, 60), help="coefficients: 0,20,60")
    command.add_argument("--l1", type=numbers, default=(3, 5, 8), help="coefficients: 3,5,8")
    command.add_argument("--forms", default="weighted", help="of the NE loss, by commas")
    command.add_argument("--seeds", type=int, default=5, help="how many; default: %(default)s")
    command.add_argument("--l0", type=float, help="to compare at; default: where most overlap")
    _add_training(command)


def _prepare(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, images and all activations of the site."""
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


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "architecture": options.architecture,
        "k": options.k,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "ne_momentum": options.momentum,
        "ne_start": options.ne_start,
    }


def _train_sae(options: argparse.Namespace) -> None:
    sae_package = module("polyseme.sae", "Training an SAE")
    sweep_package = module("polyseme.evaluate.compare", "Evaluating an SAE")
    check_source(options)
    metadata = {"model": options.model, "site": options.site}
    with ExitStack() as stack:
        if options.text is None:
            _, _, activations = _prepare(options)
        else:
            # What SAELens calls it, so that its other tools find the place too.
            metadata["hook_name"] = options.site
            activations = stack.enter_context(activations_of_text(options))
        sae = sae_package.train_sae(
            activations,
            options.d_sae,
            ne_coefficient=options.ne,
            ne_form=options.form,
            l1_coefficient=options.l1,
            seed=options.seed,
            out=options.out,
            overwrite=options.overwrite,
            resume=options.resume,
            progress=not options.quiet,
            metadata=metadata,
            **_settings(options),
        )
        record = sweep_package.report_on(options.out, sae, activations).as_dict()
    print(
        f"{options.out}: {record['n_latents']} latents, {record['dead_share']:.1%} dead, "
        f"{record['without_examples_share']:.1%} without examples, "
        f"L0 {record['l0']:.1f}, FVU {record['fvu']:.4f}, mean distance "
        f"{record['mean_distance']:.3f} (over {record['mean_distance_n']})"
    )


def _compare(options: argparse.Namespace) -> None:
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
        # A model named by a file is code to be run: only the user says so.
        hint = f"--model {known['model']} --site {known['site']}" if "model" in known else ""
        raise InputError(
            "To compare SAEs the model and the site that they read are needed: give --model and "
            f"--site{f'; {names[0]} says of itself: {hint}' if hint else ''}."
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
        progress=not options.quiet,
    )
    Console().print(comparison.table())
    figure = Path(options.out) / "comparison.png"
    comparison.figure(figure)
    runs = " ".join(shlex.quote(str(Path(options.out) / name)) for name in names)
    print(
        f"The runs of the latents are in {options.out}, the figure is {figure}. Neuron by neuron, "
        f"in the browser: polyseme explore {runs}"
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


def _sweep(options: argparse.Namespace) -> None:
    sae_package = module("polyseme.sae", "Training an SAE")
    sweeping = module("polyseme.evaluate.sweep", "A sweep")
    evaluating = module("polyseme.evaluate.sae", "Evaluating an SAE")
    from rich.console import Console
    from rich.progress import track

    def several(value: Any) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (value,)

    if options.seeds < 1:
        raise InputError(f"--seeds is {options.seeds}; at least 1 is expected.")
    model, images, activations = _prepare(options)
    forms = [form.strip() for form in options.forms.split(",")]
    todo = sweeping.points(several(options.ne), several(options.l1), range(options.seeds), forms)
    describe = module("polyseme.analysis.describe", "A sweep")
    feed = module("polyseme.sites", "A sweep").Feed(model)
    settings = {
        **_settings(options),
        "d_sae": options.d_sae,
        "site": options.site,
        "model": {
            **describe.describe_model(model),
            **describe.behaviour(model, feed, images.inputs(slice(4))),
        },
        "images": images.digest(),
        "labels": None if images.labels is None else describe.digest([images.labels]),
    }

    def train(point: Any) -> Any:
        return sae_package.train_sae(
            activations,
            options.d_sae,
            ne_coefficient=point.ne_coefficient,
            ne_form=forms[0] if point.form == "none" else point.form,
            l1_coefficient=point.l1_coefficient,
            seed=point.seed,
            progress=False,
            **_settings(options),
        )

    def score(sae: Any) -> dict[str, float]:
        splice = evaluating.evaluate_splice(model, options.site, sae, _labelled(images))
        return {"accuracy": splice.spliced_accuracy, "recovered": splice.recovered}

    work = sweeping.sweep(
        activations,
        todo,
        train,
        out=options.out,
        settings=settings,
        score=None if images.labels is None else score,
    )
    for _ in track(
        work,
        f"{len(todo)} SAEs",
        total=len(todo),
        console=Console(stderr=True),
        disable=options.quiet,
    ):
        pass
    records = sweeping.read_sweep(options.out)
    l0 = options.l0 or sweeping.common_l0(records)
    measures = [name for name in sweeping.MEASURES if name in records]
    table = sweeping.pareto(records, l0, measures)
    if table.empty:
        raise InputError(
            f"No L1 coefficients of the sweep lie around an L0 of {l0:.1f} (they gave "
            f"{records['l0'].min():.1f} to {records['l0'].max():.1f}); give others with --l1, or "
            "another --l0."
        )
    print(f"At L0 = {l0:.1f}, means over seeds ± half of the 95% confidence interval:")
    for _, row in table.iterrows():
        values = "  ".join(f"{name} {row[name]:.4f} ± {row[f'{name}_ci']:.4f}" for name in measures)
        print(f"{row['form']:>10} ne {row['ne_coefficient']:<6g} n={row['seeds']}  {values}")
    curves = records.groupby(["form", "ne_coefficient", "seed"]).ngroups
    if missing := curves - int(table["seeds"].sum()):
        print(
            f"{missing} of {curves} combinations of form, coefficient and seed are left out: their "
            "SAEs are all sparser, or all denser, than that."
        )
    figure = Path(options.out) / "pareto.png"
    sweeping.draw_pareto(table, l0, figure)
    print(f"The records are in {options.out}, the figure is {figure}.")

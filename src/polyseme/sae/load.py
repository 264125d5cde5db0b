"""SAEs that others trained: SAELens folders and releases, and plain state dicts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from polyseme.errors import InputError, MissingDependencyError, one_of
from polyseme.sae.plain import ACTIVATIONS, PlainSAE, read_plain, reading_safetensors


def load_sae(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    prefix: str | None = None,
    activation: str | None = None,
    k: int | None = None,
    apply_b_dec_to_input: bool | None = None,
) -> nn.Module:
    """Load an SAE, as a module that polyseme reads as a site.

    Parameters
    ----------
    source : str or Path
        - A SAELens folder, such as `train_sae` writes (needs sae-lens).
        - A SAELens release, ``"release/sae_id"``, fetched from the Hugging Face hub (likewise).
        - A plain state dict, ``.safetensors`` or ``.pt`` (read with ``weights_only=True``: nothing
          is unpickled), with the weights and biases of an encoder and a decoder by the names
          ``encoder.weight``, ``decoder.bias`` or ``W_enc``, ``b_dec`` and the like, after any
          prefix. Which way round the weights are is told by the biases' lengths.
    device : str or torch.device, optional
        The CPU if it is not given.
    prefix : str, optional
        Of the names in a plain state dict, where it holds several SAEs.
    activation : {"relu", "topk", "jumprelu"}, optional
        Of a plain state dict, which does not say; "relu" if it is not given. "topk" needs ``k``,
        "jumprelu" a tensor ``threshold``.
    k : int, optional
    apply_b_dec_to_input : bool, optional
        Whether a plain SAE takes its decoder's bias off its input. True if it is not given: the
        published SAE of arXiv 2411.08166 does, and so do SAELens, dictionary_learning and
        sparsify.

    Returns
    -------
    torch.nn.Module
        In evaluation mode: a SAELens ``SAE``, or a `PlainSAE`.

    Raises
    ------
    InputError
        There is nothing at ``source``, or it is not an SAE that can be read.
    MissingDependencyError
        sae-lens is needed and not installed.
    """
    path = Path(source)
    place = torch.device(device) if device is not None else torch.device("cpu")
    if path.is_file():
        return read_plain(
            path,
            prefix=prefix,
            activation=ACTIVATIONS[0] if activation is None else activation,
            k=k,
            apply_b_dec_to_input=apply_b_dec_to_input is not False,
        ).to(place)
    plain = {"prefix": prefix, "activation": activation, "k": k}
    plain["apply_b_dec_to_input"] = apply_b_dec_to_input
    given = [name for name, value in plain.items() if value is not None]
    if given:
        raise InputError(
            f"{given[0]} is given, but {str(source)!r} is not the file of a plain state dict: a "
            "SAELens SAE says itself what it is. Leave it out."
        )
    sae = _folder(path, place) if path.is_dir() else _release(str(source), place)
    return sae.eval()


def sae_shape(sae: nn.Module) -> tuple[int, int]:
    """(d_in, d_sae) of a SAELens SAE, a `PlainSAE` or any with the same weights."""
    weight = sae_tensors(sae)["W_enc"]
    return int(weight.shape[0]), int(weight.shape[1])


def check_width(sae: nn.Module, width: int, site: str) -> None:
    """Make sure that an SAE fits a place in a model.

    Parameters
    ----------
    sae : torch.nn.Module
    width : int
        Length of the vectors at that place.
    site : str
        What to call it.

    Raises
    ------
    InputError
        The SAE reads vectors of another length.
    """
    d_in, d_sae = sae_shape(sae)
    if d_in != width:
        raise InputError(
            f"The SAE reads vectors of length {d_in} (it has {d_sae} latents), but those at "
            f"{site!r} have length {width}. Give the site that it was trained on, or another SAE."
        )


def sae_tensors(sae: nn.Module) -> dict[str, Tensor]:
    """Tensors of an SAE by SAELens's names: W_enc (d_in, d_sae), W_dec (d_sae, d_in), ...

    Raises
    ------
    InputError
        The module is not an SAE that polyseme knows.
    """
    if isinstance(sae, PlainSAE):
        return sae.tensors()
    own = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    if "W_enc" not in own or "W_dec" not in own:
        raise InputError(
            f"{type(sae).__name__} is not an SAE that polyseme knows: one that load_sae "
            "or train_sae gave, or with the parameters W_enc and W_dec, is expected."
        )
    return own


def import_sae_lens(what: str) -> Any:
    """The sae_lens module, which is heavy: it brings in TransformerLens.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        with warnings.catch_warnings():
            # SAELens imports modules of TransformerLens that are deprecated there.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            import sae_lens
    except ModuleNotFoundError as error:
        if error.name == "sae_lens":
            raise MissingDependencyError(what, "sae-lens", "sae") from error
        raise
    return sae_lens


# SAELens folders and releases.


def _folder(path: Path, device: torch.device) -> nn.Module:
    config, weights = path / "cfg.json", path / "sae_weights.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise InputError(
                f"{path} is not the folder of an SAE: it has no {file.name}. Give a folder that "
                "SAELens or polyseme saved, or the file of a plain state dict."
            )
    sae_lens = import_sae_lens(f"Loading the SAELens SAE {path}")
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{config} is damaged: it is not JSON ({error}).") from error
    known = sae_lens.registry.SAE_CLASS_REGISTRY
    architecture = content.get("architecture", "standard") if isinstance(content, dict) else None
    if architecture not in known:
        kind = f"architecture in {config}"
        raise InputError(one_of(kind, str(architecture), sorted(known)))
    shapes = _shapes(weights)
    try:
        with _quiet():
            sae: nn.Module = sae_lens.SAE.load_from_disk(path, device=str(device))
    except Exception as error:
        told = _unlike(sae_lens, content, shapes) or " ".join(str(error).split())
        raise InputError(f"{path} is not an SAE that SAELens loads: {told}.") from error
    return sae


def _shapes(file: Path) -> dict[str, list[int]]:
    with reading_safetensors(file), safe_open(file, framework="pt") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _unlike(sae_lens: Any, content: dict[str, Any], shapes: Mapping[str, list[int]]) -> str:
    """How tensors differ from those that the configuration asks for; empty if they do not."""
    try:
        sae = sae_lens.SAE.from_dict(content | {"device": "meta"})
        expected = {name: list(tensor.shape) for name, tensor in sae.state_dict().items()}
    except Exception:  # then it is the configuration that is wrong, as SAELens has said
        return ""
    missing = [name for name in expected if name not in shapes]
    if missing:
        return f"its weights lack the tensor {missing[0]!r}"
    wrong = [name for name in expected if expected[name] != shapes[name]]
    if wrong:
        name = wrong[0]
        return (
            f"its tensor {name!r} has shape {tuple(shapes[name])}, and by cfg.json it should have "
            f"{tuple(expected[name])}"
        )
    return ""


def _release(source: str, device: torch.device) -> nn.Module:
    nothing = f"There is no file or folder {source!r}"
    head, _, rest = source.partition("/")
    if not rest or source.startswith((".", "/", "~")) or "\\" in source:
        raise InputError(
            f"{nothing}. Give a SAELens folder, the file of a plain state dict, or a SAELens "
            "release as 'release/sae_id'."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise InputError(
            f"Loading the release {source!r} needs torch 2.6 or newer, this is "
            f"{torch.__version__}: before that, SAELens unpickles what it fetches."
        )
    sae_lens = import_sae_lens(f"Loading the SAELens release {source!r}")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if head in releases:
        ids = releases[head].saes_map
        if rest not in ids:
            raise InputError(one_of(f"SAE of the release {head!r}", rest, ids))
    else:
        repository, _, sae_id = rest.partition("/")
        if not sae_id:
            raise InputError(f"{nothing}, and no such release. {one_of('release', head, releases)}")
        head, rest = f"{head}/{repository}", sae_id
    try:
        with _quiet():
            sae: nn.Module = sae_lens.SAE.from_pretrained(head, rest, device=str(device))
    except Exception as error:
        raise InputError(
            f"Cannot fetch the SAE {rest!r} of {head!r} from the Hugging Face hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Where the hub cannot "
            "be reached, give a folder that SAELens saved elsewhere."
        ) from error
    return sae


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of SAELens about what polyseme does not do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

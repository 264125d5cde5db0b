"""Loading published SAEs: folders of libraries, SAELens releases, plain state dicts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from polyseme.errors import InputError, MissingDependencyError, one_of
from polyseme.remote import fetched, is_url
from polyseme.sae.formats import NO_TRANSCODERS, WEIGHTS
from polyseme.sae.plain import PlainSAE, read_plain
from polyseme.sae.untrusted_files import read_json, reading_safetensors

_SAELENS = "sae_weights.safetensors"
# SAELens architectures whose latents are functions of h·w, and SAELens's input normalisations.
_ARCHITECTURES = ("standard", "gated", "topk", "abstopk", "jumprelu")
_NORMS = ("none", "layer_norm", "constant_norm_rescale")


def load_sae(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    prefix: str | None = None,
    activation: str | None = None,
    k: int | None = None,
    apply_b_dec_to_input: bool | None = None,
) -> nn.Module:
    """Load an SAE as a module that polyseme can read as a site.

    Parameters
    ----------
    source : str or Path
        - A folder of SAELens, such as `train_sae` writes (needs sae-lens).
        - A folder of dictionary_learning (``ae.pt`` and ``config.json``), of sparsify
          (``sae.safetensors`` and ``cfg.json``) or of Gemma Scope (``params.npz``, or
          ``params.safetensors`` and ``config.json``). Its configuration defines the SAE.
        - A SAELens release, ``"release/sae_id"``, downloaded from the Hugging Face Hub (needs
          sae-lens).
        - The URL of such a folder or file, which is copied to the cache.
        - A plain state dict, ``.safetensors``, ``.pt`` (only tensors are ever unpickled) or
          ``.npz``, with the weights and biases of an encoder and a decoder named
          ``encoder.weight``, ``decoder.bias`` or ``W_enc``, ``b_dec`` and the like, after any
          prefix. The lengths of the biases determine the orientation of the weights. In one of the
          folders above, the folder's configuration applies; elsewhere, ``activation`` and
          ``apply_b_dec_to_input`` are required.
    device : str or torch.device, optional
        The CPU by default.
    prefix : str, optional
        Prefix of the names in a plain state dict that holds several SAEs.
    activation : {"relu", "topk", "jumprelu"}, optional
        For a plain state dict. "topk" needs ``k``, unless the file holds it, and "jumprelu" needs a
        tensor ``threshold``.
    k : int, optional
    apply_b_dec_to_input : bool, optional
        Whether a plain SAE subtracts its decoder bias from its input, as the published SAE of arXiv
        2411.08166 does.

    Returns
    -------
    torch.nn.Module
        In evaluation mode: a SAELens ``SAE``, or a `PlainSAE`.

    Raises
    ------
    InputError
        There is nothing at ``source``, it is not an SAE that polyseme reads (a transcoder, for
        example), or what it computes is ambiguous.
    MissingDependencyError
        sae-lens is needed but not installed.

    Notes
    -----
    The input of the site, which the columns of ``W_enc`` multiply, is the SAE's input before the
    decoder bias is subtracted; for a SAELens SAE with ``normalize_activations``, it is the output
    of its ``run_time_activation_norm_fn_in``.
    """
    path = fetched(source) if is_url(source) else Path(source)
    place = torch.device(device) if device is not None else torch.device("cpu")
    # os.path, unlike Path, treats a name that the file system rejects as a missing file.
    if os.path.isdir(path):
        path = _weights_in(path)
    is_file = os.path.isfile(path)
    if is_file and not (path.name == _SAELENS and path.with_name("cfg.json").is_file()):
        return read_plain(
            path,
            prefix=prefix,
            activation=activation,
            k=k,
            apply_b_dec_to_input=apply_b_dec_to_input,
        ).to(place)
    plain = {"prefix": prefix, "activation": activation, "k": k}
    plain["apply_b_dec_to_input"] = apply_b_dec_to_input
    options = [name for name, value in plain.items() if value is not None]
    if options:
        raise InputError(
            f"{options[0]} is given, but {str(source)!r} is not a plain state dict: a SAELens SAE "
            f"has its own configuration. Leave it out."
        )
    sae = _folder(path.parent, place) if is_file else _release(str(source), place)
    _check_readable(sae, str(source))
    loaded: nn.Module = sae.eval()
    return loaded


def _weights_in(folder: Path) -> Path:
    """The weights file in the folder of an SAE."""
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if len(files) == 1:
        if files[0].name == _SAELENS and not (folder / "cfg.json").is_file():
            raise InputError(
                f"{folder} is not the folder of an SAE: it has {_SAELENS} and no cfg.json. Give a "
                "folder that SAELens or polyseme saved, or the file of a plain state dict."
            )
        return files[0]
    if files:
        raise InputError(
            f"{folder} holds several SAEs. Give one of the files: "
            f"{', '.join(file.name for file in files)}."
        )
    inside = sorted({file.parent.name for name in WEIGHTS for file in folder.glob(f"*/{name}")})
    if inside:
        suffix = ", …" if len(inside) > 8 else ""
        raise InputError(
            f"{folder} holds the folders of {len(inside)} SAEs: {', '.join(inside[:8])}{suffix}. "
            f"Give one of them, such as {str(folder / inside[0])!r}."
        )
    known = ", ".join(f"{name} ({library})" for name, library in WEIGHTS.items())
    raise InputError(
        f"{folder} is not the folder of an SAE: it has none of {known}. Give the folder of a "
        "single SAE, or the file of a plain state dict."
    )


def sae_shape(sae: nn.Module) -> tuple[int, int]:
    """(d_in, d_sae) of a SAELens SAE, a `PlainSAE` or any module with the same weights."""
    weight = sae_tensors(sae)["W_enc"]
    return int(weight.shape[0]), int(weight.shape[1])


def check_width(sae: nn.Module, width: int, site: str) -> None:
    """Check that an SAE fits a place in a model.

    Parameters
    ----------
    sae : torch.nn.Module
    width : int
        Length of the vectors at that place.
    site : str
        Name of that place, for errors.

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
    """Tensors of an SAE by their SAELens names: W_enc (d_in, d_sae), W_dec (d_sae, d_in), ...

    Raises
    ------
    InputError
        The module is not an SAE that polyseme knows.
    """
    if isinstance(sae, PlainSAE):
        return sae.tensors()
    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    if "W_enc" not in tensors or "W_dec" not in tensors:
        raise InputError(
            f"{type(sae).__name__} is not an SAE that polyseme knows; expected one from load_sae "
            f"or train_sae, or a module with the parameters W_enc and W_dec."
        )
    return tensors


def import_sae_lens(what: str) -> Any:
    """Import sae_lens, which is heavy, as it imports TransformerLens.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        with warnings.catch_warnings():
            # SAELens imports deprecated modules of TransformerLens.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            import sae_lens
    except ModuleNotFoundError as error:
        if error.name == "sae_lens":
            raise MissingDependencyError(what, "sae-lens", "sae") from error
        raise
    return sae_lens


# SAELens folders and releases.


def _folder(path: Path, device: torch.device) -> Any:
    config, weights = path / "cfg.json", path / _SAELENS
    sae_lens = import_sae_lens(f"Loading the SAELens SAE {path}")
    content = read_json(config)
    if not isinstance(content, dict):
        raise InputError(f"{config} holds a {type(content).__name__}; a JSON object is expected.")
    _check_architecture(content.get("architecture", "standard"), str(config))
    shapes = _shapes(weights)
    try:
        with _quiet():
            sae: Any = sae_lens.SAE.load_from_disk(path, device=str(device))
    except Exception as error:
        reason = _unlike(sae_lens, content, shapes) or " ".join(str(error).split())
        raise InputError(f"SAELens cannot load the SAE {path}: {reason}.") from error
    # SAELens now ignores this field of its old configurations.
    function = content.get("activation_fn", content.get("activation_fn_str"))
    if function not in (None, "relu", sae.cfg.architecture()):
        raise InputError(
            f"By {config}, the activation is {function!r}, but SAELens would read it as a "
            f"{sae.cfg.architecture()!r} SAE. Save it with SAELens 6 or newer."
        )
    return sae


def _check_architecture(architecture: object, where: str) -> None:
    if "transcoder" in str(architecture):
        raise InputError(f"The architecture in {where} is {architecture!r}. {NO_TRANSCODERS}.")
    if architecture not in _ARCHITECTURES:
        raise InputError(one_of(f"architecture in {where}", str(architecture), _ARCHITECTURES))


def _check_readable(sae: Any, source: str) -> None:
    """Check that the SAE that SAELens loaded computes what its configuration says."""
    config = sae.cfg
    _check_architecture(config.architecture(), source)
    norm = config.normalize_activations
    if norm not in _NORMS:
        raise InputError(
            f"The SAE {source} was trained with normalize_activations {norm!r}, which is neither "
            "folded into its weights nor stored with it. Fold it with SAELens "
            "(fold_activation_norm_scaling_factor or fold_activation_whitening) and save it again."
        )
    if not isinstance(config.apply_b_dec_to_input, bool):
        raise InputError(
            f"apply_b_dec_to_input of the SAE {source} is {config.apply_b_dec_to_input!r}; true or "
            "false is expected."
        )
    k = getattr(config, "k", 1)
    if not isinstance(k, int) or isinstance(k, bool) or not 0 < k <= config.d_sae:
        raise InputError(
            f"k of the SAE {source} is {k!r}; an integer of at least 1 and at most d_sae, "
            f"{config.d_sae}, is expected."
        )
    for name, tensor in sae.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{name} of the SAE {source} holds NaN or infinity: its training failed."
            )


def _shapes(file: Path) -> dict[str, list[int]]:
    with reading_safetensors(file), safe_open(file, framework="pt") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _unlike(sae_lens: Any, content: dict[str, Any], shapes: Mapping[str, list[int]]) -> str:
    """How tensors differ from those that the configuration implies; empty if they do not."""
    try:
        sae = sae_lens.SAE.from_dict(content | {"device": "meta"})
        expected = {name: list(tensor.shape) for name, tensor in sae.state_dict().items()}
    except Exception:  # then the configuration is wrong, and SAELens's own error says how
        return ""
    missing = [name for name in expected if name not in shapes]
    if missing:
        return f"its weights lack the tensor {missing[0]!r}"
    wrong = [name for name in expected if expected[name] != shapes[name]]
    if wrong:
        name = wrong[0]
        return (
            f"its tensor {name!r} has shape {tuple(shapes[name])}, but by cfg.json it should have "
            f"{tuple(expected[name])}"
        )
    return ""


def _release(source: str, device: torch.device) -> Any:
    nothing = f"There is no file or folder {source!r}"
    head, _, rest = source.partition("/")
    if not rest or source.startswith((".", "/", "~")) or "\\" in source:
        raise InputError(
            f"{nothing}. Give a SAELens folder, the file of a plain state dict, or a SAELens "
            "release as 'release/sae_id'."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise InputError(
            f"Loading the release {source!r} needs torch 2.6 or newer, but this is "
            f"{torch.__version__}: with older versions, SAELens unpickles downloads."
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
            sae = sae_lens.SAE.from_pretrained(head, rest, device=str(device))
    except Exception as error:
        raise InputError(
            f"Cannot download the SAE {rest!r} of {head!r} from the Hugging Face Hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). If the Hub cannot be "
            f"reached, give a folder that SAELens saved elsewhere."
        ) from error
    return sae


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress SAELens's warnings about things that polyseme does not do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

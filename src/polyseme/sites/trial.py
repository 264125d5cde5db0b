"""Running a language model on a few random tokens, to learn its structure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from polyseme.errors import InputError, SiteError
from polyseme.sites.hooks import Feed, evaluating, in_this_thread

_INPUTS, _POSITIONS = 3, 5
#: Number of tokens for learning a model's structure.
N_TOKENS = _INPUTS * _POSITIONS
#: Another order of these inputs. Anything in order of positions follows it.
TURNED = [2, 0, 1]


def random_tokens(model: nn.Module) -> dict[str, Tensor]:
    """A few fixed random token ids for a language model."""
    look: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = look() if look is not None else None
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise SiteError(
            f"{type(model).__name__} has no token embedding; expected a language model."
        )
    shape = (_INPUTS, _POSITIONS)
    # A separate generator, so that the caller's random state does not change.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def run_on_tokens(model: nn.Module, order: Sequence[int] = range(_INPUTS)) -> Any:
    """Run a language model without its head on a few fixed random tokens.

    ``order`` is the order of the inputs, such as `TURNED`.
    """
    tokens = {name: values[list(order)] for name, values in random_tokens(model).items()}
    try:
        return Feed(model, head=False)(tokens)
    except (InputError, AttributeError, KeyError, AssertionError) as error:
        # The latter three are from models that miss an image, for example.
        raise SiteError(
            f"{type(model).__name__} does not run on {_POSITIONS} tokens alone, which finding its "
            f"MLPs requires: {error}"
        ) from error


@dataclass
class TracedCall:
    """One call of a module; tensors have one row per position."""

    inputs: Tensor
    output: Tensor
    number: int


def _is_hidden(value: Any) -> TypeGuard[Tensor]:
    return torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1


@dataclass
class Traced:
    """Inputs and outputs of the modules that the model called exactly once, by position."""

    calls: dict[nn.Module, TracedCall]

    @classmethod
    def watch(
        cls,
        model: nn.Module,
        order: Sequence[int] = range(_INPUTS),
        driven: Collection[nn.Module] = (),
    ) -> Traced:
        """Run the model; ``driven`` modules output random numbers instead."""
        seen: dict[nn.Module, list[TracedCall]] = {}
        numbers = count()
        generator = torch.Generator().manual_seed(2)

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            inputs = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
            if not (_is_hidden(inputs) and _is_hidden(output)):
                return None
            replaced = _numbers_like(output, generator) if module in driven else None
            # Copies, as later code may work in place.
            put_out = output if replaced is None else replaced
            rows = [t.reshape(-1, t.shape[-1]).clone() for t in (inputs, put_out)]
            if [len(t) for t in rows] == [N_TOKENS] * 2:
                seen.setdefault(module, []).append(TracedCall(rows[0], rows[1], next(numbers)))
            return replaced

        with ExitStack() as hooks:
            for module in model.modules():
                # Linear layers, and the norms that may precede them.
                if isinstance(getattr(module, "weight", None), Tensor):
                    handle = module.register_forward_hook(in_this_thread(note), with_kwargs=True)
                    hooks.callback(handle.remove)
            with evaluating(model), torch.no_grad():
                run_on_tokens(model, order)
        return cls({module: calls[0] for module, calls in seen.items() if len(calls) == 1})


def _numbers_like(output: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of both signs and sizes from 0.03 to 20, which distinguish nonlinearities."""
    signs = torch.randn(output.shape, generator=generator).sign()
    sizes = 10 ** (2.8 * torch.rand(output.shape, generator=generator) - 1.5)
    return (signs * sizes).to(output)


def come_in_order(rows: Tensor, turned: Tensor) -> bool:
    """Whether rows are the positions of the inputs, one input after another.

    Then they are permuted like the inputs. Rows of a layer that works on all inputs position by
    position, or of an expert that gets some tokens in its own order, are not.

    Parameters
    ----------
    rows, turned : Tensor, shape (N_TOKENS, n)
        From a run on the inputs, and from one in the order `TURNED`.
    """
    expected = rows.reshape(_INPUTS, _POSITIONS, -1)[TURNED].reshape(N_TOKENS, -1)
    if expected.shape != turned.shape:
        return False
    # Centred, as nearly equal rows differ little relative to their size.
    spread = float((rows - rows.mean(dim=0)).abs().max())
    return float((expected - turned).abs().max()) <= 0.1 * spread and spread > 0

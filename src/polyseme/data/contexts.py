"""Texts as a language model reads them: contexts of tokens, all of one length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.data.text import Texts
from polyseme.errors import InputError, one_of

_LEAVE_OUT = ("special", "first")
# transformers sets the limit of a tokenizer without one to 1e30.
_NO_LIMIT = 1_000_000
_WANTED = (
    "expected a transformers tokenizer, such as AutoTokenizer.from_pretrained(...); wrap a "
    "tokenizers.Tokenizer with PreTrainedTokenizerFast(tokenizer_object=...)"
)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A batch of contexts: the model's input, and which positions count."""

    ids: NDArray[np.int64]
    """(B, length): the tokens."""
    attention: NDArray[np.bool_]
    """(B, length): False for padding, which only ever follows the last token of a context."""
    mask: NDArray[np.bool_]
    """(B, length): False for padding and for positions left out."""


class Contexts:
    """Contexts of one length, cut from tokenized texts.

    The parts of the documents (`Texts.parts`) are tokenized one at a time, without special tokens,
    and joined; a document of up to 65,536 characters is tokenized whole. A separator, SEP or EOS,
    stands between two documents unless a context begins there. The tokens are then cut into
    consecutive contexts, so a context may hold the end of one document and the beginning of the
    next. Each context has at least one token of text. It begins with CLS or BOS, and ends with SEP
    if the tokenizer has both CLS and SEP. Only the last context is padded.

    Parameters
    ----------
    texts : Texts
        From `read_text`.
    tokenizer : transformers.PreTrainedTokenizerBase
        Or any object that, called as ``tokenizer(text, add_special_tokens=False, verbose=False)``,
        returns a dict with ``input_ids``, a list of int, and that has the attributes
        ``bos_token_id``, ``eos_token_id``, ``cls_token_id``, ``sep_token_id``, ``pad_token_id`` and
        ``all_special_ids``.
    length : int, default 128
        Tokens per context, including its special tokens; at least 3.
    max_tokens : int, optional
        Read at most this many tokens of the documents, left out of the mask or not; all by default.
        Special tokens added to contexts, separators and padding do not count.
    leave_out : iterable of str, default ("special", "first")
        What `TokenBatch.mask` leaves out besides padding: "special", the tokenizer's special tokens
        (the one for unknown words included); "first", the first token of each context, which many
        models use as an attention sink.

    Attributes
    ----------
    texts : Texts
    tokenizer
    length, max_tokens, leave_out
        As given.
    name : str
        The name of the texts.

    Raises
    ------
    InputError
        If an argument does not have the form above, or if ``length`` is more than the tokenizer's
        model accepts.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: Any,
        *,
        length: int = 128,
        max_tokens: int | None = None,
        leave_out: Iterable[str] = _LEAVE_OUT,
    ) -> None:
        if not isinstance(texts, Texts):
            raise InputError(
                f"texts is a {type(texts).__name__}; expected Texts. Give read_text(texts)."
            )
        self.texts = texts
        self.name = texts.name
        self.tokenizer = tokenizer
        self._find_special_tokens()
        self.length = self._checked_length(length)
        if max_tokens is not None:
            _check_whole("max_tokens", max_tokens, 1, "Leave it out to use all tokens.")
        self.max_tokens = max_tokens
        asked = (leave_out,) if isinstance(leave_out, str) else tuple(leave_out)
        for entry in asked:
            if entry not in _LEAVE_OUT:
                raise InputError(one_of("entry of leave_out", str(entry), _LEAVE_OUT))
        self.leave_out = tuple(entry for entry in _LEAVE_OUT if entry in asked)

    def __repr__(self) -> str:
        return f"Contexts({self.name!r}: {self.length} tokens each)"

    def _find_special_tokens(self) -> None:
        kind = type(self.tokenizer).__name__
        self._tokenize("a")
        try:
            bos, eos, cls, sep, pad = (
                _id(getattr(self.tokenizer, f"{name}_token_id"))
                for name in ("bos", "eos", "cls", "sep", "pad")
            )
            special = sorted({int(token) for token in self.tokenizer.all_special_ids})
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"tokenizer is a {kind} without special-token attributes ({error}); {_WANTED}."
            ) from error
        # RoBERTa's BOS and EOS are its CLS and SEP.
        encoder = cls is not None and sep is not None
        self._begin = cls if encoder or bos is None else bos
        self._end = sep if encoder else None
        self._separator = sep if encoder or eos is None else eos
        self._padding = next(token for token in (pad, eos, 0) if token is not None)
        self._special = special

    def _checked_length(self, length: int) -> int:
        _check_whole("length", length, 3, "It includes the special tokens of each context.")
        limit = getattr(self.tokenizer, "model_max_length", None)
        if isinstance(limit, int | float) and limit < _NO_LIMIT and length > limit:
            raise InputError(
                f"length is {length:,}; the tokenizer says that its model accepts at most "
                f"{limit:,} tokens. Give length={limit:.0f} or less."
            )
        return length

    def _tokenize(self, text: str) -> list[int]:
        # verbose=False suppresses the warning about long texts, which are cut into contexts later.
        if isinstance(self.tokenizer, str) or not callable(self.tokenizer):
            raise InputError(f"tokenizer is a {type(self.tokenizer).__name__}; {_WANTED}.")
        try:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return [int(token) for token in ids]
        # Every exception: a user may pass a model or a processor, which can raise anything.
        except Exception as error:
            raise InputError(
                f"tokenizer is a {type(self.tokenizer).__name__} that could not tokenize a text "
                f"({type(error).__name__}: {error}); {_WANTED}."
            ) from error

    def count(self) -> int:
        """Count the contexts. Reads and tokenizes all of the text.

        Raises
        ------
        InputError
            If the texts can be read only once.
        """
        if not self.texts.reiterable:
            raise InputError(
                f"{self.name} is an iterator, which can be read only once, so its contexts cannot "
                f"be counted. Give a list, a file or an object whose __iter__ starts over."
            )
        return sum(1 for _ in self._bodies())

    def batches(self, size: int, start: int = 0) -> Iterator[TokenBatch]:
        """Iterate over contexts in batches; the contexts do not depend on the batch size.

        Parameters
        ----------
        size : int
            Contexts per batch, B; the last batch may have fewer.
        start : int, default 0
            Number of contexts to skip. Their text is still read and tokenized.

        Yields
        ------
        TokenBatch
            ids int64, attention bool and mask bool, each (B, length).

        Raises
        ------
        InputError
            If there are fewer than ``start`` contexts, if the texts contain no tokens, or as for
            `Texts.parts`.
        """
        _check_whole("size", size, 1, "It is the number of contexts per batch.")
        _check_whole("start", start, 0, "It is the number of contexts to skip.")
        return self._batches(size, start)

    def _batches(self, size: int, start: int) -> Iterator[TokenBatch]:
        bodies = self._bodies()
        skipped = sum(1 for _ in islice(bodies, start))
        if skipped < start:
            raise InputError(
                f"start is {start:,}, but {self.name} makes only {skipped:,} contexts of "
                f"{self.length} tokens. To resume, give the same texts, tokenizer and settings."
            )
        any_yet = start > 0
        while batch := list(islice(bodies, size)):
            yield self._batch(batch)
            any_yet = True
        if not any_yet:
            raise InputError(
                f"The tokenizer found no tokens in {self.name}; expected at least one. Check that "
                f"it supports the script of the texts."
            )

    def _bodies(self) -> Iterator[list[int]]:
        """The tokens of each context without its special tokens at either end; never empty."""
        room = self.length - (self._begin is not None) - (self._end is not None)
        remaining = self.max_tokens
        body: list[int] = []
        between = False
        for part in self.texts.parts():
            between = between or part.first
            ids = self._tokenize(part.text)[:remaining]
            if ids and between:
                between = False
                if body and self._separator is not None:
                    body.append(self._separator)
            offset = 0
            # The separator may have filled the context, which then takes none of the ids.
            while offset < len(ids):
                taken = ids[offset : offset + room - len(body)]
                body += taken
                offset += len(taken)
                if len(body) == room:
                    yield body
                    body = []
            if remaining is not None:
                remaining -= len(ids)
                if not remaining:
                    break
        if body:
            yield body

    def _batch(self, bodies: list[list[int]]) -> TokenBatch:
        ids = np.full((len(bodies), self.length), self._padding, dtype=np.int64)
        attention = np.zeros(ids.shape, dtype=np.bool_)
        begin = [] if self._begin is None else [self._begin]
        end = [] if self._end is None else [self._end]
        for row, body in enumerate(bodies):
            context = begin + body + end
            ids[row, : len(context)] = context
            attention[row, : len(context)] = True
        mask = attention.copy()
        if "special" in self.leave_out:
            mask &= ~np.isin(ids, self._special)
        if "first" in self.leave_out:
            mask[:, 0] = False
        return TokenBatch(ids, attention, mask)

    def counted_tokens(self) -> NDArray[np.int64]:
        """Ids of all tokens in the mask, (n,), in the order of the texts."""
        parts = [batch.ids[batch.mask] for batch in self.batches(512)]
        return np.concatenate(parts)

    def settings(self) -> dict[str, Any]:
        """How the contexts are cut, as JSON-serialisable values.

        Returns
        -------
        dict
            ``length``, ``max_tokens``, ``leave_out`` and ``special_ids``: the ids that contexts
            ``begin`` and ``end`` with, the ``separator`` and the ``padding`` (None if absent), and
            ``left_out``, the ids that "special" leaves out.
        """
        return {
            "length": self.length,
            "max_tokens": self.max_tokens,
            "leave_out": list(self.leave_out),
            "special_ids": {
                "begin": self._begin,
                "end": self._end,
                "separator": self._separator,
                "padding": self._padding,
                "left_out": self._special if "special" in self.leave_out else [],
            },
        }

    def identity(self) -> dict[str, Any]:
        """What distinguishes these contexts from others, as JSON-serialisable values.

        Returns
        -------
        dict
            ``name``, ``texts`` (`Texts.identity`, which reads files once), ``tokenizer`` (its
            class, and the sha256 of its vocabulary if it has ``get_vocab``) and `settings`.
        """
        vocabulary: dict[str, int] = getattr(self.tokenizer, "get_vocab", dict)()
        listed = json.dumps(sorted(vocabulary.items())).encode()
        return {
            "name": self.name,
            "texts": self.texts.identity(),
            "tokenizer": {
                "class": type(self.tokenizer).__name__,
                "vocabulary_sha256": sha256(listed).hexdigest() if vocabulary else None,
            },
            **self.settings(),
        }


def _id(token: Any) -> int | None:
    """A token's id, or None; some tokenizers use a negative id for "none"."""
    return None if token is None or int(token) < 0 else int(token)


def _check_whole(name: str, value: Any, lowest: int, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise InputError(
            f"{name} is {value!r}; it must be a whole number, {lowest} or more. {hint}"
        )

"""What tells one piece of work from another, so that only the same is gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from polyseme.store.format import JSON

# Lists of numbers under the first key were computed, to a relative precision that is under the
# second one beside it. Their last digits are a machine's own.
_COMPUTED, _PRECISION = "outputs", "precision"
# By so much of the largest. In float32 sums in another order differ by some 1e-6; one GELU from
# another by 1e-4.
_LEAST, _ROUNDINGS = 2e-5, 4


def changes(before: JSON, now: JSON) -> list[str]:
    """What differs between two fingerprints, with both values; nothing if they are the same.

    Lists under a key "outputs" may differ in their last digits: by 2e-5 of the largest, or by four
    times the number under "precision" beside it.
    """
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    return [told for name in old | new if (told := _change(name, old, new))]


def differences(before: JSON, now: JSON, *, limit: int = 5) -> str:
    """The first `changes`, in one line."""
    found = changes(before, now)
    more = [f"and {len(found) - limit} more"] if len(found) > limit else []
    return "; ".join(found[:limit] + more)


def _change(name: str, old: Mapping[str, JSON], new: Mapping[str, JSON]) -> str | None:
    if name in old and name in new:
        before, now = old[name], new[name]
        if before == now and _text(before) == _text(now):
            return None
        *above, last = name.split(".")
        if last == _COMPUTED and _comparable(before, now):
            precision = ".".join([*above, _PRECISION])
            allowed = max(_LEAST, *(_ROUNDINGS * leaves.get(precision, 0) for leaves in (old, new)))
            largest = max(map(abs, before + now), default=0.0) or 1.0
            gap = max(abs(a - b) for a, b in zip(before, now, strict=True)) / largest
            return f"{name} differ by up to {gap:.1g} of the largest" if gap > allowed else None
    was, is_now = (_shown(leaves, name) for leaves in (old, new))
    return f"{name} was {was} and is now {is_now}"


def _comparable(*values: JSON) -> bool:
    numbers = all(isinstance(v, list) and all(isinstance(x, float) for x in v) for v in values)
    return numbers and len({len(value) for value in values}) == 1 and bool(values[0])


def _leaves(value: JSON, name: str) -> Iterator[tuple[str, JSON]]:
    if isinstance(value, dict) and (value or not name):
        for key, child in value.items():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _text(value: JSON) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shown(leaves: Mapping[str, JSON], name: str, limit: int = 100) -> str:
    text = _text(leaves[name]) if name in leaves else "not set"
    return text if len(text) <= limit else text[: limit - 1] + "…"

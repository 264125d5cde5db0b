"""Going to a view of the explorer, and where the browser is."""

from __future__ import annotations

READY = ".page:not(.pending) h1"
# An address changes first, and what is on screen follows.
_SHOWN = "() => document.querySelector('main').dataset.at === location.hash"


def visit(page, site: str, address: str) -> None:
    """Load a view anew, and wait until it is there."""
    page.goto("about:blank")  # or else another hash of the same page would be no new page
    page.goto(f"{site}{address}")
    page.wait_for_selector(READY)


def arrive(page, condition: str) -> None:
    """Wait until an expression of the address holds, and what it leads to is on screen."""
    page.wait_for_function(f"() => {condition}")
    page.wait_for_function(_SHOWN)


def query(page) -> dict[str, str]:
    """What the address says of the view, once it is on screen."""
    page.wait_for_function(_SHOWN)
    return page.evaluate(
        "Object.fromEntries(new URLSearchParams(location.hash.split('?')[1] ?? ''))"
    )

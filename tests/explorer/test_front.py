"""What the front end's files may not do, and that an installation has them all."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path, PurePath

import pytest

from polyseme.explorer.root import STATIC, WebRoot

ROOT = Path(__file__).resolve().parents[2]
# Ways to make a page of a text, or a program, or to ask elsewhere.
UNSAFE = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|srcdoc|createContextual"
    r"|\beval\(|new Function|javascript:|\bon\w+\s*=\s*[\"']|setAttribute\(\s*[\"']on"
    r"|(?:src|href|action)=[\"'](?:https?:)?//|@import|url\(|import\([^)]*https?:"
)
FILES = sorted(path for path in STATIC.rglob("*") if path.is_file())


def violations(text: str) -> list[str]:
    return UNSAFE.findall(text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(STATIC).as_posix())
def test_text_is_set_as_text_and_nothing_comes_from_elsewhere(file):
    assert violations(file.read_text("utf-8")) == []
    assert file.suffix in {".js", ".css", ".html", ".svg"}


@pytest.mark.parametrize(
    "planted",
    [
        "element.innerHTML = label",
        "element.insertAdjacentHTML('beforeend', token)",
        "setTimeout(eval(text))",
        "<a onclick='go()'>",
        '<script src="https://cdn.example/x.js">',
        '<link href="//cdn.example/x.css">',
        "@import 'other.css'",
        "background: url(https://example/x.png)",
        "element.setAttribute('onclick', text)",
    ],
)
def test_unsafe_code_is_found(planted):
    assert violations(planted)


def test_the_page_has_no_script_or_style_of_its_own():
    page = (STATIC / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert "<style" not in page
    assert " style=" not in page


def test_an_installation_has_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["polyseme"]
    package = STATIC.parents[1]
    for file in FILES:
        inside = PurePath(file.relative_to(package))
        assert any(
            inside.match(pattern) and len(inside.parts) == len(PurePath(pattern).parts)
            for pattern in patterns
        ), f"{inside} is in no pattern of package-data"


def test_every_file_of_the_front_end_is_served():
    served = {path for path in WebRoot(list).paths() if not path.startswith("data/")}
    wanted = {f"static/{file.relative_to(STATIC).as_posix()}" for file in FILES}
    assert served == (wanted - {"static/index.html"}) | {"index.html"}

"""The documentation is run: its Python blocks, its commands and its links."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import polyseme as ps

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *NOTEBOOKS]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

FENCE = re.compile(r"^(?P<indent>\s*)(?P<marks>`{3,}|~{3,})\s*(?P<info>[^`]*)$")
NOT_RUN = re.compile(r"^\s*<!--\s*not run:?(?P<reason>.*?)-->\s*$")
# Other spellings of "python" would escape the run below.
ESCAPES = {"py", "python3", "pycon", "ipython", "doctest", "py3"}
SHELLS = {"console", "bash", "sh", "shell"}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its source, the line of its opening fence."""

    language: str
    source: str
    line: int
    not_run: str | None = None
    """The reason why it is not run, which may be empty; None where it is run."""


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, in order."""
    found = []
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        opening = FENCE.match(lines[i])
        if opening is None:
            i += 1
            continue
        first, marks = i, opening["marks"]
        body = []
        i += 1
        while i < len(lines) and not re.fullmatch(
            rf"\s*{re.escape(marks[0])}{{{len(marks)},}}\s*", lines[i]
        ):
            body.append(lines[i])
            i += 1
        i += 1
        excluded = NOT_RUN.match(lines[first - 1]) if first else None
        found.append(
            Block(
                language=(opening["info"].split() or [""])[0].strip("{}.").lower(),
                source=textwrap.dedent("\n".join(body)) + "\n",
                line=first + 1,
                not_run=excluded["reason"].strip() if excluded else None,
            )
        )
    return found


def text_of(page: Path) -> str:
    """A page as Markdown; the cells of a notebook are its text and its Python blocks."""
    text = page.read_text("utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells
    )


def run_blocks(text: str, name: str, namespace: dict[str, Any]) -> int:
    """Run the Python blocks of a text one after another; returns how many ran."""
    ran = 0
    for block in blocks(text):
        assert block.language not in ESCAPES, (
            f"{name}, line {block.line}: a block in {block.language!r} would not be run. "
            "Call it python, and write <!-- not run: reason --> before it if it cannot run."
        )
        if block.language != "python":
            continue
        if block.not_run is not None:
            assert block.not_run, f"{name}, line {block.line}: say why the block is not run."
            continue
        # The blank lines make the traceback name the line of the page.
        code = compile("\n" * block.line + block.source, name, "exec")
        exec(code, namespace)
        ran += 1
    return ran


def commands(text: str) -> list[tuple[int, list[str]]]:
    """The `polyseme` commands of the shell blocks of a text: line and arguments."""
    found = []
    for block in blocks(text):
        if block.language not in SHELLS:
            continue
        # A continued line is one command, at the line where it begins.
        joined, start = "", 0
        for offset, line in enumerate(block.source.splitlines(), block.line + 1):
            start = start if joined else offset
            joined += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            command, joined = joined.strip().removeprefix("$ "), ""
            if not command.startswith("polyseme "):
                continue
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = []
            for word in lexer:
                if set(word) <= set("|&;<>()"):
                    break
                words.append(word)
            found.append((start, words[1:]))
    return found


def command_errors(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """What of a command the parser does not have: subcommands and options."""
    errors = []
    name = parser.prog
    for word in arguments:
        getattr(parser, "complete", lambda: None)()
        subcommands: dict[str, argparse.ArgumentParser] = {}
        options: set[str] = set()
        for action in parser._actions:
            options.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                subcommands.update(action.choices)
        if re.match(r"-+[A-Za-z]", word):
            option = word.split("=", 1)[0]
            if option not in options:
                errors.append(f"`{name}` has no option {option}.")
        elif subcommands:
            if word not in subcommands:
                return [*errors, f"`{name}` has no subcommand {word!r}."]
            parser, name = subcommands[word], f"{name} {word}"
    return errors


def links(text: str) -> list[str]:
    """The targets of the links and images of a Markdown text, outside code."""
    prose, inside = [], ""
    for line in text.splitlines():
        fence = FENCE.match(line)
        if inside:
            if fence and fence["marks"].startswith(inside) and not fence["info"].strip():
                inside = ""
        elif fence:
            inside = fence["marks"]
        else:
            prose.append(line)
    plain = re.sub(r"(`+).+?\1", "", "\n".join(prose))
    patterns = (
        r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)",
        r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)",
        r"\b(?:src|href)\s*=\s*[\"']([^\"']+)[\"']",
    )
    return [target for pattern in patterns for target in re.findall(pattern, plain, re.M)]


def broken_links(text: str, page: Path) -> list[str]:
    """The relative links and images of a page that lead to no file."""
    broken = []
    for target in links(text):
        if re.match(r"[a-z][a-z0-9+.-]*:|#|//", target, re.I):
            continue
        path = re.split(r"[#?]", target, maxsplit=1)[0]
        if not (page.parent / path).exists():
            broken.append(target)
    return broken


@cache
def parser() -> argparse.ArgumentParser:
    import polyseme.cli

    return polyseme.cli.build_parser()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_python_blocks_run(
    page: Path,
    docs_namespace: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if page in NOTEBOOKS:
        # The same model, in a file that takes less time to read.
        load, folder = ps.load_language_model, request.getfixturevalue("smollm2_folder")
        monkeypatch.setattr(ps, "load_language_model", lambda name: load(folder))
    run_blocks(text_of(page), page.relative_to(ROOT).as_posix(), docs_namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_commands_are_the_parsers(page: Path) -> None:
    errors = [
        f"{page.name}, line {line}: {error}"
        for line, arguments in commands(text_of(page))
        for error in command_errors(parser(), arguments)
    ]
    assert errors == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_resolve(page: Path) -> None:
    assert broken_links(text_of(page), page) == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(notebook: Path) -> None:
    assert notebook.stat().st_size < 1e6
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= len(cells)
    for output in outputs:
        assert output["output_type"] in ("display_data", "execute_result", "stream")
        assert output.get("name", "stdout") == "stdout", "a warning"


def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    build = ["build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *build],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    reference = (tmp_path / "api.html").read_text()
    for name in ("analyse", "Polysemanticity.max_distance", "Neuron.meanings"):
        assert f'.{name}"' in reference
    notebook = (tmp_path / "notebooks" / "paper.html").read_text()
    assert "data:image/png;base64," in notebook
    assert "AUC, h ⊙ w" in notebook


# The tests of the tests.

PAGE = """\
A page, with `polyseme inline` in it.

```python
x = 1
```

1. In a list:

   ```python
   y = x + 1
   ```

<!-- not run: it needs a GPU -->
```python
raise RuntimeError
```

````markdown
```python
raise RuntimeError  # this block is a part of another one
```
````

```console
$ polyseme analyse gpt2 --out=runs/a \\
    --threshold 0.05 | head
polyseme-other
$ polyseme nothing
```

```python
z = x + y
```
"""


def small_parser() -> argparse.ArgumentParser:
    small = argparse.ArgumentParser("polyseme")
    small.add_argument("--version", action="store_true")
    analyse = small.add_subparsers().add_parser("analyse")
    analyse.add_argument("model")
    analyse.add_argument("--out")
    analyse.add_argument("--threshold", type=float)
    return small


def test_blocks_are_found_in_order() -> None:
    found = blocks(PAGE)
    assert [(block.language, block.line) for block in found] == [
        ("python", 3),
        ("python", 9),
        ("python", 14),
        ("markdown", 18),
        ("console", 24),
        ("python", 31),
    ]
    assert found[1].source == "y = x + 1\n"
    assert [block.not_run for block in found] == [None, None, "it needs a GPU", None, None, None]


def test_blocks_share_one_namespace() -> None:
    namespace: dict[str, Any] = {}
    assert run_blocks(PAGE, "page.md", namespace) == 3
    assert namespace["z"] == 3


def test_an_error_in_a_block_names_the_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run_blocks("One.\n\n```python\na = 1\n1 / 0\n```\n", "page.md", {})
    last = caught.traceback[-1]
    assert (Path(last.path).name, last.lineno + 1) == ("page.md", 5)


@pytest.mark.parametrize("comment", ["<!-- not run: -->", "<!-- not run -->"])
def test_a_block_that_is_not_run_says_why(comment: str) -> None:
    with pytest.raises(AssertionError, match=r"page\.md, line 2: say why"):
        run_blocks(f"{comment}\n```python\n1 / 0\n```\n", "page.md", {})


@pytest.mark.parametrize("language", sorted(ESCAPES))
def test_no_block_escapes_by_its_language(language: str) -> None:
    with pytest.raises(AssertionError, match="Call it python"):
        run_blocks(f"```{language}\n1 / 0\n```\n", "page.md", {})


def test_commands_are_found_whole() -> None:
    assert commands(PAGE) == [
        (25, ["analyse", "gpt2", "--out=runs/a", "--threshold", "0.05"]),
        (28, ["nothing"]),
    ]


@pytest.mark.parametrize(
    ("command", "errors"),
    [
        ("analyse gpt2 --out=runs/a --threshold -1", []),
        ("--version", []),
        ("nothing", ["`polyseme` has no subcommand 'nothing'."]),
        ("analyse gpt2 --outt runs/a", ["`polyseme analyse` has no option --outt."]),
        ("analyse gpt2 --version", ["`polyseme analyse` has no option --version."]),
        (
            "--out x analyse",
            ["`polyseme` has no option --out.", "`polyseme` has no subcommand 'x'."],
        ),
    ],
)
def test_a_command_is_compared_with_the_parser(command: str, errors: list[str]) -> None:
    assert command_errors(small_parser(), command.split()) == errors


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").touch()
    text = (
        "[a](there.md#part) [b](gone.md) ![c](gone.png 'a title') `[d](code.md)` [e](#part)\n"
        '<img src="gone.svg"> [f](https://example.org/gone) [g][h]\n'
        "[h]: gone.txt\n"
        "```text\n[i](code.md)\n```\n"
    )
    assert broken_links(text, tmp_path / "page.md") == [
        "gone.md",
        "gone.png",
        "gone.txt",
        "gone.svg",
    ]

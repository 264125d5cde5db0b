"""What the source may look like: imports, laziness, no unpickling, size, dependencies.

Each rule is a function of ``{file: source}`` that returns one sentence per violation, so
that the second half of this module can show that it finds a planted one. A file is named
by its dotted path, a package's own file with ``__init__`` at the end.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Sources = dict[str, str]

# What each layer may import, besides itself. Nothing imports the root package, which
# would go around this table; its `__version__` is the exception.
LIBRARY = {"errors", "interrupts", "core", "sites", "capture", "attribution"}
LIBRARY |= {"sae", "data", "store", "views", "remote", "options"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "interrupts": set(),
    "core": {"errors"},
    "sites": {"errors", "core", "remote"},
    "capture": {"errors", "core", "sites"},
    "attribution": {"errors", "core", "sites", "capture"},
    # The models, selectors and sites that it names are only types.
    "options": {"errors", "capture", "sites"},
    "sae": {"errors", "interrupts", "options", "core", "store", "remote"},
    "parquet": set(),
    "remote": {"errors"},
    "store": {"errors", "parquet", "remote"},
    "data": {"errors", "parquet", "remote"},
    "views": {"errors", "core", "store", "remote"},
    "explorer": {"errors", "core", "store", "views", "remote"},
    "analysis": LIBRARY,
    "opening": {"errors", "store", "views", "analysis"},
    "evaluate": LIBRARY | {"analysis", "demo"},
    "demo": LIBRARY | {"analysis", "evaluate"},
}
LAYERS["cli"] = {*LAYERS, "__init__"}
LAYERS["__main__"] = {"cli"}
LAYERS["__init__"] = {*LAYERS} - {"__main__"}

# The third-party imports of the package: the distribution, and the extra that declares it
# ("" for the dependencies that every installation has).
THIRD_PARTY = {
    "fastcluster": ("fastcluster", ""),
    "filelock": ("filelock", ""),
    "fsspec": ("fsspec", ""),
    "numpy": ("numpy", ""),
    "pandas": ("pandas", ""),
    "pyarrow": ("pyarrow", ""),
    "rich": ("rich", ""),
    "safetensors": ("safetensors", ""),
    "scipy": ("scipy", ""),
    "threadpoolctl": ("threadpoolctl", ""),
    "torch": ("torch", "torch"),
    "faiss": ("faiss-cpu", "torch"),
    "matplotlib": ("matplotlib", "figures"),
    "starlette": ("starlette", "explore"),
    "uvicorn": ("uvicorn", "explore"),
    "PIL": ("pillow", "images"),
    "mlxtend": ("mlxtend", "demo"),
    "datasets": ("datasets", "hub"),
    "sae_lens": ("sae-lens", "sae"),
    "transformers": ("transformers", "text"),
    "gguf": ("gguf", "text"),
    "sklearn": ("scikit-learn", "benchmark"),
    "ray": ("ray", "ray"),
}

HEAVY = {"torch", "transformers", "pandas", "matplotlib", "scipy", "sklearn"}
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|(?:home|Users)/[A-Za-z]\w*)(?![\w-])")
LINES = 500


@cache
def sources() -> Sources:
    """Every file of the package."""
    source = ROOT / "src"
    return {
        ".".join(path.relative_to(source).with_suffix("").parts): path.read_text("utf-8")
        for path in sorted(source.joinpath("polyseme").rglob("*.py"))
    }


def declared() -> dict[str, set[str]]:
    """The distributions that pyproject.toml declares, by extra ("" for no extra)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
        for extra, requirements in groups.items()
    }


# Reading imports.


@dataclass(frozen=True)
class Import:
    """One imported name, absolute: `from a.b import c` in full, whether c is a module or not."""

    name: str
    line: int
    lazy: bool
    """Inside a function, or only for type checkers: it does not happen on import."""


def imports(file: str, source: str) -> Iterator[Import]:
    """The imports of one file, wherever they stand, and calls of `import_module("...")`."""
    package = file.split(".")[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            for alias in node.names:
                parts = [*base, node.module or "", alias.name]
                yield Import(".".join(filter(None, parts)), node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    dots = len(name) - len(name.lstrip("."))
                    base = package[: len(package) + 1 - dots] if dots else []
                    yield Import(".".join([*base, name.lstrip(".")]), node.lineno, lazy)
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        )
        for field, value in ast.iter_fields(node):
            inside = lazy or isinstance(node, functions) or (typing_only and field == "body")
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def module_of(name: str, files: Sources) -> str:
    """The file that an import within polyseme leads to; an unknown name stays as it is."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for file in (prefix, f"{prefix}.__init__"):
            if file in files and (length > 1 or len(parts) == 1):
                return file
    if len(parts) == 2 and "polyseme.__init__" in files and parts[1] not in LAYERS:
        return "polyseme.__init__"
    return name


def layer_of(file: str) -> str:
    return file.split(".")[1] if "." in file else "__init__"


def own_imports(file: str, files: Sources) -> Iterator[tuple[Import, str]]:
    """The imports of other files of polyseme, with the file that each leads to."""
    for found in imports(file, files[file]):
        if found.name.split(".")[0] == "polyseme" and found.name != "polyseme.__version__":
            yield found, module_of(found.name, files)


# The rules.


def wrong_directions(files: Sources) -> list[str]:
    errors = []
    for file in files:
        layer = layer_of(file)
        if layer not in LAYERS:
            errors.append(
                f"{file} is in {layer!r}, which has no row in the table of layers. "
                "Say in tests/test_architecture.py what it may import."
            )
            continue
        for found, target in own_imports(file, files):
            other = layer_of(target)
            if other != layer and other not in LAYERS[layer]:
                errors.append(
                    f"{file}, line {found.line}: {layer} must not import {other} ({found.name})."
                )
            elif layer == "__init__" and not found.lazy and other not in ("errors", layer):
                errors.append(
                    f"{file}, line {found.line}: the root package imports {found.name} when it "
                    "is imported. Do it when the name is first used."
                )
    return errors


def cycles(files: Sources) -> list[str]:
    """Modules that import one another, be it inside a function.

    The root package is left out: it imports everything, lazily, and the rule above says who
    may import it.
    """
    graph = {
        file: {target for _, target in own_imports(file, files)} - {file, "polyseme.__init__"}
        for file in files
        if file != "polyseme.__init__"
    }
    errors: list[str] = []
    done: set[str] = set()

    def follow(file: str, path: list[str]) -> None:
        if file in path:
            errors.append("a cycle of imports: " + " -> ".join([*path[path.index(file) :], file]))
        elif file in graph and file not in done:
            for target in sorted(graph[file]):
                follow(target, [*path, file])
            done.add(file)

    for file in sorted(graph):
        follow(file, [])
    return errors


def undeclared(files: Sources, extras: dict[str, set[str]]) -> list[str]:
    errors = []
    for file, source in files.items():
        for found in imports(file, source):
            top = found.name.split(".")[0]
            if top == "polyseme" or top in sys.stdlib_module_names:
                continue
            distribution, extra = THIRD_PARTY.get(top, ("", None))
            if extra is None:
                errors.append(
                    f"{file}, line {found.line}: {top} is not among the declared dependencies. "
                    "Add it to pyproject.toml and to THIRD_PARTY."
                )
            elif distribution not in extras.get(extra, set()):
                where = f"the extra {extra!r}" if extra else "the dependencies"
                errors.append(f"{file}, line {found.line}: {distribution} is not in {where}.")
    return errors


def qualified(node: ast.AST, aliases: dict[str, str]) -> str:
    """`np.load` as `numpy.load`; the empty string for what is not a dotted name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        # The method of some expression: only its own name is known.
        return f"?.{parts[0]}" if parts else ""
    return ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def is_literal(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def call_errors(node: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    name = qualified(node.func, aliases)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "torch.load" and not is_literal(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True written out"
    if name == "numpy.load" and not is_literal(keywords.get("allow_pickle"), False):
        yield "numpy.load without allow_pickle=False written out"
    elif is_literal(keywords.get("allow_pickle"), True):
        yield f"{name} with allow_pickle=True"
    if re.fullmatch(r"yaml\.(\w+_)?load(_all)?", name) and not name.startswith("yaml.safe_"):
        yield f"{name}, which builds any object: use yaml.safe_load"
    if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
        yield f"{name}, which runs any text"
    if name.split(".")[-1] in ("read_pickle", "to_pickle"):
        yield f"{name}: a run holds no pickles"
    if is_literal(keywords.get("trust_remote_code"), True):
        yield f"{name} with trust_remote_code=True, which runs code from elsewhere"
    if ast.unparse(node.func).endswith((".register_forward_hook", ".register_forward_pre_hook")):
        hook = node.args[0] if node.args else None
        if not (isinstance(hook, ast.Call) and ast.unparse(hook.func) == "in_this_thread"):
            yield "a hook that another thread's use of the model runs into: see in_this_thread"


def trusting(node: ast.AST) -> Iterator[str]:
    """Remote code that is trusted by the source, not by the user: by default, or in a dict."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        given = node.args
        positional = [*given.posonlyargs, *given.args]
        pairs = [
            *zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True),
            *zip(given.kwonlyargs, given.kw_defaults, strict=True),
        ]
        found = [(argument.arg, value) for argument, value in pairs]
    elif isinstance(node, ast.Dict):
        found = [
            (getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)
        ]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        found = [(re.split(r"\W", ast.unparse(target))[-1], node.value) for target in targets]
    else:
        return
    for name, value in found:
        if name == "trust_remote_code" and is_literal(value, True):
            yield "trust_remote_code is True by itself, which runs code from elsewhere"


def unsafe(files: Sources) -> list[str]:
    """Whatever would run code from a file, or let other machines in."""
    errors = []
    for file, source in files.items():
        tree = ast.parse(source)
        aliases: dict[str, str] = {}
        prose: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Expr):
                prose.add(node.value)
        errors += [
            f"{file}, line {found.line}: import of {found.name}, which unpickles"
            for found in imports(file, source)
            if found.name.split(".")[0] in UNPICKLERS or found.name.endswith(".joblib")
        ]
        for node in ast.walk(tree):
            errors += [f"{file}, line {getattr(node, 'lineno', 0)}: {e}" for e in trusting(node)]
            if isinstance(node, ast.Call):
                errors += [f"{file}, line {node.lineno}: {e}" for e in call_errors(node, aliases)]
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and "0.0.0.0" in node.value
                and node not in prose
            ):
                errors.append(f"{file}, line {node.lineno}: an address that every machine reaches")
    return errors


def untidy(files: Sources) -> list[str]:
    errors = []
    for file, source in files.items():
        stem = file.split(".")[-1]
        lines = len(source.splitlines())
        if lines > LINES:
            errors.append(f"{file} has {lines} lines, over {LINES}: it wants to be two.")
        if {"utils", "util", "helpers"} & {part.lstrip("_") for part in file.split(".")}:
            errors.append(f"{file}: a module is called by what it is about.")
        if (stem == "__init__" or not stem.startswith("_")) and not ast.get_docstring(
            ast.parse(source)
        ):
            errors.append(f"{file} has no docstring.")
    return errors


def machine_paths(texts: dict[str, str]) -> list[str]:
    return [
        f"{name}, line {number}: {match[0]} is a path of one machine."
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (match := MACHINE_PATH.search(line))
    ]


def repository_texts() -> dict[str, str]:
    """Every text file that git tracks or would add; without git, all but hidden and built ones."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    names = listing.stdout.decode().split("\0") if listing.returncode == 0 else []
    paths = [ROOT / name for name in names if name] or [
        path
        for folder in ("src", "tests", "docs", "bench", ".ci")
        for path in (ROOT / folder).rglob("*")
        if "__pycache__" not in path.parts
    ]
    texts = {}
    for path in paths:
        try:
            texts[path.relative_to(ROOT).as_posix()] = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a folder, a file that was deleted, or no text
    return texts


def loaded_by(statement: str, names: set[str]) -> set[str]:
    """Which of these top-level modules a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return names & set(json.loads(result.stdout.splitlines()[-1]))


# The package.


def report(errors: list[str]) -> None:
    assert not errors, "\n".join(errors)


def test_imports_follow_the_layers() -> None:
    report(wrong_directions(sources()))


def test_there_are_no_cycles_of_imports() -> None:
    report(cycles(sources()))


def test_third_party_imports_are_declared() -> None:
    report(undeclared(sources(), declared()))


def test_every_dependency_is_known_here() -> None:
    known = {distribution for distribution, extra in THIRD_PARTY.values() if extra == ""}
    assert known == declared()[""]


def test_nothing_is_unpickled_or_evaluated() -> None:
    report(unsafe(sources()))


def test_modules_are_small_named_and_described() -> None:
    report(untidy(sources()))


def test_no_file_names_a_path_of_one_machine() -> None:
    report(machine_paths(repository_texts()))


def test_importing_polyseme_loads_nothing_heavy() -> None:
    assert loaded_by("import polyseme", HEAVY) == set()


def test_a_server_starts_before_numpy_and_pandas_are_loaded() -> None:
    assert (
        loaded_by("import polyseme.cli, polyseme.explorer", HEAVY | {"numpy", "pyarrow"}) == set()
    )


@pytest.mark.parametrize("layer", ["errors", "core", "store", "views", "explorer.open_runs"])
def test_torch_is_not_loaded(layer: str) -> None:
    assert loaded_by(f"import polyseme.{layer}", {"torch", "transformers"}) == set()


# The tests of the tests. The planted sources stand on a small package that is in order.

ORDER = {
    "polyseme.__init__": "import typing\nfrom polyseme.errors import InputError\n"
    "if typing.TYPE_CHECKING:\n    from polyseme.analysis import analyse\n"
    "def __getattr__(name):\n    from polyseme import analysis\n    return analysis\n",
    "polyseme.errors": "class InputError(ValueError): ...",
    "polyseme.core.__init__": "from polyseme.core.trees import cut",
    "polyseme.core.trees": "from ..errors import InputError\ndef cut(): ...",
    "polyseme.capture.__init__": "",
    "polyseme.store.__init__": "from polyseme import __version__",
    "polyseme.views.__init__": "from polyseme import core, store",
    "polyseme.sae.__init__": "import polyseme.core.trees",
    "polyseme.analysis": "from . import capture, sae, views",
    "polyseme.cli": "import polyseme as ps",
}


def planted(file: str, source: str) -> Sources:
    return {**ORDER, file: source}


def test_a_package_in_order_passes() -> None:
    assert wrong_directions(ORDER) == []
    assert cycles(ORDER) == []


@pytest.mark.parametrize(
    ("file", "source", "layers"),
    [
        ("polyseme.core.trees", "from polyseme.store import write", "core must not import store"),
        ("polyseme.core.trees", "import polyseme.store as s", "core must not import store"),
        ("polyseme.core.trees", "from ..store import write", "core must not import store"),
        ("polyseme.core.trees", "from .. import store", "core must not import store"),
        ("polyseme.core.__init__", "from ..store import x", "core must not import store"),
        ("polyseme.core.trees", "from polyseme import store", "core must not import store"),
        ("polyseme.sae.__init__", "from polyseme import capture", "sae must not import capture"),
        ("polyseme.sites.hooks", "from .. import sae", "sites must not import sae"),
        ("polyseme.analysis", "import polyseme.explorer", "analysis must not import explorer"),
        ("polyseme.errors", "def f():\n  from . import core", "errors must not import core"),
        (
            "polyseme.core.trees",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from polyseme import views",
            "core must not import views",
        ),
        (
            "polyseme.core.trees",
            "import importlib\nimportlib.import_module('polyseme.store')",
            "core must not import store",
        ),
        (
            "polyseme.store.reader",
            "from polyseme import neuron_embeddings",
            "store must not import __init__",
        ),
        ("polyseme.store.reader", "import polyseme", "store must not import __init__"),
        ("polyseme.__init__", "from polyseme.core import cut", "when it is imported"),
        ("polyseme.__init__", "from . import analysis", "when it is imported"),
        ("polyseme.magic.__init__", "", "'magic', which has no row in the table of layers"),
    ],
)
def test_a_wrong_direction_is_found(file: str, source: str, layers: str) -> None:
    (error,) = wrong_directions(planted(file, source))
    assert error.startswith(file)
    assert layers in error


@pytest.mark.parametrize(
    "source",
    [
        "from polyseme.core import cut",
        "import polyseme.core",
        "def f():\n  from . import cut",
        "import typing\nif typing.TYPE_CHECKING:\n  from polyseme.core import cut",
    ],
)
def test_a_cycle_is_found(source: str) -> None:
    (error,) = cycles(planted("polyseme.core.trees", source))
    assert "polyseme.core.trees -> polyseme.core.__init__ -> polyseme.core.trees" in error


def test_an_undeclared_dependency_is_found() -> None:
    extras = {"": {"numpy"}, "torch": set()}
    assert undeclared(planted("polyseme.core.trees", "import numpy.linalg, json"), extras) == []
    (error,) = undeclared(planted("polyseme.core.trees", "def f():\n  import umap"), extras)
    assert "umap is not among the declared dependencies" in error
    (error,) = undeclared(planted("polyseme.core.trees", "import torch"), extras)
    assert "torch is not in the extra 'torch'" in error


@pytest.mark.parametrize(
    "source",
    [
        *(f"import {name}" for name in sorted(UNPICKLERS)),
        "from pickle import loads",
        "from sklearn.externals import joblib",
        "import importlib\nimportlib.import_module('pickle')",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load as read\nread(path)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=choice)",
        "from numpy import load\nload(path)",
        "from numpy.lib import format\nformat.read_array(file, allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "from yaml import full_load\nfull_load(text)",
        "eval(text)",
        "exec(text)",
        "import pandas as pd\npd.read_pickle(path)",
        "table().to_pickle(path)",
        "model.layers[0].register_forward_hook(read, with_kwargs=True)",
        "model(name, trust_remote_code=True)",
        "def load(name, trust_remote_code=True): ...",
        "def load(name, *, other=1, trust_remote_code: bool = True): ...",
        "lambda trust_remote_code=True: name",
        "model(name, **{'trust_remote_code': True})",
        "trust_remote_code = True",
        "options.trust_remote_code = True",
        "serve(host='0.0.0.0')",
        "serve(f'0.0.0.0:{port}')",
    ],
)
def test_unsafe_source_is_found(source: str) -> None:
    assert len(unsafe({"polyseme.store.reader": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "model.layers[0].register_forward_hook(in_this_thread(read), with_kwargs=True)",
        "import json\njson.load(file)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "'''Never listens on 0.0.0.0.'''",
        "model(name, trust_remote_code=False)",
        "def load(name, *, trust_remote_code: bool = False): model(name, trust_remote_code=x)",
    ],
)
def test_safe_source_passes(source: str) -> None:
    assert unsafe({"polyseme.store.reader": source}) == []


@pytest.mark.parametrize(
    ("file", "source", "error"),
    [
        ("polyseme.core.long", "'''Long.'''\n" * (LINES + 1), "501 lines"),
        ("polyseme.core.utils", "'''Odds.'''", "called by what it is about"),
        ("polyseme.helpers.__init__", "'''Ends.'''", "called by what it is about"),
        ("polyseme.core.bare", "x = 1", "no docstring"),
        ("polyseme.core.__init__", "", "no docstring"),
    ],
)
def test_untidy_source_is_found(file: str, source: str, error: str) -> None:
    assert untidy({"polyseme.core.long": "'''Long.'''\n" * LINES, "polyseme.core._p": ""}) == []
    (found,) = untidy({file: source})
    assert error in found


@pytest.mark.parametrize("folder", ["work", "root", "home/someone", "Users/someone"])
def test_a_path_of_one_machine_is_found(folder: str) -> None:
    path = f"/{folder}"
    for line in (f'open("{path}/a.txt")', f"cd {path} && make", f"{path}/a", f"cd {path}"):
        (found,) = machine_paths({"notes.md": f"first\n{line}\n"})
        assert found.startswith("notes.md, line 2: ")
    for line in (f"https://example.org{path}/a", f"runs{path}/a", f".{path}/a"):
        assert machine_paths({"notes.md": line}) == []


def test_a_loaded_module_is_found() -> None:
    pytest.importorskip("torch")
    assert loaded_by("import torch", HEAVY) >= {"torch"}
    assert loaded_by("import json", HEAVY | {"json"}) == {"json"}
    with pytest.raises(AssertionError, match="no_such_module"):
        loaded_by("import no_such_module", HEAVY)

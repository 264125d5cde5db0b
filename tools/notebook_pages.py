"""A hook of mkdocs: each notebook in docs/ is also a page, with its committed outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        notebook = json.loads(Path(str(file.abs_src_path)).read_text("utf-8"))
        files.append(File.generated(config, page, content=markdown(notebook)))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Link to the page of a notebook, where the sources link to the notebook itself."""
    return text.replace(".ipynb)", ".md)")


def markdown(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: text, code and outputs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        return "".join(data["text/html"])
    text = "".join(output.get("text") or data["text/plain"]).rstrip("\n")
    return f"```text\n{text}\n```"

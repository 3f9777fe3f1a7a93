"""What mkdocs does for this project's pages beyond Markdown; a hook of ``mkdocs.yml``. Imports no framework.

- ``docs/notebook.ipynb`` becomes the page ``notebook.md``, and links to it lead there;
- a line ``<!-- usage: edit -->`` becomes the help of ``mindiffedit edit``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
USAGE = re.compile(r"^<!-- usage: ?([\w ]*?) *-->$", re.MULTILINE)


def notebook_page(text: str, name: str) -> str:
    """A notebook (JSON) as Markdown: its text cells as they are, its code cells as blocks; no outputs."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(source if cell["cell_type"] == "markdown" else f"```py\n{source}\n```")
    cells.insert(1, f"This page as a notebook: [{name}]({name}).")
    return "\n\n".join(cells) + "\n"


def usage(command: str) -> str:
    """The help of a command such as "edit" or "parity check"; of the program for the empty text."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from mindiffedit.cli.arguments import build_parser

    with mock.patch.dict(os.environ, COLUMNS="100"):  # argparse asks the terminal otherwise
        parser = build_parser()
        for word in command.split():
            subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = subparsers.choices[word]
        return parser.format_help()


def on_files(files, config):
    from mkdocs.structure.files import File

    for file in [f for f in files if f.src_uri.endswith(".ipynb")]:
        name = Path(file.src_uri).name
        page = str(Path(file.src_uri).with_suffix(".md"))
        text = notebook_page(file.content_string, name)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.generated_by is None:  # the notebook's own page offers the file itself
        markdown = re.sub(r"\]\(([\w/-]+)\.ipynb\)", r"](\1.md)", markdown)
    return USAGE.sub(lambda found: f"```text\n{usage(found[1])}```", markdown)

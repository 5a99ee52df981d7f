"""Executes a notebook of docs/ in an empty folder and stores its outputs in it.

    python scripts/execute_notebook.py docs/break-ppo.ipynb

What is of this machine only (paths, warnings of its libraries, execution times) is not stored. A cell that fails ends
it with 1, and the notebook stays as it was.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SECONDS = 1800
"""Longest time of a cell: a training run on two busy cores."""


def executed(file: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel."""
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
        clean(notebook, folder)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def clean(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Takes what is of this machine only out of the outputs: warnings of its libraries, and the folder it ran in."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        kept = [output for output in outputs if not output.get("text", "").startswith(sys.prefix)]
        for output in kept:
            if "text" in output:
                output["text"] = output["text"].replace(folder, ".")
        if "outputs" in cell:
            cell["outputs"] = kept


def main() -> None:
    file = Path(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the built-in pair is in the package
    notebook = executed(file)
    nbformat.write(notebook, file)


if __name__ == "__main__":
    main()

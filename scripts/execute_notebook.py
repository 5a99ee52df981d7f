"""Executes a notebook of docs/ in an empty folder and stores its outputs in it.

    python scripts/execute_notebook.py docs/break-ppo.ipynb

Paths of this machine in the outputs are cut, and what only differs from run to run (execution times, cell ids that
change) is not stored. A cell that fails ends it with 1, and the notebook stays as it was.
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
        cut_paths(notebook, folder)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def cut_paths(notebook: nbformat.NotebookNode, folder: str) -> None:
    """Replaces the folder that the notebook ran in, which no reader has, in every text output."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = output["text"].replace(folder, ".")


def main() -> None:
    file = Path(sys.argv[1])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the built-in pair is in the package
    notebook = executed(file)
    nbformat.write(notebook, file)


if __name__ == "__main__":
    main()

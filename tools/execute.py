"""Execute the notebook with its progress: `python tools/execute.py S9.ipynb demo/S9.ipynb`."""

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def main() -> None:
    """Execute a notebook, and write it with its outputs, also after a cell that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    notebook = nbformat.read(options.notebook, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    title, started = "", time.monotonic()

    def show(cell, cell_index):
        nonlocal title
        if cell.cell_type == "markdown":
            headings = [line for line in cell.source.splitlines() if line.startswith("#")]
            title = headings[-1].lstrip("# ") if headings else title
        elif cell in code:
            minutes, seconds = divmod(round(time.monotonic() - started), 60)
            number = code.index(cell) + 1
            print(f"{minutes:3}:{seconds:02}  cell {number:2} of {len(code)}: {title}", flush=True)

    client = NotebookClient(
        notebook,
        timeout=None,
        on_cell_start=show,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # no warning of its transport
        resources={"metadata": {"path": options.notebook.resolve().parent}},
    )
    error = None
    try:
        client.execute()
    except CellExecutionError as failure:
        error = str(failure).strip().splitlines()[-1]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, options.output)
    if error:
        sys.exit(f"{options.output}: a cell failed: {error}")
    for cell in code:
        for output in cell.outputs:
            lines = output.get("text", "").splitlines()
            print(*(line for line in lines if "test accuracy" in line), sep="\n", end="")
    print(f"\nopen {options.output}, as with: .venv/bin/jupyter lab {options.output}")


if __name__ == "__main__":
    main()

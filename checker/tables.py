"""Tables of text, as Markdown or in aligned columns."""

import itertools
import textwrap


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table. Columns whose heads end in a colon are aligned to the right."""
    align = ["---:" if name.endswith(":") else "---" for name in head]
    lines = [[name.rstrip(":") for name in head], align, *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def text_table(lines: list[tuple[str, ...]], most: int = 80) -> str:
    """Return lines of cells as aligned columns; a cell longer than `most` characters goes on in the
    next line.
    """
    rows = []
    for line in lines:
        cells = [
            textwrap.wrap(cell, most, break_long_words=False, break_on_hyphens=False) or [""]
            for cell in line
        ]
        rows += itertools.zip_longest(*cells, fillvalue="")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

"""Tables for people: with rich where it is installed, aligned text otherwise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

_WIDE = 200  # columns, where nobody's terminal says


def print_table(columns: Sequence[str], cells: Sequence[Sequence[str]], bad: Sequence[bool] = ()) -> None:
    """Print a table; rows where `bad` is set stand out."""
    try:
        from rich.console import Console
    except ImportError:
        print(_aligned(columns, cells))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    console.print(_table(columns, cells, bad))


def text_of_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table as plain text."""
    try:
        from rich.console import Console
    except ImportError:
        return _aligned(columns, cells)
    console = Console(file=io.StringIO(), width=_WIDE, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(_table(columns, cells, ()))
    return capture.get().rstrip("\n")


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]], bad: Sequence[bool]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for i, line in enumerate(cells):
        table.add_row(*[Text(text) for text in line], style="bold red" if bad and bad[i] else None)
    return table


def _aligned(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (columns, *cells)]
    return "\n".join("  ".join(line).rstrip() for line in lines)

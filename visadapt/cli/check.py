"""``visadapt check``: the property grid as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from visadapt.cli.errors import UserError, one_of

MARKS = {"pass": "[green]✓[/]", "refuse": "[dim]–[/]", "fail": "[bold red]✗[/]"}


def run_grid(methods: Sequence[str] | None, verbose: bool) -> int:
    """Run the grid for some methods or all, print it, and return 1 if any cell failed.

    Raises:
        UserError: a method is not in the catalogue.
    """
    import visadapt as va
    from visadapt.core.check import run

    names = list(methods or va.METHODS)
    for name in names:
        if name not in va.METHODS:
            raise UserError("--methods", f"there is no method '{name}'", one_of(name, va.METHODS))
    cells = run([va.METHODS[name] for name in names])
    show(cells, verbose)
    return int(any(cell.status == "fail" for cell in cells))


def show(cells: Sequence[Any], verbose: bool) -> None:
    """Print cells as methods and layers by properties, then the messages of those that failed."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    properties = list(dict.fromkeys(cell.prop for cell in cells))
    table = Table(title="✓ holds   – refused with a clear error   ✗ fails", title_justify="left")
    table.add_column("method", style="bold")
    table.add_column("layer")
    for prop in properties:
        table.add_column(prop, justify="center")
    found = {(cell.method, cell.layer, cell.prop): cell for cell in cells}
    rows = list(dict.fromkeys((cell.method, cell.layer) for cell in cells))
    for i, (method, layer) in enumerate(rows):
        marks = [MARKS[found[method, layer, p].status] if (method, layer, p) in found else "" for p in properties]
        last = i + 1 == len(rows) or rows[i + 1][0] != method
        table.add_row(method if i == 0 or rows[i - 1][0] != method else "", layer, *marks, end_section=last)
    console.print(table)
    for cell in cells:
        if cell.status == "fail" or (verbose and cell.status == "refuse"):
            console.print(f"{cell.status}: {cell.method} on {cell.layer}, {cell.prop}: {cell.message}", markup=False)
    total = {status: sum(cell.status == status for cell in cells) for status in MARKS}
    console.print(f"{total['pass']} hold, {total['refuse']} refused, {total['fail']} fail")

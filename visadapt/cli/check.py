"""``visadapt check``: the property grid as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from visadapt.cli.errors import UserError, one_of

if TYPE_CHECKING:
    from visadapt.core.adapter import Adapter
    from visadapt.core.check import Cell

MARKS = {"pass": "✓", "refuse": "–", "fail": "✗"}
COLOURS = {"pass": "green", "refuse": "dim", "fail": "bold red"}
LEGEND = "✓ holds   – refused with a clear error   ✗ fails"


def run_grid(methods: Sequence[str] | None, verbose: bool, markdown: bool = False) -> int:
    """Run the grid for some methods or all, print it, and return 1 if any cell failed.

    Raises:
        UserError: a method is not in the catalogue.
    """
    import visadapt as va
    from visadapt.core.check import HOSTS, PROPERTIES, run

    chosen = {name: find(name) for name in methods or va.METHODS}
    cells = list(_tracked(run(chosen), len(chosen) * len(HOSTS) * len(PROPERTIES)))
    for rows in ("host", "prop"):
        print_markdown(cells, rows) if markdown else print_table(cells, rows)
    for cell in cells:
        if cell.status == "fail" or (verbose and cell.status == "refuse"):
            print(f"{cell.status}: {cell.method} on {cell.host}, {cell.prop}: {cell.message}")
    counts = {status: sum(cell.status == status for cell in cells) for status in MARKS}
    print(f"{counts['pass']} hold, {counts['refuse']} refused, {counts['fail']} fail")
    return int(counts["fail"] > 0)


def find(name: str) -> type[Adapter]:
    """A method of the catalogue, or one's own by its import path.

    Raises:
        UserError: there is none of that name.
    """
    import visadapt as va

    if name in va.METHODS:
        return va.METHODS[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError("--methods", f"cannot import '{name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, va.Adapter)):
        raise UserError("--methods", f"there is no method '{name}'", one_of(name, va.METHODS))
    return found


def _tracked(cells: Iterable[Cell], total: int) -> Iterable[Cell]:
    from rich.console import Console
    from rich.progress import track

    return track(cells, "checking", total, transient=True, console=Console(stderr=True))


def grid(cells: Sequence[Cell], rows: str) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Methods, and row name -> (worst status, mark) per method; a mark counts where statuses differ."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    found: dict[str, list[tuple[str, str]]] = {}
    for row in dict.fromkeys(getattr(cell, rows) for cell in cells):
        for method in methods:
            seen = [c.status for c in cells if c.method == method and getattr(c, rows) == row]
            kinds = [s for s in MARKS if s in seen]
            mark = MARKS[kinds[0]] if len(kinds) == 1 else " ".join(f"{MARKS[s]}{seen.count(s)}" for s in kinds)
            found.setdefault(row, []).append((kinds[-1], mark))
    return methods, found


def print_table(cells: Sequence[Cell], rows: str) -> None:
    """Layers or properties by methods, as many tables as the terminal's width asks for."""
    from rich.console import Console
    from rich.table import Table

    methods, found = grid(cells, rows)
    console = Console()
    console.print(LEGEND, style="dim")
    marks = zip(*found.values(), strict=True)  # by method
    widths = [max(len(name), *(len(mark) for _, mark in seen)) + 3 for name, seen in zip(methods, marks, strict=True)]
    for part in parts(widths, console.width - max(map(len, found)) - 4):
        table = Table()
        table.add_column("layer" if rows == "host" else "property", no_wrap=True)
        for method in methods[part]:
            table.add_column(method, justify="center", no_wrap=True)
        for row, cells_of_row in found.items():
            table.add_row(row, *(f"[{COLOURS[status]}]{mark}[/]" for status, mark in cells_of_row[part]))
        console.print(table)


def parts(widths: Sequence[int], room: int) -> Iterator[slice]:
    """Neighbours that fit side by side in ``room``; one at least each time."""
    start = used = 0
    for place, width in enumerate(widths):
        if used + width > room and place > start:
            yield slice(start, place)
            start, used = place, 0
        used += width
    yield slice(start, len(widths))


def print_markdown(cells: Sequence[Cell], rows: str) -> None:
    """The same as Markdown."""
    methods, found = grid(cells, rows)
    print("| " + " | ".join(["layer" if rows == "host" else "property", *methods]) + " |")
    print("|---|" + ":---:|" * len(methods))
    for row, marks in found.items():
        print("| " + " | ".join([row, *(mark for _, mark in marks)]) + " |")
    print()

"""``visadapt methods``: the catalogue as a table, asked from the classes themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visadapt.core.adapter import Adapter


@dataclass(frozen=True)
class Entry:
    """One row: what a method is and what it can do.

    Args:
        name: Class name.
        equation: First line of the docstring.
        layers: Kinds of layers that it does not refuse.
        merges: Whether it folds into a plain weight.
        export: How PEFT can hold it.
        source: arXiv number of the paper.
    """

    name: str
    equation: str
    layers: tuple[str, ...]
    merges: bool
    export: str
    source: str


def hosts() -> dict[str, object]:
    """One small layer of each kind."""
    from torch import nn

    return {
        "Linear": nn.Linear(8, 8),
        "Conv1d": nn.Conv1d(8, 8, 3),
        "Conv2d": nn.Conv2d(8, 8, 3),
        "Conv3d": nn.Conv3d(8, 8, 3),
        "ConvTranspose2d": nn.ConvTranspose2d(8, 8, 3),
        "grouped Conv2d": nn.Conv2d(8, 8, 3, groups=2),
    }


def entry(method: type[Adapter]) -> Entry:
    """Ask a method which layers it refuses, on one layer of each kind."""
    from visadapt.core.site import Site

    sites = {name: Site(layer) for name, layer in hosts().items()}  # type: ignore[arg-type]
    accepted = {name: site for name, site in sites.items() if method().refuse(site) is None}
    merges = any(method().refuse_merge(site) is None for site in accepted.values())
    text = inspect.cleandoc(method.__doc__ or "")
    source = re.search(r"(?:arXiv[: ]|abs/)\s*(\d{4}\.\d{4,5})", text)
    return Entry(
        method.__name__,
        text.splitlines()[0].rstrip(".") if text else "",
        tuple(accepted),
        merges,
        peft(method),
        source[1] if source else "",
    )


def peft(method: type[Adapter]) -> str:
    """How a PEFT folder holds the method on a Linear layer: exact, by SVD (approximate), or no."""
    from torch import nn

    import visadapt as va

    model = va.adapt(nn.Sequential(nn.Linear(8, 8)), method(), "0")
    with TemporaryDirectory() as folder:
        for rank, how in ((None, "exact"), (4, "by SVD")):
            try:
                va.export(model, Path(folder) / how, rank=rank)
            except ValueError:
                continue
            return how
    return "no"


def entries(names: Sequence[str] | None = None) -> list[Entry]:
    """All methods of the catalogue, in its order, or those of some names or import paths."""
    import visadapt as va
    from visadapt.cli.check import find

    return [entry(find(name)) for name in names or va.METHODS]


def layers_text(e: Entry) -> str:
    """The layer kinds in words."""
    missing = [name for name in hosts() if name not in e.layers]
    return "all" if not missing else "all but " + ", ".join(missing) if len(missing) < 4 else ", ".join(e.layers)


def print_markdown(found: list[Entry]) -> None:
    """The catalogue as a Markdown table."""
    print("| method | equation | layers | merges | PEFT file | arXiv |")
    print("|---|---|---|---|---|---|")
    for e in found:
        link = f"[{e.source}](https://arxiv.org/abs/{e.source})"
        equation = e.equation.replace("|", "\\|")
        print(f"| {e.name} | {equation} | {layers_text(e)} | {'yes' if e.merges else 'no'} | {e.export} | {link} |")


def show(names: Sequence[str] | None = None, markdown: bool = False) -> None:
    """Print the catalogue or some methods, as a table for terminals or as Markdown."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = entries(names)
    if markdown:
        return print_markdown(found)
    every = tuple(hosts())
    table = Table(title="Methods of visadapt", title_justify="left", show_lines=True)
    table.add_column("method", style="bold")
    table.add_column("equation", overflow="fold", ratio=1)
    table.add_column("layers", overflow="fold")
    table.add_column("merges")
    table.add_column("PEFT")
    table.add_column("arXiv", no_wrap=True)
    for e in found:
        layers = layers_text(e)
        table.add_row(e.name, escape(e.equation), layers, "yes" if e.merges else "no", e.export, e.source)
    console = Console()
    console.print(table)
    console.print(f"layers: {', '.join(every)}. Options of a method: visadapt fit --model.help Classification")

"""The table that a run ends with."""

from __future__ import annotations

from pathlib import Path

from visadapt.report.card import figure_text
from visadapt.report.facts import RunFacts, readable


def print_summary(facts: RunFacts, run_dir: Path) -> None:
    """Print figures, costs and where the files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{facts.name}: {facts.task} on {facts.base}", title_justify="left", show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold", min_width=24)  # figures stay beside long names in narrow terminals
    for name, value in facts.figures.items():
        table.add_row(name, figure_text(name, value))
    for group in facts.sets:
        table.add_row(
            f"adapters '{group.name}'",
            f"{group.method}, {len(group.layers)} layers, {group.parameters:,} parameters",
        )
    table.add_row("trainable parameters", f"{facts.trainable:,} beside {facts.total:,} of the base")
    cost = f"{facts.minutes:.1f} min, {facts.steps} steps"
    if facts.step_ms is not None:
        cost += f" of {facts.step_ms:.0f} ms"
    if facts.peak_memory_mib is not None:
        cost += f", peak {facts.peak_memory_mib:,.0f} MiB"
    table.add_row("training", cost)
    if facts.adapter_bytes:
        table.add_row(
            "adapter file",
            f"{readable(run_dir / 'adapter.safetensors')} ({facts.adapter_bytes / 1024:,.0f} KiB)",
        )
    table.add_row("all results", f"{readable(run_dir)}/  (open README.md)")
    Console().print(table)
    if facts.adapter_bytes:
        file = readable(run_dir / "adapter.safetensors")
        tries = {
            "pictures": f"export {file} --format diffusers",
            "videos": f'predict --adapter {file} --prompts "a prompt"',
        }
        print(f"try it: visadapt {tries.get(facts.kind, f'predict --adapter {file} --images FOLDER')}")

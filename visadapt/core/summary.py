"""What has been adapted, as a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One adapted site."""

    layer: str
    name: str
    method: str
    parameters: int


class Summary:
    """Layer, set, method and parameters of each adapter.

    Attributes:
        rows: one per adapter.
        total: parameters of the base model.
        trainable: parameters that train.
    """

    def __init__(self, rows: list[Row], total: int, trainable: int | None = None) -> None:
        self.rows, self.total = rows, total
        self.trainable = sum(r.parameters for r in rows) if trainable is None else trainable

    def __str__(self) -> str:
        table = [("layer", "set", "method", "parameters")]
        table += [(r.layer, r.name, r.method, f"{r.parameters:,}") for r in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row[:3], widths)), row[3].rjust(widths[3])]) for row in table]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"{self.trainable:,} trainable parameters beside a base of {self.total:,} ({share:.2f} %)")
        return "\n".join(lines)

    __repr__ = __str__

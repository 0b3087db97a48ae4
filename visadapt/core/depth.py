"""How deep in its network a layer is, by the name that it has."""

from __future__ import annotations

import re
from collections.abc import Sequence


def depths(names: Sequence[str]) -> list[float]:
    """From 0 for the first block to 1 for the last one, for each layer; 0.5 where there is one block only.

    A block is what shares the path up to the first number (`blocks.7`, `down_blocks.1`); a layer without a number is a
    block of its own. Blocks count in the order in which they come.

    Args:
        names: paths of the layers of a set, in model order.
    """
    blocks = [found[0] if (found := re.match(r"(?:[^.]*[^.\d][^.]*\.)*\d+(?=\.|$)", name)) else name for name in names]
    order = {block: i for i, block in enumerate(dict.fromkeys(blocks))}
    last = len(order) - 1
    return [order[block] / last if last else 0.5 for block in blocks]

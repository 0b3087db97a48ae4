"""What an optimiser keeps of a parameter, also where the parameter is a view of a flat buffer."""

from __future__ import annotations

from torch import Tensor, nn, optim

from visadapt.core.adapter import Moments
from visadapt.optim.buffer import follows


def of(*optimizers: optim.Optimizer) -> Moments:
    """From a parameter to those of its states that have one value per element, as views: writing to them counts.

    Args:
        optimizers: plain, or flat ones (`visadapt.optim.flat`).
    """
    held = {
        id(p): (optimizer, buffer, i)
        for optimizer in optimizers
        for group in getattr(optimizer, "buffers", ())
        for buffer in group
        for i, p in enumerate(buffer.parameters)
    }

    def moments(parameter: nn.Parameter) -> dict[str, Tensor]:
        if id(parameter) in held:
            optimizer, buffer, i = held[id(parameter)]
            state = optimizer.state.get(buffer.flat, {})
            return {k: buffer.split(v)[i] for k, v in state.items() if follows(v, buffer.flat)}
        for optimizer in optimizers:
            if parameter in optimizer.state:
                return {k: v for k, v in optimizer.state[parameter].items() if follows(v, parameter)}
        return {}

    return moments

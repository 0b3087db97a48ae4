"""What a task needs from a backbone: a network and the preprocessing that its weights expect."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class Backbone(ABC):
    """A recipe for a network; nothing is imported, read or allocated before ``build``.

    Attributes:
        class_names: Names of the classes that the checkpoint's head tells apart; None if it has no such head
            or its names are unknown. Set by ``build``.
        new_head: Whether the head is not the checkpoint's own. Set by ``build``.
    """

    class_names: Sequence[str] | None = None
    new_head: bool = True

    @abstractmethod
    def build(self, num_classes: int | None = None, class_names: Sequence[str] | None = None) -> nn.Module:
        """Make the network.

        The checkpoint's head is kept if it has ``num_classes`` outputs and, where both sides name their
        classes, the names are the same in the same order.

        Args:
            num_classes: Outputs of the head; None keeps the checkpoint's own.
            class_names: Names of the classes of the data.

        Returns:
            A module with ``adapter_presets``: target preset → patterns of layer names.
        """

    @abstractmethod
    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """Give the transform from a PIL image to the network's input (channels, height, width)."""

    def head(self, model: nn.Module) -> nn.Module:
        """The classifier of a network that ``build`` made."""
        return model.get_classifier()  # type: ignore[operator]  # timm states it on each class

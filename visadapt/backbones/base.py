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
        pretrained_classes: Number of classes of the checkpoint's head, 0 without one. Set by ``build``.
    """

    class_names: Sequence[str] | None = None
    pretrained_classes: int = 0

    @abstractmethod
    def build(self, num_classes: int | None = None) -> nn.Module:
        """Make the network.

        Args:
            num_classes: Outputs of the head; None keeps the checkpoint's own.

        Returns:
            A module with ``adapter_presets``: target preset → patterns of layer names.
        """

    @abstractmethod
    def preprocess(self, train: bool) -> Callable[[Any], Tensor]:
        """Give the transform from a PIL image to the network's input (channels, height, width)."""

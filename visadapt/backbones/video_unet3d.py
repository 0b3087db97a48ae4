"""ModelScope's and ZeroScope's text-to-video: a UNet with layers over time between those of each frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from visadapt.backbones.sd_notices import without_notices
from visadapt.backbones.video_checkpointing import recompute_layers
from visadapt.backbones.video_family import Family

_ACROSS = r"(?:.*temp_attentions\.\d+|transformer_in)"


class UNet3D(Family):
    """ModelScopeT2V (Wang et al. 2023, arXiv 2308.06571): ``UNet3DConditionModel``, MotionDirector's own base.

    In training mode the base's ``temp_convs`` drop a tenth of their activations, as they did when it was trained.
    """

    name = "unet3d"
    pipelines = ("TextToVideoSDPipeline",)
    spatial = r".*\.attentions\.\d+\.transformer_blocks\.\d+"
    temporal = rf"{_ACROSS}\.transformer_blocks\.\d+"

    def stock(self, parts: Mapping[str, Any]) -> Any:
        """The ``TextToVideoSDPipeline`` of these parts."""
        from diffusers import TextToVideoSDPipeline

        with without_notices():  # that it is no longer developed
            return TextToVideoSDPipeline(**parts)

    def predict(self, network: Any, noisy: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The prediction."""
        found: Tensor = network(noisy, times, text["embeddings"].to(noisy), return_dict=False)[0]
        return found

    def recompute(self, network: nn.Module) -> None:
        """Layer by layer: diffusers has no gradient checkpointing for this network."""
        recompute_layers(network)

    def temporal_parts(self) -> str:
        """The transformers over time and the convolutions over time."""
        return rf"(?:{_ACROSS}|.*temp_convs\.\d+)"

    def more_presets(self) -> dict[str, list[str]]:
        """The projections of the transformers over time, and the convolutions over time."""
        return {
            "temporal.proj": [rf"re:unet\.{_ACROSS}\.proj_(?:in|out)"],
            "temporal.convs": [r"re:unet\..*temp_convs\.\d+\.conv[1-4]\.\d"],
        }

"""AnimateDiff: Stable Diffusion's UNet with motion modules behind its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visadapt.backbones.sd_notices import without_notices
from visadapt.backbones.video_checkpointing import recompute_layers
from visadapt.backbones.video_family import Family, per_frame

TINY_MOTION = Path(__file__).parent / "tiny" / "tiny_video"
_MOTION = r".*motion_modules\.\d+"
_BASES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_NO_EXTRAS: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}


class AnimateDiff(Family):
    """AnimateDiff (Guo et al. 2023, arXiv 2307.04725, code: github.com/guoyww/AnimateDiff): ``UNetMotionModel``.

    The UNet's own layers keep the names that they have in Stable Diffusion, so adapters of the text-to-image task
    load by name. It comes as a pipeline, or as a Stable Diffusion and a motion adapter: in its folder
    ``motion_adapter``, or elsewhere. A local motion adapter may bring a ``text_encoder`` that knows more words.
    """

    name = "animatediff"
    pipelines = ("AnimateDiffPipeline", *_BASES)
    spatial = r".*\.attentions\.\d+\.transformer_blocks\.\d+"
    temporal = rf"{_MOTION}\.transformer_blocks\.\d+"

    def load(self, place: str, motion_adapter: str | None, **options: Any) -> Any:
        """The pipeline, with the motion adapter on its UNet."""
        from diffusers import AnimateDiffPipeline, DiffusionPipeline

        index = DiffusionPipeline.load_config(place, revision=options.get("revision"))
        if motion_adapter is None and "UNetMotionModel" in index.get("unet", ()):
            # The UNet has the motion modules; a second copy beside it is of no use.
            found = AnimateDiffPipeline.from_pretrained(place, motion_adapter=None, **options)
        else:
            found = _grafted(place, motion_adapter, options)
        channels, wanted = found.unet.config.in_channels, found.vae.config.latent_channels
        if channels != wanted:  # PIA
            raise ValueError(
                f"its UNet takes {channels} channels, its VAE has {wanted}: this motion adapter wants a picture beside "
                "the noise; give one for text alone"
            )
        return found

    def stock(self, parts: Mapping[str, Any]) -> Any:
        """The ``AnimateDiffPipeline`` of these parts."""
        from diffusers import AnimateDiffPipeline

        return AnimateDiffPipeline(**parts, motion_adapter=None)  # type: ignore[arg-type]

    def predict(self, network: Any, noisy: Tensor, times: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The prediction; this UNet wants the text once for each frame."""
        said = per_frame(text["embeddings"].to(noisy), noisy.shape[2])
        found: Tensor = network(noisy, times, said, return_dict=False)[0]
        return found

    def recompute(self, network: nn.Module) -> None:
        """Layer by layer: diffusers would recompute the residual blocks alone."""
        recompute_layers(network)

    def most_frames(self, network: Any) -> int | None:
        """As many as the motion modules have positions for."""
        return int(network.config.motion_max_seq_length)

    def temporal_parts(self) -> str:
        """The motion modules."""
        return _MOTION

    def more_presets(self) -> dict[str, list[str]]:
        """The projections of the motion modules."""
        return {"temporal.proj": [rf"re:unet\.{_MOTION}\.proj_(?:in|out)"]}


def _grafted(place: str, motion_adapter: str | None, options: Mapping[str, Any]) -> Any:
    """The pipeline of a Stable Diffusion and a motion adapter."""
    from diffusers import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter, UNetMotionModel

    folder = Path(place) / "motion_adapter"
    if motion_adapter is None and folder.parent.is_dir() and not folder.is_dir():
        raise ValueError(
            "it is a Stable Diffusion without motion modules; give `motion_adapter`, a folder or hub id of one"
        )
    base: Any = DiffusionPipeline.from_pretrained(place, **(_NO_EXTRAS | dict(options)))
    if motion_adapter is None:  # of the same repository, so of the same revision and variant
        same = {key: options[key] for key in ("revision", "variant") if options.get(key) is not None}
        adapter = MotionAdapter.from_pretrained(place, subfolder="motion_adapter", **same)
    else:
        adapter = MotionAdapter.from_pretrained(motion_adapter)
    own = Path(motion_adapter or folder) / "text_encoder"
    if own.is_dir():
        base.text_encoder = type(base.text_encoder).from_pretrained(own)
    if hasattr(base.unet, "load_motion_modules"):
        base.unet.load_motion_modules(adapter)
        return base
    with without_notices():  # it advises against a conversion of its own
        unet = UNetMotionModel.from_unet2d(base.unet, adapter)
    return AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        motion_adapter=None,  # type: ignore[arg-type]  # optional where the UNet has them
        scheduler=base.scheduler,
    )

"""The families of video networks, and what differs between them.

| family | class | its order | text | predicts | space and time | clip |
|---|---|---|---|---|---|---|
| animatediff | ``UNetMotionModel`` | (B, C, F, h, w) | CLIP, once per frame | epsilon or v | apart | 16 at 8 fps |
| unet3d | ``UNet3DConditionModel`` | (B, C, F, h, w) | CLIP | epsilon or v | apart | 16 at 8 fps |
"""

from __future__ import annotations

from visadapt.backbones.video_animatediff import AnimateDiff
from visadapt.backbones.video_family import Family
from visadapt.backbones.video_unet3d import UNet3D

FAMILIES: dict[str, Family] = {family.name: family for family in (AnimateDiff(), UNet3D())}


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"backbone family: '{name}' is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(kind: str | None, name: str) -> Family:
    """The family that loads a pipeline of a class.

    Args:
        kind: ``_class_name`` of its ``model_index.json``.
        name: How the user calls it.

    Raises:
        ValueError: None does.
    """
    found = next((family for family in FAMILIES.values() if kind in family.pipelines), None)
    if found is None:
        known = sorted({pipeline for family in FAMILIES.values() for pipeline in family.pipelines})
        raise ValueError(f"'{name}' is a {kind}; VideoDiffusion takes {', '.join(known)}")
    return found

"""The families of video networks, and what differs between them.

| family | class | its order | text | predicts | space and time | clip |
|---|---|---|---|---|---|---|
| animatediff | ``UNetMotionModel`` | (B, C, F, h, w) | CLIP, once per frame | epsilon or v | apart | 16 at 8 fps |
| unet3d | ``UNet3DConditionModel`` | (B, C, F, h, w) | CLIP | epsilon or v | apart | 16 at 8 fps |
| latte | ``LatteTransformer3DModel`` | (B, C, F, h, w) | T5 with a mask | epsilon, variance | apart | 16 at 8 fps |
| wan | ``WanTransformer3DModel`` | (B, C, F', h, w) | UMT5, zeros behind | flow | together | 81 at 16 fps |

F' = (F − 1) / 4 + 1: Wan's VAE reduces time too. Latte stands for the factorised transformers rather than Stable Video
Diffusion, as that takes no text: its batches, its noise (EDM) and its conditions would need another task.
"""

from __future__ import annotations

from visadapt.backbones.video_animatediff import AnimateDiff
from visadapt.backbones.video_family import Family
from visadapt.backbones.video_latte import Latte
from visadapt.backbones.video_unet3d import UNet3D
from visadapt.backbones.video_wan import Wan

FAMILIES: dict[str, Family] = {family.name: family for family in (AnimateDiff(), UNet3D(), Latte(), Wan())}


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

"""Pre-trained networks as small recipes: ``build`` makes the module, ``preprocess`` its transforms."""

from visadapt.backbones.base import Backbone
from visadapt.backbones.sam import SAM
from visadapt.backbones.stable_diffusion import StableDiffusion
from visadapt.backbones.timm_vit import TimmViT
from visadapt.backbones.video_diffusion import VideoDiffusion

__all__ = ["SAM", "Backbone", "StableDiffusion", "TimmViT", "VideoDiffusion"]

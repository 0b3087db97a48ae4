"""LoHa in files, under the names that LyCORIS, ComfyUI, kohya and PEFT share.

    ΔW = scale · (hada_w1_a · hada_w1_b) ⊙ (hada_w2_a · hada_w2_b)

`a` is (out, r), `b` (r, in · kernel); the scale is alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from visadapt.core.site import Site
from visadapt.interop.made import Made, shaped
from visadapt.methods import LoHa

HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def read_loha(site: Site, roles: Mapping[str, Tensor], scale: float | None = None) -> Made:
    """The method that says what a file holds of one layer.

    Args:
        site: of the layer.
        roles: `hada_…` → tensor, and perhaps `alpha`.
        scale: where the file keeps alpha elsewhere.

    Raises:
        ValueError: a tensor is missing or of another kind, or does not have the shape that the layer needs.
    """
    if {role for role in roles if role.startswith("hada_")} != HADA:
        raise ValueError(f"holds {', '.join(sorted(roles))}, which is no whole LoHa without cores")
    rank = len(roles["hada_w1_b"])
    if scale is not None:
        alpha = scale * rank
    else:
        alpha = float(roles["alpha"]) if "alpha" in roles else float(rank)
    tensors = {}
    for i, side in ((1, "a"), (2, "b")):
        tensors[f"up_{side}"] = shaped(roles[f"hada_w{i}_a"], (site.width, rank), f"hada_w{i}_a")
        tensors[f"down_{side}"] = shaped(roles[f"hada_w{i}_b"], (rank, *site.in_shape), f"hada_w{i}_b")
    return LoHa(rank=rank, alpha=None if alpha == rank else alpha), tensors

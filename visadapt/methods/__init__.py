"""The catalogue: one line per method."""

from visadapt.core.adapter import Adapter
from visadapt.methods.b4m import B4M
from visadapt.methods.dora import DoRA
from visadapt.methods.flora import FLoRA
from visadapt.methods.hydra import Hydra
from visadapt.methods.loha import LoHa
from visadapt.methods.lokr import LoKr
from visadapt.methods.lora import LoRA
from visadapt.methods.salt import SALT
from visadapt.methods.ssf import SSF
from visadapt.methods.wara import WaRA

METHODS: dict[str, type[Adapter]] = {
    m.__name__: m for m in (LoRA, DoRA, FLoRA, WaRA, LoHa, LoKr, SALT, Hydra, SSF, B4M)
}  # fmt: skip

__all__ = ["B4M", "METHODS", "SALT", "SSF", "DoRA", "FLoRA", "Hydra", "LoHa", "LoKr", "LoRA", "WaRA"]

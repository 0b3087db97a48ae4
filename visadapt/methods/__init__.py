"""The catalogue: one line per method."""

from visadapt.core.adapter import Adapter
from visadapt.methods.dora import DoRA
from visadapt.methods.lora import LoRA

METHODS: dict[str, type[Adapter]] = {m.__name__: m for m in (LoRA, DoRA)}

__all__ = ["METHODS", "DoRA", "LoRA"]

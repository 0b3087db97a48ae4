"""The catalogue: one line per method, in the order in which tables list them."""
# ruff: noqa: I001

from visadapt.core.adapter import Adapter as _Adapter

from visadapt.methods.lora import LoRA as LoRA
from visadapt.methods.dora import DoRA as DoRA
from visadapt.methods.flora import FLoRA as FLoRA
from visadapt.methods.wara import WaRA as WaRA
from visadapt.methods.loha import LoHa as LoHa
from visadapt.methods.lokr import LoKr as LoKr
from visadapt.methods.vera import VeRA as VeRA
from visadapt.methods.ia3 import IA3 as IA3
from visadapt.methods.rand_lora import RandLoRA as RandLoRA
from visadapt.methods.miss import MiSS as MiSS
from visadapt.methods.bat import Bat as Bat
from visadapt.methods.structured_lora import StructuredLoRA as StructuredLoRA
from visadapt.methods.lora_xs import LoRAXS as LoRAXS
from visadapt.methods.lora_sb import LoRASB as LoRASB
from visadapt.methods.pissa import PiSSA as PiSSA
from visadapt.methods.prolora import PRoLoRA as PRoLoRA
from visadapt.methods.oft import OFT as OFT
from visadapt.methods.oft import BOFT as BOFT
from visadapt.methods.hra import HRA as HRA
from visadapt.methods.fourier_ft import FourierFT as FourierFT
from visadapt.methods.wave_ft import WaveFT as WaveFT
from visadapt.methods.dv_lora import DVLoRA as DVLoRA
from visadapt.methods.loldu import LoLDU as LoLDU
from visadapt.methods.loca import LoCA as LoCA
from visadapt.methods.bottleneck import Bottleneck as Bottleneck
from visadapt.methods.compacter import Compacter as Compacter
from visadapt.methods.nice import NICE as NICE
from visadapt.methods.glora import GLoRA as GLoRA
from visadapt.methods.salt import SALT as SALT
from visadapt.methods.hydra import Hydra as Hydra
from visadapt.methods.ssf import SSF as SSF
from visadapt.methods.b4m import B4M as B4M
from visadapt.methods.sd_lora import SDLoRA as SDLoRA
from visadapt.methods.o_lora import OLoRA as OLoRA
from visadapt.methods.inf_lora import InfLoRA as InfLoRA
from visadapt.methods.dual_lora import DualLoRA as DualLoRA
from visadapt.methods.non_collision import NonCollisionLoRA as NonCollisionLoRA
from visadapt.methods.c_lora import CLoRA as CLoRA
from visadapt.methods.codyra import CoDyRA as CoDyRA
from visadapt.methods.so_ra import SoRA as SoRA
from visadapt.methods.dy_lora import DyLoRA as DyLoRA
from visadapt.methods.ada_lora import AdaLoRA as AdaLoRA
from visadapt.methods.al_lora import ALLoRA as ALLoRA
from visadapt.methods.lora_dropout import LoRADropout as LoRADropout
from visadapt.methods.beam_lora import BeamLoRA as BeamLoRA
from visadapt.methods.pri_lora import PRILoRA as PRILoRA
from visadapt.methods.rac_lora import RACLoRA as RACLoRA
from visadapt.methods.xgb_lora import XGBLoRA as XGBLoRA
from visadapt.methods.diffo_ra import DiffoRA as DiffoRA

METHODS: dict[str, type[_Adapter]] = {
    name: found for name, found in list(globals().items()) if isinstance(found, type) and name[0] != "_"
}

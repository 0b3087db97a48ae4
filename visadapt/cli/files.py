"""Merging and converting adapter files: the base is found, built, and what is written is checked."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from visadapt.cli import diffusion_files, yaml_files
from visadapt.cli.errors import UserError
from visadapt.cli.main import find_config
from visadapt.core.files import write_state
from visadapt.interop import Format
from visadapt.report.facts import read_facts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from visadapt.backbones.base import Backbone
    from visadapt.backbones.stable_diffusion import StableDiffusion
    from visadapt.backbones.video_diffusion import VideoDiffusion


def merge_file(
    adapter: Path,
    output: Path | None,
    tolerance: float,
    config: str | None,
    backbone: str | None,
    checkpoint: str | None,
    sets: list[str] | None = None,
) -> None:
    """Write the state dict of the base with the adapter folded in, after comparing outputs."""
    import torch

    import visadapt as va
    from visadapt.backbones.sam import SAM

    recipe, model = adapted(adapter, config, backbone, checkpoint)
    diffusion_files.choose_sets(model, sets)
    if is_diffusion(recipe):
        return diffusion_files.merge_diffusion(recipe, model, adapter, output or Path("merged"), tolerance)
    output = output or Path("merged.safetensors")
    if isinstance(recipe, SAM):
        return _merge_sam(recipe.name, model, output, tolerance)
    if output.suffix != ".safetensors":
        raise UserError("--output", f"'{output}' should end in .safetensors")
    image = picture(recipe)
    with torch.no_grad():
        before = model.eval()(image)
        after = va.merge(model)(image)
    error = _deviation(before, after, tolerance)
    count = write_state(model, output)
    print(f"{output}: {count} tensors, {output.stat().st_size:,} bytes")
    print(f"outputs with the adapter and after merging differ by {error:.1e} (relative, largest)")
    print(f'load it: timm.create_model(…, num_classes={before.shape[1]}, checkpoint_path="{output}")')


def _deviation(before: Tensor, after: Tensor, tolerance: float) -> float:
    """The largest relative deviation of outputs by merging; a `UserError` where it is above the tolerance."""
    error = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not error <= tolerance:  # also what is no number
        raise UserError(
            "--tolerance",
            f"merging changes the outputs by {error:.1e} (relative, largest), more than {tolerance:.1e}; not written",
            f"accept it with --tolerance {2 * error:.0e}" if error < 1 else "",
        )
    return error


def _merge_sam(name: str, model: Any, output: Path, tolerance: float) -> None:
    """The official layout, which stock ``segment_anything`` loads; for the base that is shipped, its plain one."""
    import torch

    import visadapt as va
    from visadapt.backbones.sam_export import save_official
    from visadapt.backbones.sam_layout import OFFICIAL

    if output.suffix not in (".pth", ".safetensors"):
        raise UserError("--output", f"'{output}' should end in .pth, as SAM's official files do, or in .safetensors")
    side = model.image_encoder.img_size
    noise = torch.randint(256, (3, side, side), generator=torch.Generator().manual_seed(0)).float()
    box = torch.tensor([[side / 4, side / 4, 3 * side / 4, 3 * side / 4]])
    request = [{"image": noise, "original_size": (side, side), "boxes": box}]
    before = model.eval()(request, multimask_output=True)[0]["low_res_logits"]
    after = va.merge(model)(request, multimask_output=True)[0]["low_res_logits"]
    error = _deviation(before, after, tolerance)
    notes = save_official(model, output)
    print(f"{output}: SAM {name}, {output.stat().st_size:,} bytes")
    print(f"mask logits with the adapter and after merging differ by {error:.1e} (relative, largest)")
    for note in notes:
        print(note)
    if name in OFFICIAL and output.suffix == ".pth":
        print(f'load it: segment_anything.sam_model_registry["{name}"](checkpoint="{output}")')
    else:
        print(f'load it: visadapt.backbones.SAM(name="{name}", checkpoint="{output}").build()')


def export_file(
    adapter: Path,
    output: Path,
    format: Format,
    rank: int | None,
    tolerance: float,
    config: str | None,
    backbone: str | None,
    checkpoint: str | None,
    sets: list[str] | None = None,
) -> None:
    """Write an adapter file in the format of another library and say how exact it is."""
    import visadapt as va

    recipe, model = adapted(adapter, config, backbone, checkpoint)
    diffusion_files.choose_sets(model, sets)
    if is_diffusion(recipe):
        return diffusion_files.export_diffusion(recipe, model, adapter, output, format, rank, tolerance)
    error = va.export(model, output, format=format, rank=rank)
    how = "exact" if error == 0 else f"largest relative error of a layer {error:.1e}"
    print(f"{output}: {format} folder, {how}")
    print(f'load it: peft.PeftModel.from_pretrained(model, "{output}")')


def import_file(adapter: Path, output: Path, config: str | None, backbone: str | None, checkpoint: str | None) -> None:
    """Read a PEFT folder, or a file of diffusers, kohya or LyCORIS, onto its base and save it as an adapter file."""
    import visadapt as va

    recipe, model = adapted(adapter, config, backbone, checkpoint)
    va.save(model, output, base_name=getattr(recipe, "name", None))
    print(f"{output}: {output.stat().st_size:,} bytes")
    print(va.summary(model))


def adapted(
    adapter: Path, config: str | None, backbone: str | None, checkpoint: str | None
) -> tuple[Backbone, nn.Module]:
    """The recipe of the base and the network with the adapters of a file on it."""
    import visadapt as va
    from visadapt.backbones.sam import SAM
    from visadapt.backbones.sam_export import load_adapter
    from visadapt.methods import METHODS  # noqa: F401 - a file names methods, their classes must be imported

    recipe = base_recipe(adapter, config, backbone, checkpoint)
    if is_diffusion(recipe):
        return recipe, _on_diffusion(recipe, adapter)
    names = class_names(adapter)
    if isinstance(recipe, SAM):
        recipe.base_dtype = "float32"  # a file is written once: no reason to round it
        sam: Any = recipe.build()
        return recipe, load_adapter(sam, adapter)
    model = recipe.build(len(names) or None, names or None)
    return recipe, va.load(model, adapter)


def is_diffusion(recipe: Backbone) -> TypeGuard[StableDiffusion | VideoDiffusion]:
    """Whether a recipe is that of a diffusion model."""
    from visadapt.backbones.stable_diffusion import StableDiffusion
    from visadapt.backbones.video_diffusion import VideoDiffusion

    return isinstance(recipe, (StableDiffusion, VideoDiffusion))


def _on_diffusion(recipe: StableDiffusion | VideoDiffusion, adapter: Path) -> nn.Module:
    """The base with the adapters of a file of any format; those of visadapt may bring new words."""
    import visadapt as va
    from visadapt.backbones import sd_tokens
    from visadapt.interop.read import is_lora_file

    recipe.base_dtype = "float32"  # a file is written once: no reason to round it
    recipe.grad_checkpointing = recipe.channels_last = recipe.lean = False  # nor to train: the modules of diffusers
    model: Any = recipe.build()
    if adapter.is_dir() or is_lora_file(adapter):
        return va.load(model, adapter).eval()
    loaded: nn.Module = sd_tokens.load_adapter(model, adapter)
    return loaded.eval()


def base_recipe(adapter: Path, config: str | None, backbone: str | None, checkpoint: str | None) -> Backbone:
    """The backbone that options name, else that of the configuration of the adapter's run.

    Raises:
        UserError: neither is there, or the configuration has no backbone.
    """
    from visadapt.backbones.sam import SAM
    from visadapt.backbones.sam_layout import NAMES
    from visadapt.backbones.stable_diffusion import StableDiffusion
    from visadapt.backbones.timm_vit import TimmViT
    from visadapt.backbones.video_diffusion import VideoDiffusion

    found = config or find_config(str(adapter))
    if found is not None:
        yaml_files.check(str(found))
        _import_methods(Path(found))
    if backbone in NAMES:
        return SAM(name=backbone, checkpoint=checkpoint)  # type: ignore[arg-type]  # one of its names
    if backbone is not None and diffusion_files.is_video_base(backbone):
        return VideoDiffusion(name=backbone, motion_adapter=checkpoint)
    if backbone is not None and checkpoint is not None and diffusion_files.is_diffusion_base(backbone):
        return VideoDiffusion(name=backbone, motion_adapter=checkpoint)
    if backbone is not None and diffusion_files.is_diffusion_base(backbone):
        return StableDiffusion(name=backbone)
    if backbone is not None:
        return TimmViT(name=backbone, checkpoint=checkpoint)
    if checkpoint is not None:
        raise UserError("--checkpoint", "say of which model these are the weights", "add --backbone NAME")
    if found is None:
        stated = _stated_base(adapter)
        raise UserError(
            str(adapter),
            "no config.yaml beside it says which base it belongs to",
            f"the file itself names '{stated}': add --backbone {stated}" if stated else "add --backbone or --config",
        )
    return _from_config(Path(found))


def _model_of(path: Path) -> dict[str, Any]:
    """What a configuration says of the model."""
    import yaml

    model = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("model") or {}
    return model.get("init_args") or model


def _import_methods(path: Path) -> None:
    """Import the modules of a user's own methods that a configuration names, as the run did: a file never does.

    Raises:
        UserError: there is no such module.
    """
    for entry in _model_of(path).get("adapters") or ():
        method = entry.get("method") or ""
        name = method if isinstance(method, str) else method.get("class_path", "")
        module = name.rpartition(".")[0]
        if module and not name.startswith("visadapt."):
            try:
                import_module(module)
            except ImportError as error:
                raise UserError(f"{path}: {name}", str(error), "run it in the folder of that module") from error


def _stated_base(adapter: Path) -> str:
    """The name of the base in an adapter file of visadapt; empty in others."""
    from visadapt.interop.files import read_keys

    plan = json.loads(read_keys(adapter)[0].get("visadapt", "{}"))
    return str(plan.get("base", {}).get("name", ""))


def _from_config(path: Path) -> Backbone:
    from jsonargparse import ArgumentParser

    import visadapt.backbones  # noqa: F401 - short class names need their class imported
    from visadapt.backbones.base import Backbone

    found = _model_of(path).get("backbone")
    if found is None:
        raise UserError(f"{path}: model.backbone", "this is required and missing")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    return parser.instantiate_classes(parser.parse_object({"backbone": found})).backbone


def class_names(adapter: Path) -> list[str]:
    """Names of the classes of an adapter, from its own metadata, else from its run; empty if unknown."""
    if adapter.is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(adapter, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            return []  # va.load will say what is wrong with the file
        if "class_names" in metadata:
            return list(json.loads(metadata["class_names"]))
    return list(read_facts(adapter).get("class_names", ()))


def picture(recipe: Any) -> Tensor:
    """A batch of one image of noise, preprocessed as the base wants it."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return recipe.preprocess(False)(Image.fromarray(noise))[None]

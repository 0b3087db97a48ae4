"""Small adapters and runs for the apps, and each app launched once for all tests that talk to it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import visadapt as va

torch.set_num_threads(1)


def given(task: str) -> Path | None:
    """The newest adapter of a task in the folder of runs that VISADAPT_RUNS names, if there is one."""
    from apps import _runs

    folder = os.environ.get("VISADAPT_RUNS")
    found = _runs.newest([task], Path(folder)) if folder else []
    return found[0] if found else None


def noisy(model, size: float = 0.2):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    for adapter in va.adapters(model).values():
        for parameter in adapter.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def digits_adapter(tmp_path_factory) -> Path:
    """A LoRA on the shipped digit classifier, without a run around it."""
    from visadapt.backbones.timm_vit import TimmViT

    model = va.adapt(TimmViT("tiny_digits").build(), va.LoRA(rank=2), ["attn.qkv", "attn.proj"])
    return va.save(noisy(model), tmp_path_factory.mktemp("digits") / "ink.safetensors", base_name="tiny_digits")


@pytest.fixture(scope="session")
def peft_zip(digits_adapter, tmp_path_factory) -> Path:
    """The same adapter as a zipped PEFT folder."""
    from visadapt.backbones.timm_vit import TimmViT

    folder = tmp_path_factory.mktemp("peft")
    model = va.load(TimmViT("tiny_digits").build(), digits_adapter)
    va.export(model, folder / "ink", format="peft")
    return Path(shutil.make_archive(str(folder / "ink"), "zip", folder, "ink"))


def write_run(folder: Path, class_path: str, options: dict, names: list[str]) -> Path:
    """What a run leaves beside its adapter."""
    folder.mkdir(parents=True)
    config = {"model": {"class_path": class_path, "init_args": options}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"class_names": names}))
    return folder / "adapter.safetensors"


@pytest.fixture(scope="session")
def railway_run(tmp_path_factory) -> Path:
    """The adapter of a run that segments without prompts (untrained, unless VISADAPT_RUNS names a folder of runs)."""
    pytest.importorskip("segment_anything")
    from visadapt.backbones.sam import SAM
    from visadapt.tasks.automatic import AutomaticSegmentation

    if found := given("AutomaticSegmentation"):
        return found
    options = {
        "backbone": {"class_path": "visadapt.backbones.sam.SAM", "init_args": {"name": "tiny_sam"}},
        "adapters": [{"method": {"class_path": "visadapt.methods.lora.LoRA"}, "targets": "encoder.qv"}],
    }
    path = write_run(
        tmp_path_factory.mktemp("runs") / "railway" / "1",
        "visadapt.tasks.automatic.AutomaticSegmentation", options, ["background", "railway"],
    )  # fmt: skip
    torch.manual_seed(0)
    task = AutomaticSegmentation(SAM(), adapters=[va.Adaptation(va.LoRA(rank=2), "encoder.qv")])
    task.configure_model()
    return va.save(noisy(task.model, 0.05), path, base_name="tiny_sam")


@pytest.fixture(scope="session")
def motion_run(tmp_path_factory) -> Path:
    """The adapter of a run that learned a motion, below VISADAPT_RUNS; else of both sets on a random video network."""
    pytest.importorskip("diffusers", reason="video models need diffusers: pip install 'visadapt[diffusion]'")
    if found := given("TextToVideo"):
        return found
    from tests.tiny_video import FRAMES, video_base
    from tests.video_training import SPATIAL, TEMPORAL
    from visadapt.backbones.video_diffusion import VideoDiffusion

    options = {
        "backbone": {
            "class_path": "visadapt.backbones.video_diffusion.VideoDiffusion", "init_args": {"name": video_base()},
        },
        "preview": {"prompts": ["a red star orbiting"], "steps": 2, "guidance": 2.0, "frames": FRAMES},
    }  # fmt: skip
    task = "visadapt.tasks.text_to_video.TextToVideo"
    path = write_run(tmp_path_factory.mktemp("work") / "runs" / "orbit" / "20260101-120000", task, options, [])
    model = VideoDiffusion(video_base()).build()
    for name, targets in (("spatial", SPATIAL), ("temporal", TEMPORAL)):
        va.adapt(model, va.LoRA(rank=1), targets, name)
    return va.save(noisy(model), path, base_name=video_base())


@pytest.fixture(scope="session")
def picture_run(tmp_path_factory) -> Path:
    """The adapter of a run on the shipped Stable Diffusion (untrained, unless VISADAPT_RUNS names a folder of runs)."""
    pytest.importorskip("diffusers", reason="Stable Diffusion needs diffusers: pip install 'visadapt[diffusion]'")
    from visadapt.backbones.stable_diffusion import StableDiffusion

    if found := given("TextToImage"):
        return found
    options = {
        "backbone": {
            "class_path": "visadapt.backbones.stable_diffusion.StableDiffusion", "init_args": {"name": "tiny_sd"},
        },
        "preview": {"prompts": ["a sks shape on bricks"], "guidance": 3.0},
    }  # fmt: skip
    task = "visadapt.tasks.text_to_image.TextToImage"
    path = write_run(tmp_path_factory.mktemp("pictures") / "subject" / "20260101-120000", task, options, [])
    model = va.adapt(StableDiffusion("tiny_sd").build(), va.LoRA(rank=1), ["unet.cross"])
    return va.save(noisy(model), path, base_name="tiny_sd")


@pytest.fixture(scope="session")
def for_classify(digits_adapter) -> Path:
    """The trained adapter below VISADAPT_RUNS, for pictures in the documents; else the untrained one."""
    return given("Classification") or digits_adapter


@pytest.fixture(scope="session")
def served(request):
    """Starts an app once: name -> address; what an app needs is made when it starts."""
    pytest.importorskip("gradio", reason="apps need Gradio: pip install 'visadapt[apps]'")
    from importlib import import_module

    from apps import _safety, _server

    needs = {"segment": "railway_run", "text_to_image": "picture_run", "text_to_video": "motion_run"}
    running = {}

    def address(name: str) -> str:
        if name not in running:
            adapter = request.getfixturevalue(needs.get(name, "for_classify"))
            running[name] = _server.launch(import_module(f"apps.{name}").build([adapter]), block=False)
        return running[name][1]

    yield address
    for blocks, _ in running.values():
        blocks.close(verbose=False)
    _safety.stay_on_this_machine(False)

"""Every file in configs/ trains: one real batch through the command line, with a small network."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny_diffusion import tiny_pipeline
from tests.tiny_video import FRAMES, video_base
from visadapt.backbones.sd_layout import SHIPPED
from visadapt.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
SMALL = [
    "--model.backbone.name=vit_tiny_patch16_224",
    "--model.backbone.pretrained=false",
    "--model.backbone.img_size=32",
    '--model.backbone.options={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "--data.num_workers=0",
    "--data.batch_size=8",
]
FOLDER = CONFIGS / "classification" / "vit_b16_lora_folder.yaml"
ROWS = {
    "segmentation": "railway_10shot.yaml",
    "text_to_image": "subject.yaml",
    "text_to_video": "orbit_one_clip.yaml",
    "class_incremental": "digits_sdlora.yaml",
}
STACKED = {FOLDER.with_name(f"vit_b16_{what}_folder.yaml"): FOLDER for what in ("probe", "full")}
STACKED |= {row: CONFIGS / task / under for task, under in ROWS.items() for row in CONFIGS.glob(f"{task}/rows/*.yaml")}
SMALL_MAPS = ["--data.train_size=24", "--data.val_size=2", "--data.test_size=2", "--data.batch_size=2"]
SMALL_SAM = ["--model.backbone.name=tiny_sam", "--model.backbone.img_size=128", "--data.shots=4"]


@pytest.fixture
def images(tmp_path):
    for name, hue in {"cat": 60, "dog": 160}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (40, 36), (hue, i, hue)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def maps(tmp_path):
    """Images with a mask of the same name each: a black square is the class."""
    for name in ("images", "masks"):
        (tmp_path / "maps" / name).mkdir(parents=True)
    for i in range(12):
        mask = Image.new("L", (128, 128))
        mask.paste(255, (20 + i, 30, 60 + i, 90))
        mask.save(tmp_path / "maps" / "masks" / f"{i}.png")
        Image.eval(mask, lambda value: 255 - value).convert("RGB").save(tmp_path / "maps" / "images" / f"{i}.png")
    return tmp_path / "maps"


@pytest.fixture
def photos(images):
    """The same pictures with a caption each."""
    for path in images.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a photo of a {path.parent.name}")
    return images


def video(config, photos):
    """Options for a small random base with the layers of the shipped one."""
    options = [f"--model.backbone.name={video_base()}", "--model.preview.steps=1"]
    options += [f"--data.frames={FRAMES}", "--data.batch_size=2"]
    if config.stem != "folder":
        return options
    small = ["--data.resolution=32", "--data.bucket_step=8", "--data.num_workers=0", "--data.instance_prompt=it moves"]
    for path in photos.rglob("*.txt"):
        path.unlink()
    motion = f"--model.backbone.motion_adapter={video_base()}/motion_adapter"
    return [*options, *small, motion, f"--data.root={photos}"]


def diffusion(config, photos, tmp_path):
    """Options for a small base; the shipped one has its own configurations."""
    options = ["--model.preview.steps=1", "--model.start=null"]  # b4m_join starts from what other runs have left
    if not config.stem.endswith("folder"):
        if not (SHIPPED / "model_index.json").is_file():
            pytest.skip("the tiny Stable Diffusion has not been trained yet")
        return options
    base = tiny_pipeline(tmp_path / "base", "sdxl" if "sdxl" in config.stem else "sd")
    small = ["--data.resolution=32", "--data.bucket_step=8", "--data.num_workers=0"]
    return [*options, *small, f"--model.backbone.name={base}", f"--data.root={photos}"]


def cases():
    """All of them; rows of the diffusion tasks, half a minute each and but for the method alike, are slow."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS))[:-5]
        slow = name.startswith("text_to_") and path.parent.name == "rows" and path.stem != "full"
        yield pytest.param(path, id=name, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("config", cases())
def test_a_configuration_trains(config, photos, maps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["visadapt"])
    files = [STACKED[config], config] if config in STACKED else [config]
    extra = {"classification": [*SMALL, f"--data.root={photos}"], "segmentation": SMALL_MAPS}
    if config.stem in ("imagenet_r", "imagenet_a", "cifar100", "cub200", "domainnet"):
        extra["class_incremental"] = [*SMALL, f"--data.source.init_args.root={photos}", "--data.tasks=2"]
    if config.name == "vit_b_folder.yaml":
        extra["segmentation"] = [*SMALL_SAM, f"--data.root={maps}"]
    task = config.relative_to(CONFIGS).parts[0]
    if task == "text_to_image":
        extra[task] = diffusion(config, photos, tmp_path)
    if task == "text_to_video":
        extra[task] = video(config, photos)
    verb = "test" if config.name == "oracle.yaml" else "fit"  # nothing in it trains
    options = [*(f"--config={file}" for file in files), *extra.get(task, []), *QUICK]
    assert main([verb, *options]) in (0, None)

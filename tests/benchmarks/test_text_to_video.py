"""The table and the pictures of text-to-video: rows stacked on tasks, figures by name, clips side by side."""

from __future__ import annotations

from pathlib import Path

import torch

import visadapt as va
from benchmarks import _figures, text_to_video
from tests.tiny import moved
from tests.tiny_video import video_base
from visadapt.backbones import StableDiffusion
from visadapt.backbones.video_diffusion import VideoDiffusion

ROOT = Path(__file__).parents[2]


def test_a_command_line_stacks_the_row_on_the_task():
    line = text_to_video.command("orbit_one_clip", "dual", 1, Path("out"), 1e-3)
    assert line[4:6] == [
        f"--config={text_to_video.CONFIGS / name}" for name in ("orbit_one_clip.yaml", "rows/dual.yaml")
    ]
    assert line[6:] == [
        "--seed_everything=1",
        "--data.seed=1",
        "--run_dir=out",
        "--model.optimizer.init_args.lr=0.001",
        "--model.seed=1",
        "--model.measures.base=false",
    ]


def test_the_base_is_measured_beside_the_clips_of_each_seed(tmp_path, monkeypatch):
    lines = []

    def make(line, done, jobs):
        lines.append(line)
        done.parent.mkdir(parents=True)
        done.write_text("measures/motion_correlation,measures/share_of_frames_with_the_right_shape\n-0.25,0.5\n")

    monkeypatch.setattr(text_to_video._runs, "make", make)
    found = [text_to_video.base("orbit_one_clip", seed, tmp_path, 1) for seed in range(2)]
    assert found == [{"motion correlation": -0.25, "right shape %": 50.0}] * 2
    assert [line[3] for line in lines] == ["test", "test"]
    assert [line[6:8] for line in lines] == [[f"--seed_everything={s}", f"--data.seed={s}"] for s in range(2)]
    runs = [{"figures": {}, "trainable": 5, "adapter_bytes": 1024, "minutes": 3.0}]
    columns = text_to_video.COLUMNS["orbit_one_clip"]
    found[1]["right shape %"] = 60.0
    text = _figures.table({"dual": runs}, "orbit_one_clip", columns, text_to_video.ROWS, found).splitlines()
    assert "| 55.0 ± 7.1 |" in text[2]


def test_the_table_tells_leakage_of_one_clip_only():
    columns = text_to_video.COLUMNS["orbit_one_clip"]
    figures = {
        f"{name}, {when}": value for name in columns.values() for when, value in (("before", 0.1), ("after", 0.6))
    }
    runs = [{"figures": figures, "trainable": 5, "adapter_bytes": 1024, "minutes": m} for m in (3.0, 2.0)]
    text = _figures.table({"dual": runs}, "orbit_one_clip", columns, text_to_video.ROWS).splitlines()
    assert "| the clip's shape % |" in text[0]
    assert text[2].startswith("| base | 0.100 | 0.100 | 0.100 | 10.0 |")
    assert text[3].startswith("| dual paths | 0.600 ± 0.000 |")
    assert text[3].endswith("| 5 | 1 | 2.0 |")
    assert not any(heading.startswith("the clip's") for heading in text_to_video.COLUMNS["orbit_clips"])


def test_clips_stand_side_by_side(monkeypatch):
    monkeypatch.chdir(ROOT)
    clip = text_to_video.learned("zigzag_one_clip")
    assert (clip.dtype, clip.shape) == (torch.uint8, (8, 3, 32, 32))
    sources = [("learned clip", clip.expand(2, -1, -1, -1, -1)), ("base", torch.zeros(2, 8, 3, 32, 32).byte())]
    sheets = text_to_video.pages(sources, ["a", "b"])
    assert len(sheets) == 8
    assert len({sheet.tobytes() for sheet in sheets}) == 8  # it moves
    assert text_to_video.strips(sources).width > sheets[0].width


def test_an_appearance_of_pictures_and_a_motion_at_their_strengths(tmp_path, monkeypatch):
    look = moved(va.adapt(StableDiffusion(video_base()).build(), va.LoRA(rank=1), "unet.cross"), 0.2)
    motion = moved(
        va.adapt(VideoDiffusion(video_base()).build(), va.LoRA(rank=1), "temporal.attention", "temporal"), 0.2
    )
    va.save(look, tmp_path / "look.safetensors")
    va.save(motion, tmp_path / "motion.safetensors")
    monkeypatch.setattr(text_to_video, "STRENGTHS", (0.0, 1.0))
    found = text_to_video.mixed(tmp_path / "look.safetensors", tmp_path / "motion.safetensors", video_base(), "a", 1)
    assert [title for title, _ in found] == ["appearance 0", "appearance 1"]
    clips = torch.cat([clips for _, clips in found])
    assert len({clip.numpy().tobytes() for clip in clips}) == 4

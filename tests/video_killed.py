"""Text-to-video runs on drawn clips, to be killed and resumed.

python tests/video_killed.py DIR BASE CASE … kills a run of each case by SIGKILL; their folders stay.
"""

from pathlib import Path

import visadapt as va
from tests.diffusion_killed import kill_all
from tests.diffusion_training import train
from tests.tiny_video import FRAMES
from tests.video_training import SPATIAL, TEMPORAL, task
from visadapt.data.moving_scenes import MovingScenes
from visadapt.tasks.diffusion_options import Noise, Paths

CASES = ("dual", "sequential, cached")


def run(folder: Path, base: str, case: str, *callbacks, resume: Path | None = None) -> Path:
    """Train two epochs of a case in a folder; returns the adapter file."""
    mode, _, cached = case.partition(", ")
    lora = va.LoRA(rank=2, dropout=0.1)
    adapters = [va.Adaptation(lora, SPATIAL, "spatial"), va.Adaptation(lora, TEMPORAL, "temporal")]
    made = task(
        name=base, adapters=adapters, paths=Paths(mode, skip=0.3), clips=2, noise=Noise(offset=0.1),
        caption_dropout=0.3, ema_decay=0.9, rates={"spatial": 1e-3},
    )  # fmt: skip
    data = MovingScenes("orbit", clips=2, val_clips=2, frames=FRAMES, repeats=3, batch_size=2, seed=1,
                        cache=str(folder / "cache") if cached else None)  # fmt: skip
    train(folder, *callbacks, task=made, data=data, resume=resume)
    return va.save(made.model, folder / "adapter.safetensors")


if __name__ == "__main__":
    kill_all(run)

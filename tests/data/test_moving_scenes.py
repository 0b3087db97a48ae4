"""MovingScenes: every kind gives the batch of the contract; stages share nothing; latents of clips are kept."""

import numpy as np
import pytest
import torch

from tests.captioned_tasks import CaptionTask, fit
from visadapt.data.moving import KINDS, clip, motion_of
from visadapt.data.moving_scenes import MovingScenes


class ClipTask(CaptionTask):
    """Encodes clips (B, F, 3, H, W) frame by frame."""

    def encode(self, videos):
        return super().encode(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])

    def loss(self, batch):
        latents = batch["latents"] if "latents" in batch else self.encode(batch["videos"])
        return (self.model.net(latents.flatten(0, 1)) - 1).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    data = MovingScenes(kind, clips=3, val_clips=2, test_clips=1, frames=4, size=16, batch_size=2, seed=5)
    batches = list(data.train_dataloader())
    assert [batch["videos"].shape for batch in batches] == [(2, 4, 3, 16, 16), (1, 4, 3, 16, 16)]
    assert sorted(torch.cat([batch["clip"] for batch in batches]).tolist()) == [0, 1, 2]
    frames, caption, labels = clip(5, 2, 4, 16, "train", kind)
    sample = data.dataset("train")[2]
    assert sample["caption"] == caption
    assert motion_of(sample["frame_caption"]) is None
    pixels = ((sample["video"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, frames)
    assert np.array_equal(data.labels("train")[2]["centres"], labels["centres"])
    assert [len(data.dataset(stage)) for stage in ("val", "test")] == [2, 1]


def test_stages_seeds_and_repeats():
    def clips(stage, seed=0):
        dataset = MovingScenes(clips=4, val_clips=4, frames=2, size=8, seed=seed).dataset(stage)
        return {dataset[i]["video"].numpy().tobytes() for i in range(4)}

    assert not clips("train") & clips("val")
    assert not clips("train") & clips("train", 1)
    assert clips("val") == clips("val", 1)
    thrice = MovingScenes(clips=2, repeats=3, frames=2, size=8)
    assert [thrice.dataset("train")[i]["clip"] for i in range(6)] == [0, 1] * 3
    assert len(thrice.dataset("val")) == 16
    assert len(thrice.labels("train")) == 2


def test_latents_are_kept(tmp_path):
    options = {"clips": 2, "val_clips": 1, "frames": 3, "size": 16, "cache": str(tmp_path / "c"), "batch_size": 2}
    first = fit(tmp_path, MovingScenes(**options), epochs=2, task=ClipTask())
    again = fit(tmp_path, MovingScenes(**options), epochs=2, task=ClipTask())
    assert (len(first.encoded), len(again.encoded)) == (3, 0)
    (batch, _), (kept, _) = first.seen[0], again.seen[0]
    assert batch["latents"].shape == (2, 3, 4, 4, 4)
    assert torch.equal(batch["latents"], kept["latents"])
    assert batch["text"]["embeddings"].shape == batch["frame_text"]["embeddings"].shape == (2, 1, 2)
    plain = fit(tmp_path, MovingScenes(**(options | {"cache": None})), epochs=2, task=ClipTask())
    for (one, loss), (other, same) in zip(first.seen, plain.seen, strict=True):
        assert one["captions"] == other["captions"]
        assert torch.equal(one["clip"], other["clip"])
        assert np.isclose(loss, same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "jump"}, "data.kind: 'jump' is not one of moving, orbit, zigzag, bounce, digits"),
        ({"clips": 0}, "data.clips: 0 must be at least 1"),
        ({"frames": 1}, "data.frames: 1 shows no motion"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MovingScenes(**options)

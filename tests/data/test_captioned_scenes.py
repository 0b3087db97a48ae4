"""Scenes: every kind gives the batch of the contract; stages share nothing; validation never changes."""

import numpy as np
import pytest
import torch

from tests.captioned_tasks import fit
from visadapt.data import scenes
from visadapt.data.captioned_scenes import Scenes


@pytest.mark.parametrize(("kind", "draw"), [("scenes", scenes.scene), ("subject", scenes.subject),
                                            ("style", scenes.style), ("digits", scenes.digit)])  # fmt: skip
def test_every_kind(kind, draw):
    data = Scenes(kind, train_size=6, val_size=3, test_size=2, batch_size=4, seed=5)
    batches = list(data.train_dataloader())
    assert [batch["images"].shape for batch in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    image, caption, labels = draw(5, 2, 32, "train")
    sample = data.dataset("train")[2]
    assert sample["caption"] == caption
    assert np.array_equal(((sample["image"] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), image)
    assert sample["sizes"].tolist() == [32, 32, 0, 0, 32, 32]
    assert data.labels("train")[2] == labels
    assert [len(data.dataset(stage)) for stage in ("val", "test")] == [3, 2]


def test_subject_and_style_together():
    data = Scenes("both", train_size=3, val_size=2)
    captions = [data.dataset("train")[i]["caption"] for i in range(6)]
    assert [caption.startswith("a sks shape") for caption in captions] == [True] * 3 + [False] * 3
    assert all(caption.endswith("in sks style") for caption in captions[3:])
    assert len(data.labels("val")) == len(data.dataset("val")) == 4


def test_stages_and_seeds():
    def pictures(stage, seed=0):
        dataset = Scenes(train_size=8, val_size=8, seed=seed).dataset(stage)
        return {dataset[i]["image"].numpy().tobytes() for i in range(8)}

    assert not pictures("train") & pictures("val")
    assert not pictures("train") & pictures("train", 1)
    assert pictures("val") == pictures("val", 1)


def test_prior_pictures_are_of_the_known_world():
    data = Scenes("subject", train_size=4, prior_size=4, batch_size=8)
    (batch,) = data.train_dataloader()
    assert [("sks" in caption) for caption in batch["captions"]] == (~batch["prior"]).tolist()
    assert batch["prior"].sum() == 4
    assert all("prior" not in batch for batch in data.val_dataloader())


def test_drawn_pictures_are_cached_by_their_pixels(tmp_path):
    options = {"train_size": 4, "val_size": 2, "size": 16, "cache": str(tmp_path / "c")}
    first = fit(tmp_path, Scenes(**options), epochs=1)
    again = fit(tmp_path, Scenes(**options), epochs=1)
    assert (len(first.encoded), len(again.encoded)) == (6, 0)
    assert all(torch.equal(a["latents"], b["latents"]) for (a, _), (b, _) in zip(first.seen, again.seen, strict=True))
    other = fit(tmp_path, Scenes(seed=1, **options), epochs=1)
    assert len(other.encoded) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cats"}, "data.kind: 'cats' is not one of scenes, subject, style, digits"),
        ({"train_size": 0}, "data.train_size: 0 must be at least 1"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**options)

"""Digits: what is drawn depends on (domain, seed, epoch, index) alone, and splits never overlap."""

import pytest
import torch

from visadapt.data.digit_domains import DOMAINS, draw, handwriting
from visadapt.data.digits import TEST, TRAIN, Digits


def samples(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))]), dataset.labels


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_drawing_depends_on_its_own_coordinates_only(domain):
    together = draw(domain, [5, 700, 1300], seed=3, epoch=2, train=True)
    alone = draw(domain, [700], seed=3, epoch=2, train=True)
    assert torch.equal(together[1:2], alone)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 3, 32, 32)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"epoch": 3}, {"index": 701}])
def test_every_coordinate_matters(changed):
    def one(index=700, seed=3, epoch=2):
        return draw("scan", [index], seed, epoch, True)

    assert not torch.equal(one(), one(**changed))


def test_domains_look_different():
    drawn = {name: draw(name, range(50), 0, 0, True).float() for name in DOMAINS}
    brightness = {name: images.mean().item() for name, images in drawn.items()}
    assert brightness["upright"] < 60 < 180 < brightness["inverted"]
    spread = {name: (images.amax(1) - images.amin(1)).mean().item() for name, images in drawn.items()}
    assert spread["upright"] == spread["inverted"] == spread["rotated"] == 0  # grey
    assert min(spread["scan"], spread["texture"]) > 10  # coloured
    assert torch.allclose(drawn["upright"], 255 - drawn["inverted"], atol=1)


def test_texture_backgrounds_are_not_shared_between_training_and_evaluation():
    train, evaluation = (draw("texture", range(200), 0, 0, flag) for flag in (True, False))
    corners = [{tuple(image[:, 0, :4].flatten().tolist()) for image in part} for part in (train, evaluation)]
    assert len(corners[0]) > 150
    assert not corners[0] & corners[1]


def test_splits_are_disjoint_and_the_tail_is_the_test():
    data = Digits()
    parts = {stage: set(data._indices(stage)) for stage in ("train", "val", "test")}
    assert parts["test"] == set(range(TRAIN, TRAIN + TEST))
    assert parts["train"] | parts["val"] == set(range(TRAIN))
    assert not parts["train"] & parts["val"]


def test_few_shots_are_balanced_fixed_and_follow_the_seed():
    first, again, other = (Digits(shots=3, seed=seed).dataset("train") for seed in (0, 0, 1))
    assert first.labels == sorted(list(range(10)) * 3)
    assert first.indices == again.indices != other.indices
    assert torch.equal(first.images, again.images)
    before = first.images.clone()
    first.set_epoch(1)
    assert torch.equal(before, first.images)
    assert set(first.indices) <= set(Digits()._indices("train"))


def test_fixed_images_are_moved_by_the_random_state_only():
    dataset = Digits(shots=1).dataset("train")
    torch.manual_seed(1)
    one = dataset[0][0]
    torch.manual_seed(1)
    assert torch.equal(one, dataset[0][0])
    assert not torch.equal(one, dataset[0][0])
    assert (one - dataset.images[0] / 255).abs().mean() < 0.2


def test_all_training_digits_are_drawn_anew_each_epoch_and_evaluation_never_changes():
    data = Digits(seed=5)
    train = data.dataset("train")
    first = train.images.clone()
    train.set_epoch(1)
    assert (first != train.images).any()
    train.set_epoch(0)
    assert torch.equal(first, train.images)
    for stage in ("val", "test"):
        assert torch.equal(Digits(seed=5).dataset(stage).images, Digits(seed=6).dataset(stage).images)


def test_classes_are_relabelled_in_the_given_order():
    data = Digits(classes=[7, 2], shots=2)
    assert data.class_names == ["7", "2"]
    assert data.num_classes == 2
    dataset = data.dataset("test")
    digits = handwriting()[1][dataset.indices]
    assert set(digits.tolist()) == {2, 7}
    assert [[7, 2][label] for label in dataset.labels] == digits.tolist()


def test_the_original_domain_shows_the_same_digits():
    data = Digits("inverted", "upright")
    loader = data.source_dataloader()
    images, labels = next(iter(loader))
    assert labels.tolist() == data.dataset("test").labels[: len(labels)]
    assert images.mean() < 0.3
    assert Digits("inverted", None).source_dataloader() is None


def test_batches_are_the_same_with_and_without_workers():
    def epoch(workers):
        data = Digits(shots=2, batch_size=8, num_workers=workers)
        return torch.cat([images for images, _ in data.train_dataloader()])

    assert torch.equal(epoch(0), epoch(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domain": "scann"}, "'scann' is not one of upright, tilted, rotated"),
        ({"source_domain": "up"}, "data.source_domain"),
        ({"classes": [1, 1]}, "different digits"),
        ({"classes": [10]}, "different digits"),
        ({"val_size": 0}, "val_size"),
    ],
)
def test_wrong_arguments_name_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_too_many_shots():
    with pytest.raises(ValueError, match=r"data.shots: 500, but of digit 0 there are \d+"):
        Digits(shots=500).dataset("train")

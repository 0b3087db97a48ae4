"""ImageFolder: layouts, splits, picture formats, and one clear message for each kind of bad data."""

import numpy as np
import pytest
from PIL import Image

from visadapt.data.image_folder import ImageFolder
from visadapt.data.images import UnreadableImage, find_images, read_rgb


def paint(path, colour=(200, 30, 30), size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def flat(tmp_path):
    for name in ("cat", "dog", "owl"):
        for i in range(10):
            paint(tmp_path / name / f"{i}.png", colour=(20 * i, 50, 50))
    return tmp_path


@pytest.fixture
def split(tmp_path):
    for part in ("train", "valid", "test"):
        for name in ("cat", "dog"):
            for i in range(3):
                paint(tmp_path / part / name / f"{i}.jpg")
    return tmp_path


def test_one_folder_is_split_within_each_class(flat):
    data = ImageFolder(str(flat), split=[0.6, 0.2, 0.2])
    parts = {stage: data.dataset(stage).samples for stage in ("train", "val", "test")}
    assert {stage: len(part) for stage, part in parts.items()} == {"train": 18, "val": 6, "test": 6}
    assert len({path for part in parts.values() for path, _ in part}) == 30
    for part in parts.values():
        labels = [label for _, label in part]
        assert labels.count(0) == labels.count(1) == labels.count(2)
    assert data.class_names == ["cat", "dog", "owl"]


def test_the_split_follows_the_seed(flat):
    first, again, other = (ImageFolder(str(flat), seed=seed).samples() for seed in (0, 0, 1))
    assert first == again
    assert first["test"] != other["test"]


def test_split_folders_are_found_under_their_usual_names(split):
    data = ImageFolder(str(split))
    assert {stage: len(data.dataset(stage)) for stage in ("train", "val", "test")} == dict.fromkeys(
        ("train", "val", "test"), 6
    )
    image, label = data.dataset("val")[5]
    assert image.size == (12, 9)
    assert label == 1


def test_shots(split):
    assert [label for _, label in ImageFolder(str(split), shots=2).samples()["train"]] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"data\.shots: 4, but class 'cat' has 3.*set it to null"):
        ImageFolder(str(split), shots=4).samples()


def test_a_split_without_folder_says_what_to_do(split):
    import shutil

    shutil.rmtree(split / "valid")
    with pytest.raises(NotImplementedError, match=r"has no val images; make a 'val' folder"):
        ImageFolder(str(split)).dataset("val")


@pytest.mark.parametrize(
    ("mode", "pixels", "expected"),
    [
        ("L", np.full((4, 4), 90, np.uint8), (90, 90, 90)),
        ("I;16", np.full((4, 4), 257 * 90, np.uint16), (90, 90, 90)),
        ("RGBA", np.full((4, 4, 4), (10, 20, 30, 0), np.uint8), (255, 255, 255)),
        ("LA", np.full((4, 4, 2), (60, 255), np.uint8), (60, 60, 60)),
    ],
)
def test_pictures_of_every_mode_become_rgb(tmp_path, mode, pixels, expected):
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    image = read_rgb(path)
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == expected


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "phone.jpg", exif=exif)
    assert read_rgb(tmp_path / "phone.jpg").size == (10, 20)


def truncate(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def test_unreadable_files_are_all_named_before_training(flat):
    (flat / "cat" / "3.png").write_bytes(b"not an image")
    (flat / "owl" / "7.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"(?s)cat/3\.png.*owl/7\.png.*replace or delete"):
        ImageFolder(str(flat)).setup("fit")


def test_a_truncated_image_is_named_when_it_is_read(flat):
    truncate(flat / "cat" / "0.png")
    data = ImageFolder(str(flat))
    data.setup("fit")
    read = (sample for stage in ("train", "val", "test") for sample in data.dataset(stage))
    with pytest.raises(UnreadableImage, match=r"cat/0\.png.*truncated.*replace or delete the file"):
        list(read)


def test_empty_class(flat):
    (flat / "ant").mkdir()
    (flat / "ant" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"class folder '.*ant' has no images; known suffixes: \.jpg"):
        ImageFolder(str(flat)).samples()


def test_class_sets_that_differ(split):
    (split / "test" / "dog").rename(split / "test" / "dogs")
    with pytest.raises(ValueError, match=r"classes \['dog'\] of '.*train' are missing in '.*test'"):
        ImageFolder(str(split))
    paint(split / "test" / "dog" / "0.jpg")
    with pytest.raises(ValueError, match=r"classes \['dogs'\] of '.*test' are missing in '.*train'"):
        ImageFolder(str(split))


def test_missing_and_empty_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.root: folder '.*nowhere' does not exist"):
        ImageFolder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no class folders"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize("ratio", [[0.5, 0.5], [0.5, 0.1, 0.1], [0, 0.5, 0.5], [1.2, -0.1, -0.1]])
def test_wrong_split(flat, ratio):
    with pytest.raises(ValueError, match=r"data.split: .* must be three shares"):
        ImageFolder(str(flat), split=ratio)


def test_a_class_too_small_to_split(flat):
    paint(flat / "ant" / "0.png")
    with pytest.raises(ValueError, match=r"class 'ant' has 1 image\(s\), too few"):
        ImageFolder(str(flat)).samples()


def test_predict_leaves_broken_files_out_and_says_so(flat, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    paint(folder / "b.png")
    paint(folder / "a" / "c.PNG")
    truncate(folder / "broken.png")
    data = ImageFolder(str(flat), images=str(folder))
    with pytest.warns(UserWarning, match=r"left out: cannot read image '.*broken\.png'"):
        dataset = data.dataset("predict")
    assert [path.rsplit("/", 1)[1] for path, _ in dataset.samples] == ["c.PNG", "b.png"]
    assert dataset[0][1] == -1


def test_find_images_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images in"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither an image nor a folder"):
        find_images([tmp_path / "x.png"])

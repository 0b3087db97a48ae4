"""VideoFolder: videos, animations and folders of frames give the same clips; what is broken is named, all at once."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.data.captions import BadCaption
from visadapt.data.video_files import BadClip, find_clips, frame_files, look
from visadapt.data.video_folder import VideoFolder

SIDE = 16


def frames_of(count, size=(SIDE, SIDE), first=0):
    """Grey frames whose value tells their number."""
    return [Image.new("RGB", size, (10 * (first + i),) * 3) for i in range(count)]


def frame_folder(folder, count, caption=None, **options):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames_of(count, **options)):
        frame.save(folder / f"{number}.png")
    if caption:
        folder.with_name(folder.name + ".txt").write_text(caption)


def animation(file, count, caption=None, **options):
    first, *rest = frames_of(count, **options)
    first.save(file, save_all=True, append_images=rest, duration=100, lossless=True)
    if caption:
        file.with_suffix(".txt").write_text(caption)


def shown(sample):
    return ((sample["video"][:, 0, 0, 0] + 1) * 12.75).round().int().tolist()


def folder(root, **options):
    return VideoFolder(str(root), **({"frames": 4, "resolution": SIDE, "bucket_step": 8} | options))


def test_folders_and_animations(tmp_path):
    frame_folder(tmp_path / "a.v1", 12, "walks")
    animation(tmp_path / "b.webp", 12, "runs")
    animation(tmp_path / "c.gif", 12, "jumps")
    data = folder(tmp_path, batch_size=3)
    (batch,) = data.val_dataloader()
    assert batch["videos"].shape == (3, 4, 3, SIDE, SIDE)
    assert batch["captions"] == batch["frame_captions"] == ["walks", "runs", "jumps"]
    assert batch["clip"].tolist() == [0, 1, 2]
    for index in range(3):
        assert shown(data.dataset("val")[index]) == [4, 5, 6, 7], "the middle"


def test_names_count_as_numbers(tmp_path):
    frame_folder(tmp_path / "a", 12)
    assert [file.name for file in frame_files(tmp_path / "a")] == [f"{i}.png" for i in range(12)]
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "still.webp")
    assert find_clips(tmp_path, sorted((tmp_path / "a").iterdir())) == [tmp_path / "a"], "a still WebP is a frame"
    for name in ("²3", "3"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    assert [file.stem for file in frame_files(tmp_path)] == ["3", "²3"], "a raised 2 is no number"


def test_random_start_stride_and_resume(tmp_path):
    frame_folder(tmp_path / "a", 12, "walks")
    data = folder(tmp_path, stride=2, repeats=40)
    starts = [shown(sample)[0] for batch in data.train_dataloader() for sample in [{"video": batch["videos"][0]}]]
    assert set(starts) == set(range(6)), "every start, and no more: 12 − 6 of them"
    sample = data.dataset("val")[0]
    assert np.diff(shown(sample)).tolist() == [2, 2, 2]
    again = [
        shown({"video": batch["videos"][0]})[0] for batch in folder(tmp_path, stride=2, repeats=40).train_dataloader()
    ]
    assert starts == again


def test_rate(tmp_path):
    animation(tmp_path / "b.webp", 12, "runs")  # ten frames a second
    assert look(tmp_path / "b.webp").rate == 10
    assert np.diff(shown(folder(tmp_path, fps=4).dataset("val")[0])).tolist() == [2, 3, 3]
    with pytest.raises(BadClip, match="b.webp' has 10 frames per second, fewer than data.fps 20"):
        folder(tmp_path, fps=20).setup("fit")
    frame_folder(tmp_path / "a", 12, "walks")
    with pytest.raises(BadClip, match="a' states no frame rate; set data.stride"):
        folder(tmp_path, fps=4).setup("fit")


def test_all_that_is_wrong_in_one_error(tmp_path):
    frame_folder(tmp_path / "good", 8, "walks")
    frame_folder(tmp_path / "short", 3, "walks")
    frame_folder(tmp_path / "uneven", 8, "walks")
    Image.new("RGB", (8, 8)).save(tmp_path / "uneven" / "7.png")
    animation(tmp_path / "cut.gif", 8, "walks")
    whole = (tmp_path / "cut.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[:20])
    frame_folder(tmp_path / "broken", 8, "walks")
    (tmp_path / "broken" / "2.png").write_bytes(b"nothing")
    with pytest.raises(BadClip) as error:
        folder(tmp_path).setup("fit")
    said = str(error.value)
    assert "short' has 3 frame(s); data.frames 4 needs 4" in said
    assert "frame '7.png' has 8 × 8 pixels, the first 16 × 16" in said
    assert "cannot read clip" in said
    assert "cut.gif" in said
    assert "2.png" in said
    assert "good" not in said


def test_captions(tmp_path):
    frame_folder(tmp_path / "10_sks dance" / "a", 4)
    animation(tmp_path / "10_sks dance" / "b.webp", 4, "own words")
    data = folder(tmp_path)
    clips = data.clips("train")
    assert len(clips) == 20
    assert {clip.caption for clip in clips} == {"sks dance", "own words"}
    assert len(data.clips("val")) == 2
    (tmp_path / "10_sks dance" / "b.txt").unlink()
    assert {clip.caption for clip in folder(tmp_path, instance_prompt="a dance").clips("train")} == {"a dance"}


def test_metadata_and_missing_captions(tmp_path):
    frame_folder(tmp_path / "a", 4)
    animation(tmp_path / "b.webp", 4)
    with pytest.raises(BadCaption, match="has 2 clip"):
        folder(tmp_path).setup("fit")
    rows = [{"file_name": "a", "text": "walks"}, {"file_name": "b.webp", "text": "runs"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [clip.caption for clip in folder(tmp_path).clips("val")] == ["walks", "runs"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(BadCaption, match="clip '.*b.webp' is not in 'metadata.jsonl'"):
        folder(tmp_path).setup("fit")


def test_buckets_flips_and_validation(tmp_path):
    frame_folder(tmp_path / "a", 4, "walks", size=(32, 16))
    frame_folder(tmp_path / "b", 4, "runs", size=(16, 32))
    data = folder(tmp_path, batch_size=2)
    shapes = {tuple(batch["videos"].shape[-2:]) for batch in data.val_dataloader()}
    assert shapes == {(8, 24), (24, 8)}
    held = folder(tmp_path, val_size=1)
    assert {clip.name for clip in held.clips("train")} != {clip.name for clip in held.clips("val")}
    assert len(held.clips("train")) == len(held.clips("val")) == 1
    half = Image.new("RGB", (16, 16))
    half.paste("white", (0, 0, 8, 16))
    for file in frame_files(tmp_path / "a"):
        half.save(file)
    data = folder(tmp_path, flip=True)
    sides = set()
    for seed in range(12):
        torch.manual_seed(seed)
        video = data.dataset("train")[0]["video"]
        assert (video == video[:1]).all(), "all frames of a clip alike"
        sides.add(video[0, 0, 0, 0].item() > 0)
    assert sides == {True, False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "data.stride: 0 must be at least 1"),
        ({"fps": 8, "stride": 2}, "data.fps: 8 must be positive, and takes the place of data.stride: 2"),
        ({"val_size": 5}, "data.val_size: 5, but '.*' has 1 clips"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    frame_folder(tmp_path / "a", 4, "walks")
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options).clips("val")


def test_no_clips(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root: no clips in"):
        folder(tmp_path).setup("fit")


@pytest.mark.parametrize("prompt", [None, "a dance"])
def test_frames_directly_in_the_root_are_refused(tmp_path, prompt):
    frame_folder(tmp_path / "clip", 4)
    with pytest.raises(
        BadClip, match="data.root: frames lie directly in '.*clip'; put them into a folder of their own"
    ):
        folder(tmp_path / "clip", instance_prompt=prompt).setup("fit")


def test_pictures_beside_clips_are_left_out(tmp_path):
    (tmp_path / "10_sks dance").mkdir()
    animation(tmp_path / "10_sks dance" / "b.webp", 4)
    Image.new("RGB", (99, 99)).save(tmp_path / "10_sks dance" / "b.jpg")
    frame_folder(tmp_path / "a", 4, "walks")
    Image.new("RGB", (99, 99)).save(tmp_path / "cover.png")
    with pytest.warns(UserWarning, match=r"2 picture\(s\) beside clips are left out, such as '.*b\.jpg'"):
        clips = folder(tmp_path).clips("val")
    assert [(clip.source.path.name, clip.caption) for clip in clips] == [("b.webp", "sks dance"), ("a", "walks")]
    (tmp_path / "a.txt").unlink()
    with pytest.warns(UserWarning, match="beside clips"):
        assert len(folder(tmp_path, instance_prompt="a dance").clips("val")) == 2


def test_a_folder_without_frames_is_no_clip(tmp_path):
    with pytest.raises(BadClip, match="holds no frames"):
        look(tmp_path)


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((0, 1, -1, 0), (slice(16), slice(-16, None))),  # QuickTime's for a telephone held upright: clockwise
        ((0, -1, 1, 0), (slice(-16, None), slice(16))),
        ((-1, 0, 0, -1), (slice(-16, None), slice(-16, None))),
        ((1, 0, 0, 1), (slice(16), slice(16))),
    ],
)
def test_videos_are_turned_as_players_turn_them(tmp_path, matrix, bright):
    av = pytest.importorskip("av")
    stored = Image.new("RGB", (48, 32))
    stored.paste("white", (0, 0, 16, 16))  # bright at the upper left
    a, b, c, d = (round(value * 65536) for value in matrix)  # x' = a x + c y, y' = b x + d y, downwards
    with av.open(str(tmp_path / "d.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        if not hasattr(stream, "set_display_matrix"):
            pytest.skip("this PyAV writes no display matrix")
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for _ in range(4):
            file.mux(stream.encode(av.VideoFrame.from_image(stored)))
        file.mux(stream.encode())
    source = look(tmp_path / "d.mp4")
    (picture,) = source.read([2])
    assert picture.size == source.size == ((48, 32) if a else (32, 48))
    pixels = np.asarray(picture.convert("L"))
    assert pixels[bright].mean() > 200
    assert pixels.mean() < 60


def test_videos(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "d.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for image in frames_of(12, (32, 32)):
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode())
    (tmp_path / "d.txt").write_text("walks")
    assert look(tmp_path / "d.mp4").rate == 25
    assert shown(folder(tmp_path).dataset("val")[0]) == [4, 5, 6, 7]
    whole = (tmp_path / "d.mp4").read_bytes()
    (tmp_path / "d.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadClip, match="cannot read clip '.*d.mp4'"):
        folder(tmp_path).setup("fit")


def test_videos_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "d.mp4").write_bytes(b"")
    (tmp_path / "d.txt").write_text("walks")
    with pytest.raises(ImportError, match=r"pip install 'visadapt\[video\]'"):
        folder(tmp_path).setup("fit")

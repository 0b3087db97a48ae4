"""Handlers of the segmentation app, without a server."""

import json

import numpy as np
import pytest
from PIL import Image

from apps import _masks, segment
from visadapt.cli.errors import UserError
from visadapt.data.sheets import open_windows
from visadapt.report.tiled import predict_sheet

pytest.importorskip("segment_anything")


@pytest.fixture(scope="module")
def model():
    return _masks.Clicked()


@pytest.fixture(scope="module")
def automatic(railway_run):
    return _masks.Automatic(railway_run)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    return _masks.examples(tmp_path_factory.mktemp("sheets"), 160)[0]


def blob(path, size=(96, 96)):
    """A bright square on black, from 24 to 56 of 96."""
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[24:56, 24:56] = (220, 180, 40)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def test_clicks_gather_and_a_third_corner_begins_a_new_box(tmp_path):
    state = segment.opened(str(blob(tmp_path / "a.png")))
    state = segment.clicked(state, 5, 6, "object")
    state = segment.clicked(state, 7, 8, "background")
    assert state["points"] == [(5, 6, 1), (7, 8, 0)]
    for corner in [(50, 9), (10, 40)]:
        state = segment.clicked(state, *corner, "box")
    assert _masks.box_of(state["corners"]) == (10, 9, 50, 40)
    assert segment.clicked(state, 1, 2, "box")["corners"] == [(1, 2)]
    assert np.asarray(segment.drawn(state)).shape == (96, 96, 3)
    with pytest.raises(UserError, match="no picture yet"):
        segment.clicked(None, 1, 2, "box")


def test_a_click_on_an_object_cuts_it_out_and_leaves_files(model, tmp_path):
    state = segment.clicked(segment.opened(str(blob(tmp_path / "a.png"))), 40, 40, "object")
    found = segment.cut_out(model, state, tmp_path)
    truth = np.zeros((96, 96), bool)
    truth[24:56, 24:56] = True
    both = (found.labels > 0) & truth
    assert both.sum() / ((found.labels > 0) | truth).sum() > 0.5
    mask = np.asarray(Image.open(tmp_path / "a_mask.png"))
    assert np.array_equal(mask, found.labels)
    assert found.share == pytest.approx((mask > 0).mean())
    if len(found.files) == 2:  # rasterio is there
        features = json.loads((tmp_path / "a.geojson").read_text())["features"]
        assert sum(f["properties"]["area_pixels"] for f in features) == (mask > 0).sum()
    assert (found.blended(0.0) == found.picture).all()
    assert not (found.blended(0.8) == found.picture).all()


def test_a_box_does_too_and_nothing_is_refused(model, tmp_path):
    state = segment.opened(str(blob(tmp_path / "a.png")))
    with pytest.raises(UserError, match="there is no click yet"):
        segment.cut_out(model, state, tmp_path)
    state["corners"] = [(22, 22), (58, 58)]
    labels = segment.cut_out(model, state, tmp_path).labels
    assert labels[26:54, 26:54].mean() > 0.6
    assert labels[:15].mean() < 0.2


def test_the_encoder_runs_once_for_the_clicks_of_a_picture(model, monkeypatch, tmp_path):
    calls = []
    plain = model.predictor.set_image
    monkeypatch.setattr(model.predictor, "set_image", lambda image: (calls.append(1), plain(image)))
    picture = np.array(Image.open(blob(tmp_path / "a.png")))
    picture[0, 0] = 77
    model.mask(picture, [(40, 40, 1)], None)
    model.mask(picture, [(40, 40, 1), (5, 5, 0)], None)
    assert len(calls) == 1


def test_a_large_picture_is_shown_small_and_cut_out_whole(model, monkeypatch, tmp_path):
    monkeypatch.setattr(_masks.smaller, "__defaults__", (64,))
    state = segment.clicked(segment.opened(str(blob(tmp_path / "a.png", (192, 192)))), 25, 25, "object")
    assert state["picture"].shape == (64, 64, 3)
    segment.cut_out(model, state, tmp_path)
    assert Image.open(tmp_path / "a_mask.png").size == (192, 192)


def test_reduced_labels_keep_thin_lines():
    labels = np.zeros((100, 90), np.uint8)
    labels[:, 41] = 1
    picture, small = _masks.smaller(np.zeros((100, 90, 3), np.uint8), labels, 50)
    assert picture.shape == (50, 45, 3)
    assert (small[:, 20] == 1).all()
    assert small.sum() == 50


def test_without_prompts_it_is_what_predict_finds(automatic, sheet, tmp_path):
    steps = []
    found = automatic.find(str(sheet), 1.0, 0.25, tmp_path, lambda done, total: steps.append((done, total)))
    with open_windows(sheet) as windows:
        wanted = predict_sheet(automatic.task, windows, 0.25, progress=False)
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"{sheet.stem}_mask.png")), wanted)
    assert automatic.names == ["background", "railway"]
    assert steps[-1] == (4, 4)
    assert found.picture.shape == (160, 160, 3)


def test_a_map_with_a_place_gives_masks_there(automatic, sheet, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    pixels = np.asarray(Image.open(sheet)).transpose(2, 0, 1)
    path = tmp_path / "map.tif"
    place = {"crs": "EPSG:2056", "transform": from_origin(2_600_000, 1_200_000, 1.25, 1.25)}
    with rasterio.open(path, "w", driver="GTiff", width=160, height=160, count=3, dtype="uint8", **place) as file:
        file.write(pixels)
    (tmp_path / "out").mkdir()
    found = automatic.find(str(path), 1.0, 0.25, tmp_path / "out", lambda done, total: None)
    assert [f.name for f in found.files] == ["map_mask.tif", "map.geojson"]
    with rasterio.open(found.files[0]) as file:
        assert file.crs.to_epsg() == 2056
        assert file.transform == place["transform"]


def test_examples_are_drawn_and_coordinates_checked(sheet):
    assert Image.open(sheet).size == (160, 160)
    assert segment._numbers([[1, 2, 1]], "points") == [(1, 2, 1)]
    assert segment._numbers([], "points") == []
    assert segment._coordinates(None, [1, 2, 3, 4]) == {"points": [], "corners": [(1, 2), (3, 4)]}
    for wrong in ([[1, 2]], [1, 2, 3], [[10**30, 1, 1]], "/etc/passwd", {"x": 1}, 5):
        with pytest.raises(UserError, match="rows of x, y"):
            segment._numbers(wrong, "points")
    for wrong in ([1, 2, 3], [1, 2, 3, 4] * 2, "box", {"x": 1}, 5):
        with pytest.raises(UserError, match="left, top, right and bottom"):
            segment._numbers([wrong], "box")


def test_without_segment_anything_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(UserError, match="needs the package segment-anything") as caught:
        _masks.Clicked()
    assert caught.value.hint == "pip install -e '.[apps,sam]'"

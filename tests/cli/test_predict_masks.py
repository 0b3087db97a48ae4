"""``visadapt predict`` of a segmentation: masks, overlays, polygons and the table of a folder of pictures."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visadapt as va
from tests.tiny_masks import TinyMasks
from visadapt.cli.main import main
from visadapt.data.sheets import open_windows
from visadapt.report.overlay import palette
from visadapt.report.polygons import area, signed_area, write_polygons
from visadapt.report.sheet_files import Overlay, PngMask, TiffMask
from visadapt.report.sheets import outputs
from visadapt.report.tiled import predict_sheet

from .conftest import write

CONFIG = {
    "trainer": {"max_epochs": 15, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    "model": {"class_path": "tests.tiny_masks.TinyMasks"},
    "data": {"class_path": "tests.tiny_masks.SquareData", "init_args": {"classes": 3}},
}


@pytest.fixture(scope="module")
def masks_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        import yaml

        assert main(["fit", "--config", write(folder / "squares.yaml", yaml.safe_dump(CONFIG))]) == 0
    finally:
        os.chdir(before)
        sys.argv = argv
    (made,) = (folder / "runs" / "squares").iterdir()
    return made


def drawn(width, height):
    """A picture with one red and one green rectangle, and its truth."""
    pixels = np.random.default_rng(0).integers(60, 120, (height, width, 3)).astype(np.uint8)
    truth = np.zeros((height, width), np.uint8)
    for label, (x, y, w, h) in enumerate([(10, 5, 40, 30), (60, 20, 30, 40)], 1):
        pixels[y : y + h, x : x + w, label - 1] += 90
        truth[y : y + h, x : x + w] = label
    return pixels, truth


def task_of(run):
    task = TinyMasks(3)
    task.configure_model()
    va.remove(task.model)
    va.load(task.model, run / "adapter.safetensors")
    return task.eval()


def predict(run, *args):
    return main(["predict", "--adapter", str(run / "adapter.safetensors"), *args])


def test_a_folder_of_pictures(masks_run, here, capsys):
    pixels, truth = drawn(120, 90)
    (here / "in" / "sub").mkdir(parents=True)
    Image.fromarray(pixels).save(here / "in" / "a.png")
    Image.fromarray(pixels[:, :20]).save(here / "in" / "sub" / "b.png")
    (here / "in" / "broken.png").write_bytes((here / "in" / "a.png").read_bytes()[:200])
    assert predict(masks_run, "--images", "in", "--output", "out") == 0
    said = capsys.readouterr().out
    assert "2 masks, 1 skipped: out/masks.csv" in said
    assert "skipped: cannot read image 'in/broken.png'" in said
    files = sorted(p.relative_to(here / "out").as_posix() for p in (here / "out").rglob("*") if p.is_file())
    assert files == ["a_mask.png", "a_overlay.png", "masks.csv", "sub/b_mask.png", "sub/b_overlay.png"]
    with Image.open(here / "out" / "a_mask.png") as mask:
        assert mask.mode == "P"
        assert np.array_equal(np.array(mask.getpalette()).reshape(-1, 3)[:3], palette(3)[:3])
        labels = np.asarray(mask)
    assert (labels == truth).mean() > 0.95
    with open_windows(here / "in" / "a.png") as sheet:
        assert np.array_equal(labels, predict_sheet(task_of(masks_run), sheet, progress=False))
    rows = list(csv.DictReader((here / "out" / "masks.csv").open()))
    assert list(rows[0]) == [
        "file",
        "mask",
        "width",
        "height",
        *(f"share of {c}" for c in ("background", "red", "green")),
    ]
    assert [row["mask"] for row in rows] == ["a_mask.png", "sub/b_mask.png"]
    assert float(rows[0]["share of red"]) == pytest.approx((labels == 1).mean(), abs=1e-6)


def test_the_checkpoint_gives_the_same_masks_as_the_adapter(masks_run, here):
    Image.fromarray(drawn(100, 70)[0]).save(here / "a.png")
    ckpt = str(masks_run / "checkpoints" / "last.ckpt")
    assert main(["predict", "--ckpt_path", ckpt, "--images", "a.png", "--output", "x", "--no-overlay"]) == 0
    assert predict(masks_run, "--images", "a.png", "--run_dir", "y", "--overlap=0.5") == 0
    assert not (here / "x" / "a_overlay.png").exists()
    with Image.open(here / "x" / "a_mask.png") as x, Image.open(here / "y" / "a_mask.png") as y:
        assert np.mean(np.asarray(x) == np.asarray(y)) > 0.99
    assert predict(masks_run, "--images", "a.png") == 0
    assert (masks_run / "predict" / "a_mask.png").is_file()


def geotiff(path, pixels, crs="EPSG:2056", nodata=None):
    rasterio = pytest.importorskip("rasterio", reason="reads GeoTIFF: pip install 'visadapt[geo]'")
    transform = rasterio.Affine(2.0, 0, 2_600_000, 0, -2.0, 1_200_000)  # two metres a pixel, near Berne
    if crs == "EPSG:4326":
        transform = rasterio.Affine(1e-4, 0, 7.4, 0, -1e-4, 46.9)
    with rasterio.open(path, "w", driver="GTiff", width=pixels.shape[1], height=pixels.shape[0], count=3,
                       dtype="uint8", crs=crs, transform=transform, nodata=nodata) as file:  # fmt: skip
        file.write(pixels.transpose(2, 0, 1))
    return transform


def test_a_geotiff_keeps_its_place(masks_run, here):
    rasterio = pytest.importorskip("rasterio")
    pixels, truth = drawn(120, 90)
    pixels[80:] = 0
    transform = geotiff(here / "map.tif", pixels, nodata=0)
    assert predict(masks_run, "--images", "map.tif", "--output", "out", "--geojson") == 0
    with rasterio.open(here / "out" / "map_mask.tif") as mask:
        assert mask.crs.to_epsg() == 2056
        assert mask.transform == transform
        assert mask.nodata == 255
        assert json.loads(mask.tags()["classes"]) == ["background", "red", "green"]
        labels = mask.read(1)
    assert (labels[:80] == truth[:80]).mean() > 0.95
    assert (labels[80:] == 255).all()
    shapes = json.loads((here / "out" / "map.geojson").read_text())
    assert shapes["source_crs"] == "EPSG:2056"
    largest = max(shapes["features"], key=lambda f: f["properties"]["area_pixels"])
    assert largest["properties"]["area_m2"] == pytest.approx(4 * largest["properties"]["area_pixels"])
    ring = np.array(largest["geometry"]["coordinates"][0])
    assert (np.abs(ring - [7.44, 46.95]) < 0.01).all()  # longitude before latitude
    assert signed_area(ring) > 0  # counterclockwise
    assert sum(f["properties"]["area_pixels"] for f in shapes["features"]) == ((labels > 0) & (labels < 255)).sum()
    share = next(csv.DictReader((here / "out" / "masks.csv").open()))["share of red"]
    assert float(share) == pytest.approx((labels == 1).sum() / (80 * 120), abs=1e-6)


def test_polygons_of_a_picture_are_in_pixels_and_have_holes(tmp_path):
    pytest.importorskip("rasterio")
    labels = np.zeros((20, 30), np.uint8)
    labels[2:12, 4:14] = 1
    labels[5:8, 6:9] = 2
    with PngMask(tmp_path / "m.png", (30, 20), ["nothing", "field", "pond"]) as mask:
        mask.write(0, labels)
    assert write_polygons(tmp_path / "m.png", tmp_path / "m.geojson", ["nothing", "field", "pond"], None) == 2
    shapes = json.loads((tmp_path / "m.geojson").read_text())
    assert "pixels of the picture" in shapes["coordinates"]
    areas = {f["properties"]["class"]: f["properties"]["area_pixels"] for f in shapes["features"]}
    assert areas == {"field": 91, "pond": 9}
    field = next(f for f in shapes["features"] if f["properties"]["class"] == "field")["geometry"]["coordinates"]
    assert len(field) == 2
    assert signed_area(field[0]) > 0 > signed_area(field[1])
    assert np.array(field[0]).min(0).tolist() == [4, 2]


def test_areas_where_the_unit_is_a_degree(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    geotiff(tmp_path / "a.tif", np.zeros((50, 50, 3), np.uint8), "EPSG:4326")
    with (
        open_windows(tmp_path / "a.tif") as sheet,
        TiffMask(tmp_path / "m.tif", (50, 50), "ab", sheet.georeference) as m,
    ):
        m.write(0, np.pad(np.ones((10, 10), np.uint8), ((0, 40), (0, 40))))
        place = sheet.georeference
    write_polygons(tmp_path / "m.tif", tmp_path / "m.geojson", "ab", place)
    (feature,) = json.loads((tmp_path / "m.geojson").read_text())["features"]
    side = 1e-3 * np.pi / 180 * 6_371_000
    wanted = side * side * np.cos(np.radians(46.9))
    assert feature["properties"]["area_m2"] == pytest.approx(wanted, rel=0.01)
    assert rasterio.open(tmp_path / "m.tif").colormap(1)[1][:3] == tuple(palette(2)[1])


def test_a_mask_that_fails_leaves_nothing(tmp_path):
    pytest.importorskip("rasterio")
    for kind in (PngMask, lambda *a: TiffMask(*a, None)):
        with pytest.raises(ZeroDivisionError), kind(tmp_path / "m.x", (4, 4), "ab"):
            _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_overlay_is_the_mean_of_coloured_pixels(tmp_path):
    pixels, truth = drawn(117, 83)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with open_windows(tmp_path / "a.png") as sheet:
        small = Overlay(sheet, 3, most=50)
        for top in (0, 40):
            small.add(top, truth[top : top + 43 if top else 40])
        small.save(tmp_path / "o.png")
    assert small.factor == 3
    with Image.open(tmp_path / "o.png") as shown:
        got = np.asarray(shown).astype(float)
    assert got.shape == (28, 39, 3)
    whole = pixels + 0.65 * (palette(3)[truth].astype(float) - pixels) * (truth > 0)[..., None]
    assert np.abs(got[5, 7] - whole[15:18, 21:24].mean((0, 1))).max() < 1.5
    assert np.abs(got[27, 38] - whole[81:83, 114:117].mean((0, 1))).max() < 1.5


def test_names_of_outputs():
    paths = [Path(p) for p in ("/x/in/a.png", "/x/in/a.jpg", "/x/in/b.c.tif", "/x/in/d/a.png")]
    assert [str(p) for p in outputs(paths)] == ["a_png", "a_jpg", "b.c", "d/a"]
    assert outputs(paths[:1]) == [Path("a")]


def test_areas():
    square = [(0, 0), (4, 0), (4, 4), (0, 4), (0, 0)]
    assert signed_area(square) == 16
    assert area([square, [(1, 1), (1, 2), (2, 2), (2, 1), (1, 1)]]) == 15


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "error at '--images'"),
        (["--images", "nowhere"], "neither an image nor a folder"),
        (["--images", "broken.png"], "none of 1 files could be read; the first: cannot read image 'broken.png'"),
        (["--images", "a.png", "--overlap", "1.5"], "overlap: 1.5, but tiles overlap by 0 to 0.9"),
        (["--images", "a.png", "--scale", "0"], "scale: 0.0, but a sheet is enlarged 0.01 to 100 times"),
    ],
)
def test_mistakes_are_one_message(masks_run, here, capsys, args, text):
    Image.fromarray(drawn(40, 40)[0]).save(here / "a.png")
    (here / "broken.png").write_text("no image")
    assert predict(masks_run, *args, "--output", "out") == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
    assert not (here / "out").exists()


# Peak of this program alone: getrusage would count the process of the tests that it was forked from.
SHEET = """
import sys
import numpy as np, torch
from PIL import Image
torch.set_num_threads(1)
from visadapt.cli.main import main
rng = np.random.default_rng(0)
Image.fromarray(rng.integers(0, 256, (4096, 4096, 3), dtype=np.uint8)).save("sheet.png", compress_level=1)
status = main(["predict", "--config", sys.argv[1], "--images", "sheet.png", "--output", "out"])
print("peak", next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("task", ["AutomaticSegmentation", "SemanticSegmentation"])
def test_a_sheet_of_4096_pixels_within_two_gib(tmp_path, task):
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "class_path": task,
            "init_args": {"backbone": {"class_path": "SAM", "init_args": {"pretrained": False}}},
        },
        "data": {"class_path": "MapTiles", "init_args": {"batch_size": 8}},
    }
    import yaml

    file = write(tmp_path / "c.yaml", yaml.safe_dump(config))
    root = str(Path(__file__).parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", SHEET, file], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "sheet_mask.png") as mask:
        assert mask.size == (4096, 4096)
    with Image.open(tmp_path / "out" / "sheet_overlay.png") as picture:
        assert picture.size == (2048, 2048)
    assert float(done.stdout.split("peak ")[1]) < 2

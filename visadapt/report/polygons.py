"""A mask as GeoJSON (RFC 7946): polygons with class names and areas, in longitude and latitude or in pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visadapt.core.files import replacing
from visadapt.data import geotiff
from visadapt.data.geotiff import Georeference

PIXELS = "pixels of the picture: x to the right, y downwards from its top left corner; it has no reference system"
_AT_ONCE = 1000  # polygons per call of the projection
EQUAL_AREA = "EPSG:6933"  # cylindrical equal-area on WGS 84: areas where degrees have none

Ring = list[tuple[float, float]]


def write_polygons(mask: Path, path: Path, names: Sequence[str], place: Georeference | None) -> int:
    """Write the foreground of a mask as a FeatureCollection and return how many polygons it has.

    Every feature has ``class``, ``area_pixels`` and, where the sheet has a reference system, ``area_m2``.
    With one, coordinates are longitude and latitude on WGS 84, as RFC 7946 wants; without, they are pixels, and
    the member ``coordinates`` of the collection says so. Pixels that touch at corners only are separate polygons.

    Args:
        mask: PNG or TIFF of classes.
        path: File to write.
        names: Names of the classes.
        place: Where the sheet lies, if it is known.

    Raises:
        ImportError: rasterio is not installed; names the extra.
    """
    crs = place.crs if place is not None else None
    head: dict[str, Any] = {"type": "FeatureCollection"}
    head |= {"coordinates": PIXELS} if crs is None else {"source_crs": crs.to_string()}
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "features": [')
        polygons = _polygons(mask)
        while batch := list(islice(polygons, _AT_ONCE)):
            for feature in _features(batch, names, place if crs is not None else None):
                file.write((",\n" if count else "\n") + json.dumps(feature, ensure_ascii=False))
                count += 1
        file.write("\n]}\n")
    return count


def _polygons(mask: Path) -> Iterator[tuple[int, list[Ring]]]:
    """Class and rings, in pixels, of each polygon; a TIFF is read block by block."""
    geotiff.rasterio()
    import rasterio.features  # rasterio is there by now

    if mask.suffix.lower() in geotiff.SUFFIXES:
        with rasterio.open(mask) as file:
            band = rasterio.band(file, 1)
            back = ~file.transform  # rasterio gives the shapes of a file in its coordinates
            for label, rings in _kept(rasterio.features.shapes(band, mask=band)):
                yield label, [[(round(x), round(y)) for x, y in _moved(ring, back)] for ring in rings]
    else:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # we have just written it
        try:
            with Image.open(mask) as picture:
                labels = np.asarray(picture)
        finally:
            Image.MAX_IMAGE_PIXELS = before
        yield from _kept(rasterio.features.shapes(labels, mask=labels))


def _kept(shapes: Any) -> Iterator[tuple[int, list[Ring]]]:
    for shape, label in shapes:
        if int(label) not in (0, 255):
            yield int(label), shape["coordinates"]


def _features(
    batch: list[tuple[int, list[Ring]]], names: Sequence[str], place: Georeference | None
) -> Iterator[dict[str, Any]]:
    shapes = [rings for _, rings in batch]
    metres: list[float] = []
    if place is not None:
        moved = [[_moved(ring, place.transform) for ring in rings] for rings in shapes]
        shapes = _projected(moved, place.crs, "EPSG:4326")
        flat = moved if place.crs.is_projected else _projected(moved, place.crs, EQUAL_AREA)
        unit = place.crs.linear_units_factor[1] if place.crs.is_projected else 1.0
        metres = [unit**2 * area(rings) for rings in flat]
        shapes = [[[(round(x, 8), round(y, 8)) for x, y in ring] for ring in rings] for rings in shapes]
    for i, ((label, pixels), rings) in enumerate(zip(batch, shapes, strict=True)):
        properties: dict[str, Any] = {"class": names[label], "area_pixels": round(area(pixels))}
        if metres:
            properties["area_m2"] = round(metres[i], 2)
        outline = {"type": "Polygon", "coordinates": [_turned(ring, n == 0) for n, ring in enumerate(rings)]}
        yield {"type": "Feature", "properties": properties, "geometry": outline}


def _moved(ring: Ring, transform: Any) -> Ring:
    """A ring through an affine map (written out: its operator for points depends on the version of affine)."""
    a, b, c, d, e, f = transform[:6]
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in ring]


def _projected(shapes: list[list[Ring]], source: Any, target: str) -> list[list[Ring]]:
    from rasterio.warp import transform

    points = [point for rings in shapes for ring in rings for point in ring]
    xs, ys = transform(source, target, *map(list, zip(*points, strict=True)))
    found = iter(zip(xs, ys, strict=True))
    return [[list(islice(found, len(ring))) for ring in rings] for rings in shapes]


def signed_area(ring: Sequence[tuple[float, float]]) -> float:
    """Area of a closed ring, positive where it runs counterclockwise (y upwards)."""
    x, y = np.asarray(ring, dtype=np.float64).T
    x, y = x - x[0], y - y[0]  # coordinates of millions of metres would cost digits
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def area(rings: list[Ring]) -> float:
    """Area of a polygon: its outline less its holes."""
    outline, *holes = (abs(signed_area(ring)) for ring in rings)
    return outline - sum(holes)


def _turned(ring: Ring, outline: bool) -> Ring:
    """The ring counterclockwise where it is the outline, clockwise where it is a hole."""
    return ring if (signed_area(ring) > 0) == outline else ring[::-1]

"""More than 8 bits, floats and channels are read without loss and windowed by a rule; masks are turned with images."""

import contextlib
import hashlib
import io
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypdefect import images
from hypdefect.datasets import DATASETS
from hypdefect.datasets.card import ManifestRow
from hypdefect.datasets.ingest import NO_NORMALS_NOTE, ingest
from hypdefect.datasets.manifest import manifest_digest
from hypdefect.datasets.readers.folder import CARD
from hypdefect.distributed.extract import Extractor
from hypdefect.errors import DataError
from hypdefect.families.plan import image_requests
from hypdefect.images import ALPHA_NOTE, deep_kind, exif_orientation, read_image, read_mask, read_raw
from hypdefect.images.intensity import Intensity, PixelKind, fit_intensity
from tests.tiny_dataset import make_folder_tree

# Pillow's remarks on damaged metadata; the image itself is judged.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

H, W = 24, 33


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def png16(pixels: np.ndarray, alpha: bool = False, exif: int = 0) -> bytes:
    """A 16-bit PNG `[H W C]`, made by hand: no library of the reader's is trusted with it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, samples = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    assert alpha == (samples in (2, 4))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    tags = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, exif, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        + (chunk(b"eXIf", tags) if exif else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def noise(dtype: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


CONTIG = {"photometric": "minisblack", "planarconfig": "contig"}
PLANES = {"photometric": "rgb", "planarconfig": "separate"}
LOSSLESS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "uint16": (noise("uint16", H, W), {}),
    "uint16 big endian": (noise("uint16", H, W), {"byteorder": ">"}),
    "uint16 LZW with a predictor": (noise("uint16", H, W), {"compression": "lzw", "predictor": 2}),
    "uint16 tiles": (noise("uint16", H, W), {"tile": (16, 16), "compression": "zlib"}),
    "uint16 BigTIFF strips": (noise("uint16", H, W), {"bigtiff": True, "rowsperstrip": 7}),
    "uint16 RGB": (noise("uint16", H, W, 3), {"photometric": "rgb", "compression": "packbits"}),
    "uint8 five channels": (noise("uint8", H, W, 5), CONTIG),
    "uint16 five planes": (noise("uint16", 5, H, W), {"photometric": "minisblack", "planarconfig": "separate"}),
    "uint8 RGB planes LZW": (noise("uint8", 3, H, W), PLANES | {"compression": "lzw"}),
    "uint16 RGB planes LZW": (noise("uint16", 3, H, W), PLANES | {"compression": "lzw"}),
    "uint8 three channels without colour": (noise("uint8", H, W, 3), CONTIG),
    "float32": (noise("float32", H, W), {}),
    "float32 deflate with a predictor": (noise("float32", H, W), {"compression": "zlib", "predictor": 3}),
    "float64": (noise("float64", H, W), {}),
    "float16": (noise("float16", H, W), {}),
    "int8": (noise("int8", H, W), {}),
    "int32 zstd": (noise("int32", H, W), {"compression": "zstd"}),
    "uint32": (noise("uint32", H, W), {}),
    "one pixel": (noise("uint16", 1, 1), {}),
}


def channels_last(pixels: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels[:, :, None]
    return np.moveaxis(pixels, 0, 2) if options.get("planarconfig") == "separate" else pixels


@pytest.mark.parametrize("case", LOSSLESS)
def test_tiff_without_loss(case: str) -> None:
    pixels, options = LOSSLESS[case]
    data, expected = tiff(pixels, **options), channels_last(pixels, options)
    raw, note = read_raw(data)
    assert (raw.dtype, note) == (pixels.dtype, "")
    np.testing.assert_array_equal(raw, expected)
    kind = PixelKind(str(raw.dtype), raw.shape[2])
    if kind.plain:
        assert deep_kind(data) is None
        np.testing.assert_array_equal(read_image(data), expected)
    else:
        assert deep_kind(data) == kind
        with pytest.raises(DataError, match=r"upload: .*no intensity window.*jobs/ingest\.py"):
            read_image(data)


def test_png_without_loss() -> None:
    for samples in (1, 2, 3, 4):
        pixels = noise("uint16", H, W, samples)
        data = png16(pixels, alpha=samples in (2, 4))
        colours = 1 if samples < 3 else 3
        raw, note = read_raw(data)
        np.testing.assert_array_equal(raw, pixels[:, :, :colours])
        assert note == ("" if samples == colours else ALPHA_NOTE)
        assert deep_kind(data) == PixelKind("uint16", colours)


def test_alpha_of_a_tiff_is_dropped_and_an_unnamed_channel_is_not() -> None:
    pixels = noise("uint16", H, W, 4)
    raw, note = read_raw(tiff(pixels, photometric="rgb", extrasamples=["unassalpha"]))
    np.testing.assert_array_equal(raw, pixels[:, :, :3])
    assert note == ALPHA_NOTE
    raw, note = read_raw(tiff(pixels, photometric="rgb", extrasamples=["unspecified"]))
    np.testing.assert_array_equal(raw, pixels)
    assert note == ""


def test_white_is_zero_is_inverted() -> None:
    for dtype in ("uint8", "uint16"):
        pixels = noise(dtype, H, W)
        raw, _ = read_raw(tiff(pixels, photometric="miniswhite"))
        np.testing.assert_array_equal(raw[:, :, 0], ~pixels)


@pytest.mark.parametrize(
    ("mode", "note"), [("1", ""), ("L", ""), ("LA", ALPHA_NOTE), ("RGB", ""), ("RGBA", ALPHA_NOTE), ("P", "")]
)
def test_plain_modes(mode: str, note: str) -> None:
    grey = Image.fromarray(noise("uint8", H, W))
    picture = Image.merge("RGB", [grey, grey.rotate(180), grey])
    buffer = io.BytesIO()
    stored = picture.convert(mode)
    if mode.endswith("A"):
        stored.putalpha(grey)
    stored.save(buffer, "PNG")
    raw, found = read_raw(buffer.getvalue())
    assert found == note
    assert raw.shape[2] == (1 if mode in ("1", "L", "LA") else 3)
    expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(read_image(buffer.getvalue()), expected)
    assert mode != "1" or set(np.unique(raw)) == {0, 255}


def test_transparency_of_a_palette_is_dropped_with_a_note() -> None:
    stored = Image.fromarray(noise("uint8", H, W)).convert("P")
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", transparency=bytes(range(256)))
    raw, note = read_raw(buffer.getvalue())
    assert note == ALPHA_NOTE
    np.testing.assert_array_equal(raw, np.asarray(stored.convert("RGB")))


def nan_tiff() -> bytes:
    pixels = noise("float32", H, W)
    pixels[3, 4], pixels[5, 6] = np.nan, np.inf
    return tiff(pixels)


def patched(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a tag."""
    at = data.index(struct.pack("<H", tag), 8)
    return data[: at + 8] + struct.pack("<I", value) + data[at + 12 :]


def sparse(data: bytes) -> bytes:
    return patched(patched(data, 273, 0), 279, 0)


REFUSED: dict[str, tuple[bytes, str]] = {
    "nan": (nan_tiff(), "2 values are NaN or infinite"),
    "pages": (tiff(noise("uint16", 3, H, W), photometric="minisblack"), "2 frames"),
    "an ImageJ stack": (tiff(noise("uint16", 3, H, W), imagej=True), "3 frames"),
    "a volume": (tiff(noise("uint16", 16, 16, 16), photometric="minisblack", volumetric=True), "16 frames"),
    "16-bit CMYK": (tiff(noise("uint16", H, W, 4), photometric="separated"), "SEPARATED"),
    "8-bit CMYK": (tiff(noise("uint8", H, W, 4), photometric="separated"), "CMYK"),
    "complex": (tiff(noise("float32", H, W).astype(np.complex64)), "unsupported pixel type"),
    "white is zero in floats": (tiff(noise("float32", H, W), photometric="miniswhite"), "white is zero"),
    "JPEG 2000": (tiff(noise("uint16", H, W), compression="jpeg2000"), "JPEG2000 is not read"),
    "a huge header": (patched(patched(tiff(noise("uint16", H, W)), 256, 19_000), 257, 19_000), "too large"),
    "a header beyond its data": (patched(tiff(noise("uint16", H, W)), 256, 2_000), "cut short"),
    "rows beyond its data": (patched(tiff(noise("uint16", H, W), rowsperstrip=8), 257, 2_000), "strips are missing"),
    "no data": (sparse(tiff(noise("uint16", H, W))), "strips are missing"),
    "huge tiles": (patched(tiff(noise("uint16", H, W), tile=(16, 16)), 322, 2**31), "too large"),
    "cut short": (tiff(noise("uint16", H, W))[:-50], "strips are missing"),
    "cut before the second page": (tiff(noise("uint16", 3, H, W), photometric="minisblack")[:3000], "2 frames"),
    "png cut short": (png16(noise("uint16", H, W, 1))[:600], "damaged or cut short"),
    "png too large": (png16(np.zeros((1, 20_001, 1), np.uint16)), "too large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(DataError) as caught:
        read_raw(data, name="it.tif")
    message = str(caught.value)
    assert reason in message
    assert message.startswith("it.tif: ")
    assert "magick" in message or "export" in message
    assert "\n" not in message


def test_decoded_bytes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(noise("uint16", H, W, 5), **CONTIG)
    monkeypatch.setattr(images, "MAX_DECODED_BYTES", H * W * 10)
    read_raw(data)
    monkeypatch.setattr(images, "MAX_DECODED_BYTES", H * W * 10 - 1)
    with pytest.raises(DataError, match="too large"):
        read_raw(data)
    monkeypatch.undo()
    monkeypatch.setattr(images, "MAX_SEGMENTS", 3)
    with pytest.raises(DataError, match="4 strips"):
        read_raw(tiff(noise("uint16", H, W), rowsperstrip=6))


@pytest.mark.parametrize(
    "case", ["uint16", "uint16 LZW with a predictor", "uint16 tiles", "float32", "uint8 five channels"]
)
def test_damage_gives_an_image_or_a_data_error(case: str) -> None:
    pixels, options = LOSSLESS[case]
    data = tiff(pixels, **options)
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(0, min(len(data), 400), 3):
            broken[at] = rng.integers(0, 256)
        with contextlib.suppress(DataError):
            assert read_raw(bytes(broken))[0].ndim == 3
    for end in range(0, len(data), 97):
        with pytest.raises(DataError):
            read_raw(data[:end])


# --- the intensity rule

WINDOWS = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=60, deadline=None)
@given(window=WINDOWS, values=st.lists(st.floats(-4e6, 4e6), min_size=2, max_size=20))
def test_intensity_maps_low_to_0_and_high_to_255_and_is_monotone(
    window: tuple[float, float], values: list[float]
) -> None:
    low, high = window
    rule = Intensity((low,), (high,), (0,), "float64", 1)
    raw = np.array([low, high, *sorted(values)]).reshape(1, -1, 1)
    out = rule.apply(raw)
    assert out.shape == (1, raw.size, 3)
    assert (out == out[:, :, :1]).all()
    assert out[0, :2, 0].tolist() == [0, 255]
    assert (np.diff(out[0, 2:, 0].astype(int)) >= 0).all()
    again = Intensity.from_json(rule.to_json())
    assert again == rule
    assert again.to_json() == rule.to_json() != ""


def test_integers_are_windowed_exactly() -> None:
    raw = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256, 1)
    out = Intensity((1000.0,), (1510.0,), (0,), "uint16", 1).apply(raw)[:, :, 0].ravel()
    assert (out[:1001] == 0).all()
    assert (out[1510:] == 255).all()
    assert (np.abs(out[1000:1511] - np.arange(511) / 2) <= 0.5).all()


def test_channels_are_chosen() -> None:
    raw = noise("uint16", H, W, 5)
    rule = fit_intensity([raw], channels=(4, 0, 2))
    out = rule.apply(raw)
    for i, channel in enumerate((4, 0, 2)):
        assert (rule.low[i], rule.high[i]) == tuple(np.percentile(raw[:, :, channel], (0.5, 99.5), method="nearest"))
        assert np.corrcoef(out[:, :, i].ravel(), raw[:, :, channel].ravel())[0, 1] > 0.99
    one = fit_intensity([raw], channels=[3]).apply(raw)
    assert (one == one[:, :, :1]).all()


def test_rgb_shares_one_window() -> None:
    rule = fit_intensity([noise("uint16", H, W, 3) // np.array([1, 2, 4], np.uint16)])
    assert len(set(rule.low)) == len(set(rule.high)) == 1


def test_a_window_of_many_large_images_is_that_of_all() -> None:
    arrays = [np.full((400, 400, 1), level, np.uint16) for level in range(100, 300)]
    rule = fit_intensity(iter(arrays), lower=10.0, upper=90.0)
    assert abs(rule.low[0] - 119) <= 1
    assert abs(rule.high[0] - 279) <= 1
    assert rule == fit_intensity(arrays, lower=10.0, upper=90.0)


@pytest.mark.parametrize(
    ("arrays", "channels", "message"),
    [
        ([], None, "no image to fit"),
        ([np.full((4, 4, 1), 7, np.uint16)], None, "window from 7 to 7 is empty.*constant or saturated"),
        ([noise("uint16", 4, 4, 5)], None, "5 channels: name 1 or 3 of them"),
        ([noise("uint16", 4, 4, 5)], (0, 5, 1), "the images have 5"),
        ([noise("uint16", 4, 4, 5)], (0, 1), "name 1 or 3"),
        ([noise("uint16", 4, 4, 1), noise("float32", 4, 4, 1)], None, "several kinds"),
        ([np.array([[[-1.7e308], [1.7e308]]])], None, "infinite"),
    ],
)
def test_windows_that_cannot_be_fitted(
    arrays: list[np.ndarray], channels: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fit_intensity(arrays, channels=channels)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"low":["x"]}', "null"])
def test_other_texts_are_no_intensity(text: str) -> None:
    with pytest.raises(DataError, match="is not an intensity rule"):
        Intensity.from_json(text)


def test_read_image_with_a_rule(tmp_path: Path) -> None:
    pixels = noise("uint16", H, W)
    (tmp_path / "a.tif").write_bytes(tiff(pixels))
    rule = fit_intensity([read_raw(tmp_path / "a.tif")[0]])
    image = read_image(tmp_path / "a.tif", intensity=rule)
    np.testing.assert_array_equal(image, rule.apply(pixels[:, :, None]))
    with pytest.raises(DataError, match=r"b: more than 8 bits .* the intensity rule is for .*export the images alike"):
        read_image(tiff(pixels.astype(np.int32)), name="b", intensity=rule)
    plain = io.BytesIO()
    Image.fromarray(noise("uint8", H, W)).save(plain, "PNG")
    np.testing.assert_array_equal(read_image(plain.getvalue(), intensity=rule)[:, :, 0], noise("uint8", H, W))


# --- orientation of images and masks

STORED = {  # how the stored pixels lie for a viewer who then turns them back
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: np.rot90,
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: lambda x: np.rot90(x, -1),
}


def upright(height: int, width: int) -> np.ndarray:
    picture = np.zeros((height, width), np.uint8)
    picture[4:20, 6:14] = 255
    return picture


def with_exif(pixels: np.ndarray, format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("width", [40, 64], ids=["square", "oblong"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_mask_lands_on_the_object(orientation: int, width: int) -> None:
    picture = upright(40, width)
    stored = STORED[orientation](picture)
    for image in (
        with_exif(stored, "JPEG", orientation),
        tiff(stored.astype(np.uint16) * 257, extratags=[(274, "H", 1, orientation, True)]),
        png16((stored.astype(np.uint16) * 257)[:, :, None], exif=orientation),
    ):
        assert exif_orientation(image) == orientation
        rule = Intensity((0.0,), (65535.0,), (0,), "uint16", 1)
        shown = read_image(image, intensity=rule)[:, :, 0]
        assert np.abs(shown.astype(int) - picture).max() < 32
        mask, note = read_mask(with_exif(stored, "PNG", 0), shown.shape, orientation=exif_orientation(image))
        np.testing.assert_array_equal(mask, picture > 0)
        assert note == ("" if orientation == 1 else f"turned like its image (EXIF orientation {orientation})")
        # a mask with a tag of its own follows that one
        for own in (1, orientation):
            mask, note = read_mask(with_exif(STORED[own](picture), "PNG", own), shown.shape, orientation=orientation)
            np.testing.assert_array_equal(mask, picture > 0)
            assert note == ""


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_upright_size_is_upright(orientation: int) -> None:
    mask, note = read_mask(with_exif(upright(40, 64), "PNG", 0), (40, 64), orientation=orientation)
    np.testing.assert_array_equal(mask, upright(40, 64) > 0)
    assert note == ""
    with pytest.raises(DataError, match="the mask is 30 x 40 pixels, its image 64 x 40"):
        read_mask(with_exif(upright(40, 30), "PNG", 0), (40, 64), orientation=orientation)


def test_an_image_without_a_usable_tag() -> None:
    assert exif_orientation(with_exif(upright(40, 64), "PNG", 0)) == 0
    assert exif_orientation(with_exif(upright(40, 64), "PNG", 9)) == 0


# --- ingestion


def deep_tree(root: Path, **levels: int) -> Path:
    """`<class>/<i>.png` of 16 bits: noise below 4096 and a spot of the given level in the classes named."""
    rng = np.random.default_rng(0)
    for kind, level in levels.items():
        (root / kind).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(1000, 4096, (H, W, 1), dtype=np.uint16)
            pixels[4:10, 6:12] = level
            (root / kind / f"{i}.png").write_bytes(png16(pixels))
    return root


def windows(root: Path, **options: Any) -> set[str]:
    return set(ingest("folder", root, **options).manifest["intensity"].to_pylist())


def test_the_window_is_fitted_on_the_normal_images_alone(tmp_path: Path) -> None:
    result = ingest("folder", deep_tree(tmp_path / "a" / "set", good=2000, dent=60_000, hole=0))
    rows = result.manifest.to_pylist()
    (text,) = {row["intensity"] for row in rows}
    rule = Intensity.from_json(text)
    assert 1000 <= rule.low[0] < 1100 < 4000 < rule.high[0] < 4096
    assert len({row["image_id"] for row in rows}) == len(rows) == 12
    assert not {row["image_id"] for row in rows} & {row["file_id"] for row in rows}
    assert {row["note"] for row in rows} == {""}
    # other defects leave the window as it is; other normals do not
    assert windows(deep_tree(tmp_path / "b" / "set", good=2000, dent=50_000)) == {text}
    assert windows(deep_tree(tmp_path / "c" / "set", good=9000, dent=60_000)) != {text}
    (tmp_path / "d").mkdir()
    moved = Path(shutil.copytree(tmp_path / "a" / "set", tmp_path / "d" / "set"))
    assert manifest_digest(ingest("folder", moved, threads=1).manifest) == manifest_digest(result.manifest)


def test_requests_carry_what_reading_needs(tmp_path: Path) -> None:
    manifest = ingest("folder", deep_tree(tmp_path / "set", good=2000, dent=60_000)).manifest
    requests = image_requests(manifest, dict.fromkeys(manifest["image_id"].to_pylist(), 0), uses_mask=False)
    assert len(requests) == 8
    for request in requests:
        data = Path(request.uri).read_bytes()
        assert hashlib.sha256(data).hexdigest() == request.file_id
        expected = read_image(data, intensity=Intensity.from_json(request.intensity))
        assert expected.max() == 255
        image, mask = Extractor.read(object.__new__(Extractor), request)
        np.testing.assert_array_equal(image, expected)
        assert mask is None


def test_without_normal_images_the_note_says_so(tmp_path: Path) -> None:
    result = ingest("folder", deep_tree(tmp_path / "set", dent=60_000, hole=0))
    assert set(result.manifest["note"].to_pylist()) == {NO_NORMALS_NOTE}
    assert "" not in result.manifest["intensity"].to_pylist()


def test_plain_images_and_several_kinds_in_one_set(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "set", classes=1, per_class=2)
    (root / "dent" / "masks" / "deep.png").write_bytes(with_exif(upright(80, 96), "PNG", 0))
    for shift, name in enumerate(("good", "dent")):
        (root / name / "deep.tif").write_bytes(tiff(noise("float32", 80, 96) + np.float32(shift)))
    Image.fromarray(noise("uint8", 80, 96, 4)).save(root / "good" / "alpha.png")
    (root / "good" / "nan.tif").write_bytes(nan_tiff())
    result = ingest("folder", root)
    rows = {Path(row["uri"]).relative_to(root).as_posix(): row for row in result.manifest.to_pylist()}
    assert {name for name, row in rows.items() if row["intensity"]} == {"good/deep.tif", "dent/deep.tif"}
    assert rows["dent/deep.tif"]["bbox"] == [6, 4, 14, 20]
    assert {name: row["note"] for name, row in rows.items() if row["note"]} == {"good/alpha.png": ALPHA_NOTE}
    (reason,) = result.quarantine["reason"].to_pylist()
    assert "nan.tif: 2 values are NaN" in reason
    for row in rows.values():
        assert row["intensity"] or row["image_id"] == row["file_id"]


def test_channels_are_named_for_ingestion(tmp_path: Path) -> None:
    for shift, name in enumerate(("good", "dent")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tif").write_bytes(tiff(noise("uint16", H, W, 5) // 2 + np.uint16(shift), **CONTIG))
    with pytest.raises(DataError, match=r"a\.tif: 5 channels: name 1 or 3 of them .--channels"):
        ingest("folder", tmp_path)
    (text,) = windows(tmp_path, channels=(3, 0, 1))
    assert Intensity.from_json(text).channels == (3, 0, 1)


def test_a_constant_product_is_quarantined_with_the_reason(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "set", classes=1, per_class=2)
    (root / "good" / "flat.tif").write_bytes(tiff(np.full((H, W), 7, np.uint16)))
    reasons = ingest("folder", root).quarantine["reason"].to_pylist()
    assert len(reasons) == 1
    assert "flat.tif: channel 0: the intensity window from 7 to 7 is empty" in reasons[0]


def test_turned_images_and_their_masks_are_ingested(tmp_path: Path) -> None:
    picture = upright(40, 64)
    for orientation in (1, 3, 6):
        folder = tmp_path / "set" / f"turn{orientation}"
        (folder / "masks").mkdir(parents=True)
        (folder / "a.jpg").write_bytes(with_exif(STORED[orientation](picture), "JPEG", orientation))
        (folder / "masks" / "a.png").write_bytes(with_exif(STORED[orientation](picture), "PNG", 0))
    rows = ingest("folder", tmp_path / "set").manifest.to_pylist()
    assert [row["bbox"] for row in rows] == [[6, 4, 14, 20]] * 3
    assert [row["note"][:6] for row in rows] == ["", "turned", "turned"]


def test_extraction_turns_masks_like_ingestion(tmp_path: Path) -> None:
    stored = STORED[3](upright(40, 64))
    (tmp_path / "dent" / "masks").mkdir(parents=True)
    (tmp_path / "dent" / "a.jpg").write_bytes(with_exif(stored, "JPEG", 3))
    (tmp_path / "dent" / "masks" / "a.png").write_bytes(with_exif(stored, "PNG", 0))
    manifest = ingest("folder", tmp_path).manifest
    (request,) = image_requests(manifest, {manifest["image_id"][0].as_py(): 0}, uses_mask=True)
    _, mask = Extractor.read(object.__new__(Extractor), request)
    np.testing.assert_array_equal(mask, upright(40, 64) > 0)


def test_a_drawn_mask_is_not_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = upright(40, 64)
    path = tmp_path / "a.jpg"
    path.write_bytes(with_exif(STORED[3](picture), "JPEG", 3))
    row = ManifestRow(path=path, product="p", defect="dent", is_defect=True, draw_mask=lambda h, w: picture > 0)
    monkeypatch.setitem(DATASETS, "folder", replace(CARD, scan=lambda root: [row]))
    (record,) = ingest("folder", tmp_path, mask_folder=tmp_path / "masks").manifest.to_pylist()
    assert record["bbox"] == [6, 4, 14, 20]
    mask, note = read_mask(Path(record["mask_uri"]), (40, 64), orientation=exif_orientation(path))
    np.testing.assert_array_equal(mask, picture > 0)
    assert note == ""

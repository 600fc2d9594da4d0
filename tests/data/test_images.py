"""Every kind of bad input, made of real bytes, is refused with the file, the reason and the remedy."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from hypdefect import images
from hypdefect.errors import DataError
from hypdefect.images import EmptyMaskError, read_image, read_mask, region_box

# Pillow's remarks on damaged metadata; the image itself is judged. Its warning of bombs stays an error.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


def png(width: int, height: int, bits: int = 8, colour: int = 0, rows: bytes = b"") -> bytes:
    """A PNG with any header: what Pillow would refuse to write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREY = Image.fromarray(noise())
RGB = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.FLIP_LEFT_RIGHT), GREY])
WIDE = Image.fromarray(noise().astype(np.uint16) * 257)

BAD = {
    "empty": (b"", "0 bytes"),
    "text": (b"this is not an image at all", "not a readable PNG, JPEG, BMP or TIFF"),
    "png cut short": (encode(GREY)[:300], "damaged or cut short"),
    "jpeg cut short": (encode(GREY, "JPEG", quality=95)[:500], "damaged or cut short"),
    "bmp cut short": (encode(GREY, "BMP")[:-200], "damaged or cut short"),
    "tiff cut short": (encode(GREY, "TIFF", compression="tiff_lzw")[:-150], ""),
    "png of garbage": (png(24, 32, rows=b"\x07" * 100), "damaged or cut short"),
    "gif": (encode(GREY, "GIF"), "not a readable"),
    "webp": (encode(RGB, "WEBP"), "not a readable"),
    "16-bit png": (encode(WIDE), "more than 8 bits"),
    "16-bit tiff": (encode(WIDE, "TIFF"), "more than 8 bits"),
    "16-bit rgb png": (png(2, 2, 16, 2, (b"\0" + b"\1\2" * 6) * 2), "more than 8 bits"),
    "32-bit integer": (encode(Image.fromarray(noise().astype(np.int32)), "TIFF"), "more than 8 bits"),
    "float": (encode(Image.fromarray(noise().astype(np.float32)), "TIFF"), "more than 8 bits"),
    "cmyk": (encode(RGB.convert("CMYK"), "JPEG"), "CMYK"),
    "zero size": (png(0, 0), ""),
    "two tiff pages": (encode(GREY, "TIFF", save_all=True, append_images=[GREY]), "2 frames"),
    "animated png": (encode(GREY, save_all=True, append_images=[RGB.convert("L").rotate(90)]), "2 frames"),
    "64 megapixels": (png(8000, 8000), "too large"),
    "25000 pixels wide": (png(25_000, 10), "too large"),
    "bomb that Pillow lets pass with a warning": (png(12_000, 10_000), "too large"),
    "bomb that Pillow refuses": (png(19_000, 19_000), "too large"),
    "21 KB of one bit a pixel that open to 528 MB": (png(13_266, 13_266, 1, rows=bytes(22_008_000)), "too large"),
    "bomb beyond both limits": (png(2**31 - 1, 2**31 - 1), ""),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("from_file", [True, False])
def test_bad_image(case: str, from_file: bool, tmp_path: Path) -> None:
    data, reason = BAD[case]
    path = tmp_path / "it's bad.png"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_image(path if from_file else data)
    message = str(caught.value)
    assert reason in message
    assert (str(path) if from_file else "upload") in message
    assert "magick" in message or "export it again" in message
    assert "\n" not in message


def test_too_large_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bytes(20_001 * 3000)  # 60 MB of zeros in a file of 60 kB
    bomb = png(20_000, 3000, rows=rows)
    assert len(bomb) < 100_000

    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(DataError, match="20000 x 3000"):
        read_image(bomb)
    with pytest.raises(AssertionError, match="decoded"):
        read_image(encode(GREY))
    assert 20_000 < len(BAD["21 KB of one bit a pixel that open to 528 MB"][0]) < 22_000


def test_cut_anywhere_gives_an_image_or_a_data_error() -> None:
    for format in ("PNG", "JPEG", "BMP", "TIFF"):
        data = encode(RGB, format)
        for end in range(0, len(data), 37):
            with contextlib.suppress(DataError):
                assert read_image(data[:end]).shape == (24, 32, 3)


def test_flipped_bytes_give_an_image_or_a_data_error() -> None:
    rng = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "BMP", "TIFF"):
        data = np.frombuffer(encode(RGB, format), dtype=np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(0, min(len(data), 200), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(DataError):
                assert read_image(broken.tobytes()).dtype == np.uint8


def test_missing_and_oversized_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"gone\.png: cannot be read \(No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path)
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    (tmp_path / "big.png").write_bytes(encode(GREY))
    with pytest.raises(DataError, match="files up to"):
        read_image(tmp_path / "big.png")


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_grey_and_rgb_are_read_exactly(format: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode(GREY, format))
    grey = read_image(tmp_path / "x")
    assert grey.dtype == np.uint8
    assert grey.shape == (24, 32, 3)
    assert (grey == noise()[:, :, None]).all()
    assert (read_image(encode(RGB, format)) == np.asarray(RGB)).all()
    grey[0, 0] = 0  # writable: callers may draw on it


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(format: str, orientation: int) -> None:
    upright = np.zeros((40, 64), dtype=np.uint8)
    upright[:16, :16] = 255
    turn = {  # how the stored pixels lie for a viewer who then turns them back
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda x: np.rot90(x, 2).T,
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(turn(upright))), format, exif=exif)
    assert np.abs(read_image(data)[:, :, 0].astype(int) - upright).max() < 16
    assert (read_mask(data, (40, 64))[0] == (upright > 0)).all()


def mask_bytes(*levels: int, mode: str = "L") -> bytes:
    mask = np.zeros((24, 32), dtype=np.uint8)
    for i, level in enumerate(levels):
        mask[4 + i, 6:10] = level
    return encode(Image.fromarray(mask).convert(mode))


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_mask_kinds(mode: str, tmp_path: Path) -> None:
    (tmp_path / "m.png").write_bytes(mask_bytes(255, mode=mode))
    mask, note = read_mask(tmp_path / "m.png", (24, 32))
    assert mask.dtype == bool
    assert mask.sum() == 4
    assert note == ""
    assert region_box(mask) == (6, 4, 10, 5)


def test_mask_threshold_and_fallback() -> None:
    mask, note = read_mask(mask_bytes(127, 128), (24, 32))
    assert region_box(mask) == (6, 5, 10, 6)
    assert note == ""
    mask, note = read_mask(mask_bytes(1, 127), (24, 32))
    assert region_box(mask) == (6, 4, 10, 6)
    assert note == "empty at 127, used > 0"
    assert read_mask(mask_bytes(1, 3), (24, 32), threshold=2)[0].sum() == 4
    with pytest.raises(EmptyMaskError, match=r"upload: the mask is all zero; mark the defect"):
        read_mask(mask_bytes(), (24, 32))


def test_bad_masks(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    path.write_bytes(mask_bytes(255))
    with pytest.raises(DataError, match=r"m\.png: the mask is 32 x 24 pixels, its image 48 x 24; .*magick"):
        read_mask(path, (24, 48))
    with pytest.raises(DataError, match="coloured mask"):
        read_mask(encode(RGB), (24, 32))
    with pytest.raises(DataError, match="alpha channel"):
        read_mask(encode(RGB.convert("RGBA")), (24, 32))
    with pytest.raises(DataError, match="palette"):
        read_mask(encode(GREY.convert("P")), (24, 32))
    with pytest.raises(DataError, match="more than 8 bits"):
        read_mask(encode(WIDE), (24, 32))
    with pytest.raises(DataError, match="cannot be read"):
        read_mask(tmp_path / "none.png", (24, 32))


def test_region_box() -> None:
    mask = np.zeros((10, 20), dtype=bool)
    with pytest.raises(EmptyMaskError):
        region_box(mask)
    mask[3, 5] = mask[7, 2] = True
    assert region_box(mask) == (2, 3, 6, 8)
    assert region_box(~np.zeros((10, 20), dtype=bool)) == (0, 0, 20, 10)

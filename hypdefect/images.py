"""Reading images and masks: one door for ingestion, feature extraction and serving.

What comes in is 8-bit greyscale or RGB, whole, of sane size and in one frame. Everything else is refused with the
reason and the command that repairs it, because a silent conversion (16 to 8 bit, alpha dropped, first frame taken)
changes what the model sees. The header is judged before a pixel is decoded.

Shapes: H W pixels.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from hypdefect.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
MAX_BYTES = 256 * 2**20
MASK_THRESHOLD = 127

_REFUSED_MODES = {
    "1": "a 1-bit image",
    "P": "a palette image",
    "PA": "a palette image",
    "LA": "an image with an alpha channel",
    "La": "an image with an alpha channel",
    "RGBA": "an image with an alpha channel",
    "RGBa": "an image with an alpha channel",
    "RGBX": "a four-channel image",
    "CMYK": "a CMYK image",
}
# What Pillow's readers raise on damaged bytes, beside OSError and its own SyntaxError.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error, zlib.error)


class EmptyMaskError(DataError):
    """A mask without a single marked pixel."""


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: the file is missing, unreadable, empty or larger than `MAX_BYTES`.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                f"{path}: {size / 1e6:.0f} MB; files up to {MAX_BYTES / 1e6:.0f} MB are read; make it smaller"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from error


def read_image(source: Path | bytes, name: str | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """An image as uint8 `[H, W, 3]`, upright (EXIF orientation applied); greyscale is repeated on the three channels.

    Args:
        source: a file, or the bytes of one.
        name: how messages call the image; default the path, or "upload" for bytes.

    Raises:
        DataError: damaged, of another format or pixel type than 8-bit greyscale / RGB in PNG, JPEG, BMP or TIFF, of
            several frames, or too large; the message ends with the remedy.
    """
    data, name = _open(source, name)
    pixels = _decode(data, name, modes=("L", "RGB"))
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def read_mask(
    path: Path | bytes, size_hw: tuple[int, int], threshold: int = MASK_THRESHOLD, name: str | None = None
) -> tuple[Bool[np.ndarray, "H W"], str]:
    """The marked pixels as bool `[H, W]`, and a note on how they were found ("" where nothing needs saying).

    Marked is `> threshold`. A mask that is empty so but not all zero (faint, or drawn in 0 and 1) is read as `> 0`,
    and the note says so.

    Args:
        path: 1-bit, greyscale or RGB (three equal channels) image file, or the bytes of one.
        size_hw: height and width of the image the mask belongs to.

    Raises:
        EmptyMaskError: no pixel is above 0.
        DataError: unreadable, of another pixel type, or not of the image's size.
    """
    data, name = _open(path, name)
    pixels = _decode(data, name, modes=("1", "L", "RGB"), what="mask")
    if pixels.ndim == 3:
        if not (pixels == pixels[:, :, :1]).all():
            raise DataError(f"{name}: a coloured mask; {_remedy(name, '-threshold 0 -colorspace Gray')}")
        pixels = pixels[:, :, 0]
    if pixels.shape != tuple(size_hw):
        (height, width), (h, w) = size_hw, pixels.shape
        raise DataError(
            f"{name}: the mask is {w} x {h} pixels, its image {width} x {height}; "
            f"export it at the image's size: magick {_quote(name)} -filter point -resize '{width}x{height}!' mask.png"
        )
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    marked = pixels > threshold
    if marked.any():
        return marked, ""
    marked = pixels > 0
    if marked.any():
        return marked, f"empty at {threshold}, used > 0"
    raise EmptyMaskError(f"{name}: the mask is all zero; mark the defect, or leave the mask file out")


def region_box(mask: Bool[np.ndarray, "H W"], name: str = "region_box") -> tuple[int, int, int, int]:
    """The smallest box round the marked pixels as `(x0, y0, x1, y1)`, x1 and y1 exclusive."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise EmptyMaskError(f"{name}: the mask has no marked pixel")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _open(source: Path | bytes, name: str | None) -> tuple[bytes, str]:
    if isinstance(source, Path):
        return read_bytes(source), name or str(source)
    return source, name or "upload"


def _decode(data: bytes, name: str, modes: tuple[str, ...], what: str = "image") -> Shaped[np.ndarray, "H W *C"]:
    if not data:
        raise DataError(f"{name}: the file is empty (0 bytes); copy or export it again")
    try:
        with Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
            _judge_header(image, name, modes)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.array(upright)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except UnidentifiedImageError as error:
        reason = f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} {what}, or its header is damaged"
        raise DataError(f"{name}: {reason}; {_remedy(name)}") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: the {what} is damaged or cut short ({reason}); copy or export it again") from error


def _judge_header(image: Image.Image, name: str, modes: tuple[str, ...]) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"{name}: {width} x {height} pixels, there is nothing in it; export it again")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise DataError(f"{name}: {frames} frames in one file; take one of them: {_magick(name, frame='[0]')}")
    if image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", "")):
        raise DataError(f"{name}: more than 8 bits a channel (mode {image.mode}); {_remedy(name)}")
    if image.mode not in modes:
        reason = _REFUSED_MODES.get(image.mode, "of an unsupported pixel type")
        raise DataError(f"{name}: {reason} (mode {image.mode}); {_remedy(name)}")


def _too_large(name: str, reason: str) -> DataError:
    limits = f"at most {MAX_PIXELS / 1e6:.0f} megapixels and {MAX_SIDE} pixels a side are read"
    remedy = _magick(name, f"-resize {MAX_PIXELS}@ -resize '{MAX_SIDE}x{MAX_SIDE}>'")
    return DataError(f"{name}: too large: {reason}; {limits}: cut it into tiles, or {remedy}")


def _remedy(name: str, options: str = "-alpha off -colorspace sRGB") -> str:
    return f"convert to 8-bit greyscale or RGB: {_magick(name, options)}"


def _magick(name: str, options: str = "-alpha off -colorspace sRGB", frame: str = "") -> str:
    return f"magick {_quote(name + frame)} {options} -depth 8 PNG24:out.png"


def _quote(name: str) -> str:
    return "'" + name.replace("'", "'\\''") + "'"

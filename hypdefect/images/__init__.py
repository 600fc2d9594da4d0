"""Reading images and masks: one door for ingestion, feature extraction and serving.

Plain pixels (8-bit, grey or RGB) are read as they are. Deep ones (more than 8 bits, signed, float, other numbers of
channels; PNG and TIFF) are read without loss by `read_raw` and become 8-bit by an `Intensity`: a window per channel,
fixed on the normal images of the product, so that no image is stretched by what it shows itself. Alpha is dropped with
a note, palettes become RGB. What is left (CMYK, several frames, not finite) is refused with the reason and the
command that repairs it. The header is judged before a pixel is decoded.

Images are turned upright by their EXIF orientation. A mask follows a tag of its own; one without lies in the image's
stored pixel grid and is turned like the image, unless its size says that it is upright already.

Shapes: H W pixels, C channels.
"""

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from hypdefect.errors import DataError
from hypdefect.images.intensity import Intensity, PixelKind

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
MAX_BYTES = 256 * 2**20
MAX_DECODED_BYTES = 400_000_000
MAX_SEGMENTS = 2**18  # strips or tiles of a TIFF
MASK_THRESHOLD = 127
ALPHA_NOTE = "alpha channel dropped"

_ORIENTATION = 0x0112
_HEAD = 32  # bytes that tell deep PNG and TIFF files
_READ_AS = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "PA": "RGB"}
_MASK_MODES = ("1", "L", "RGB")
_REFUSED_MODES = {
    "P": "a palette image",
    "PA": "a palette image",
    "LA": "an image with an alpha channel",
    "La": "an image with an alpha channel",
    "RGBA": "an image with an alpha channel",
    "RGBa": "an image with an alpha channel",
    "CMYK": "a CMYK image",
}
_PNG_CHANNELS = {0: 1, 2: 3, 4: 1, 6: 3}  # colour type -> channels without alpha
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_CODECS = {
    tifffile.COMPRESSION.NONE,
    tifffile.COMPRESSION.LZW,
    tifffile.COMPRESSION.ADOBE_DEFLATE,
    tifffile.COMPRESSION.DEFLATE,
    tifffile.COMPRESSION.PACKBITS,
    tifffile.COMPRESSION.ZSTD,
}
_TIFF_COLOURS = {tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.RGB}
# What the readers raise on damaged bytes, beside OSError and Pillow's own SyntaxError; RuntimeError is imagecodecs'.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    tifffile.TiffFileError,
)


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


def read_unchanged(path: Path, sha256: str) -> bytes:
    """The bytes of a file that a manifest names, checked against its hash.

    Raises:
        DataError: as `read_bytes`, or the file is another one now.
    """
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path} changed since its manifest was written; run jobs/ingest.py again")
    return data


def deep_kind(source: Path | bytes, name: str | None = None) -> PixelKind | None:
    """What a file's pixels are where it needs an `Intensity`, by its header; None for plain ones.

    Raises:
        DataError: unreadable, or a TIFF that `read_raw` refuses.
    """
    if isinstance(source, Path):
        try:
            with source.open("rb") as file:
                head = file.read(_HEAD)
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
        if not (_is_deep_png(head) or head.startswith(_TIFF_STARTS)):
            return None  # most files: no need to read them twice
    kind = _raw_kind(*_open(source, name))
    return None if kind is None or kind.plain else kind


def exif_orientation(source: Path | bytes, name: str | None = None) -> int:
    """The EXIF orientation of an image, 1 to 8; 0 where it has none.

    Raises:
        DataError: unreadable.
    """
    data, name = _open(source, name)
    if data.startswith(_TIFF_STARTS):
        with _tiff_page(data, name) as page:
            return _known_orientation(page.tags.valueof(_ORIENTATION))
    with _pillow(data, name, "image") as image:
        return _known_orientation(image.getexif().get(_ORIENTATION))


def read_raw(source: Path | bytes, name: str | None = None) -> tuple[Shaped[np.ndarray, "H W C"], str]:
    """The stored pixels of an image without loss, upright, and a note on what was dropped ("" for nothing).

    uint8, uint16, float32, ... as in the file; a white-is-zero TIFF is inverted. 1-bit becomes 0 and 255, a palette
    RGB; alpha is dropped.

    Raises:
        DataError: damaged, CMYK or of another unsupported type, of several frames, with values that are not finite,
            or too large; the message ends with the remedy.
    """
    data, name = _open(source, name)
    kind = _raw_kind(data, name)
    if kind is None:
        return _decode_plain(data, name)
    return (_decode_deep_png if _is_deep_png(data) else _decode_tiff)(data, name, kind)


def read_image(
    source: Path | bytes, name: str | None = None, intensity: Intensity | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """An image as uint8 `[H, W, 3]`, upright (EXIF orientation applied); greyscale is repeated on the three channels.

    Args:
        source: a file, or the bytes of one.
        name: how messages call the image; default the path, or "upload" for bytes.
        intensity: the rule for deep pixels; plain ones are read as they are with or without it.

    Raises:
        DataError: what `read_raw` refuses; deep pixels without a rule, or of another kind than the rule's.
    """
    data, name = _open(source, name)
    if intensity is None and (kind := deep_kind(data, name)):
        raise _without_window(name, kind)  # nothing decoded yet
    raw, _ = read_raw(data, name)
    return to_rgb(raw, intensity, name)


def to_rgb(
    raw: Shaped[np.ndarray, "H W C"], intensity: Intensity | None, name: str = "image"
) -> UInt8[np.ndarray, "H W 3"]:
    """What `read_raw` gave as 8-bit RGB.

    Raises:
        DataError: deep pixels without a rule, or of another kind than the rule's.
    """
    kind = PixelKind(str(raw.dtype), raw.shape[2])
    if kind.plain:
        return np.repeat(raw, 3, axis=2) if raw.shape[2] == 1 else raw
    if intensity is None:
        raise _without_window(name, kind)
    return intensity.apply(raw, name)


def read_mask(
    path: Path | bytes,
    size_hw: tuple[int, int],
    threshold: int = MASK_THRESHOLD,
    name: str | None = None,
    orientation: int = 0,
) -> tuple[Bool[np.ndarray, "H W"], str]:
    """The marked pixels as bool `[H, W]`, and a note on how they were found ("" where nothing needs saying).

    Marked is `> threshold`. A mask that is empty so but not all zero (faint, or drawn in 0 and 1) is read as `> 0`,
    and the note says so. A mask without an EXIF orientation of its own is turned like its image, and the note says so.

    Args:
        path: 1-bit, greyscale or RGB (three equal channels) image file, or the bytes of one.
        size_hw: height and width of the upright image the mask belongs to.
        orientation: `exif_orientation` of the image; matters for a mask without one that has the stored image's size.

    Raises:
        EmptyMaskError: no pixel is above 0.
        DataError: unreadable, of another pixel type, or not of the image's size.
    """
    data, name = _open(path, name)
    with _pillow(data, name, "mask") as image:
        _judge_header(image, name, _MASK_MODES)
        own = _known_orientation(image.getexif().get(_ORIENTATION))
        image.load()
        pixels = np.array(ImageOps.exif_transpose(image))
    notes = []
    stored_hw = tuple(size_hw)[:: -1 if orientation >= 5 else 1]
    if not own and orientation > 1 and pixels.shape[:2] == stored_hw:
        pixels = _TURNS[orientation](pixels)
        notes.append(f"turned like its image (EXIF orientation {orientation})")
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
    if not marked.any():
        marked = pixels > 0
        notes.append(f"empty at {threshold}, used > 0")
    if not marked.any():
        raise EmptyMaskError(f"{name}: the mask is all zero; mark the defect, or leave the mask file out")
    return marked, "; ".join(notes)


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


# --- decoding --------------------------------------------------------------------------------------------------------

_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # stored -> upright
    0: lambda x: x,
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: np.rot90,
}


def _known_orientation(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 0


def _is_deep_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and data[24:25] == b"\x10"


def _raw_kind(data: bytes, name: str) -> PixelKind | None:
    """The pixels of a file that Pillow does not read without loss; None where it does, or refuses it."""
    if _is_deep_png(data[:_HEAD]):
        channels = _PNG_CHANNELS.get(data[25])
        return None if channels is None else PixelKind("uint16", channels)
    if not data.startswith(_TIFF_STARTS):
        return None
    with _tiff_page(data, name) as page:
        return None if _pillow_reads(page) else _judge_tiff(page, data, name)


def _decode_plain(data: bytes, name: str) -> tuple[UInt8[np.ndarray, "H W C"], str]:
    with _pillow(data, name, "image") as image:
        _judge_header(image, name, tuple(_READ_AS))
        has_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.info.pop("transparency", None)
        pixels = np.array(upright.convert(_READ_AS[image.mode]))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels, ALPHA_NOTE if has_alpha else ""


def _decode_deep_png(data: bytes, name: str, kind: PixelKind) -> tuple[Shaped[np.ndarray, "H W C"], str]:
    with _pillow(data, name, "image") as image:
        _judge_size(*image.size, name)
        _judge_frames(getattr(image, "n_frames", 1), name)
        has_alpha = data[25] in (4, 6) or "transparency" in image.info
        turn = _TURNS[_known_orientation(image.getexif().get(_ORIENTATION))]
        pixels = imagecodecs.png_decode(data)
        pixels = pixels.reshape(*image.size[::-1], -1)[:, :, : kind.channels]
    return np.ascontiguousarray(turn(pixels)), ALPHA_NOTE if has_alpha else ""


def _decode_tiff(data: bytes, name: str, kind: PixelKind) -> tuple[Shaped[np.ndarray, "H W C"], str]:
    with _tiff_page(data, name) as page:
        stored = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # planes, rows, columns, samples of a plane
        pixels = np.moveaxis(stored, 0, 2).reshape(*stored.shape[1:3], -1)
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = ~pixels
        alpha = _alpha_samples(page)
        pixels = np.delete(pixels, alpha, axis=2).astype(kind.dtype, copy=False)
        pixels = np.ascontiguousarray(_TURNS[_known_orientation(page.tags.valueof(_ORIENTATION))](pixels))
    if not np.isfinite(pixels).all():
        bad = int((~np.isfinite(pixels)).sum())
        raise DataError(
            f"{name}: {bad} values are NaN or infinite; replace them by a number of the sensor's range and export the "
            f"image again"
        )
    return pixels, ALPHA_NOTE if alpha else ""


@contextmanager
def _pillow(data: bytes, name: str, what: str) -> Iterator[Image.Image]:
    if not data:
        raise DataError(f"{name}: the file is empty (0 bytes); copy or export it again")
    with _damage_reported(name, what), Image.open(io.BytesIO(data), formats=list(FORMATS)) as image:
        yield image


@contextmanager
def _tiff_page(data: bytes, name: str) -> Iterator[tifffile.TiffPage]:
    with _damage_reported(name, "image"), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        yield page


@contextmanager
def _damage_reported(name: str, what: str) -> Iterator[None]:
    try:
        yield
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


# --- judging the header ----------------------------------------------------------------------------------------------


def _judge_header(image: Image.Image, name: str, modes: tuple[str, ...]) -> None:
    _judge_size(*image.size, name)
    _judge_frames(getattr(image, "n_frames", 1), name)
    if image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", "")):
        raise DataError(f"{name}: more than 8 bits a channel (mode {image.mode}); {_remedy(name)}")
    if image.mode not in modes:
        reason = _REFUSED_MODES.get(image.mode, "of an unsupported pixel type")
        raise DataError(f"{name}: {reason} (mode {image.mode}); {_remedy(name)}")


def _judge_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise DataError(f"{name}: {width} x {height} pixels, there is nothing in it; export it again")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"{width} x {height} pixels")


def _judge_frames(frames: int, name: str) -> None:
    if frames != 1:
        raise DataError(f"{name}: {frames} frames in one file; take one of them: {_magick(name, frame='[0]')}")


def _alpha_samples(page: tifffile.TiffPage) -> list[int]:
    """Positions of the samples that the ExtraSamples tag calls alpha."""
    first = page.samplesperpixel - len(page.extrasamples)
    return [first + i for i, extra in enumerate(page.extrasamples) if extra in (1, 2)]


def _pillow_reads(page: tifffile.TiffPage) -> bool:
    """Whether Pillow reads a TIFF whole (or refuses it): 8-bit, unsigned, one or three colour channels."""
    if np.max(page.bitspersample) > 8 or page.sampleformat != tifffile.SAMPLEFORMAT.UINT:
        return False
    colours = page.samplesperpixel - len(_alpha_samples(page))
    return page.photometric not in _TIFF_COLOURS or colours == (3 if page.photometric == 2 else 1)


def _judge_tiff(page: tifffile.TiffPage, data: bytes, name: str) -> PixelKind:
    """What a TIFF holds, where it is whole and all of it fits."""
    _judge_size(page.imagewidth, page.imagelength, name)
    frames = page.imagedepth * int((page.parent.imagej_metadata or {}).get("images", 1))
    layout = page.parent.tiff
    (tags,) = struct.unpack_from(layout.tagnoformat, data, page.offset)
    (more,) = struct.unpack_from(layout.offsetformat, data, page.offset + layout.tagnosize + tags * layout.tagsize)
    if more:
        frames = max(frames, 2)
    _judge_frames(frames, name)
    if page.photometric not in _TIFF_COLOURS or page.dtype is None or page.dtype.kind not in "uif":
        raise DataError(f"{name}: of an unsupported pixel type ({_tiff_type(page)}); {_remedy(name)}")
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and page.dtype.kind != "u":
        raise DataError(f"{name}: white is zero in signed or float pixels; {_remedy(name)}")
    if page.compression not in _TIFF_CODECS:
        raise DataError(
            f"{name}: {_tiff_type(page)} is not read compressed like this; write it without: "
            f"magick {_quote(name)} -compress none out.tif"
        )
    sample = page.dtype.itemsize * (page.samplesperpixel if page.planarconfig == 1 else 1)
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if max(math.prod(page.shaped) * page.dtype.itemsize, rows * columns * sample) > MAX_DECODED_BYTES:
        raise _too_large(
            name, f"{page.imagewidth} x {page.imagelength} pixels of {page.samplesperpixel} x {page.dtype}"
        )
    segments = -(-page.imagelength // rows) * -(-page.imagewidth // columns)
    segments *= page.samplesperpixel if page.planarconfig == 2 else 1
    if segments > MAX_SEGMENTS:
        raise _too_large(name, f"{segments} strips or tiles")
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(places) != segments or not all(0 < at < at + count <= len(data) for at, count in places):
        raise ValueError("strips are missing")
    return PixelKind(page.dtype.name, page.samplesperpixel - len(_alpha_samples(page)))


def _tiff_type(page: tifffile.TiffPage) -> str:
    names = (getattr(x, "name", x) for x in (page.photometric, page.sampleformat, page.compression))
    return f"TIFF of {page.samplesperpixel} x {page.bitspersample} bits, " + ", ".join(map(str, names))


def _too_large(name: str, reason: str) -> DataError:
    limits = (
        f"at most {MAX_PIXELS / 1e6:.0f} megapixels, {MAX_SIDE} pixels a side and {MAX_DECODED_BYTES / 1e6:.0f} MB "
        f"decoded are read"
    )
    remedy = _magick(name, f"-resize {MAX_PIXELS}@ -resize '{MAX_SIDE}x{MAX_SIDE}>'")
    return DataError(f"{name}: too large: {reason}; {limits}: cut it into tiles, or {remedy}")


def _without_window(name: str, kind: PixelKind) -> DataError:
    return DataError(
        f"{name}: {kind}, and no intensity window to make 8 bits of it: jobs/ingest.py fits one on the normal images "
        f"of a set; or {_remedy(name)}"
    )


def _remedy(name: str, options: str = "-alpha off -colorspace sRGB") -> str:
    return f"convert to 8-bit greyscale or RGB: {_magick(name, options)}"


def _magick(name: str, options: str = "-alpha off -colorspace sRGB", frame: str = "") -> str:
    return f"magick {_quote(name + frame)} {options} -depth 8 PNG24:out.png"


def _quote(name: str) -> str:
    return "'" + name.replace("'", "'\\''") + "'"

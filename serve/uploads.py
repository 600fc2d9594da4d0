"""What a client sends: bodies of bounded size, images that are judged before a pixel is decoded, and refusals."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request

from hypdefect.errors import DataError
from hypdefect.images import FORMATS, exif_orientation, read_mask, read_raw

MiB = 2**20
SIGNATURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "BMP": (b"BM",),
    "TIFF": (b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b"),
}


class Refusal(Exception):
    """A request that is answered with a problem."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def over_the_cap(max_bytes: int) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the request body is larger than {max_bytes // MiB} MiB ({max_bytes} bytes): send a smaller image",
    )


async def read_upload(request: Request, max_bytes: int) -> tuple[bytes, bytes | None]:
    """The image's bytes and the mask's, never more than `max_bytes` of body.

    Raises:
        Refusal: 400 without an image, 413 over the cap, 415 for another kind of body.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise over_the_cap(max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    capped = Request(request.scope, _capped(request.receive, max_bytes))
    if kind == "multipart/form-data":
        return await _read_form(capped)
    body = await capped.body()
    if not body:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the request has no body; {_usage(request)}")
    if kind not in ("", "application/octet-stream") and not kind.startswith("image/"):
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type {kind!r} is not read here; {_usage(request)}")
    return body, None


def _capped(receive: Callable[[], Awaitable[Any]], max_bytes: int) -> Callable[[], Awaitable[Any]]:
    """Count what arrives: Content-Length may be absent."""
    received = 0

    async def counted() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise over_the_cap(max_bytes)
        return message

    return counted


async def _read_form(request: Request) -> tuple[bytes, bytes | None]:
    async with request.form(max_files=4, max_fields=16) as form:
        files: dict[str, bytes] = {}
        for name, part in form.multi_items():
            if name not in ("image", "mask"):
                raise Refusal(
                    HTTPStatus.BAD_REQUEST,
                    f"form field {name[:40]!r} is unknown; known: image, mask; {_usage(request)}",
                )
            if isinstance(part, str):
                raise Refusal(
                    HTTPStatus.BAD_REQUEST,
                    f"form field {name!r} is text, not a file (is the @ missing?); {_usage(request)}",
                )
            if name in files:
                raise Refusal(HTTPStatus.BAD_REQUEST, f"several {name!r} fields; send one image a request")
            files[name] = await part.read()
    if "image" not in files:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the form has no field 'image'; {_usage(request)}")
    return files["image"], files.get("mask")


def decode(upload: bytes, mask_upload: bytes | None) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Pixels as they are in the file, marked region and notes.

    Raises:
        Refusal: 400 empty or damaged, 415 of another format, 422 readable but not usable.
    """
    for name, data in (("image", upload), ("mask", mask_upload)):
        if data is None:
            continue
        if not data:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"the {name} is empty (0 bytes)")
        if not data.startswith(tuple(start for starts in SIGNATURES.values() for start in starts)):
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"the {name} is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}: its first bytes are {data[:8]!r}",
            )
    try:
        raw, dropped = read_raw(upload, name="image")
        notes = [f"image: {dropped}"] if dropped else []
        if mask_upload is None:
            return raw, None, notes
        turned = exif_orientation(upload, name="image")
        mask, note = read_mask(mask_upload, (raw.shape[0], raw.shape[1]), name="mask", orientation=turned)
        return raw, mask, notes + ([f"mask: {note}"] if note else [])
    except DataError as error:
        raise Refusal(_status_of(error), str(error)) from error


def _status_of(error: DataError) -> HTTPStatus:
    """400 where the decoder failed on the bytes, 422 where they are an image that is not read here."""
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    damaged = error.__cause__ is not None and not isinstance(error.__cause__, bombs)
    return HTTPStatus.BAD_REQUEST if damaged else HTTPStatus.UNPROCESSABLE_ENTITY


def _usage(request: Request) -> str:
    url = request.url.replace(query="")
    return (
        f"send a file: curl -F image=@IMAGE.png {url}, and where the model takes a mask also -F mask=@MASK.png; "
        f"or its bytes: curl -H 'Content-Type: image/png' --data-binary @IMAGE.png {url}"
    )

"""HTTP service of one published model, on Ray Serve.

`Ingress` reads and checks uploads and decodes images; `Classifier` holds the model. Nothing is looked up at import or
in `build_app`: each `Classifier` replica resolves `name@alias` once, when it starts, and names its version in every
answer. Every refusal is `application/problem+json` with a remedy; the body cap, image limits and the number of images
held at a time bound what a client can make the service allocate.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

import hypdefect
from hypdefect import config, registry
from hypdefect.backbones import compute_on_one_thread
from hypdefect.errors import DataError
from hypdefect.images import FORMATS, exif_orientation, read_mask, read_raw
from hypdefect.predictor import Prediction, Predictor
from serve.schemas import Classification, Health, ModelInfo, Problem, ServedModel

logger = logging.getLogger("ray.serve")

MiB = 2**20
SIGNATURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "BMP": (b"BM",),
    "TIFF": (b"II\x2a\x00", b"MM\x00\x2a", b"II\x2b\x00", b"MM\x00\x2b"),
}
HELD_IMAGES = 8
"""Decoded images an ingress replica holds at a time: one may take 150 MB."""
BATCH = 4
READY_WITHIN_S = 5.0


class AppArgs(BaseModel):
    """`args` of the application in `serve/config/*.yaml`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    """NAME@ALIAS or NAME@VERSION."""
    home: str | None = None
    """Where `registry/` lies; default `$HYPDEFECT_HOME` as the replica sees it."""
    max_upload_mb: int = Field(default=20, ge=1, le=256)
    """Largest request body, in MiB."""
    max_pending: int = Field(default=64, ge=1)
    """Classifications an ingress replica takes on at a time; more are answered 503."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of the model."""
    num_ingress: int = Field(default=1, ge=1)
    """Copies of the part that decodes."""
    num_cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray sets aside for each copy of the model (it computes on one); 0: shares with the cluster's jobs."""


class Refusal(Exception):
    """A request that is answered with a problem."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


# --- the model -------------------------------------------------------------------------------------------------------


class Classifier:
    """One loaded model, which computes on one thread. A health check waits its turn on it: it sees a stuck model."""

    def __init__(self, reference: str, home: str | None) -> None:
        entry = registry.resolve(Path(home) if home else config.home(), reference)
        self.predictor = Predictor.load(entry)
        which = reference.partition("@")[2]
        alias = which if which in entry.aliases else None
        self.model = ServedModel(name=entry.name, version=entry.version, alias=alias)
        digests = json.loads((entry.path / registry.CHECKSUMS).read_text())
        self.info = _info(self.predictor, self.model, digests)
        self.worker = ThreadPoolExecutor(1, "predict", initializer=compute_on_one_thread)
        self.worker.submit(self.predictor.probe).result()

    async def describe(self) -> ModelInfo:
        return self.info

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.002)
    async def classify(
        self, items: list[tuple[np.ndarray, np.ndarray | None]]
    ) -> list[tuple[Prediction | DataError, ServedModel]]:
        """Each item's prediction, or why it is refused: one bad item of a batch does not fail the others."""
        loop = asyncio.get_running_loop()
        return [(found, self.model) for found in await loop.run_in_executor(self.worker, self._predict, items)]

    def _predict(self, items: list[tuple[np.ndarray, np.ndarray | None]]) -> list[Prediction | DataError]:
        found: list[Prediction | DataError] = []
        for image, mask in items:
            try:  # arrays from Ray's object store are read-only, which torch warns of
                own = None if mask is None else np.require(mask, requirements="W")
                found += self.predictor.predict([(self.predictor.rgb(np.require(image, requirements="W")), own)])
            except DataError as error:
                found.append(error)
        return found

    async def check_health(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.worker, self.predictor.probe)


def _info(predictor: Predictor, model: ServedModel, digests: dict[str, str]) -> ModelInfo:
    card = predictor.card
    return ModelInfo(
        model=model,
        class_names=list(card.class_names),
        method=card.run.name,
        config=config.to_mapping(card.run),
        backbone=card.backbone,
        recipe=config.to_mapping(card.recipe),
        uses_mask=card.uses_mask,
        digests=digests | {"backbone": card.backbone_digest},
        metrics=dict(card.provenance.get("metrics") or {}),
        provenance=card.provenance,
    )


# --- problems --------------------------------------------------------------------------------------------------------

api = FastAPI(title="hypdefect", version=hypdefect.__version__, description=hypdefect.__doc__ or "")


def _request_id(request: Request) -> str:
    """As in the response header: the client's own X-Request-ID, or the one Serve's proxy made."""
    return request.headers.get("x-request-id", "")


def problem(request: Request, refusal: Refusal) -> Response:
    body = Problem(
        title=refusal.status.phrase, status=refusal.status, detail=refusal.detail, request_id=_request_id(request)
    )
    return JSONResponse(body.model_dump(), refusal.status, refusal.headers, "application/problem+json")


@api.exception_handler(Refusal)
async def _refused(request: Request, error: Refusal) -> Response:
    return problem(request, error)


@api.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> Response:
    """What FastAPI itself refuses: unknown routes and methods, malformed forms."""
    status, detail = HTTPStatus(error.status_code), str(error.detail)
    if detail == status.phrase:
        detail = (
            f"{request.method} {request.url.path[:200]}: {detail}; the routes are listed at /docs and /openapi.json"
        )
    return problem(request, Refusal(status, detail, dict(error.headers or {})))


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> Response:
    return problem(request, Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error.errors()[0].get("msg", error))))


@api.exception_handler(BackPressureError)
@api.exception_handler(DeploymentUnavailableError)
@api.exception_handler(ReplicaUnavailableError)
@api.exception_handler(RayActorError)
async def _unavailable(request: Request, error: Exception) -> Response:
    """No retry here: an upload that kills one replica must not be passed on to the next."""
    logger.warning("no model replica for request %r: %s", _request_id(request), error)
    return problem(request, _busy("no model replica is at hand"))


@api.exception_handler(ClientDisconnect)
async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return problem(request, Refusal(HTTPStatus.BAD_REQUEST, "the connection closed before the body was complete"))


@api.exception_handler(Exception)
async def _unexpected(request: Request, error: Exception) -> Response:
    """Details stay in the log (Starlette raises the error again after this answer); the request id finds them."""
    logger.error("request %r failed: %s", _request_id(request), type(error).__name__)
    detail = "an internal error; the service's log has the details under this request_id"
    return problem(request, Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, detail))


def _over_the_cap(max_bytes: int) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the request body is larger than {max_bytes // MiB} MiB ({max_bytes} bytes): send a smaller image",
    )


def _busy(reason: str) -> Refusal:
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}; try again shortly", {"Retry-After": "1"})


# --- uploads ---------------------------------------------------------------------------------------------------------


async def read_upload(request: Request, max_bytes: int) -> tuple[bytes, bytes | None]:
    """The image's bytes and the mask's, never more than `max_bytes` of body.

    Raises:
        Refusal: 400 without an image, 413 over the cap, 415 for another kind of body.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _over_the_cap(max_bytes)
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
            raise _over_the_cap(max_bytes)
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
    url = f"{str(request.base_url).rstrip('/')}/v1/classify"
    return (
        f"send a file: curl -F image=@IMAGE.png {url}, with a mask also -F mask=@MASK.png; "
        f"or its bytes: curl -H 'Content-Type: image/png' --data-binary @IMAGE.png {url}"
    )


# --- the door --------------------------------------------------------------------------------------------------------

_BINARY = {"type": "string", "format": "binary"}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {"type": "object", "required": ["image"], "properties": {"image": _BINARY, "mask": _BINARY}}
        },
        "image/*": {"schema": _BINARY},
    },
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in (
        (400, "No image, or a damaged one"),
        (413, "Body larger than the cap"),
        (415, "Not " + ", ".join(FORMATS)),
        (422, "An image or mask that can be read but not used"),
        (503, "Busy, or no model replica at hand: try again"),
    )
}


# `serve.ingress` pickles app and class here and now: what they use, exception handlers too, is defined above.
@serve.ingress(api)
class Ingress:
    """Routes, limits and decoding."""

    def __init__(self, max_upload_mb: int, max_pending: int, classifier: DeploymentHandle) -> None:
        self.max_bytes, self.max_pending, self.classifier = max_upload_mb * MiB, max_pending, classifier
        self.pending = 0
        self.slots = asyncio.Semaphore(HELD_IMAGES)
        self.decoders = ThreadPoolExecutor(2, "decode")

    @api.post("/v1/classify", responses=_PROBLEMS, openapi_extra={"requestBody": _BODY})
    async def classify(self, request: Request) -> Classification:
        """Class probabilities of one image: multipart field `image` (and `mask`), or an image's bytes as the body."""
        if self.pending >= self.max_pending:
            raise _busy(f"{self.pending} classifications are under way")
        self.pending += 1
        try:
            upload, mask_upload = await read_upload(request, self.max_bytes)
            async with self.slots:
                loop = asyncio.get_running_loop()
                image, mask, notes = await loop.run_in_executor(self.decoders, decode, upload, mask_upload)
                found, model = await self.classifier.classify.remote((image, mask))
        finally:
            self.pending -= 1
        if isinstance(found, DataError):
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(found))
        return Classification(
            label=found.label,
            probability=found.probabilities[found.label],
            probabilities=found.probabilities,
            region=found.region,
            notes=notes,
            model=model,
            request_id=_request_id(request),
        )

    @api.get("/v1/model", responses={503: _PROBLEMS[503]})
    async def model(self) -> ModelInfo:
        """The model that answers: classes, where it comes from, what it scored, digests."""
        return await self._describe()

    @api.get("/v1/health/live")
    @api.get("/livez", include_in_schema=False)
    async def live(self) -> Health:
        """The service takes requests."""
        return Health(status="live")

    @api.get("/v1/health/ready", responses={503: _PROBLEMS[503]})
    @api.get("/readyz", include_in_schema=False)
    async def ready(self) -> Health:
        """A model replica answers."""
        await self._describe()
        return Health(status="ready")

    async def _describe(self) -> ModelInfo:
        try:
            return await asyncio.wait_for(self.classifier.describe.remote(), READY_WITHIN_S)
        except TimeoutError as error:
            raise _busy(f"the model did not answer within {READY_WITHIN_S:.0f} s") from error


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config (`import_path: serve.app:build_app`)."""
    given = AppArgs.model_validate(args)
    classifier = serve.deployment(
        num_replicas=given.num_replicas,
        ray_actor_options={"num_cpus": given.num_cpus},
        max_ongoing_requests=2 * HELD_IMAGES,
        health_check_period_s=10,
        health_check_timeout_s=30,
    )(Classifier)
    ingress = serve.deployment(
        num_replicas=given.num_ingress,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * given.max_pending + 16,  # so that too many are refused in JSON, and probes get through
    )(Ingress)
    return ingress.bind(given.max_upload_mb, given.max_pending, classifier.bind(given.model, given.home))

"""HTTP service of one published model of any family, on Ray Serve.

`Ingress` reads and checks uploads and decodes images; `Model` holds the model. Nothing is looked up at import or
in `build_app`: each `Model` replica resolves `name@alias` once, when it starts and was told no version, and names its
version in every answer. Every refusal is `application/problem+json` with a remedy; the body cap, image limits and the
number of images held at a time bound what a client can make the service allocate.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

import hypdefect
from hypdefect.errors import DataError
from hypdefect.images import FORMATS
from hypdefect.predictor import Detection, Prediction, Segmentation
from serve.models import Failure, Model
from serve.schemas import (
    Classification,
    ClassRegion,
    Detected,
    Health,
    ModelInfo,
    Predicted,
    Problem,
    Region,
    Segmented,
    ServedModel,
)
from serve.uploads import MiB, Refusal, decode, read_upload

logger = logging.getLogger("ray.serve")

HELD_IMAGES = 8
"""Decoded images an ingress replica holds at a time: one may take 150 MB."""
READY_WITHIN_S = 5.0


class AppArgs(BaseModel):
    """`args` of the application in `serve/config/*.yaml`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    """NAME@ALIAS or NAME@VERSION."""
    version: int | None = Field(default=None, ge=1)
    """The version that an alias stood for when it was deployed; default: each `Model` replica looks it up."""
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
        base, asked = str(request.base_url), f"{request.method} {request.url.path[:200]}"
        detail = f"{asked}: {detail}; the routes are listed at {base}docs and {base}openapi.json"
    return problem(request, Refusal(status, detail, dict(error.headers or {})))


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = " parameter ".join(map(str, first["loc"]))
    detail = f"{where}: {first['msg']}; leave it out, or see {request.base_url}docs for what it may be"
    return problem(request, Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, detail))


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


def _busy(reason: str) -> Refusal:
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}; try again shortly", {"Retry-After": "1"})


# --- the door --------------------------------------------------------------------------------------------------------

_BINARY = {"type": "string", "format": "binary"}


def _body(*fields: str) -> dict[str, Any]:
    """The request of an endpoint that reads these files, `image` among them."""
    form = {"type": "object", "required": ["image"], "properties": dict.fromkeys(fields, _BINARY)}
    content = {"multipart/form-data": {"schema": form}, "image/*": {"schema": _BINARY}}
    return {"requestBody": {"required": True, "content": content}}


def _said(text: str) -> dict[str, Any]:
    """A refusal, as /openapi.json describes it."""
    return {"description": text, "content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: _said("No image, or a damaged one"),
    413: _said("Body larger than the cap"),
    415: _said("Not " + ", ".join(FORMATS)),
    422: _said("An image or mask that can be read but not used, or a parameter that is no such value"),
    503: _said("Busy, or no model replica at hand: try again"),
}
_OF_ONE_KIND = _PROBLEMS | {404: _said("The model gives another kind of answer")}


# `serve.ingress` pickles app and class here and now: what they use, exception handlers too, is defined above.
@serve.ingress(api)
class Ingress:
    """Routes, limits and decoding."""

    def __init__(self, max_upload_mb: int, max_pending: int, model: DeploymentHandle) -> None:
        self.max_bytes, self.max_pending, self.served = max_upload_mb * MiB, max_pending, model
        self.pending = 0
        self.slots = asyncio.Semaphore(HELD_IMAGES)
        self.decoders = ThreadPoolExecutor(2, "decode")

    @api.post("/v1/classify", responses=_OF_ONE_KIND, openapi_extra=_body("image", "mask"))
    async def classify(self, request: Request) -> Classification:
        """Class probabilities of one image: multipart field `image` (and `mask`), or an image's bytes as the body."""
        answer, notes, model = await self._answer(request)
        if not isinstance(answer, Prediction):
            raise Refusal(
                HTTPStatus.NOT_FOUND, f"{model.name} gives no class probabilities: ask it at /v1/predict, see /v1/model"
            )
        return Classification(
            label=answer.label,
            probability=answer.probabilities[answer.label],
            probabilities=answer.probabilities,
            region=answer.region,
            notes=notes,
            model=model,
            request_id=_request_id(request),
        )

    @api.post("/v1/detect", responses=_OF_ONE_KIND, openapi_extra=_body("image"))
    async def detect(self, request: Request, map: bool = False) -> Detected:
        """Whether the part on an image is good, and where not; the image comes as for /v1/classify, without a mask."""
        answer, notes, model = await self._answer(request)
        if not isinstance(answer, Detection):
            raise Refusal(HTTPStatus.NOT_FOUND, f"{model.name} is no detector: ask it at /v1/predict, see /v1/model")
        return Detected(
            verdict="anomalous" if answer.anomalous else "good",
            p_value=answer.p_value,
            false_alarms=answer.false_alarms,
            score=answer.score,
            regions=[Region(polygon=region.polygon, area=region.area) for region in answer.regions],
            map_png=answer.map_png if map else None,
            notes=notes,
            model=model,
            request_id=_request_id(request),
        )

    @api.post("/v1/segment", responses=_OF_ONE_KIND, openapi_extra=_body("image"))
    async def segment(self, request: Request, map: bool = False) -> Segmented:
        """Which pixels of an image are which defect; the image comes as for /v1/classify, without a mask."""
        answer, notes, model = await self._answer(request)
        if not isinstance(answer, Segmentation):
            raise Refusal(HTTPStatus.NOT_FOUND, f"{model.name} is no segmenter: ask it at /v1/predict, see /v1/model")
        return Segmented(
            label=answer.label,
            shares=answer.shares,
            regions=[ClassRegion(polygon=r.polygon, area=r.area, label=r.label) for r in answer.regions],
            map_png=answer.map_png if map else None,
            notes=notes,
            model=model,
            request_id=_request_id(request),
        )

    @api.post("/v1/predict", responses=_PROBLEMS, openapi_extra=_body("image", "mask"))
    async def predict(self, request: Request) -> Predicted:
        """What the model's family answers to one image, given as for /v1/classify."""
        answer, notes, model = await self._answer(request)
        return Predicted(answer=asdict(answer), notes=notes, model=model, request_id=_request_id(request))

    async def _answer(self, request: Request) -> tuple[Any, list[str], ServedModel]:
        """The model's answer to an upload, and notes on it."""
        if self.pending >= self.max_pending:
            raise _busy(f"{self.pending} images are being looked at")
        self.pending += 1
        try:
            upload, mask_upload = await read_upload(request, self.max_bytes)
            async with self.slots:
                loop = asyncio.get_running_loop()
                image, mask, notes = await loop.run_in_executor(self.decoders, decode, upload, mask_upload)
                answer, model = await self.served.predict.remote((image, mask))
        finally:
            self.pending -= 1
        if isinstance(answer, DataError):
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(answer))
        if isinstance(answer, Failure):
            raise answer
        return answer, notes, model

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
            return await asyncio.wait_for(self.served.describe.remote(), READY_WITHIN_S)
        except TimeoutError as error:
            raise _busy(f"the model did not answer within {READY_WITHIN_S:.0f} s") from error


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config (`import_path: serve.app:build_app`)."""
    given = AppArgs.model_validate(args)
    model = serve.deployment(
        num_replicas=given.num_replicas,
        ray_actor_options={"num_cpus": given.num_cpus},
        max_ongoing_requests=2 * HELD_IMAGES,
        health_check_period_s=10,
        health_check_timeout_s=30,
    )(Model)
    ingress = serve.deployment(
        num_replicas=given.num_ingress,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * given.max_pending + 16,  # so that too many are refused in JSON, and probes get through
    )(Ingress)
    return ingress.bind(given.max_upload_mb, given.max_pending, model.bind(given.model, given.home, given.version))

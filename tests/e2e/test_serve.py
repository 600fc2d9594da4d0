"""The service as a client meets it: real HTTP, every refusal a problem with a remedy, and Predictor's own numbers."""

import io
import json
import re
import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hypdefect import registry
from hypdefect.errors import DataError, NumericsError
from hypdefect.evaluation import RunConfig
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import RecipeConfig, dims_of
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.images import FORMATS
from hypdefect.predictor import Predictor, save_model
from tests.tiny_dataset import draw

pytestmark = [pytest.mark.e2e, pytest.mark.ray]
PROJECT = Path(__file__).resolve().parents[2]
CLASSES = ("dent", "scratch", "stain")
CAP = 2**20


def save(folder: Path) -> None:
    spec = get_backbone("tiny_random")
    run = RunConfig(name="prototype", method={})
    recipe = RecipeConfig(whole_size=64, window=48, crop_size=64)
    block_dims, shape_dims = dims_of(spec, recipe)
    transform = FeatureTransform.fit(None, block_dims, TransformConfig(), shape_dims)
    classifier = run.model(transform.dim)
    prototypes = torch.randn(3, 2 * transform.dim, generator=torch.Generator().manual_seed(0))
    classifier.restore({"prototypes": prototypes})
    save_model(
        folder,
        run_config=run,
        model=classifier,
        class_names=CLASSES,
        transform=transform,
        backbone=spec.name,
        recipe=recipe,
        uses_mask=True,
        provenance={"dataset": "drawn", "metrics": {"acc": 0.5}},
    )


class Failing:
    """A predictor to which dark images are damaged and bright ones a bug."""

    def rgb(self, raw: np.ndarray) -> np.ndarray:
        return raw

    def predict(self, images: list[tuple[np.ndarray, np.ndarray | None]]) -> list[str]:
        [(image, _)] = images
        if image.max() == 0:
            raise DataError("dark")
        if image.min() == 255:
            raise NumericsError("secret path /srv/models")
        return ["fine"]


class Broken:
    """In place of the model: fails as a bug would, in the answer to a mask of its own or altogether."""

    async def predict(self, item: tuple[np.ndarray, np.ndarray | None]) -> tuple[Exception, None]:
        from serve.models import Failure

        if item[1] is not None:
            return Failure("secret path /srv/models"), None
        raise RuntimeError("secret path /srv/models")

    async def describe(self) -> None:
        raise RuntimeError("secret path /srv/models")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("registry")
    registry.publish(path, "drawn", save)
    registry.publish(path, "drawn", save, "champion")
    return path


@pytest.fixture(scope="module")
def client(ray_local: Any, home: Path) -> Iterator[httpx.Client]:
    from ray import serve

    from serve import app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"model": "drawn@champion", "home": str(home), "max_upload_mb": 1, "num_cpus": 0.1}
    serve.run(app.build_app(args), name="hypdefect", route_prefix="/")
    broken = serve.deployment(app.Ingress).bind(1, 4, serve.deployment(Broken).bind())
    serve.run(broken, name="broken", route_prefix="/broken")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
        yield http
    serve.shutdown()


@pytest.fixture(scope="module")
def local(home: Path) -> Predictor:
    return Predictor.load(registry.resolve(home, "drawn@champion"))


def picture(kind: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return draw(kind, tile=7, exposure=0, defect=True)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


PIXELS, MASK = picture()
PNG, MASK_PNG = encoded(PIXELS), encoded(MASK)


def expect_problem(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert sorted(body) == ["detail", "request_id", "status", "title", "type"]
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"] != ""
    for word in words:
        assert word in body["detail"]
    return body


def bomb(side: int) -> bytes:
    """A 1-bit PNG of a few kilobytes that decodes to side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(side * (side // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True])
def test_an_upload_is_answered_with_what_the_predictor_says(
    client: httpx.Client, local: Predictor, with_mask: bool
) -> None:
    files = {"image": ("a.png", PNG, "image/png")} | ({"mask": ("m.png", MASK_PNG, "image/png")} if with_mask else {})
    answer = client.post("/v1/classify", files=files)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    [expected] = local.predict([(np.repeat(PIXELS[:, :, None], 3, 2), MASK > 0 if with_mask else None)])
    assert body["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert sum(body["probabilities"].values()) == pytest.approx(1, abs=1e-12)
    assert (body["label"], body["region"]) == (expected.label, "mask" if with_mask else "whole image")
    assert body["probability"] == body["probabilities"][body["label"]]
    assert body["model"] == {"name": "drawn", "version": 2, "alias": "champion"}
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["notes"] == []


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", ""])
def test_a_raw_body_of_each_format(client: httpx.Client, kind: str, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = client.post("/v1/classify", content=encoded(PIXELS, kind), headers=headers)
    assert answer.status_code == 200, answer.text


def test_raw_and_multipart_agree(client: httpx.Client) -> None:
    raw = client.post("/v1/classify", content=PNG, headers={"content-type": "image/png"}).json()
    form = client.post("/v1/classify", files={"image": PNG}).json()
    assert raw["probabilities"] == form["probabilities"]


def test_a_faint_mask_is_used_and_noted(client: httpx.Client) -> None:
    answer = client.post("/v1/classify", files={"image": PNG, "mask": encoded((MASK > 0).astype(np.uint8))})
    assert answer.json()["notes"] == ["mask: empty at 127, used > 0"]
    assert answer.json()["region"] == "mask"


def test_alpha_is_dropped_and_noted(client: httpx.Client) -> None:
    answer = client.post("/v1/classify", files={"image": encoded(PIXELS, mode="RGBA")})
    assert answer.json()["notes"] == ["image: alpha channel dropped"]


def test_a_client_may_name_its_request(client: httpx.Client) -> None:
    answer = client.post("/v1/classify", files={"image": PNG}, headers={"x-request-id": "line-4/part-17"})
    assert answer.json()["request_id"] == "line-4/part-17"


def test_sixteen_at_once(client: httpx.Client, local: Predictor) -> None:
    pictures = [picture(i)[0] for i in range(16)]

    def ask(pixels: np.ndarray) -> httpx.Response:
        return client.post("/v1/classify", files={"image": encoded(pixels)})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, pictures))
    assert [answer.status_code for answer in answers] == [200] * 16
    for pixels, answer in zip(pictures, answers, strict=True):
        [expected] = local.predict([(np.repeat(pixels[:, :, None], 3, 2), None)])
        assert answer.json()["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)


def test_the_model_describes_itself(client: httpx.Client, home: Path) -> None:
    info = client.get("/v1/model").json()
    assert info["class_names"] == list(CLASSES)
    assert info["metrics"] == {"acc": 0.5}
    assert info["provenance"]["dataset"] == "drawn"
    assert info["model"] == {"name": "drawn", "version": 2, "alias": "champion"}
    checksums = json.loads((home / "registry/drawn/v2/checksums.json").read_text())
    assert info["digests"] == checksums | {"backbone": get_backbone("tiny_random").digest}


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/health/live", "live"), ("/livez", "live"), ("/v1/health/ready", "ready"), ("/readyz", "ready")],
)
def test_probes(client: httpx.Client, path: str, status: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()) == (200, {"status": status})


def test_the_api_documents_itself(client: httpx.Client) -> None:
    assert "swagger" in client.get("/docs").text.lower()
    paths = client.get("/openapi.json").json()["paths"]
    asked = [
        "/v1/classify",
        "/v1/detect",
        "/v1/health/live",
        "/v1/health/ready",
        "/v1/model",
        "/v1/predict",
        "/v1/segment",
    ]
    assert sorted(paths) == asked
    assert sorted(paths["/v1/classify"]["post"]["requestBody"]["content"]) == ["image/*", "multipart/form-data"]
    assert {"200", "400", "404", "413", "415", "422", "503"} == set(paths["/v1/classify"]["post"]["responses"])


def test_refusals_and_fields_are_documented_as_they_are() -> None:
    from serve.app import api

    described = api.openapi()
    for path, methods in described["paths"].items():
        for method in methods.values():
            refusals = {status: answer["content"] for status, answer in method["responses"].items() if status != "200"}
            assert all(list(content) == ["application/problem+json"] for content in refusals.values()), path
    fields = described["components"]["schemas"]["Detected"]["properties"]
    assert "128 where a region begins" in fields["map_png"]["description"]


def test_a_mask_is_offered_only_where_a_model_may_take_one() -> None:
    from serve.app import api

    paths = api.openapi()["paths"]
    fields = {
        path: sorted(body["content"]["multipart/form-data"]["schema"]["properties"])
        for path, methods in paths.items()
        if (body := methods.get("post", {}).get("requestBody"))
    }
    assert fields == {
        "/v1/classify": ["image", "mask"],
        "/v1/detect": ["image"],
        "/v1/predict": ["image", "mask"],
        "/v1/segment": ["image"],
    }


# --- refusals --------------------------------------------------------------------------------------------------------

GIF = encoded(PIXELS, "GIF")
DEEP = encoded(PIXELS.astype(np.uint16) * 256)


@pytest.mark.parametrize(
    ("upload", "status", "word"),
    [
        (b"", 400, "empty"),
        (PNG[: len(PNG) // 2], 400, "damaged or cut short"),
        (PNG[:20], 400, "damaged"),
        (PNG[:8] + bytes(1000), 400, "damaged"),
        (b"\xff\xd8\xff" + b"no JPEG" * 50, 400, "damaged"),
        (b"BM" + bytes(10), 400, "damaged"),
        (b"hello, this is text\n", 415, "first bytes"),
        (GIF, 415, "not PNG, JPEG, BMP or TIFF"),
        (DEEP, 422, "more than 8 bits"),
        (encoded(PIXELS, "JPEG", mode="CMYK"), 422, "CMYK"),
        (bomb(8_000), 422, "too large"),
        (bomb(20_000), 422, "too large"),
    ],
    ids=[
        "empty",
        "half",
        "header",
        "zeros",
        "jpeg",
        "bmp",
        "text",
        "gif",
        "16-bit",
        "cmyk",
        "64 MP",
        "bomb",
    ],
)
def test_what_is_no_usable_image(client: httpx.Client, upload: bytes, status: int, word: str) -> None:
    expect_problem(client.post("/v1/classify", files={"image": ("../../x.png", upload)}), status, word)
    raw = client.post("/v1/classify", content=upload, headers={"content-type": "image/png"})
    expect_problem(raw, status, word if upload else "no body")


@pytest.mark.parametrize(
    ("mask", "status", "word"),
    [
        (MASK_PNG[:50], 400, "mask"),
        (b"", 400, "the mask is empty (0 bytes)"),
        (b"text", 415, "the mask is not"),
        (encoded(MASK[:-1]), 422, "its image 96 x 80"),
        (encoded(MASK * 0), 422, "all zero"),
        (DEEP, 422, "more than 8 bits"),
    ],
    ids=["half", "empty", "text", "size", "zero", "16-bit"],
)
def test_what_is_no_usable_mask(client: httpx.Client, mask: bytes, status: int, word: str) -> None:
    expect_problem(client.post("/v1/classify", files={"image": PNG, "mask": ("m.png", mask)}), status, word)


@pytest.mark.parametrize(
    ("request_", "status", "word"),
    [
        ({}, 400, "curl -F image=@"),
        ({"files": {"picture": PNG}}, 400, "'picture' is unknown"),
        ({"files": {"mask": MASK_PNG}}, 400, "no field 'image'"),
        ({"files": {"other": b"x"}, "data": {"image": "a.png"}}, 400, "is the @ missing?"),
        ({"files": [("image", PNG), ("image", PNG)]}, 400, "several 'image'"),
        ({"files": [("image", PNG)] * 9}, 400, "Too many files"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, ""),
        ({"json": {"image": "a"}}, 415, "'application/json'"),
        ({"data": {"image": "a"}}, 415, "--data-binary"),
    ],
    ids=["nothing", "unknown", "mask only", "text", "two", "nine", "no boundary", "no form", "json", "urlencoded"],
)
def test_what_is_no_upload(client: httpx.Client, request_: dict[str, Any], status: int, word: str) -> None:
    expect_problem(client.post("/v1/classify", **request_), status, word)


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_the_cap(client: httpx.Client, chunked: bool) -> None:
    def send(size: int) -> httpx.Response:
        data = PNG + bytes(size - len(PNG))  # decoders stop at the end of the image
        content = (data[i : i + 50_000] for i in range(0, size, 50_000)) if chunked else data
        return client.post("/v1/classify", content=content, headers={"content-type": "image/png"})

    assert send(CAP - 1).status_code == 200
    assert send(CAP).status_code == 200
    expect_problem(send(CAP + 1), 413, "1 MiB")
    expect_problem(send(9 * CAP), 413, "1 MiB")
    form = client.post("/v1/classify", files={"image": PNG + bytes(CAP)})
    expect_problem(form, 413, "1 MiB")


def test_unknown_routes_and_methods(client: httpx.Client) -> None:
    expect_problem(client.get("/v1/nothing"), 404, "/docs")
    expect_problem(client.get("/v1/classify"), 405, "GET")


def test_remedies_name_addresses_that_exist(client: httpx.Client) -> None:
    """Also where an application lies below a route of its own."""
    host = str(client.base_url).rstrip("/")
    for base in (host, f"{host}/broken"):
        body = expect_problem(
            client.post(f"{base}/v1/classify?map=1"), 400, f"curl -F image=@IMAGE.png {base}/v1/classify,"
        )
        assert "map" not in body["detail"]
        expect_problem(client.get(f"{base}/v1/nothing"), 404, f"{base}/docs", f"{base}/openapi.json")
        assert client.get(f"{base}/docs").status_code == 200


def test_a_parameter_that_is_no_such_value(client: httpx.Client) -> None:
    expect_problem(client.post("/v1/detect?map=yes!", files={"image": PNG}), 422, "query parameter map:", "/docs")


def test_a_bug_is_not_shown(client: httpx.Client) -> None:
    asked = [client.post("/broken/v1/classify", files=files) for files in ({"image": PNG}, {"image": PNG, "mask": PNG})]
    for answer in (*asked, client.get("/broken/v1/model")):
        body = expect_problem(answer, 500, "internal error")
        assert "secret" not in json.dumps(body)
    assert client.get("/broken/v1/health/live").status_code == 200


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((PROJECT / "serve" / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_serve_configs_say_nothing_that_serve_ignores(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import AppArgs

    written = yaml.safe_load(path.read_text())
    understood = ServeDeploySchema.model_validate(written).model_dump(mode="json", exclude_unset=True)

    def keys(value: Any, where: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield f"{where}.{key}"
                yield from keys(inner, f"{where}.{key}")
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner, where)

    assert set(keys(written)) <= set(keys(understood))
    for application in written["applications"]:
        assert application["import_path"] == "serve.app:build_app"
        AppArgs.model_validate(application["args"] | {"home": "/home"})


def test_a_failure_is_that_of_its_image_alone(home: Path) -> None:
    from serve.models import Failure, Model

    model = Model("drawn@champion", str(home))
    model.predictor = Failing()  # type: ignore[assignment]
    found = model._predict([(np.full((2, 2, 3), value, np.uint8), None) for value in (100, 255, 0, 100)])
    assert (found[0], found[3]) == ("fine", "fine")
    assert isinstance(found[1], Failure)
    assert "NumericsError: secret path" in str(found[1])
    assert isinstance(found[2], DataError)


def test_a_version_that_is_given_is_loaded_wherever_the_alias_is(home: Path) -> None:
    from serve.models import Model

    assert Model("drawn@champion", str(home)).model.model_dump() == {"name": "drawn", "version": 2, "alias": "champion"}
    assert Model("drawn@champion", str(home), 1).model.model_dump() == {"name": "drawn", "version": 1, "alias": None}


def test_a_version_that_is_deployed_answers(client: httpx.Client, home: Path) -> None:
    from ray import serve

    from serve import app

    args = {"model": "drawn@champion", "version": 1, "home": str(home), "num_cpus": 0.1}
    serve.run(app.build_app(args), name="old", route_prefix="/old")
    try:
        assert client.get("/old/v1/model").json()["model"] == {"name": "drawn", "version": 1, "alias": None}
    finally:
        serve.delete("old")


@pytest.mark.parametrize("change", [{"modle": "a@b"}, {"max_upload_mb": "20"}, {"max_upload_mb": 0}, {"model": None}])
def test_args_are_strict(change: dict[str, Any]) -> None:
    from serve.app import build_app

    with pytest.raises(ValueError, match=re.escape(next(iter(change)))):
        build_app({"model": "drawn@champion"} | change)


def test_every_format_has_its_signature() -> None:
    from serve.uploads import SIGNATURES

    assert tuple(SIGNATURES) == FORMATS
    for kind, starts in SIGNATURES.items():
        assert encoded(PIXELS, kind).startswith(starts)

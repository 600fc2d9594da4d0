"""A fitted model on disk, and back from there: images in, answers out, one predictor for each family.

A model folder holds `model.json` (everything but tensors), `model.safetensors` and `checksums.json`. It is complete:
the backbone apart, whose digest it pins, nothing else is read. A segmenter reads no backbone: its network is among its
tensors. A `Predictor` shares feature extraction with the feature store.

Shapes: H W pixels, W classes.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError, NumericsError
from hypdefect.evaluation import RunConfig
from hypdefect.families import get_family
from hypdefect.features.backbones import get_backbone, without_weights
from hypdefect.features.extract import EXTRACTOR_VERSION, Extractor, RecipeConfig, dims_of, extractor_for
from hypdefect.features.transform import FeatureTransform, SideBySide
from hypdefect.files import write_json
from hypdefect.images import to_rgb
from hypdefect.images.intensity import Intensity
from hypdefect.images.regions import as_png, class_map, cleaned, cleaned_classes, grey_png, regions_of, resized
from hypdefect.methods import get_method
from hypdefect.methods.residuals import Residuals
from hypdefect.metrics import class_of_image
from hypdefect.registry import ModelEntry, verify_folder, write_checksums
from hypdefect.statistics import p_values
from hypdefect.types import VIEWS, Batch, Published

FORMAT_VERSION = 2
Seen = Literal["mask", "whole image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What `model.json` says."""

    family: str = "few_shot"
    """Of the method; models published before there were families are few-shot classifiers."""
    run: RunConfig
    class_names: tuple[str, ...]
    """Empty where a family has no classes."""
    backbone: str
    backbone_digest: str
    """Empty where the family reads no backbone."""
    block_dims: tuple[int, ...]
    recipe: RecipeConfig
    uses_mask: bool
    """Whether the supports had masks; features with and without one are not comparable."""
    intensities: tuple[str, ...] = ()
    """How deep pixels become 8-bit (`images.Intensity` as JSON), one rule for each kind of pixels of the image set."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: digests of data and code, metrics, seeds; free JSON."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else the family's predictor needs, such as a threshold; free JSON."""

    @property
    def dim(self) -> int:
        return sum(self.block_dims)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The likeliest class, all probabilities (their sum is 1) and what the features were pooled over."""

    label: str
    probabilities: dict[str, float]
    region: Seen


@dataclass(frozen=True, slots=True)
class Region:
    """A connected region that the map marks: corners (x, y) of its outline in pixels of the image, and its area."""

    polygon: list[list[float]]
    area: int


@dataclass(frozen=True, slots=True)
class ClassRegion(Region):
    """A connected region of one class; its area does not count what else its outline encloses."""

    label: str


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Which pixels are which defect."""

    label: str
    """The class with the most pixels of the map, "good" where none has any."""
    shares: dict[str, float]
    """Of each class, the share of the image's pixels that the map gives it."""
    regions: list[ClassRegion]
    """Class by class, largest first, at most 100 of each."""
    map_png: str
    """The number of the class of each pixel, in the order of the class names, 0 for none: a grey PNG, base64. A class
    has no regions of fewer than 9 pixels there."""


@dataclass(frozen=True, slots=True)
class Detection:
    """Whether a part is good, and where it is not."""

    anomalous: bool
    """Whether the p-value is at most the model's false-alarm rate."""
    p_value: float
    """Conformal p-value of "this part is good"; 1 / (n + 1) of n calibration images is the lowest there is."""
    false_alarms: float
    """That rate."""
    score: float
    regions: list[Region]
    """Where the map exceeds what calibration images reach, largest first, at most 100."""
    map_png: str
    """The map as a grey PNG of the image's size, base64: 0 is 0, 128 the threshold of a region, 255 twice that."""


def save_model(
    folder: Path,
    *,
    run_config: RunConfig,
    model: Published,
    transform: FeatureTransform | SideBySide,
    backbone: str,
    recipe: RecipeConfig,
    uses_mask: bool,
    provenance: dict[str, Any],
    class_names: Sequence[str] = (),
    intensities: Sequence[str] = (),
    details: dict[str, Any] | None = None,
) -> None:
    """Write a fitted model and all it needs; `lambda folder: save_model(folder, ...)` fits `registry.publish`.

    Raises:
        ConfigError: the parts contradict one another, or `provenance` or `details` are not plain finite JSON.
    """
    spec, family = get_backbone(backbone), get_method(run_config.name).family
    if (given := (transform.block_dims, transform.shape_dims)) != (expected := dims_of(spec, recipe)):
        raise ConfigError(f"save_model: transform of blocks {_blocks(*given)}, {backbone} gives {_blocks(*expected)}")
    if len(set(class_names)) != len(class_names) or (family == "few_shot" and not class_names):
        raise ConfigError(f"save_model: class names must be distinct, got {list(class_names)}")
    card = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "method": run_config.name,
        "run": to_mapping(run_config),
        "class_names": list(class_names),
        "backbone": backbone,
        "backbone_digest": spec.digest if get_family(run_config.name).Predictor.reads_backbone else "",
        "extractor_version": EXTRACTOR_VERSION,
        "block_dims": list(transform.block_dims),
        "dim": sum(transform.block_dims),
        "recipe": to_mapping(recipe),
        "uses_mask": uses_mask,
        "intensities": list(intensities),
        "provenance": provenance,
        "details": details or {},
    }
    tensors = {f"transform.{name}": value for name, value in transform.tensors.items()}
    tensors |= {f"method.{name}": value for name, value in model.export().items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / "model.json", card)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"save_model: provenance and details must be plain JSON without NaN or infinity: {error}"
        ) from error
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, _tensors(folder))
    write_checksums(folder)


class Predictor(ABC):
    """A loaded model. Every image is a forward of its own: its result does not depend on its neighbours.

    A family's predictor says what an answer is (`answer`) and whether the tensors fit one another (`check`).
    """

    transform_type: ClassVar[type[FeatureTransform]] = FeatureTransform
    reads_backbone: ClassVar[bool] = True
    """Whether answers depend on the card's backbone, which is then pinned."""

    def __init__(
        self,
        card: ModelCard,
        extractor: Extractor,
        transform: FeatureTransform | SideBySide,
        model: Any,
        entry: ModelEntry | None = None,
    ) -> None:
        self.card, self.extractor, self.transform, self.model, self.entry = card, extractor, transform, model, entry

    @staticmethod
    def load(source: ModelEntry | Path, device: str = "cpu") -> "Predictor":
        """Rebuild a model from a registry version or from the folder that `save_model` wrote: its family's predictor.

        Raises:
            ArtifactError: a file is damaged or missing, or this installation's backbone or extractor is another one.
        """
        folder = source.path if isinstance(source, ModelEntry) else Path(source)
        verify_folder(folder)
        card = _read_card(folder / "model.json")
        kind: type[Predictor] = get_family(card.run.name).Predictor
        try:
            with nullcontext() if kind.reads_backbone else without_weights():
                spec = get_backbone(card.backbone)
        except ConfigError as error:
            raise ArtifactError(f"{folder}: {error}") from error
        if kind.reads_backbone and spec.digest != card.backbone_digest:
            raise ArtifactError(
                f"{folder}: made with another {card.backbone} (digest {card.backbone_digest[:12]}, here "
                f"{spec.digest[:12]}); install the hypdefect it was made with, or train it again"
            )
        try:
            tensors = load_file(_tensors(folder))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{_tensors(folder)} cannot be read: {error}") from error
        transform_type = SideBySide if card.run.blend else kind.transform_type
        transform: Any = transform_type(card.block_dims, _below("transform.", tensors))
        try:
            given, expected = (card.block_dims, transform.shape_dims), dims_of(spec, card.recipe)
        except KeyError as error:
            raise ArtifactError(f"{folder}: its tensors hold no transform of a blend: {error}") from error
        if given != expected:
            raise ArtifactError(f"{folder}: blocks {_blocks(*given)} do not fit {card.backbone}, {_blocks(*expected)}")
        try:
            with without_weights():  # every tensor of the model is in its folder
                model = card.run.model(kind.size_of(card, transform))
            model.restore(_below("method.", tensors))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ArtifactError(f"{folder}: its tensors do not fit method {card.run.name!r}: {error}") from error
        extractor = extractor_for(spec, card.recipe, device, needs=model.needs)
        predictor = kind(card, extractor, transform, model, source if isinstance(source, ModelEntry) else None)
        predictor.check(folder)
        return predictor

    @staticmethod
    def size_of(card: ModelCard, transform: FeatureTransform | SideBySide) -> int | tuple[int, ...]:
        """What the method is built with: numbers a view, of each member of a blend; of segmenters, classes."""
        return transform.dim

    @abstractmethod
    def answer(self, image: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H2 W2"] | None) -> Any:
        """A dataclass of plain values for one image and its region, which has been checked."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Show tensors of a wrong shape at loading rather than at the first image.

        Raises:
            ArtifactError: they do not fit one another; names the folder.
        """

    def predict(
        self, images: Sequence[tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H2 W2"] | None]]
    ) -> list[Any]:
        """The answer to each (image, mask or None).

        Raises:
            DataError: a mask for a model made without masks, of another size than its image, or empty.
            NumericsError: the answer is not finite.
        """
        for image, mask in images:
            if mask is not None:
                self._check_mask(image, mask)
        return [self.answer(image, mask) for image, mask in images]

    def rgb(self, raw: Shaped[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
        """Decoded pixels as 8-bit RGB, deep ones by the window that was fitted on the normals of the model's set.

        Raises:
            DataError: deep pixels of a kind that the model's set did not have.
        """
        for rule in map(Intensity.from_json, self.card.intensities):
            if (rule.dtype, rule.num_channels) == (str(raw.dtype), raw.shape[2]):
                return to_rgb(raw, rule)
        return to_rgb(raw, None)

    def probe(self) -> None:
        """One small forward through everything, for health checks."""
        self.predict([(np.full((32, 32, 3), 128, np.uint8), None)])

    def check_probe(self, folder: Path) -> None:
        """`probe`, whose failure is an ArtifactError that names the folder."""
        try:
            self.probe()
        except (KeyError, RuntimeError, NumericsError, ValueError) as error:
            name = self.card.run.name
            raise ArtifactError(f"{folder}: its tensors do not fit method {name!r} or one another: {error}") from error

    def batch(self, image: np.ndarray, mask: np.ndarray | None) -> Batch:
        """What the model sees of an image. Where it was made with masks, an image without one is region as a whole."""
        if mask is None and self.card.uses_mask:
            mask = np.ones(image.shape[:2], dtype=bool)
        return row(self.extractor.forward(self.extractor.prepare(image, mask)))

    def _check_mask(self, image: np.ndarray, mask: np.ndarray) -> None:
        if not self.card.uses_mask:
            raise DataError(
                "this model was made without masks, and features under one are not comparable: leave it out"
            )
        if mask.shape != image.shape[:2]:
            raise DataError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]}, its image {image.shape[1]} x {image.shape[0]}"
            )
        if not mask.any():
            raise DataError("the mask is empty: mark the region, or leave the mask out")


class ClassPredictor(Predictor):
    """Few-shot classification: class probabilities."""

    def answer(self, image: np.ndarray, mask: np.ndarray | None) -> Prediction:
        probabilities = self.logits(image, mask).softmax(0)
        if not torch.isfinite(probabilities).all():
            raise NumericsError(f"probabilities {probabilities.tolist()} of a {image.shape} image are not finite")
        return Prediction(
            label=self.card.class_names[int(probabilities.argmax())],
            probabilities=dict(zip(self.card.class_names, probabilities.tolist(), strict=True)),
            region="whole image" if mask is None else "mask",
        )

    def logits(self, image: np.ndarray, mask: np.ndarray | None) -> Tensor:
        """Logits `[W]` in float64."""
        batch = self.batch(image, mask)
        return self.model.logits(replace(batch, views=self.transform(batch.views)))[0].double()

    def check(self, folder: Path) -> None:
        """Score one row of zeros."""
        try:
            zeros = {view: torch.zeros(1, self.card.dim) for view in VIEWS}
            scores = self.model.logits(row(self.transform(zeros)))
        except (KeyError, RuntimeError) as error:
            name = self.card.run.name
            raise ArtifactError(f"{folder}: its tensors do not fit method {name!r} or one another: {error}") from error
        if scores.shape != (1, len(self.card.class_names)) or not torch.isfinite(scores).all():
            names = len(self.card.class_names)
            raise ArtifactError(f"{folder}: scores {tuple(scores.shape)} for {names} classes, or not finite ones")


class PatchClassPredictor(ClassPredictor):
    """Few-shot classification from patches."""

    transform_type = Residuals

    def check(self, folder: Path) -> None:
        self.check_probe(folder)


def segmentation_of(found: UInt8[np.ndarray, "H W"], names: Sequence[str]) -> Segmentation:
    """The answer to a map of classes, 0 for none: map, shares, regions and label are of the same pixels."""
    classes = cleaned_classes(found)
    sizes = np.bincount(classes.ravel(), minlength=len(names) + 1)
    regions = [
        ClassRegion(polygon=outline, area=area, label=name)
        for number, name in enumerate(names, 1)
        if sizes[number]
        for outline, area in regions_of(classes == number)
    ]
    shares = {name: float(size / classes.size) for name, size in zip(names, sizes[1:], strict=True)}
    label = ("good", *names)[class_of_image(classes)]
    return Segmentation(label=label, shares=shares, regions=regions, map_png=grey_png(classes))


class SegmentationPredictor(Predictor):
    """Segmentation: the class of each pixel, and the regions of each class."""

    reads_backbone = False

    def answer(self, image: np.ndarray, mask: np.ndarray | None) -> Segmentation:
        logits = self.model.logits(self.batch(image, None))
        if not torch.isfinite(logits).all():
            raise NumericsError(f"the scores of a {image.shape} image are not finite")
        return segmentation_of(class_map(logits, (image.shape[0], image.shape[1])), self.card.class_names)

    @staticmethod
    def size_of(card: ModelCard, transform: FeatureTransform | SideBySide) -> int:
        return len(card.class_names)

    def check(self, folder: Path) -> None:
        self.check_probe(folder)


def anomalous_regions(values: Float[np.ndarray, "H W"], threshold: float) -> list[Region]:
    """Where a map exceeds the threshold: without holes, and without specks."""
    return [Region(polygon=outline, area=area) for outline, area in regions_of(cleaned(values > threshold))]


class DetectionPredictor(Predictor):
    """Anomaly detection: a verdict, its p-value, and the regions that raise it."""

    def answer(self, image: np.ndarray, mask: np.ndarray | None) -> Detection:
        found = self.model.anomaly(self.batch(image, None))
        score, rate = float(found.score[0]), self.card.details["false_alarms"]
        if not math.isfinite(score):
            raise NumericsError(f"the score {score} of a {image.shape} image is not finite")
        p_value = float(p_values(np.array([score]), np.array(self.card.details["calibration"]))[0])
        threshold = self.card.details["pixel_threshold"]
        anomaly_map = resized(found.map[0].numpy(), image.shape[:2])
        return Detection(
            anomalous=p_value <= rate,
            p_value=p_value,
            false_alarms=rate,
            score=score,
            regions=anomalous_regions(anomaly_map, threshold),
            map_png=as_png(anomaly_map / max(2 * threshold, 1e-12)),
        )

    def check(self, folder: Path) -> None:
        """Look at one grey image."""
        wanted = {"calibration", "false_alarms", "pixel_threshold"}
        if missing := wanted - self.card.details.keys():
            raise ArtifactError(f"{folder}: details lack {', '.join(sorted(missing))}; publish the model again")
        self.check_probe(folder)


def _blocks(block_dims: tuple[int, ...], shape_dims: int) -> str:
    return f"{block_dims}, the last {shape_dims} of shape" if shape_dims else f"{block_dims}"


def _tensors(folder: Path) -> Path:
    return folder / "model.safetensors"


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def row(views: dict[str, Tensor]) -> Batch:
    """The views of one image as a batch."""
    none = torch.zeros(1, dtype=torch.long)
    return Batch(image_ids=("",), views=views, labels=none, aug_index=none)


def _read_card(path: Path) -> ModelCard:
    try:
        stored = json.loads(path.read_text())
        for key, here in (("format_version", FORMAT_VERSION), ("extractor_version", EXTRACTOR_VERSION)):
            if (found := stored.pop(key)) != here:
                raise ArtifactError(f"{path}: {key} {found}, here {here}; use the hypdefect it was made with")
        del stored["method"], stored["dim"]  # for readers of the file; `run` and `block_dims` tell the same
        provenance, run = dict(stored.pop("provenance")), dict(stored.pop("run"))
        details = dict(stored.pop("details", {}))
        method = run.pop("method")
        config = replace(from_mapping(RunConfig, run, "run"), method=method)
        card = replace(from_mapping(ModelCard, stored | {"run": config}), provenance=provenance, details=details)
        if (family := get_method(card.run.name).family) != card.family:
            raise ArtifactError(f"{path}: method {card.run.name!r} is of family {family!r}, not {card.family!r}")
        return card
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a model description: {error}") from error

"""A fitted few-shot model on disk, and back from there: images in, class probabilities out.

A model folder holds `model.json` (everything but tensors), `model.safetensors` and `checksums.json`. It is complete:
the backbone apart, whose digest it pins, nothing else is read. Evaluation and Serve share `Predictor`, which shares
feature extraction with the feature store.

Shapes: H W pixels, W classes.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Shaped, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError, NumericsError
from hypdefect.evaluation import RunConfig
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import EXTRACTOR_VERSION, Extractor, RecipeConfig, dims_of, extractor_for
from hypdefect.features.transform import FeatureTransform
from hypdefect.files import write_json
from hypdefect.images import Intensity, to_rgb
from hypdefect.methods import Classifier
from hypdefect.registry import ModelEntry, verify_folder, write_checksums
from hypdefect.types import VIEWS, FeatureBatch

FORMAT_VERSION = 2
Region = Literal["mask", "whole image"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What `model.json` says."""

    run: RunConfig
    class_names: tuple[str, ...]
    backbone: str
    backbone_digest: str
    block_dims: tuple[int, ...]
    recipe: RecipeConfig
    uses_mask: bool
    """Whether the supports had masks; features with and without one are not comparable."""
    intensities: tuple[str, ...] = ()
    """How deep pixels become 8-bit (`images.Intensity` as JSON), one rule for each kind of pixels of the image set."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: digests of data and code, metrics, seeds; free JSON."""

    @property
    def dim(self) -> int:
        return sum(self.block_dims)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The likeliest class, all probabilities (their sum is 1) and what the features were pooled over."""

    label: str
    probabilities: dict[str, float]
    region: Region


def save_model(
    folder: Path,
    *,
    method: str,
    run_config: RunConfig,
    classifier: Classifier,
    class_names: Sequence[str],
    transform: FeatureTransform,
    backbone: str,
    recipe: RecipeConfig,
    uses_mask: bool,
    provenance: dict[str, Any],
    intensities: Sequence[str] = (),
) -> None:
    """Write a fitted classifier and all it needs; `lambda folder: save_model(folder, ...)` fits `registry.publish`.

    Raises:
        ConfigError: the parts contradict one another, or `provenance` is not plain finite JSON.
    """
    spec = get_backbone(backbone)
    if method != run_config.name:
        raise ConfigError(f"save_model: method {method!r}, but the run configuration is one of {run_config.name!r}")
    if (found := (transform.block_dims, transform.shape_dims)) != (given := dims_of(spec, recipe)):
        raise ConfigError(f"save_model: transform of blocks {_blocks(*found)}, {backbone} gives {_blocks(*given)}")
    if len(set(class_names)) != len(class_names) or not class_names:
        raise ConfigError(f"save_model: class names must be distinct, got {list(class_names)}")
    card = {
        "format_version": FORMAT_VERSION,
        "method": method,
        "run": to_mapping(run_config),
        "class_names": list(class_names),
        "backbone": backbone,
        "backbone_digest": spec.digest,
        "extractor_version": EXTRACTOR_VERSION,
        "block_dims": list(transform.block_dims),
        "dim": sum(transform.block_dims),
        "recipe": to_mapping(recipe),
        "uses_mask": uses_mask,
        "intensities": list(intensities),
        "provenance": provenance,
    }
    tensors = {f"transform.{name}": value for name, value in transform.tensors.items()}
    tensors |= {f"method.{name}": value for name, value in classifier.export().items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_json(folder / "model.json", card)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"save_model: provenance must be plain JSON without NaN or infinity: {error}") from error
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, _tensors(folder))
    write_checksums(folder)


class Predictor:
    """A loaded model. Every image is a forward of its own: its result does not depend on its neighbours."""

    def __init__(
        self,
        card: ModelCard,
        extractor: Extractor,
        transform: FeatureTransform,
        classifier: Classifier,
        entry: ModelEntry | None = None,
    ) -> None:
        self.card, self.extractor, self.transform, self.classifier = card, extractor, transform, classifier
        self.entry = entry

    @classmethod
    def load(cls, source: ModelEntry | Path, device: str = "cpu") -> "Predictor":
        """Rebuild a model from a registry version or from the folder that `save_model` wrote.

        Raises:
            ArtifactError: a file is damaged or missing, or this installation's backbone or extractor is another one.
        """
        folder = source.path if isinstance(source, ModelEntry) else Path(source)
        verify_folder(folder)
        card = _read_card(folder / "model.json")
        try:
            spec = get_backbone(card.backbone)
        except ConfigError as error:
            raise ArtifactError(f"{folder}: {error}") from error
        if spec.digest != card.backbone_digest:
            raise ArtifactError(
                f"{folder}: made with another {card.backbone} (digest {card.backbone_digest[:12]}, here "
                f"{spec.digest[:12]}); install the hypdefect it was made with, or train it again"
            )
        try:
            tensors = load_file(_tensors(folder))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{_tensors(folder)} cannot be read: {error}") from error
        transform = FeatureTransform(card.block_dims, _below("transform.", tensors))
        found, given = (card.block_dims, transform.shape_dims), dims_of(spec, card.recipe)
        if found != given:
            raise ArtifactError(f"{folder}: blocks {_blocks(*found)} do not fit {card.backbone}, {_blocks(*given)}")
        classifier = card.run.classifier(transform.dim)
        try:
            classifier.restore(_below("method.", tensors))
        except (KeyError, RuntimeError) as error:
            raise ArtifactError(f"{folder}: its tensors do not fit method {card.run.name!r}: {error}") from error
        extractor = extractor_for(spec, card.recipe, device)
        predictor = cls(card, extractor, transform, classifier, source if isinstance(source, ModelEntry) else None)
        predictor._check_logits(folder)
        return predictor

    def predict(
        self, images: Sequence[tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H2 W2"] | None]]
    ) -> list[Prediction]:
        """Class probabilities of each (image, mask or None).

        Raises:
            DataError: a mask for a model made without masks, of another size than its image, or empty.
            NumericsError: a probability is not finite.
        """
        return [self._predict(image, mask) for image, mask in images]

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

    def logits(self, image: np.ndarray, mask: np.ndarray | None) -> Tensor:
        """Logits `[W]` in float64. Where a model was made with masks, an image without one is region as a whole."""
        if mask is None and self.card.uses_mask:
            mask = np.ones(image.shape[:2], dtype=bool)
        views = self.extractor.forward(self.extractor.prepare(image, mask))
        return self.classifier.logits(_batch(self.transform(views)))[0].double()

    def _predict(self, image: np.ndarray, mask: np.ndarray | None) -> Prediction:
        if mask is not None:
            self._check_mask(image, mask)
        probabilities = self.logits(image, mask).softmax(0)
        if not torch.isfinite(probabilities).all():
            raise NumericsError(f"probabilities {probabilities.tolist()} of a {image.shape} image are not finite")
        return Prediction(
            label=self.card.class_names[int(probabilities.argmax())],
            probabilities=dict(zip(self.card.class_names, probabilities.tolist(), strict=True)),
            region="whole image" if mask is None else "mask",
        )

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

    def _check_logits(self, folder: Path) -> None:
        """Score one row of zeros: shows tensors of a wrong shape at loading rather than at the first image."""
        try:
            zeros = {view: torch.zeros(1, self.card.dim) for view in VIEWS}
            scores = self.classifier.logits(_batch(self.transform(zeros)))
        except (KeyError, RuntimeError) as error:
            name = self.card.run.name
            raise ArtifactError(f"{folder}: its tensors do not fit method {name!r} or one another: {error}") from error
        if scores.shape != (1, len(self.card.class_names)) or not torch.isfinite(scores).all():
            names = len(self.card.class_names)
            raise ArtifactError(f"{folder}: scores {tuple(scores.shape)} for {names} classes, or not finite ones")


def _blocks(block_dims: tuple[int, ...], shape_dims: int) -> str:
    return f"{block_dims}, the last {shape_dims} of shape" if shape_dims else f"{block_dims}"


def _tensors(folder: Path) -> Path:
    return folder / "model.safetensors"


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _batch(views: dict[str, Tensor]) -> FeatureBatch:
    none = torch.zeros(1, dtype=torch.long)
    return FeatureBatch(image_ids=("",), views=views, labels=none, aug_index=none)


def _read_card(path: Path) -> ModelCard:
    try:
        stored = json.loads(path.read_text())
        for key, here in (("format_version", FORMAT_VERSION), ("extractor_version", EXTRACTOR_VERSION)):
            if (found := stored.pop(key)) != here:
                raise ArtifactError(f"{path}: {key} {found}, here {here}; use the hypdefect it was made with")
        del stored["method"], stored["dim"]  # for readers of the file; `run` and `block_dims` tell the same
        provenance, run = dict(stored.pop("provenance")), dict(stored.pop("run"))
        method = run.pop("method")
        config = dataclasses.replace(from_mapping(RunConfig, run, "run"), method=method)
        return dataclasses.replace(from_mapping(ModelCard, stored | {"run": config}), provenance=provenance)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a model description: {error}") from error

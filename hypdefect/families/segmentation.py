"""Segmentation: which pixels are which defect? Learned from masks.

An image set is parted in three, 8 : 1 : 1 as in HADNet's paper, by whole groups where images of one part must not stand
on two sides, class by class. Where the set has an official test that does not leak, that is what is reported on, and
the other images are parted 9 : 1. `Fitting` holds the images that are learned from and those that training is stopped
by and settings are chosen by; `Reported` holds the rest. Draw n trains with seed n.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
from torch import nn

from hypdefect.config import digest
from hypdefect.datasets import get_dataset
from hypdefect.datasets.manifest import LOST_MARK_NOTE
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig, Score
from hypdefect.families.detection import calibrated, transformed, twin
from hypdefect.families.image_files import image_file, mask_file
from hypdefect.families.plan import DataConfig, Plan, of_product, shuffled, task_label
from hypdefect.families.segmentation_training import REPORT_EVERY, Marked, SegmenterTraining, epoch_of, measured
from hypdefect.features.extract import RecipeConfig, dims_of
from hypdefect.features.imported import Imported
from hypdefect.features.spec import ImageRequest
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.methods.fpn import TrainedSegmenter
from hypdefect.predictor import SegmentationPredictor as Predictor
from hypdefect.training import fit as train_in_process
from hypdefect.types import Segmenter, SplitKind

logger = logging.getLogger(__name__)

__all__ = ["METRIC", "Predictor", "calibrated", "transformed", "twin"]

METRIC = "val/pixel/miou"
MOST_CLASSES = 255
"""Numbers of a grey PNG, but for background's."""
SHARE = 0.1
"""Of the images of each class that validation is on, and of those that are reported on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig(DataConfig):
    """The data side of a segmentation job."""

    backbone: str = "efficientnet_lite0"
    """Not read: a segmenter has a network of its own, method.network."""
    recipe: RecipeConfig = RecipeConfig(whole_size=256)
    split: SplitKind = "grouped"
    """How images are parted. grouped: those of one part never stand on two sides; random: by file. Both report on the
    set's official test where every class stands in it and in two parts outside of it. Grouped does so only where no
    part stands on both sides."""
    max_normals: int = 400
    """At most this many good parts, whose pixels are all background; those of an official test are not counted."""
    patience: int = 0
    """Reports without a better validation after which training ends; 0: all steps. The best weights are kept anyway."""

    @property
    def title(self) -> str:
        return f"{task_label(self)}-segmentation-{self.split}"

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        for name in ("max_normals", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationPlan(Plan):
    """Which file is learned from, validated on and reported on."""

    config: TaskConfig
    kind: SplitKind | Literal["official"]
    learned_ids: tuple[str, ...]
    validated_ids: tuple[str, ...]
    reported_ids: tuple[str, ...]

    @property
    def model_name(self) -> str:
        return f"hypdefect-{self.label}-segmentation"

    @property
    def split(self) -> str:
        """official, random or grouped."""
        return self.kind

    def requests(self) -> list[ImageRequest]:
        """None: a segmenter looks at pixels."""
        return []

    def provenance(self) -> dict[str, object]:
        return Plan.provenance(self) | {
            "split": self.split,
            "partition_digest": digest([list(self.learned_ids), list(self.validated_ids), list(self.reported_ids)]),
            "learned_images": len(self.learned_ids),
            "validated_images": len(self.validated_ids),
            "reported_images": len(self.reported_ids),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """What may be looked at."""

    classes: tuple[str, ...]
    learned: Marked
    validated: Marked
    side: int
    """Of the network input, in pixels."""
    patience: int
    block_dims: tuple[int, ...]
    shape_dims: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    images: Marked


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a run is told beside its configuration."""

    k_shot: int = 0
    seed: int = 0


def plan(config: TaskConfig, manifest: pa.Table, imported: Imported | None = None) -> SegmentationPlan:
    """Decide which files are learned from, validated on and reported on.

    Raises:
        ConfigError: imported features; several products and none named. DataError: no masks; no groups for a grouped
            split; a class with masks that cannot stand on all three sides.
    """
    if imported is not None:
        raise ConfigError(f"{config.dataset} holds features and no images; segmentation needs pixels")
    manifest = of_product(config, manifest)
    rows = manifest.to_pylist()
    classes = tuple(sorted({row["defect"] for row in rows if row["is_defect"] and row["mask_id"]}))
    if not classes:
        raise DataError(f"dataset {config.dataset} has no masks, which is what a segmenter learns from")
    if len(classes) > MOST_CLASSES:
        raise DataError(f"{len(classes)} classes; a map of classes holds {MOST_CLASSES}: give several one name")
    if config.split == "grouped" and not any(row["group_id"] for row in rows):
        raise DataError(
            "no image has a group id, so a grouped split would be a random one: use --split random, or look for "
            f"near-duplicates first: python jobs/ingest.py --dataset {config.dataset} --audit"
        )
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        files[row["file_id"]].append(row)
    usable = {name: of for name, of in files.items() if all(map(_is_told, of))}
    _warn_of_losses(config, rows, classes, [of[0]["uri"] for name, of in files.items() if name not in usable])
    shown = {name: {row["defect"] for row in of if row["is_defect"]} for name, of in usable.items()}
    for defect in classes:
        if not any(defect in defects for defects in shown.values()):
            uris = [row["uri"] for row in rows if row["defect"] == defect]
            raise DataError(
                f"class {defect!r} has masks, but each of its {len(uris)} files has another mark without one that can "
                f"be used (the first is {uris[0]}): mask every mark of a file, or take these files out of the set"
            )
    unit_of = {name: (config.split == "grouped" and of[0]["group_id"]) or name for name, of in usable.items()}
    tested = {name for name, of in usable.items() if of[0]["split"] == "test"}
    official = _is_followed(tested, classes, unit_of, shown)
    fixed = tested if official else set()
    good = shuffled((name for name, defects in shown.items() if not defects and name not in fixed), config.partition)
    kept = {name for name, defects in shown.items() if defects} | fixed | set(good[: config.max_normals])
    unit_of = {name: unit for name, unit in unit_of.items() if name in kept}
    units = {unit_of[name] for name in fixed}
    sides = _three_sides(config, unit_of, shown, {name: of[0]["uri"] for name, of in usable.items()}, units)
    ids = {side: tuple(sorted(usable[name][0]["image_id"] for name in names)) for side, names in sides.items()}
    return SegmentationPlan(
        config=config,
        card=get_dataset(config.dataset),
        manifest=manifest,
        uses_mask=False,
        classes=classes,
        kind="official" if official else config.split,
        learned_ids=ids["learned"],
        validated_ids=ids["validated"],
        reported_ids=ids["reported"],
    )


def _is_told(row: dict[str, Any]) -> bool:
    """Whether a file's row is good, or has a mask, and no other mark on the file was refused."""
    return (bool(row["mask_id"]) or not row["is_defect"]) and LOST_MARK_NOTE not in row["note"]


def _warn_of_losses(config: TaskConfig, rows: list[dict[str, Any]], classes: tuple[str, ...], uris: list[str]) -> None:
    """Name what a segmenter does not learn: classes without any mask, and the files that are left out."""
    for defect in sorted({row["defect"] for row in rows if row["is_defect"]} - set(classes)):
        logger.warning(
            "%s: class %r is not learned, since none of its images has a mask: mask them if it is to be named",
            config.dataset,
            defect,
        )
    if uris:
        logger.warning(
            "%s: %d files are left out, since not every mark of theirs has a mask that can be used; the first is %s",
            config.dataset,
            len(uris),
            uris[0],
        )


def _is_followed(
    tested: set[str], classes: tuple[str, ...], unit_of: dict[str, str], shown: dict[str, set[str]]
) -> bool:
    """Whether an official test is followed: every class stands in it, and in two units of the others, one to learn from
    and one to validate on; and no unit stands in both."""

    def units(names: Collection[str], defect: str) -> set[str]:
        return {unit_of[name] for name in names if defect in shown[name]}

    others = unit_of.keys() - tested
    enough = all(units(tested, defect) and len(units(others, defect)) > 1 for defect in classes)
    return enough and not {unit_of[name] for name in tested} & {unit_of[name] for name in others}


Side = Literal["learned", "validated", "reported"]


def _three_sides(
    config: TaskConfig, unit_of: dict[str, str], shown: dict[str, set[str]], uri_of: dict[str, str], tested: set[str]
) -> dict[Side, list[str]]:
    """Files of each side. Class by class, those in the fewest units first, whole units are taken in a seeded order
    until a tenth of the class's images is reported on, and another tenth validated on. Good parts count as a class.
    Where there are units that are tested already, those are reported on, and a tenth of the others is validated on.

    Raises:
        DataError: a class does not stand on all sides.
    """
    members: dict[str, list[str]] = defaultdict(list)
    holders: dict[str, list[str]] = defaultdict(list)
    for name in sorted(unit_of):
        members[unit_of[name]].append(name)
        for defect in shown[name] or {""}:
            holders[defect].append(unit_of[name])
    side_of: dict[str, Side] = dict.fromkeys(tested, "reported")
    drawn: tuple[Side, ...] = ("validated",) if tested else ("reported", "validated")
    order = sorted(members, key=lambda unit: digest([config.partition, unit]))
    for defect in sorted(holders, key=lambda defect: (len(set(holders[defect])), defect)):
        size = Counter(holders[defect])
        inside = sum(count for unit, count in size.items() if unit not in tested)
        free = [unit for unit in order if unit in size and unit not in side_of]
        for side in drawn:
            held = sum(size[unit] for unit, of in side_of.items() if of == side)
            while len(free) > 1 and (not held or held + size[free[0]] / 2 <= SHARE * inside):
                held += size[free[0]]
                side_of[free.pop(0)] = side
    sides: dict[Side, list[str]] = {"learned": [], "validated": [], "reported": []}
    for unit, names in members.items():
        sides[side_of.get(unit, "learned")] += names
    for defect in sorted(holders.keys() - {""}):
        if any(all(defect not in shown[name] for name in names) for names in sides.values()):
            count = f"{len(holders[defect])} images of {len(set(holders[defect]))} parts"
            one = next(uri_of[name] for name in sorted(unit_of) if defect in shown[name])
            raise DataError(
                f"class {defect!r} has {count} with masks (one is {one}); it must stand in learning, validation and "
                "test: give images of more parts, or choose another --partition"
            )
    return sides


def load(plan: SegmentationPlan, home: Path) -> tuple[Fitting, Reported]:
    """The images of a task; they are read when they are needed."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    file_of = {}
    for row in plan.manifest.to_pylist():
        rows[row["file_id"]].append(row)
        file_of[row["image_id"]] = row["file_id"]
    number = {name: i + 1 for i, name in enumerate(plan.classes)}

    def images(ids: tuple[str, ...]) -> Marked:
        own = [rows[file_of[i]] for i in ids]
        masks = [sorted((number[row["defect"]], mask_file(row)) for row in of if row["is_defect"]) for of in own]
        return Marked(
            files=tuple(image_file(of[0]) for of in own), masks=tuple(map(tuple, masks)), image_ids=tuple(ids)
        )

    block_dims, shape_dims = dims_of(plan.spec, plan.config.recipe)
    fitting = Fitting(
        classes=plan.classes,
        learned=images(plan.learned_ids),
        validated=images(plan.validated_ids),
        side=plan.config.recipe.whole_size,
        patience=plan.config.patience,
        block_dims=block_dims,
        shape_dims=shape_dims,
    )
    return fitting, Reported(images=images(plan.reported_ids))


def remarks(fitting: Fitting) -> list[str]:
    """Classes with so few images that their IoU says little."""
    counts = Counter(label for masks in fitting.validated.masks for label, _ in masks)
    few = [name for i, name in enumerate(fitting.classes) if counts[i + 1] < 5]
    return [f"fewer than 5 images to validate on show {', '.join(few)}: their IoU is uncertain"] if few else []


def setting(config: Any) -> Setting:
    return Setting(seed=config.seed)


def check(plan: SegmentationPlan, setting: Setting) -> None:
    """Nothing beside what `plan` refuses."""


def references(plan: SegmentationPlan, config: Any) -> tuple[RunConfig, ...]:
    """A feature pyramid with a linear layer, trained as long."""
    steps = getattr(config, "steps", None)
    return (RunConfig(name="fpn", method=None if steps is None else {"steps": steps}, pretrained=False),)


def transform_of(run: RunConfig, fitting: Fitting, start: Any = None) -> FeatureTransform:
    """None: segmenters look at pixels."""
    return FeatureTransform.fit(None, fitting.block_dims, TransformConfig(), fitting.shape_dims)


def validation_scores(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: Any = None
) -> Iterator[float]:
    """Mean IoU of the defect classes on the images that are not learned from; each problem has another seed."""
    for number in numbers:
        yield _fitted(run, fitting, setting, number)[1]


def training_of(
    run: RunConfig, fitting: Fitting, setting: Setting, number: int, report_every: int = REPORT_EVERY
) -> SegmenterTraining:
    """How the network of a draw is trained, by this process or by Ray Train; whether it will answer with mirrored
    images, too, is no part of that."""
    seed = run.method.seed + 1000 * setting.seed + number
    seeded = replace(run, method=replace(run.method, seed=seed, mirrored=False))
    return SegmenterTraining(
        run=seeded,
        classes=fitting.classes,
        learned=fitting.learned,
        validated=fitting.validated,
        epoch=epoch_of(fitting.learned, seeded.method.rare, seeded.method.seed),
        side=fitting.side,
        report_every=report_every,
        patience=fitting.patience,
    )


def fit(run: RunConfig, fitting: Fitting, setting: Setting, number: int, start: Any = None) -> Segmenter:
    """The network of a draw, trained in this process; it ends at the weights that validated best."""
    return _fitted(run, fitting, setting, number)[0]


def _fitted(run: RunConfig, fitting: Fitting, setting: Setting, number: int) -> tuple[Segmenter, float]:
    training = training_of(run, fitting, setting, number)
    model = training.model()
    train_in_process(model, training.item, training.config, lambda metrics, write: None, validation=training)
    return finished(run, model, fitting, setting, number)


def finished(
    run: RunConfig, model: nn.Module, fitting: Fitting, setting: Setting, number: int
) -> tuple[Segmenter, float]:
    """A trained network, ready to answer, and its mean IoU of the defect classes on the images of validation, which
    choose whether it names regions as wholes."""
    segmenter = cast(TrainedSegmenter, model)
    segmenter.config = replace(segmenter.config, mirrored=run.method.mirrored)
    segmenter.finish()
    regions = segmenter.config.regions
    values = {}
    for whole in (False, True) if regions == "validated" else (regions == "whole",):
        segmenter.whole_regions.fill_(whole)
        values[whole] = measured(segmenter, fitting.validated, fitting.classes, fitting.side).compute()["miou"]
    best = max(values, key=lambda whole: values[whole])  # of equal ones pixels, which come first
    segmenter.whole_regions.fill_(best)
    return cast(Segmenter, segmenter), values[best]


def fitted_on(fitting: Fitting, setting: Setting, number: int) -> tuple[str, ...]:
    """Ids of the images that are learned from."""
    return fitting.learned.image_ids


def details(run: RunConfig, fitting: Fitting, setting: Setting, number: int, model: Segmenter) -> dict[str, Any]:
    """A segmenter needs nothing beside its tensors."""
    return {}


def score(
    run: RunConfig, fitting: Fitting, reported: Reported, setting: Setting, number: int, start: Any = None
) -> Score:
    """Train, and look at every reported image once."""
    begun = time.perf_counter()
    model = fit(run, fitting, setting, number, start)
    return score_model(model, fitting, reported, setting, number, time.perf_counter() - begun)


def score_model(
    model: Segmenter, fitting: Fitting, reported: Reported, setting: Setting, number: int, fit_seconds: float
) -> Score:
    """Look at every reported image once."""
    begun = time.perf_counter()
    found = measured(model, reported.images, fitting.classes, fitting.side)
    seconds = {"fit_seconds": fit_seconds, "predict_seconds": time.perf_counter() - begun}
    return Score(
        number=number,
        metrics=found.compute() | seconds,
        image_ids=reported.images.image_ids,
    )

"""Anomaly detection: is a part good, and where is it not? Only images of good parts are learned from.

`Fitting` holds normal images and pseudo-defects painted on them. Each problem and each draw parts the normals anew: a
model learns from one side and is calibrated on the other. `Reported` holds normals that nothing was learned from, and
every image of a defect.

A score becomes a conformal p-value: the share of calibration normals that are at least as anomalous, the image itself
counted among them, (1 + #{s_i >= s}) / (n + 1). If the image is a good part like those of the calibration, the chance
of a p-value of at most a is at most a (Vovk et al., "Algorithmic Learning in a Random World", 2005; Bates et al.,
"Testing for Outliers with Conformal p-values", 2023). None is below 1 / (n + 1). The guarantee is an average over
calibration sets. It does not hold for parts that differ from those of the calibration, such as another batch.

Shapes: N images, H W pixels of the network input.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool
from sklearn.metrics import roc_auc_score

from hypdefect.config import digest
from hypdefect.datasets import get_dataset
from hypdefect.datasets.split import parted
from hypdefect.datasets.synthetic import stored
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import RunConfig, Score
from hypdefect.families.detector_training import DetectorTraining
from hypdefect.families.image_files import ImageFile, MaskFile, image_file, mask_file
from hypdefect.families.plan import DataConfig, Plan, image_requests, of_product, task_label
from hypdefect.families.suspects import constant, named, suspects
from hypdefect.features.extract import RecipeConfig
from hypdefect.features.imported import Imported
from hypdefect.features.spec import FeatureKey, ImageRequest, RowKey
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.images.pseudo_defects import SynthesisConfig, load_textures
from hypdefect.methods import get_method
from hypdefect.methods.anomaly_maps import STRIDE
from hypdefect.metrics import PixelMetrics, image_metrics
from hypdefect.predictor import DetectionPredictor as Predictor
from hypdefect.statistics import p_values
from hypdefect.training import fit as train_in_process
from hypdefect.types import AnomalyDetector, Batch, Needs, SplitKind, TrainableDetector

__all__ = ["METRIC", "Predictor"]

logger = logging.getLogger(__name__)
METRIC = "val/image/auroc"
SLICE = 32
"""Images read from the store at a time."""
SCALE_SHARE = 0.1
"""Share of a draw's normals that its networks are not trained on: the scale of their maps comes from these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig(DataConfig):
    """The data side of a detection job."""

    backbone: str = "patchcore_lite0"
    recipe: RecipeConfig = RecipeConfig(whole_size=256)
    split: SplitKind = "random"
    """How normal images are parted, where the set has no official split. random: by file; grouped: images of one part
    never stand on both sides."""
    test_share: float = 0.2
    """Share of the normal images that are reported on, where the set has no official split."""
    calibration_share: float = 0.25
    """Share of the other normal images that each draw keeps for its p-values."""
    false_alarms: float = 0.05
    """A part is called anomalous where its p-value is at most this: the share of good parts that raise an alarm."""
    synthesis: SynthesisConfig = SynthesisConfig(per_class=2, kind="marks")
    """Pseudo-defects on normal images, which settings are validated on."""

    @property
    def title(self) -> str:
        return f"{task_label(self)}-detection-{self.split}"

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        for name in ("test_share", "calibration_share", "false_alarms"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionPlan(Plan):
    """Which image is learned from and which is reported on. An image is one file, marked where any defect is."""

    config: TaskConfig
    kind: str
    """official, random or grouped."""
    normal_ids: tuple[str, ...]
    tested_ids: tuple[str, ...]
    """Normal images that are reported on."""
    defect_ids: tuple[str, ...]
    unit_of: dict[str, str]
    """What a normal image must not be parted from: its file or its group."""

    @property
    def model_name(self) -> str:
        return f"hypdefect-{self.label}-detection"

    @property
    def split(self) -> str:
        return self.kind

    def requests(self) -> list[ImageRequest]:
        wanted = dict.fromkeys((*self.normal_ids, *self.tested_ids, *self.defect_ids), 0)
        return image_requests(self.manifest, wanted, self.uses_mask)

    def pseudo(self) -> tuple[pa.Table, SynthesisConfig]:
        """Pseudo-defects lie on all normal images, so that every partition has the same; a task is handed those on
        images that it may learn from (`load`)."""
        return self.manifest.filter(pc.is_in(self.manifest["image_id"], pa.array(self.unit_of))), self.config.synthesis

    def provenance(self) -> dict[str, object]:
        return Plan.provenance(self) | {
            "split": self.kind,
            "partition_digest": digest([list(self.normal_ids), list(self.tested_ids)]),
            "normal_images": len(self.normal_ids),
            "tested_normals": len(self.tested_ids),
            "tested_defects": len(self.defect_ids),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Images whose stored features are read in slices, whenever they are iterated over: a `types.Batches`."""

    home: Path
    key: FeatureKey
    rows: tuple[RowKey, ...]
    units: tuple[str, ...]
    """Of a normal image its file or group, of a pseudo-defect the image it lies on, of a defect its class."""
    files: tuple[ImageFile, ...]
    masks: tuple[tuple[MaskFile, ...], ...] = ()
    """The masks of each image's defects; empty where no image has one."""
    needs: Needs = "patches"
    """What batches hold: the patches, or also the images themselves."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_ids(self) -> tuple[str, ...]:
        return tuple(row.image_id for row in self.rows)

    def select(self, positions: Sequence[int]) -> "Images":
        return replace(
            self,
            rows=tuple(self.rows[i] for i in positions),
            units=tuple(self.units[i] for i in positions),
            files=tuple(self.files[i] for i in positions),
            masks=tuple(self.masks[i] for i in positions) if self.masks else (),
        )

    def seen_by(self, model: AnomalyDetector) -> "Images":
        """The same images, with what a detector needs of them."""
        return replace(self, needs=model.needs)

    @property
    def side(self) -> int:
        """Of the network input, in pixels."""
        assert self.key.recipe is not None  # features of detectors are never imported
        return self.key.recipe.whole_size

    def __iter__(self) -> Iterator[Batch]:
        store = FeatureStore(self.home, self.key)
        for first in range(0, len(self.rows), SLICE):
            table = store.load(list(self.rows[first : first + SLICE]))
            none = torch.zeros(len(table), dtype=torch.long)
            side = [STRIDE * cells for cells in next(iter(table.views.values())).shape[1:3]]
            numbers = range(first, first + len(table)) if self.masks else ()
            masks = [torch.from_numpy(self.mask(number, (side[0], side[1]))) for number in numbers]
            views = {view: torch.from_numpy(x) for view, x in table.views.items()}
            if self.needs == "patches+pixels":
                views["pixels"] = torch.stack([f.read(self.side) for f in self.files[first : first + len(table)]])
            yield Batch(
                image_ids=tuple(table.image_ids.tolist()),
                views=views,
                labels=none,
                aug_index=none,
                targets=torch.stack(masks).long() if masks else None,
            )

    def mask(self, number: int, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
        """What is marked of an image, at the size of its map: cells that a region touches."""
        marked = np.zeros(size, dtype=bool)
        for file in self.masks[number] if self.masks else ():
            full = torch.from_numpy(file.read()).float()[None, None]
            marked |= (torch.nn.functional.adaptive_max_pool2d(full, size)[0, 0] > 0).numpy()
        return marked


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """What may be looked at: normal images, and pseudo-defects that lie on some of them."""

    normals: Images
    pseudo: Images
    block_dims: tuple[int, ...]
    backbone: str
    """What patches of further images are made with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """Normal images that nothing is learned from, and defects."""

    normals: Images
    defects: Images


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a run is told beside its configuration."""

    k_shot: int = 0
    seed: int = 0
    calibration_share: float = 0.25
    false_alarms: float = 0.05


def setting(config: Any) -> Setting:
    """Seed, calibration and false-alarm rate of a job."""
    return Setting(seed=config.seed, calibration_share=config.calibration_share, false_alarms=config.false_alarms)


def plan(config: TaskConfig, manifest: pa.Table, imported: Imported | None = None) -> DetectionPlan:
    """Decide which normal images are learned from and which are reported on.

    Raises:
        ConfigError: imported features; several products and none named; features that are no patches.
        DataError: no normal image, or no defect; normals that cannot be parted so.
    """
    if imported is not None:
        raise ConfigError(f"{config.dataset} holds features and no images; detection needs patches of images")
    manifest = of_product(config, manifest)
    rows = manifest.to_pylist()
    normals = [row for row in rows if not row["is_defect"]]
    defects = {row["file_id"]: row["image_id"] for row in reversed(rows) if row["is_defect"]}
    normals = [row for row in normals if row["file_id"] not in defects]
    if not normals:
        raise DataError(f"dataset {config.dataset} has no normal images, which is all that a detector learns from")
    if not defects:
        raise DataError(f"dataset {config.dataset} has no image of a defect to report on")
    official = any(row["split"] == "train" for row in normals) and any(row["split"] == "test" for row in rows)
    grouped = config.split == "grouped" and not official
    if grouped and not any(row["group_id"] for row in normals):
        raise DataError(
            "no normal image has a group id, so a grouped split would be a random one: use split random, or look for "
            f"near-duplicates first: python jobs/ingest.py --dataset {config.dataset} --audit"
        )
    unit_of = {row["image_id"]: (grouped and row["group_id"]) or row["file_id"] for row in normals}
    if official:
        learned = [row["image_id"] for row in normals if row["split"] == "train"]
        tested = [row["image_id"] for row in normals if row["split"] == "test"]
        reported = {row["file_id"] for row in rows if row["split"] == "test"}
        defects = {file: image for file, image in defects.items() if file in reported}
    else:
        tested, learned = parted(unit_of, config.test_share, config.partition)
    plan = DetectionPlan(
        config=config,
        card=get_dataset(config.dataset),
        manifest=manifest,
        uses_mask=False,
        kind="official" if official else config.split,
        normal_ids=tuple(sorted(learned)),
        tested_ids=tuple(sorted(tested)),
        defect_ids=tuple(sorted(defects.values())),
        unit_of=unit_of,
    )
    if plan.key.grid is None:
        raise ConfigError(f"{config.backbone} gives vectors; a detector reads patches: use a backbone patchcore:...")
    return plan


def check(plan: DetectionPlan, setting: Setting) -> None:
    """Raises DataError where the calibration normals are too few for p-values as low as the false-alarm rate."""
    _, held = sides(plan.normal_ids, [plan.unit_of[i] for i in plan.normal_ids], setting, 0)
    needed = math.ceil(1 / setting.false_alarms) - 1
    if len(held) < needed:
        raise DataError(
            f"{len(held)} normal images are left for calibration, so that no p-value is below "
            f"{1 / (len(held) + 1):.3f}; --false-alarms {setting.false_alarms} needs {needed}: give more normal "
            "images, or raise --calibration-share or --false-alarms"
        )


def sides(image_ids: Sequence[str], units: Sequence[str], setting: Setting, number: int) -> tuple[list[int], list[int]]:
    """Positions of the normals that draw `number` learns from, and of those it is calibrated on."""
    held, _ = parted(dict(zip(image_ids, units, strict=True)), setting.calibration_share, [setting.seed, number])
    chosen = set(held)
    learned = [i for i, image_id in enumerate(image_ids) if image_id not in chosen]
    return learned, [i for i, image_id in enumerate(image_ids) if image_id in chosen]


def load(plan: DetectionPlan, home: Path) -> tuple[Fitting, Reported]:
    """The images of a task; their features are read when they are needed.

    Raises:
        ArtifactError: the pseudo-defects were not made yet.
    """
    table, synthesis = plan.pseudo()
    made = stored(table, plan.label, home, synthesis)
    if made is None:
        raise ArtifactError(f"the pseudo-defects of {plan.label} are not there; run jobs/sweep.py --task detection")
    rows = {row["image_id"]: row for row in plan.manifest.to_pylist()}
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.values():
        if row["is_defect"] and row["mask_uri"]:
            files[row["file_id"]].append(row)
    key_of = {r.image_id: r.row_keys()[0] for r in plan.requests()}

    def images(ids: Sequence[str], units: Iterable[str], masks: Sequence[tuple[MaskFile, ...]] = ()) -> Images:
        keys, files = tuple(key_of[i] for i in ids), tuple(image_file(rows[i]) for i in ids)
        return Images(home=home, key=plan.key, rows=keys, units=tuple(units), files=files, masks=tuple(masks))

    free = set(plan.normal_ids)
    pseudo_rows = [row for row in made.manifest.to_pylist() if row["group_id"] in free]
    pseudo = Images(
        home=home,
        key=plan.key,
        rows=tuple(RowKey(row["image_id"], "", 0) for row in pseudo_rows),
        units=tuple(row["group_id"] for row in pseudo_rows),
        files=tuple(map(image_file, pseudo_rows)),
        masks=tuple((mask_file(row),) for row in pseudo_rows),
    )
    masks = [tuple(map(mask_file, files[rows[i]["file_id"]])) for i in plan.defect_ids]
    if not any(masks):
        logger.warning("%s: no defect has a mask, so that there are no metrics of pixels", plan.label)
    return (
        Fitting(
            normals=images(plan.normal_ids, (plan.unit_of[i] for i in plan.normal_ids)),
            pseudo=pseudo,
            block_dims=plan.key.block_dims,
            backbone=plan.config.backbone,
        ),
        Reported(
            normals=images(plan.tested_ids, (plan.unit_of[i] for i in plan.tested_ids)),
            defects=images(plan.defect_ids, (rows[i]["defect"] for i in plan.defect_ids), masks if any(masks) else ()),
        ),
    )


def remarks(fitting: Fitting) -> list[str]:
    """Normal images that are constant, or so unlike the others that they may show defects, by the names of files."""
    normals, found = fitting.normals, []
    if flat := constant(normals):
        found.append(f"{len(flat)} normal images are of one colour, and teach nothing: {named(normals, flat)}")
    unit_of = dict(zip(normals.image_ids, normals.units, strict=True))
    half = set(parted(unit_of, 0.5, "halves")[0]) if len(set(normals.units)) > 1 else set()
    sides = [[i for i, name in enumerate(normals.image_ids) if (name in half) is side] for side in (True, False)]
    odd = suspects(normals, sides[0], sides[1], sum(fitting.block_dims)) if half else []
    if odd:
        found.append(
            f"{len(odd)} of {len(normals)} normal images look unlike the others; take out those that show defects: "
            + named(normals, odd)
        )
    return found


def references(plan: DetectionPlan, config: Any) -> tuple[RunConfig, ...]:
    """PatchCore as its paper has it."""
    return (RunConfig(name="patchcore", pretrained=False),)


def transform_of(run: RunConfig, fitting: Fitting, start: Any = None) -> FeatureTransform:
    """None: detectors read patches as they are."""
    return FeatureTransform.fit(None, fitting.block_dims, TransformConfig())


def transformed(data: Any, transform: FeatureTransform) -> Any:
    """The same data."""
    return data


def twin(run: RunConfig, fitting: Any, start: Any = None) -> RunConfig | None:
    """The run at c = 0, for any family; None where its method has no curvature."""
    flat_twin = get_method(run.name).flat_twin
    return None if flat_twin is None else replace(run, method=flat_twin(run.method))


def calibrated(run: RunConfig, fitting: Any, setting: Any, numbers: range, start: Any = None) -> RunConfig:
    """The run as it is: a detector's p-values come from normals of each draw, a segmenter has none."""
    return run


def validation_scores(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: Any = None
) -> Iterator[float]:
    """AUROC of normals that were not learned from against pseudo-defects that lie on them."""
    for number in numbers:
        held, sources = _held(fitting, setting, number)
        model = fit(run, fitting, setting, number, start)
        clean, painted = scores_of(model, held), scores_of(model, sources)
        yield float(roc_auc_score([0] * len(clean) + [1] * len(painted), np.concatenate([clean, painted])))


def _held(fitting: Fitting, setting: Setting, number: int) -> tuple[Images, Images]:
    """The calibration normals of a draw, and the pseudo-defects that lie on them.

    Raises:
        DataError: none lies on them.
    """
    _, held = sides(fitting.normals.image_ids, fitting.normals.units, setting, number)
    normals = fitting.normals.select(held)
    painted = _painted_on(fitting, normals)
    if not len(painted):
        raise DataError(
            f"no pseudo-defect lies on the {len(held)} calibration normals: raise --synthesis.per-class, or "
            "--calibration-share"
        )
    return normals, painted


def _painted_on(fitting: Fitting, normals: Images) -> Images:
    """The pseudo-defects that lie on these images."""
    there = set(normals.image_ids)
    return fitting.pseudo.select([i for i, source in enumerate(fitting.pseudo.units) if source in there])


def scores_of(model: AnomalyDetector, images: Images) -> np.ndarray:
    """Anomaly score of each image, in float64."""
    return np.concatenate([model.anomaly(batch).score.double().numpy() for batch in images.seen_by(model)])


def fit(run: RunConfig, fitting: Fitting, setting: Setting, number: int, start: Any = None) -> AnomalyDetector:
    """The detector of a draw, which learned from the normals that are not calibrated on.

    A detector of networks is first trained on most of them, in this process.
    """
    learned, _ = sides(fitting.normals.image_ids, fitting.normals.units, setting, number)
    normals = fitting.normals.select(learned)
    model: AnomalyDetector = run.model(sum(fitting.block_dims), start)
    if isinstance(model, TrainableDetector):
        training = training_of(run, fitting, setting, number)
        trained: Any = training.model()
        train_in_process(trained, training.item, training.config, lambda metrics, write: None)
        return finished(run, trained, fitting, setting, number)[0]
    model.fit(normals.seen_by(model), _painted_on(fitting, normals).seen_by(model))
    return model


def training_of(
    run: RunConfig, fitting: Fitting, setting: Setting, number: int, report_every: int = 50
) -> DetectorTraining:
    """How the networks of a draw's detector are trained, by this process or by Ray Train."""
    normals, _ = _trained_on(fitting, setting, number)
    recipe = normals.key.recipe
    assert recipe is not None  # features of detectors are never imported
    return DetectorTraining(
        run=run,
        dim=sum(fitting.block_dims),
        normals=normals,
        files=normals.files,
        backbone=fitting.backbone,
        recipe=recipe,
        pictures=tuple(load_textures(SynthesisConfig())[1]),
        report_every=report_every,
    )


def _trained_on(fitting: Fitting, setting: Setting, number: int) -> tuple[Images, Images]:
    """The normals that a draw's networks are trained on, and the others, which give the scale of their maps."""
    learned, _ = sides(fitting.normals.image_ids, fitting.normals.units, setting, number)
    normals = fitting.normals.select(learned)
    unit_of = dict(zip(normals.image_ids, normals.units, strict=True))
    later = set(parted(unit_of, SCALE_SHARE, [setting.seed, number, "later"])[0])
    there = [image_id in later for image_id in normals.image_ids]
    trained, scaling = ([i for i, held in enumerate(there) if held is side] for side in (False, True))
    return normals.select(trained), normals.select(scaling)


def finished(
    run: RunConfig, model: Any, fitting: Fitting, setting: Setting, number: int
) -> tuple[AnomalyDetector, float]:
    """A trained detector, fitted on those of the draw's normals that it was not trained on; nothing validates it."""
    model.eval()
    model.fit(_trained_on(fitting, setting, number)[1].seen_by(model))
    return cast(AnomalyDetector, model), math.nan


def fitted_on(fitting: Fitting, setting: Setting, number: int) -> tuple[str, ...]:
    """Ids of the normals that a draw learned from."""
    learned, _ = sides(fitting.normals.image_ids, fitting.normals.units, setting, number)
    return fitting.normals.select(learned).image_ids


def details(run: RunConfig, fitting: Fitting, setting: Setting, number: int, model: AnomalyDetector) -> dict[str, Any]:
    """What turns scores and maps into an answer: the scores of the calibration normals, the false-alarm rate, and the
    map value that the highest pixel of a calibration normal exceeds at that rate."""
    held, _ = _held(fitting, setting, number)
    scores, peaks = [], []
    for batch in held.seen_by(model):
        answer = model.anomaly(batch)
        scores += answer.score.double().tolist()
        peaks += answer.map.flatten(1).amax(1).double().tolist()
    return {
        "calibration": sorted(scores),
        "false_alarms": setting.false_alarms,
        "pixel_threshold": float(np.quantile(peaks, 1 - setting.false_alarms, method="higher")),
    }


def score(
    run: RunConfig, fitting: Fitting, reported: Reported, setting: Setting, number: int, start: Any = None
) -> Score:
    """Fit and calibrate on the normals of a draw, and look at every reported image once.

    `false_alarms` is the share of reported normals that are called anomalous, `detected` that of defects; the AUROC of
    each class of defects has the name of the class behind it.
    """
    begun = time.perf_counter()
    model = fit(run, fitting, setting, number, start)
    return score_model(model, fitting, reported, setting, number, time.perf_counter() - begun)


def score_model(
    model: AnomalyDetector, fitting: Fitting, reported: Reported, setting: Setting, number: int, fit_seconds: float
) -> Score:
    """Calibrate a fitted detector on the normals of its draw, and look at every reported image once."""
    begun = time.perf_counter()
    calibration = scores_of(model, _held(fitting, setting, number)[0])
    pixels = PixelMetrics()
    clean, anomalous = (_streamed(model, images, pixels) for images in (reported.normals, reported.defects))
    done = time.perf_counter()
    metrics = image_metrics(
        np.concatenate([clean, anomalous]), np.array([False] * len(clean) + [True] * len(anomalous))
    )
    metrics |= pixels.compute() if reported.defects.masks else {}
    for name in sorted(set(reported.defects.units)):
        of_class = anomalous[[unit == name for unit in reported.defects.units]]
        truth = [0] * len(clean) + [1] * len(of_class)
        metrics[f"auroc {name}"] = float(roc_auc_score(truth, np.concatenate([clean, of_class])))
    metrics |= {
        "false_alarms": float((p_values(clean, calibration) <= setting.false_alarms).mean()),
        "detected": float((p_values(anomalous, calibration) <= setting.false_alarms).mean()),
        "fit_seconds": fit_seconds,
        "predict_seconds": done - begun,
    }
    ids = (*reported.normals.image_ids, *reported.defects.image_ids)
    return Score(number=number, metrics=metrics, image_ids=ids, anomaly=np.concatenate([clean, anomalous]))


def _streamed(model: AnomalyDetector, images: Images, pixels: PixelMetrics) -> np.ndarray:
    """Scores of the images; their maps go into the pixel metrics and are forgotten.

    Defects without a mask are left out of these.
    """
    scores: list[np.ndarray] = []
    for batch in images.seen_by(model):
        answer = model.anomaly(batch)
        scores.append(answer.score.double().numpy())
        masks = torch.zeros_like(answer.map, dtype=torch.bool) if batch.targets is None else batch.targets > 0
        for anomaly_map, mask in zip(answer.map.numpy(), masks.numpy(), strict=True):
            if mask.any() or batch.targets is None:
                pixels.update(anomaly_map, mask)
    return np.concatenate(scores)

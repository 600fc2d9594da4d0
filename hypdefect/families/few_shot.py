"""Few-shot classification: which defect is it? A handful of labelled images a class, drawn from a support pool.

`Fitting` holds the pool and the normals; validation episodes are drawn inside the pool. `Reported` holds the queries.

Shapes: W ways (classes), D numbers a view.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np
import pyarrow as pa
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from torch import Tensor

from hypdefect.config import digest
from hypdefect.datasets import get_dataset
from hypdefect.datasets.split import Partition, check_task, make_partition, task_classes
from hypdefect.errors import ConfigError, DataError, NumericsError
from hypdefect.evaluation import RunConfig, Score, choose, usual_copies
from hypdefect.families.episodes import LabelledFeatures, build_episode, draw_support, first_support, sample_episode
from hypdefect.families.plan import DataConfig, Plan, image_requests, of_product, shuffled, task_label
from hypdefect.features.imported import Imported, card_of
from hypdefect.features.prompts import TEMPLATE, has_text_tower, load_prompts, prompts_of
from hypdefect.features.spec import FeatureTable, ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import (
    CENTRINGS,
    FEWEST_NORMALS,
    FeatureTransform,
    SideBySide,
    TransformConfig,
    part_choices,
)
from hypdefect.methods import get_method
from hypdefect.methods.blended import fitted_weights, ranges, worths
from hypdefect.methods.centred import centred, row_means
from hypdefect.methods.tempered import fitted_temperature, likelihood_loss
from hypdefect.metrics import calibration_error, chance_calibration_error
from hypdefect.predictor import ClassPredictor as Predictor
from hypdefect.types import EpisodeSpec, FewShotClassifier, SplitKind

__all__ = ["METRIC", "Predictor"]

METRIC = "val/episode/acc"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig(DataConfig):
    """The data side of a few-shot job."""

    k_shot: int = 5
    """Support images a class."""
    split: SplitKind = "random"
    """random: by image; grouped: images of one part never stand on both sides."""
    pool_per_class: int = 100
    """At most this many support candidates a class; 0: half of the set."""
    copies: int | None = None
    """Augmented copies extracted of each support candidate; default: as many as help, 4 at one shot and else 2."""
    max_normals: int = 400
    """Normal images used for whitening, or to choose a bank of normal patches from."""
    good_class: bool = False
    """Good parts are one more class, for methods that read no masks (AMC, appendix F)."""
    prompt_template: str = TEMPLATE
    """What a class is called where the backbone has a text tower (openclip:...); {} stands for its name."""
    class_prompts: tuple[str, ...] = ()
    """CLASS=PROMPT for classes that the template does not fit."""

    @property
    def title(self) -> str:
        return f"{task_label(self)}-k{self.k_shot}-{self.split}"

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if wrong := [text for text in self.class_prompts if not all(text.partition("=")[::2])]:
            raise ConfigError(f"class_prompts are written CLASS=PROMPT, got {wrong[0]!r}")
        for name, least in (("k_shot", 1), ("pool_per_class", 0), ("copies", 0), ("max_normals", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.pool_per_class <= self.k_shot:
            raise ConfigError(
                f"pool_per_class={self.pool_per_class} leaves no validation query beside k_shot={self.k_shot}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan(Plan):
    """Which image is a support candidate, a query or a normal."""

    config: TaskConfig
    partition: Partition
    pool_ids: tuple[str, ...]
    normal_ids: tuple[str, ...]
    source_ids: frozenset[str]
    """Images that pseudo-defects may lie on: the usable normal images; if there are none, the support candidates."""

    @property
    def split(self) -> str:
        return self.partition.kind

    def requests(self) -> list[ImageRequest]:
        """Every image once: support candidates with their copies, queries and normals without."""
        copies = dict.fromkeys([*self.normal_ids, *self.partition.query], 0) | dict.fromkeys(self.pool_ids, self.copies)
        return image_requests(self.manifest, copies, self.uses_mask)

    @property
    def copies(self) -> int:
        """Augmented copies of each support candidate."""
        most = usual_copies(self.config.k_shot) if self.config.copies is None else self.config.copies
        return most if self.imported is None else min(most, self.imported.copies)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each class; none where the backbone has no text tower.

        Raises:
            ConfigError: as `prompts_of`.
        """
        if self.imported or not has_text_tower(self.spec):
            return []
        given = dict(text.split("=", 1) for text in self.config.class_prompts)
        return prompts_of(self.classes, self.config.prompt_template, given)

    @property
    def searched_parts(self) -> int:
        return self.num_parts if self.key.grid is None else 1

    @property
    def independent_queries(self) -> int:
        """Queries, or in a grouped split their parts, as images of one part are alike."""
        queries = set(self.partition.query)
        columns = (self.manifest[c].to_pylist() for c in ("image_id", "group_id"))
        parts = {group or i for i, group in zip(*columns, strict=True) if i in queries}
        return len(parts if self.partition.kind == "grouped" else queries)

    @property
    def whitened(self) -> bool:
        return len(self.normal_ids) >= FEWEST_NORMALS

    @property
    def idle_fields(self) -> tuple[str, ...]:
        idle = [] if self.whitened else ["transform.whitening"]
        idle += [] if self.key.shape_dims and self.uses_mask else ["transform.shape_weight"]
        idle += [] if self.copies else ["support_copies"]
        return (*idle, "method.prototype_scale" if self.prompts else "method.text_share")  # text stands for prototypes

    def provenance(self) -> dict[str, object]:
        return Plan.provenance(self) | {
            "split": self.partition.kind,
            "partition_digest": digest([list(self.pool_ids), list(self.partition.query)]),
            "pool_images": len(self.pool_ids),
            "query_images": len(self.partition.query),
            "normal_images": len(self.normal_ids),
        }


P = TypeVar("P", bound=TaskPlan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    """What may be looked at: the support pool and the normals. There is no query in it."""

    pool: LabelledFeatures
    normals: dict[str, np.ndarray] | None
    block_dims: tuple[int, ...]
    shape_dims: int = 0
    uri_of: Mapping[str, str] = field(default_factory=dict)
    """Where each image of the pool lies."""
    widths: tuple[int, ...] = ()
    """Numbers a view of each member of a blend, whose features stand side by side."""

    @property
    def dim(self) -> int | tuple[int, ...]:
        """D; of a blend, that of each member."""
        return self.widths or self.pool.dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """The queries."""

    queries: LabelledFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a run is told beside its configuration."""

    k_shot: int
    seed: int = 0
    split: SplitKind = "random"
    """How validation episodes part the pool."""
    supports: Literal["draws", "first", "pool"] = "draws"
    """draws: K random images a class; first: the first K by file name (AMC's rule); pool: every image of the pool."""

    @property
    def episodes(self) -> EpisodeSpec:
        """Validation episodes: all ways, K supports, every image left as query."""
        return EpisodeSpec(k_shot=self.k_shot, seed=self.seed, split=self.split)


@dataclass(frozen=True, slots=True)
class MetaStart:
    """What a meta-training run gives to a task; either part may be empty.

    `projection[view]` `[D, d]` follows the transform for configurations whose `features` are "meta". `core` are the
    weights that `method` starts from, on these features (on plain ones without a projection).
    """

    method: str
    projection: dict[str, Tensor]
    core: dict[str, Tensor]
    mean: dict[str, Tensor] = field(default_factory=dict)
    """Of each projected view, `[D]`: what is subtracted before it."""

    def weights(self, run: RunConfig) -> Any:
        """The starting weights of a configuration, None where it starts from scratch; of a blend, those of each."""
        if run.blend:
            return [self.weights(member) for member in run.blend]
        fits = run.features == ("meta" if self.projection else "plain")
        return self.core if self.core and fits and run.pretrained and run.name == self.method else None


def remarks(fitting: Fitting) -> list[str]:
    """Nothing is said of few-shot data."""
    return []


def setting(config: Any) -> Setting:
    """K, seed and split of a job."""
    return Setting(k_shot=config.k_shot, seed=config.seed, split=config.split)


def check(plan: TaskPlan, setting: Setting) -> None:
    """Raises DataError where a class of the pool has too few images (or groups) for a validation episode."""
    columns = (plan.manifest[c].to_pylist() for c in ("image_id", "defect", "group_id"))
    about = {i: (defect, group or i) for i, defect, group in zip(*columns, strict=True)}
    ids = np.array(plan.pool_ids)
    outline = LabelledFeatures(
        class_names=plan.classes,
        image_ids=ids,
        labels=np.array([plan.classes.index(about[i][0]) for i in plan.pool_ids]),
        groups=np.array([about[i][1] for i in plan.pool_ids]),
        table=FeatureTable(image_ids=ids, aug_index=np.zeros(len(ids), np.int64), views={}),
    )
    sample_episode(outline, setting.episodes, 0)


def plan(config: TaskConfig, manifest: pa.Table, imported: Imported | None = None) -> TaskPlan:
    """Decide which images take which part.

    Raises:
        ConfigError: the set has several products and none, or an unknown one, is named; good parts as a class beside
            masks, which vectors are made under.
        DataError: a class is too small for K supports and a query.
    """
    card = card_of(config.dataset) if imported else get_dataset(config.dataset)
    manifest = of_product(config, manifest)
    classes = task_classes(manifest, card.good_is_class or config.good_class)
    if len(classes) < 2:
        raise DataError(f"dataset {config.dataset} has {len(classes)} few-shot classes ({', '.join(classes)}); needs 2")
    partition = make_partition(manifest, config.split, config.partition, classes)
    check_task(manifest, partition, config.k_shot)
    columns = ["image_id", "file_id", "defect", "is_defect", "mask_id", "group_id", "split"]
    rows = manifest.select(columns).to_pylist()
    defect_of = {row["image_id"]: row["defect"] for row in rows}
    pool: list[str] = []
    for name in classes:
        members = shuffled((i for i in partition.pool if defect_of[i] == name), config.partition)
        pool += members[: config.pool_per_class or None]
    queries, in_pool = set(partition.query), set(pool)
    unit = "group_id" if partition.kind == "grouped" else "file_id"
    tested = {row[unit] for row in rows if row["image_id"] in queries} - {""}
    normals = [
        row["image_id"]
        for row in rows
        if not row["is_defect"]
        and row["image_id"] not in queries
        and row[unit] not in tested
        and (partition.kind != "official" or row["split"] == "train")
    ]
    if card.good_is_class:  # supports stand for the normals a factory has anyway; what is in neither side stays out
        normals = [i for i in normals if i in in_pool]
    task = TaskPlan(
        config=config,
        card=card,
        manifest=manifest,
        classes=classes,
        partition=partition,
        pool_ids=tuple(sorted(pool)),
        normal_ids=tuple(shuffled(normals, 0)[: config.max_normals]),  # alike in all partitions, where they can be
        source_ids=frozenset(normals or partition.pool),
        uses_mask=any(row["mask_id"] for row in rows if row["defect"] in classes),
        imported=imported,
    )
    if config.good_class and task.uses_mask and task.key.grid is None:
        raise ConfigError(
            "good_class: a good part has no mask, which would tell it from defects: use --space amc and a backbone of "
            "patches, such as --backbone patchcore_lite0"
        )
    return task


def after_the_test(plan: P, setting: Setting, shots: int) -> tuple[P, Setting]:
    """What a last fit learns from: `shots` images of each class, or as many as the smallest class has, of the support
    pool and the queries together."""
    labelled = {*plan.pool_ids, *plan.partition.query}
    members: dict[str, list[str]] = {name: [] for name in plan.classes}
    for image_id, name in zip(plan.manifest["image_id"].to_pylist(), plan.manifest["defect"].to_pylist(), strict=True):
        if image_id in labelled:
            members[name].append(image_id)
    fewest = min(shots, *map(len, members.values()))
    pool = [i for own in members.values() for i in shuffled(own, setting.seed)[:fewest]]
    return replace(plan, pool_ids=tuple(sorted(pool))), replace(setting, k_shot=fewest, supports="pool")


def load(plan: TaskPlan, home: Path) -> tuple[Fitting, Reported]:
    """Read a task's features from the store.

    Raises:
        ConfigError: features that are patches.
        ArtifactError: rows are missing (run the extraction first) or a part is damaged.
    """
    if plan.key.grid is not None:
        raise ConfigError(f"{plan.spec.name} gives patches, which this method does not read; use another backbone")
    return read(plan, home)


def read(plan: TaskPlan, home: Path) -> tuple[Fitting, Reported]:
    """A task's features, of whatever kind. Raises ArtifactError as `load`."""
    store = FeatureStore(home, plan.key)
    requests = {r.image_id: r for r in plan.requests()}
    table = store.load([key for r in requests.values() for key in r.row_keys()])
    columns = (plan.manifest[c].to_pylist() for c in ("image_id", "defect", "group_id"))
    text = load_prompts(plan.spec, plan.prompts, home).numpy() if plan.prompts else None
    about = {i: (defect, group or i) for i, defect, group in zip(*columns, strict=True)}

    def labelled(ids: tuple[str, ...]) -> LabelledFeatures:
        return LabelledFeatures(
            class_names=plan.classes,
            image_ids=np.array(ids),
            labels=np.array([plan.classes.index(about[i][0]) for i in ids]),
            groups=np.array([about[i][1] for i in ids]),
            table=table.select(table.rows_of(ids)),
            text=text,
        )

    normals = None
    if plan.normal_ids:
        rows = table.rows_of(plan.normal_ids, max_aug=0)
        normals = {view: values[rows] for view, values in table.views.items()}
    fitting = Fitting(
        pool=labelled(plan.pool_ids),
        normals=normals,
        block_dims=plan.key.block_dims,
        shape_dims=plan.key.shape_dims,
        uri_of=dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["uri"].to_pylist(), strict=True)),
    )
    return fitting, Reported(queries=labelled(plan.partition.query))


def transform_of(run: RunConfig, fitting: Fitting, start: MetaStart | None = None) -> FeatureTransform | SideBySide:
    """The transform of a run, fitted on the normals; on meta-trained features with the projection behind it."""
    if run.blend:
        return SideBySide.of([_transform_of(member, fitting, start) for member in run.blend])
    return _transform_of(run, fitting, start)


def _transform_of(run: RunConfig, fitting: Fitting, start: MetaStart | None) -> FeatureTransform:
    transform = FeatureTransform.fit(fitting.normals, fitting.block_dims, run.transform, fitting.shape_dims)
    if run.features == "meta" and start is not None:
        transform = transform.projected(start.projection, start.mean)
    return transform


@overload
def transformed(data: Fitting, transform: FeatureTransform | SideBySide) -> Fitting: ...
@overload
def transformed(data: Reported, transform: FeatureTransform | SideBySide) -> Reported: ...
def transformed(data: Fitting | Reported, transform: FeatureTransform | SideBySide) -> Fitting | Reported:
    """The same images with transformed features; normals are not needed behind a transform."""
    if isinstance(transform, SideBySide):
        seen: list[Any] = [transformed(data, member) for member in transform.members]
        return cast(Fitting | Reported, beside(seen))
    if isinstance(data, Reported):
        return Reported(queries=_behind(data.queries, transform))
    return replace(data, pool=_behind(data.pool, transform), normals=None)


def _behind(features: LabelledFeatures, transform: FeatureTransform) -> LabelledFeatures:
    text = None if features.text is None else transform.text(torch.from_numpy(features.text)).numpy()
    return replace(features, table=transform.table(features.table), text=text)


D = TypeVar("D", Fitting, Reported)


def beside(data: Sequence[D]) -> D:
    """The same images as the members of a blend see them: their transformed features side by side."""
    if isinstance(data[0], Reported):
        return replace(data[0], queries=_beside([one.queries for one in data]))
    pools = [one.pool for one in data]
    return replace(data[0], pool=_beside(pools), widths=tuple(pool.dim for pool in pools))


def _beside(parts: Sequence[LabelledFeatures]) -> LabelledFeatures:
    first = parts[0]
    views = {view: np.concatenate([one.table.views[view] for one in parts], -1) for view in first.table.views}
    text = None if first.text is None else np.concatenate([one.text for one in parts if one.text is not None], 1)
    return replace(first, table=replace(first.table, views=views), text=text)


def _apart(fitting: Fitting) -> list[Fitting]:
    """What each member sees of features side by side."""
    pools = []
    for number in range(len(fitting.widths)):
        table, text = fitting.pool.table, fitting.pool.text
        of_view, of_text = ranges(fitting.widths, number)
        views = {view: x[..., of_view] for view, x in table.views.items()}
        text = None if text is None else text[:, of_text]
        pools.append(replace(fitting.pool, table=replace(table, views=views), text=text))
    return [replace(fitting, pool=pool, widths=()) for pool in pools]


def references(plan: TaskPlan, config: Any) -> tuple[RunConfig, ...]:
    """Nearest prototypes, the defaults first: both metrics, three whitenings, with and without copies, all parts and
    each alone, as they are and centred."""
    return tuple(
        RunConfig(
            name="prototype",
            method={"metric": metric},
            transform=TransformConfig(whitening=whitening, parts=parts, centring=centring),
            support_copies=copies,
            pretrained=False,  # it has no weights
        )
        for metric, whitening, copies, parts, centring in product(
            ("cosine", "euclidean"),
            (3.0, None, 0.1),
            (None, 0),
            part_choices(plan.searched_parts),
            CENTRINGS if plan.searched_parts > 1 else CENTRINGS[:1],
        )
    )


def twin(run: RunConfig, fitting: Fitting, start: MetaStart | None = None) -> RunConfig | None:
    """The run's twin at c = 0, distances matched on the images of the pool; None where its method has none."""
    flat_twin = get_method(run.name).flat_twin
    if flat_twin is None:
        return None
    if run.blend:
        twins: list[Any] = [twin(member, seen, start) for member, seen in zip(run.blend, _apart(fitting), strict=True)]
        return replace(twins[0], temperature=1.0, blend=tuple(twins))
    batch = fitting.pool.batch(np.arange(len(fitting.pool)))
    if run.transform.centring == "supports":  # the pool lies round its mean as a task's rows round theirs
        batch = centred(batch, row_means(batch))
    weights = start.weights(run) if start else None
    return replace(run, method=flat_twin(run.method, fitting.pool.dim, batch, weights))


def validation_scores(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: MetaStart | None = None
) -> Iterator[float]:
    """Query accuracy of each validation episode, all of them drawn inside the support pool."""
    for answer in _validated(run, fitting, setting, numbers, start):
        yield from accuracies([answer])


def _validated(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: MetaStart | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `[Q W]` and labels `[Q]` of the queries of each validation episode."""
    weights = start.weights(run) if start else None
    for number in numbers:
        episode = build_episode(fitting.pool, setting.episodes, number, copies=run.copies(setting.k_shot))
        classifier: FewShotClassifier = run.model(fitting.dim, weights)
        classifier.adapt(episode.support, len(episode.class_names))
        yield classifier.logits(episode.query), episode.query.labels


def calibrated(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: MetaStart | None = None
) -> RunConfig:
    """The run at the temperature at which the query labels of these validation episodes are likeliest; a blend with its
    weights anew, without members that get none.

    Raises:
        NumericsError: logits that are not finite, or a blend that says nothing of the labels.
    """
    if run.blend:
        sides = _apart(fitting)
        return _blend_of(
            run.blend,
            setting.k_shot,
            [answers(member, seen, setting, numbers, start) for member, seen in zip(run.blend, sides, strict=True)],
        )
    return replace(run, temperature=fitted_temperature(answers(run, fitting, setting, numbers, start)))


Answer = tuple[Tensor, Tensor]
"""Logits `[Q W]` and labels `[Q]` of a validation episode."""


def answers(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: MetaStart | None = None
) -> list[Answer]:
    """To each validation episode, what the run says without its temperature.

    Raises:
        NumericsError: logits that are not finite.
    """
    found = list(_validated(replace(run, temperature=1.0), fitting, setting, numbers, start))
    if not all(torch.isfinite(logits).all() for logits, _ in found):
        raise NumericsError(f"logits of {run.name} are not finite")
    return found


def settle(
    runs: Sequence[RunConfig], answered: Sequence[list[Answer] | None], setting: Setting
) -> tuple[RunConfig, list[float]]:
    """Of some candidates, the defaults first: their blend where labels are likelier by more than a standard error, else
    the defaults.

    The gain is taken on episodes that fitted neither weights nor temperature: every other one is answered with
    those of the rest, which have other supports, but mostly the same queries. Of a small pool an episode has a dozen
    queries, too few for accuracy to show a gain. What is taken then gets its weights, or its temperature, from all.

    Args:
        answered: of each run its `answers` to the same episodes; None for one that fails numerically. Such a run takes
            no part, nor does one that answers as an earlier one does.

    Returns:
        The configuration, and its query accuracy on each episode; [0.0] where all fail.
    """
    sound: dict[int, list[Answer]] = {}
    for place, own in enumerate(answered):
        if own is not None and not any(_alike(own, other) for other in sound.values()):
            sound[place] = own
    if not sound:
        return runs[0], [0.0]
    together = _stacked(list(sound.values()))
    if len(together) > 1 and list(sound) != [0]:
        with contextlib.suppress(NumericsError):  # no candidate says anything of the labels
            blended = _weighted(together)
            if 0 not in sound or choose([_likelihoods(_tempered(sound[0])), _likelihoods(blended)]):
                taken = _blend_of([runs[place] for place in sound], setting.k_shot, list(sound.values()))
                return taken, accuracies(blended)
    if 0 not in sound:
        return runs[0], [0.0] * len(together)
    return replace(runs[0], temperature=fitted_temperature(sound[0])), accuracies(sound[0])


def _weighted(episodes: list[Answer]) -> list[Answer]:
    """The blend's answers to each episode, its weights from every other one."""
    weights = [fitted_weights(episodes[1 - first :: 2]) for first in (0, 1)]
    return [(_sum(weights[n % 2], logits), labels) for n, (logits, labels) in enumerate(episodes)]


def _tempered(episodes: list[Answer]) -> list[Answer]:
    """The same of a single run and its temperature."""
    temperatures = [fitted_temperature(episodes[1 - first :: 2]) for first in (0, 1)]
    return [(logits / temperatures[n % 2], labels) for n, (logits, labels) in enumerate(episodes)]


def _likelihoods(episodes: list[Answer]) -> list[float]:
    """Mean log likelihood of each episode's labels."""
    return [-likelihood_loss([one], 1.0) for one in episodes]


def _blend_of(runs: Sequence[RunConfig], k_shot: int, answered: Sequence[list[Answer]]) -> RunConfig:
    """The blend whose answers are likeliest; where one run has all the weight, that run at its temperature."""
    together = _stacked(answered)
    weights = fitted_weights(together)
    worth = worths(together, weights)
    order = sorted((m for m, weight in enumerate(weights) if weight), key=lambda m: -worth[m])
    members = [replace(runs[m], temperature=1 / weights[m]) for m in order]
    if len(members) == 1:
        return members[0]
    members = [replace(member, support_copies=member.copies(k_shot)) for member in members]
    return replace(members[0], temperature=1.0, blend=tuple(members))


def _alike(answers: list[Answer], others: list[Answer]) -> bool:
    return all(torch.equal(one, other) for (one, _), (other, _) in zip(answers, others, strict=True))


def _stacked(answered: Sequence[list[Answer]]) -> list[Answer]:
    """Of each episode, logits `[M Q W]` of all members."""
    return [(torch.stack([logits for logits, _ in own]), own[0][1]) for own in zip(*answered, strict=True)]


def _sum(weights: Sequence[float], logits: Tensor) -> Tensor:
    return torch.tensordot(torch.tensor(weights, dtype=torch.float64), logits.double(), 1)


def accuracies(answered: Sequence[Answer]) -> list[float]:
    """Query accuracy of each validation episode."""
    return [float((logits.argmax(1) == labels).double().mean()) for logits, labels in answered]


def supports_of(fitting: Fitting, setting: Setting, number: int) -> np.ndarray:
    """Positions in the pool of the supports of a draw.

    Raises:
        DataError: a class has fewer than K images.
    """
    if setting.supports == "pool":
        return np.arange(len(fitting.pool))
    if setting.supports == "first":
        return first_support(fitting.pool, setting.k_shot, fitting.uri_of)
    return draw_support(fitting.pool, setting.k_shot, setting.seed, number)


def fitted_on(fitting: Fitting, setting: Setting, number: int) -> tuple[str, ...]:
    """Ids of the supports of a draw."""
    return tuple(fitting.pool.image_ids[supports_of(fitting, setting, number)].tolist())


def details(
    run: RunConfig, fitting: Fitting, setting: Setting, number: int, model: FewShotClassifier
) -> dict[str, Any]:
    """A few-shot classifier needs nothing beside its tensors."""
    return {}


def fit(
    run: RunConfig, fitting: Fitting, setting: Setting, number: int, start: MetaStart | None = None
) -> FewShotClassifier:
    """The classifier of a draw's supports."""
    support = fitting.pool.batch(supports_of(fitting, setting, number), copies=run.copies(setting.k_shot))
    classifier: FewShotClassifier = run.model(fitting.dim, start.weights(run) if start else None)
    classifier.adapt(support, fitting.pool.n_way)
    return classifier


def score(
    run: RunConfig,
    fitting: Fitting,
    reported: Reported,
    setting: Setting,
    number: int,
    start: MetaStart | None = None,
) -> Score:
    """Fit on the supports of a draw and score every query once."""
    begun = time.perf_counter()
    classifier = fit(run, fitting, setting, number, start)
    fitted = time.perf_counter()
    queries = reported.queries
    batch = queries.batch(np.arange(len(queries)))
    probabilities = classifier.logits(batch).softmax(1).numpy()
    done = time.perf_counter()
    truth, predicted = batch.labels.numpy(), probabilities.argmax(1)
    confidence = probabilities.max(1).astype(np.float64)
    metrics = {
        "acc": float((truth == predicted).mean()),
        "balanced_acc": float(balanced_accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "ece": calibration_error(confidence, truth == predicted),
        "ece_by_chance": chance_calibration_error(confidence),
        "fit_seconds": fitted - begun,
        "predict_seconds": done - fitted,
    }
    return Score(
        number=number,
        metrics=metrics,
        image_ids=batch.image_ids,
        predicted=predicted,
        probabilities=probabilities,
        confusion=confusion_matrix(truth, predicted, labels=np.arange(fitting.pool.n_way)),
    )

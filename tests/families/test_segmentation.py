"""Segmentation: images are parted without leaks, targets are put together, training gives what it saw best."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hypdefect.datasets.ingest import ingest
from hypdefect.distributed.networks import settings_of
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import segmentation
from hypdefect.families.image_files import ImageFile, MaskFile
from hypdefect.families.plan import prepare
from hypdefect.families.segmentation import Fitting, Reported, Setting, TaskConfig
from hypdefect.families.segmentation_training import Marked, Painted, epoch_of, measured, scores_of, sized
from hypdefect.features import backbones, timm_networks
from hypdefect.features.backbones import BACKBONES, get_backbone
from hypdefect.features.extract import RecipeConfig
from hypdefect.files import sha256
from hypdefect.images import regions
from hypdefect.images.regions import as_values, cleaned_classes
from hypdefect.metrics import SegmentationMetrics
from hypdefect.predictor import Predictor, Segmentation, save_model, segmentation_of
from hypdefect.training import fit
from tests.tiny_dataset import READER_TREES, make_mtd_tree

TINY = {"network": "tiny_random", "width": 16, "images": 2, "items_per_step": 1, "steps": 6, "lr": 3e-3}


def setup_module() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("HYPDEFECT_DATA", raising=False)
        tree = make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=20)
        yield TaskConfig(
            dataset="mtd", root=tree, split="random", backbone="tiny_random", recipe=RecipeConfig(whole_size=64)
        )


@pytest.fixture(scope="module")
def task(job: TaskConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Fitting, Reported]:
    plan = prepare(segmentation, job)
    return plan, *segmentation.load(plan, tmp_path_factory.mktemp("unused"))


def saved(folder: Path, run: RunConfig, model: Any, task: Any) -> None:
    plan, fitting, _ = task
    save_model(
        folder,
        run_config=run,
        model=model,
        class_names=plan.classes,
        transform=segmentation.transform_of(run, fitting),
        backbone=plan.config.backbone,
        recipe=plan.config.recipe,
        uses_mask=False,
        provenance={},
    )


def test_files_are_parted_in_three_each_with_every_class(task: Any) -> None:
    plan, fitting, reported = task
    sides = [set(ids) for ids in (plan.learned_ids, plan.validated_ids, plan.reported_ids)]
    assert len(set.union(*sides)) == sum(map(len, sides))
    labels = [{n for masks in images.masks for n, _ in masks} for images in (fitting.learned, fitting.validated)]
    assert labels == [set(range(1, len(plan.classes) + 1))] * 2
    assert {n for masks in reported.images.masks for n, _ in masks} == labels[0]
    assert len(sides[1]) / sum(map(len, sides)) == pytest.approx(0.1, abs=0.05)
    again = segmentation.plan(plan.config, plan.manifest)
    assert again.reported_ids == plan.reported_ids
    other = segmentation.plan(replace(plan.config, partition=1), plan.manifest)
    assert other.reported_ids != plan.reported_ids


def test_images_of_a_group_stay_together(task: Any) -> None:
    plan, _, _ = task
    rows = plan.manifest.to_pylist()
    for row in rows:
        row["group_id"] = f"part {int(row['file_id'][:8], 16) % 23}" if row["is_defect"] else row["file_id"]
    manifest = pa.Table.from_pylist(rows, schema=plan.manifest.schema)
    grouped = segmentation.plan(replace(plan.config, split="grouped"), manifest)
    group_of = {row["image_id"]: row["group_id"] for row in rows}
    where = defaultdict(set)
    for side in ("learned_ids", "validated_ids", "reported_ids"):
        for image_id in getattr(grouped, side):
            where[group_of[image_id]].add(side)
    assert all(len(sides) == 1 for sides in where.values())


def with_official_test(plan: Any, **values: Any) -> pa.Table:
    """Three pairs of each class are the test; of the images of the others every second one is called validation."""
    rows = plan.manifest.to_pylist()
    for defect in {row["defect"] for row in rows}:
        for i, row in enumerate(row for row in rows if row["defect"] == defect):
            row["group_id"] = f"{defect} {i // 2}"
            row["split"] = "test" if i < 6 else ("train", "val")[i % 2]
    rows[0] |= values
    return pa.Table.from_pylist(rows, schema=plan.manifest.schema)


@pytest.mark.parametrize("split", ["random", "grouped"])
def test_an_official_test_is_reported_on(task: Any, split: Any) -> None:
    plan, _, _ = task
    manifest = with_official_test(plan)
    official = segmentation.plan(replace(plan.config, split=split), manifest)
    split_of = {row["image_id"]: row["split"] for row in manifest.to_pylist()}
    assert official.split == "official"
    assert set(official.reported_ids) == {i for i, side in split_of.items() if side == "test"}
    held = 2 if split == "grouped" else 1  # the tile or image that is nearest to a tenth of the 14 others
    assert (len(official.validated_ids), len(official.learned_ids)) == (6 * held, 6 * (14 - held))
    other = segmentation.plan(replace(plan.config, split=split, partition=1), manifest)
    assert other.reported_ids == official.reported_ids
    assert other.validated_ids != official.validated_ids
    fewer = segmentation.plan(replace(plan.config, split=split, max_normals=2), manifest)
    assert fewer.reported_ids == official.reported_ids
    assert len(fewer.learned_ids) < len(official.learned_ids)


def test_an_official_test_that_leaks_or_lacks_a_class_is_not_followed(task: Any) -> None:
    plan, _, _ = task
    grouped = replace(plan.config, split="grouped")
    torn = with_official_test(plan, split="train")
    assert segmentation.plan(grouped, torn).split == "grouped"
    assert segmentation.plan(plan.config, torn).split == "official"  # no file stands on both sides
    rows = [row | {"split": "train"} if row["defect"] == "crack" else row for row in torn.to_pylist()]
    lacking = pa.Table.from_pylist(rows, schema=torn.schema)
    untold = pa.Table.from_pylist([row | {"split": ""} for row in rows], schema=torn.schema)
    cracks = [row["file_id"] for row in rows if row["defect"] == "crack"]
    rows = [row | {"split": "test"} if row["file_id"] in cracks[1:] else row for row in rows]
    scarce = pa.Table.from_pylist(rows, schema=torn.schema)  # one crack to learn from and to validate on
    for config in (plan.config, grouped):
        for manifest in (lacking, scarce):
            found, expected = segmentation.plan(config, manifest), segmentation.plan(config, untold)
            assert found.split == config.split
            assert found.reported_ids == expected.reported_ids
            assert found.validated_ids == expected.validated_ids


def test_a_target_has_the_class_of_every_mask_of_its_file(task: Any) -> None:
    plan, fitting, _ = task
    rows = {row["image_id"]: row for row in plan.manifest.to_pylist()}
    seen = set()
    for number, image_id in enumerate(fitting.learned.image_ids):
        image, target = fitting.learned.read(number)
        assert target.shape == image.shape[:2]
        row = rows[image_id]
        expected = {plan.classes.index(row["defect"]) + 1} if row["is_defect"] else set()
        assert set(np.unique(target)) - {0} == expected
        seen |= expected
    assert seen == set(range(1, len(plan.classes) + 1))


def test_a_mask_that_changed_since_it_was_ingested_is_refused(task: Any, tmp_path: Path) -> None:
    _, fitting, _ = task
    mask = next(masks[0][1] for masks in fitting.learned.masks if masks)
    with Image.open(mask.uri) as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png changed since its manifest was written; run jobs/ingest\.py again"):
        replace(mask, uri=str(tmp_path / "mask.png")).read()
    assert mask.read().any()


def test_an_item_depends_on_its_number_and_turns_the_target_with_the_image(task: Any) -> None:
    _, fitting, _ = task
    once = TINY | {"rare": 0.0}
    training = segmentation.training_of(RunConfig(name="fpn", method=once), fitting, Setting(), 0)
    first, again, other = training.item(3), training.item(3), training.item(4)
    assert torch.equal(first.views["pixels"], again.views["pixels"])
    assert not torch.equal(first.views["pixels"], other.views["pixels"])
    pieces = segmentation.training_of(RunConfig(name="fpn", method=once | {"smallest": 0.5}), fitting, Setting(), 0)
    assert not torch.equal(pieces.item(3).views["pixels"], first.views["pixels"])
    assert first.targets is not None
    assert first.targets.shape == (2, 64, 64)
    epoch = {image_id for i in range(len(fitting.learned) // 2) for image_id in training.item(i).image_ids}
    assert len(epoch) == 2 * (len(fitting.learned) // 2)  # every image once before any comes again
    there, turned = [], []
    for number in range(40):
        batch = training.item(number)
        assert batch.targets is not None
        for pixels, target in zip(batch.views["pixels"], batch.targets, strict=True):
            for gaps, marked in ((there, target > 0), (turned, target.rot90(2, (0, 1)) > 0)):
                if marked.sum() > 20:
                    grey = pixels.mean(0)
                    gaps.append(float((grey[marked].mean() - grey[~marked].mean()).abs()))
    assert np.mean(there) > 1.5 * np.mean(turned)


def blank(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.int64)


def test_a_thin_mark_stays_where_an_image_is_made_smaller() -> None:
    image, target = blank(2000, 1200)
    target[:, 603] = 2
    target[102:106, 100:104] = 1
    marked = sized(image, target, 256)[1].numpy()
    assert (marked[:, 603 * 256 // 1200] == 2).all()
    assert (marked == 2).sum() == 256
    assert (marked == 1).sum() == 1
    assert marked[104 * 256 // 2000, 102 * 256 // 1200] == 1


def test_a_thin_mark_takes_no_cell_of_another() -> None:
    image, target = blank(1024, 1024)
    target[400:403, 400:403] = 2
    target[:, 403] = 1  # in the same cell, and above and below it
    marked = sized(image, target, 256)[1].numpy()
    assert marked[100, 100] == 2
    assert (np.delete(marked[:, 100], 100) == 1).all()


def test_a_cell_has_the_class_of_most_of_its_area() -> None:
    rng = np.random.default_rng(0)
    image, target = blank(96, 128)
    target[:] = np.kron(rng.integers(0, 3, (8, 8)), np.ones((12, 16), np.int64))
    assert (sized(image, target, 8)[1].numpy() == target[::12, ::16]).all()
    target[1::2, ::2] = 0  # a quarter of each cell, which is where nearest pixels are looked for
    assert (sized(image, target, 48)[1].numpy() == np.kron(target[::12, 1::16], np.ones((6, 6), np.int64))).all()


def test_a_pixel_on_the_edge_of_two_cells_counts_for_each_by_its_part() -> None:
    image, target = blank(3, 3)
    target[:, 1:] = 1  # half a pixel of the first cell, which is one and a half pixels wide
    assert sized(image, target, 2)[1].tolist() == [[0, 1], [0, 1]]


def test_a_target_that_is_not_made_smaller_is_that_of_nearest_pixels() -> None:
    for height, width in ((200, 200), (256, 256), (7, 90)):
        image, target = blank(height, width)
        target[:] = np.random.default_rng(height).integers(0, 4, target.shape)
        y, x = ((2 * np.arange(256) + 1) * n // 512 for n in (height, width))
        assert (sized(image, target, 256)[1].numpy() == target[np.ix_(y, x)]).all()


def test_a_mark_inside_another_one_stays_whatever_their_names(tmp_path: Path) -> None:
    files = []
    for name, size in (("image", 0), ("large", 20), ("small", 4)):
        marked = np.zeros((24, 24), dtype=np.uint8)
        marked[2 : 2 + size, 2 : 2 + size] = 255
        Image.fromarray(marked).save(tmp_path / f"{name}.png")
        files.append((str(path := tmp_path / f"{name}.png"), sha256(path.read_bytes())))
    image, *masks = files
    large, small = (MaskFile(*mask, image[0], (24, 24)) for mask in masks)
    for first, second in ((large, small), (small, large)):
        images = Marked(files=(ImageFile(*image),), masks=(((1, first), (2, second)),), image_ids=("a",))
        counts = np.bincount(images.read(0)[1].ravel(), minlength=3)
        assert counts.tolist() == [176, *((384, 16) if first is large else (16, 384))]


def test_images_of_rare_classes_come_more_often(task: Any) -> None:
    _, fitting, _ = task
    labels = [(1,)] * 3 + [(1, 2)] + [(2,)] * 15 + [(3,)] * 41 + [()] * 40
    a_mask = next(masks[0][1] for masks in fitting.learned.masks if masks)
    images = Marked(
        files=fitting.learned.files[:1] * 100,
        masks=tuple(tuple((label, a_mask) for label in of) for of in labels),
        image_ids=tuple(map(str, range(100))),
    )
    assert epoch_of(images, 0.0, 0) == tuple(range(100))
    counts = Counter(epoch_of(images, 0.25, 0))  # class 1: sqrt(0.25 / 0.04) = 2.5 times; class 2: 1.25
    assert {counts[i] for i in range(4)} == {2, 3}
    assert {counts[i] for i in range(4, 19)} == {1, 2}
    several = [Counter(epoch_of(images, 0.25, seed)) for seed in range(200)]
    assert np.mean([[c[i] for i in range(4)] for c in several]) == pytest.approx(2.5, abs=0.1)
    assert np.mean([[c[i] for i in range(4, 19)] for c in several]) == pytest.approx(1.25, abs=0.1)
    assert {counts[i] for i in range(19, 100)} == {1}
    assert len({tuple(c[i] for i in range(19)) for c in several}) > 150


def test_training_shows_an_epoch_as_often_as_its_classes_ask_for(task: Any) -> None:
    _, fitting, _ = task
    run = RunConfig(name="fpn", method=TINY | {"images": 1, "rare": 1.0})
    training = segmentation.training_of(run, fitting, Setting(), 0)
    epoch = epoch_of(fitting.learned, 1.0, 0)
    assert len(epoch) > 1.3 * len(fitting.learned)
    seen = Counter(training.item(i).image_ids[0] for i in range(len(epoch)))
    assert seen == Counter(fitting.learned.image_ids[i] for i in epoch)
    other = segmentation.training_of(run, fitting, Setting(), 1)
    assert other.epoch != training.epoch


def test_defects_of_other_images_are_pasted_by_chance(task: Any) -> None:
    _, fitting, _ = task
    settings: dict[str, Any] = TINY | {"images": 1, "rare": 0.0, "jitter": 0.0}

    def items(chance: float) -> list[Any]:
        run = RunConfig(name="fpn", method=settings | {"pasted": chance})
        training = segmentation.training_of(run, fitting, Setting(), 0)
        return [training.item(number) for number in range(len(fitting.learned))]

    def marked(batches: list[Any]) -> float:
        return float(np.mean([(batch.targets > 0).float().mean() for batch in batches]))

    never, half, always = items(0.0), items(0.5), items(1.0)
    assert marked(never) < marked(half) < marked(always)
    assert all(torch.equal(a.views["pixels"], b.views["pixels"]) for a, b in zip(always, items(1.0), strict=True))
    labels = [len(set(batch.targets.unique().tolist()) - {0}) for batch in always]
    assert max(labels) == 2  # of images with one class each
    assert min(labels) == 1  # good parts get one, too
    with pytest.raises(ConfigError, match="pasted"):
        RunConfig(name="fpn", method=settings | {"pasted": 1.5})


def test_pseudo_defects_are_painted_beside_the_real_ones(task: Any) -> None:
    _, fitting, _ = task
    training = segmentation.training_of(RunConfig(name="hadnet", method=TINY), fitting, Setting(), 0)
    batches = list(Painted(training))
    assert batches
    for batch in batches:
        assert batch.targets is not None
        change, marked = (batch.views["pixels"] - batch.views["clean"]).abs().mean(1), batch.targets > 0
        assert change[marked].mean() > 3 * change[~marked].mean()
        assert 0.05 < float((batch.targets > 0).float().mean()) < 0.5


def test_textures_are_read_only_where_something_is_painted(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fitting, _ = task
    (tmp_path / "dtd" / "images").mkdir(parents=True)
    monkeypatch.setenv("HYPDEFECT_DATA", str(tmp_path))
    for name, own in (("fpn", {}), ("hadnet", {"selection": "random"}), ("hadnet", {"selection": "projection"})):
        run = RunConfig(name=name, method=TINY | own)
        assert segmentation.training_of(run, fitting, Setting(), 0).model().training
    with pytest.raises(ConfigError, match="0 pictures below"):
        segmentation.training_of(RunConfig(name="hadnet", method=TINY), fitting, Setting(), 0).model()


def test_a_network_ends_at_the_weights_that_validate_best(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fitting, _ = task
    run = RunConfig(name="hadnet", method=TINY | {"steps": 24, "lr": 3e-4})
    training = segmentation.training_of(run, fitting, Setting(), 0, report_every=4)
    model: Any = training.model()
    values: list[float] = []

    def keep(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        values.append(metrics["val"])
        assert write is not None
        write(tmp_path)

    fit(model, training.item, training.config, keep, validation=training)
    assert training.value(training.seen(model, slice(None))) == pytest.approx(max(values))
    assert values[-1] < max(values)
    monkeypatch.setattr(segmentation, "training_of", lambda *args: training)
    fitted: Any = segmentation.fit(run, fitting, Setting(), 0)
    for name, weights in model.named_parameters():
        torch.testing.assert_close(fitted.get_parameter(name), weights, rtol=0, atol=0)
    early = replace(training, patience=1)
    model = early.model()
    seen: list[float] = []
    fit(model, early.item, early.config, lambda m, write: seen.append(m["val"]), validation=early)
    assert seen == values[: len(seen)]


@pytest.mark.parametrize(
    ("decay", "shares"), [("cosine", [1.0, 0.5, 0.0955, 0.0157]), ("steps", [1.0, 1.0, 0.1, 0.01])]
)
def test_the_rate_falls_as_a_cosine_or_in_steps(task: Any, decay: str, shares: list[float]) -> None:
    _, fitting, _ = task
    run = RunConfig(name="fpn", method=TINY | {"steps": 100, "lr": 1e-3, "decay": decay})
    config = segmentation.training_of(run, fitting, Setting(), 0).config
    assert [config.rate(step) for step in (0, 50, 80, 92)] == pytest.approx(
        [1e-3 * share for share in shares], rel=0.01
    )


def test_validation_is_shared_out_over_the_workers(task: Any) -> None:
    _, fitting, _ = task
    training = segmentation.training_of(RunConfig(name="fpn", method=TINY), fitting, Setting(), 0)
    model = training.model()
    whole = training.seen(model, slice(None))
    shares = [training.seen(model, slice(rank, None, 3)) for rank in range(3)]
    assert all(0 < share.sum() < whole.sum() for share in shares)
    assert torch.equal(torch.stack(shares).sum(0), whole)
    more_workers_than_images = training.seen(model, slice(len(fitting.validated), None, len(fitting.validated) + 1))
    assert not more_workers_than_images.any()


def test_regions_are_named_as_wholes_where_that_validates_better(task: Any) -> None:
    _, fitting, _ = task
    chosen = set()
    for seed in range(8):
        runs = {
            r: RunConfig(name="fpn", method=TINY | {"regions": r, "seed": seed})
            for r in ("whole", "pixels", "validated")
        }
        models = {r: run.model(len(fitting.classes)) for r, run in runs.items()}
        for name, model in models.items():
            _, validation = segmentation.finished(runs[name], model, fitting, Setting(), 0)
            assert validation == measured(model, fitting.validated, fitting.classes, fitting.side).compute()["miou"]
            assert name == "validated" or model.whole_regions == (name == "whole")
        value = {
            r: measured(m, fitting.validated, fitting.classes, fitting.side).compute()["miou"]
            for r, m in models.items()
        }
        assert value["validated"] == max(value.values())
        chosen.add(bool(models["validated"].whole_regions))
        kept = runs["validated"].model(len(fitting.classes))
        kept.restore(models["validated"].export())
        assert torch.equal(kept.whole_regions, models["validated"].whole_regions)
    assert chosen == {False, True}


def test_a_network_is_trained_alike_whether_it_answers_with_mirrored_images_or_not(task: Any) -> None:
    _, fitting, _ = task
    once, thrice = (RunConfig(name="fpn", method=TINY | {"mirrored": mirrored}) for mirrored in (False, True))
    trainings = [segmentation.training_of(run, fitting, Setting(), 0) for run in (once, thrice)]
    assert trainings[0] == trainings[1]
    batch = trainings[0].item(0)
    answers = []
    for run in (once, thrice):
        model: Any
        model, validation = segmentation.finished(run, trainings[0].model(), fitting, Setting(), 0)
        assert model.config.mirrored == run.method.mirrored
        assert validation == measured(model, fitting.validated, fitting.classes, fitting.side).compute()["miou"]
        published = run.model(len(fitting.classes))
        published.restore(model.export())
        answers.append(model.logits(batch))
        assert torch.equal(published.logits(batch), answers[-1])
    assert not torch.allclose(*answers)


def test_draws_have_other_seeds_and_the_published_model_answers_alike(
    task: Any, job: TaskConfig, tmp_path: Path
) -> None:
    plan, fitting, reported = task
    run = RunConfig(name="hadnet", method=TINY, pretrained=False)
    model: Any = segmentation.fit(run, fitting, Setting(), 0)
    other: Any = segmentation.fit(run, fitting, Setting(), 1)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    score = segmentation.score_model(model, fitting, reported, Setting(), 0, 0.0)
    assert score.metrics.keys() >= {"miou", "miou_background", "pixel_acc", "macro_f1", "weighted_f1"}
    saved(tmp_path / "m", run, model, task)
    predictor = Predictor.load(tmp_path / "m")
    image, _ = reported.images.read(0)
    (answer,) = predictor.predict([(image, None)])
    expected = cleaned_classes(scores_of(model, image, 64).argmax(0).numpy().astype(np.uint8))
    assert list(answer.shares) == list(plan.classes)
    for number, name in enumerate(plan.classes, 1):
        assert answer.shares[name] == pytest.approx(float((expected == number).mean()), abs=1e-3)
    assert measured(predictor.model, reported.images, plan.classes, 64).compute()["miou"] == pytest.approx(
        score.metrics["miou"]
    )


def told(classes: np.ndarray) -> tuple[Segmentation, np.ndarray]:
    """The answer, whose map, areas, shares and label are of the same pixels, and that map."""
    answer = segmentation_of(classes.astype(np.uint8), ("a", "b", "c"))
    numbers = np.rint(as_values(answer.map_png) * 255).astype(np.int64)
    counts = dict(zip("abc", np.bincount(numbers.ravel(), minlength=4)[1:].tolist(), strict=True))
    assert answer.shares == {name: count / numbers.size for name, count in counts.items()}
    assert answer.label == (max(counts, key=lambda name: counts[name]) if numbers.any() else "good")
    listed = {name: [region.area for region in answer.regions if region.label == name] for name in counts}
    for name, areas in listed.items():
        assert sum(areas) == counts[name] or (len(areas) == 100 and sum(areas) < counts[name])
    return answer, numbers


@pytest.mark.parametrize(("outer", "inner"), ["ab", "ba"])
def test_a_class_that_encloses_another_counts_its_own_pixels_alone(outer: str, inner: str) -> None:
    classes = np.zeros((30, 40), dtype=np.int64)
    classes[5:25, 5:25] = 1 + "abc".index(outer)
    classes[6:24, 6:24] = 1 + "abc".index(inner)
    answer, numbers = told(classes)
    assert answer.label == inner
    assert {region.label: region.area for region in answer.regions} == {outer: 76, inner: 324}
    assert (numbers == classes).all()


def test_the_class_with_the_most_pixels_may_have_them_in_more_regions_than_are_listed() -> None:
    classes = np.zeros((120, 120), dtype=np.int64)
    classes[:100, :100] = np.kron(np.arange(400).reshape(20, 20) % 2 * 2, np.pad(np.ones((3, 3), int), 1))
    classes[100:, :50] = 1
    answer, _ = told(classes)
    assert answer.label == "b"
    assert sum(region.label == "b" for region in answer.regions) == 100


def test_specks_stand_neither_in_the_map_nor_in_the_regions() -> None:
    classes = np.zeros((30, 40), dtype=np.int64)
    classes[::4, :20:4] = 3
    assert told(classes)[0].label == "good"
    classes[10:20, 25:35] = 2
    classes[12, 27:30] = 1
    answer, numbers = told(classes)
    assert (answer.label, answer.shares["a"], answer.shares["c"]) == ("b", 0, 0)
    assert (numbers > 0).sum() == 97


def test_classes_that_an_image_does_not_show_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelling the regions of 20 megapixels takes half a second a class."""
    seen: list[int] = []
    for name, module in (("without_specks", "images.regions"), ("regions_of", "predictor")):
        function = getattr(regions, name)

        def counted(marked: np.ndarray, function: Any = function) -> Any:
            seen.append(int(marked.sum()))
            return function(marked)

        monkeypatch.setattr(f"hypdefect.{module}.{name}", counted)
    classes = np.zeros((30, 40), dtype=np.uint8)
    classes[10:20, 25:35] = 200
    answer = segmentation_of(classes, [f"class {i}" for i in range(1, 256)])
    assert (answer.label, answer.shares["class 200"], len(answer.shares)) == ("class 200", 100 / 1200, 255)
    assert seen == [100, 100]


def test_more_classes_than_a_map_holds_are_refused(task: Any) -> None:
    plan, _, _ = task
    marked = [row for row in plan.manifest.to_pylist() if row["mask_id"]]
    rows = [marked[i % len(marked)] | {"defect": f"class {i}"} for i in range(256)]
    with pytest.raises(DataError, match="256 classes; a map of classes holds 255: give several one name"):
        segmentation.plan(plan.config, pa.Table.from_pylist(rows, schema=plan.manifest.schema))


@pytest.mark.parametrize("name", ["fpn", "hadnet"])
def test_a_published_model_needs_no_file_but_its_own(
    name: str, task: Any, job: TaskConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the weights that training began with, nor the backbone of features, which a segmenter does not read."""
    _, fitting, reported = task
    weights = tmp_path / "w.safetensors"
    save_file(timm_networks.timm.create_model("test_efficientnet", pretrained=False).state_dict(), weights)
    network = f"timm:test_efficientnet@{weights}"
    run = RunConfig(name=name, method=TINY | {"network": network, "steps": 1}, pretrained=False)
    model: Any = segmentation.fit(run, fitting, Setting(), 0)
    saved(tmp_path / "m", run, model, task)
    weights.unlink()
    monkeypatch.setitem(BACKBONES, "tiny_random", replace(BACKBONES["tiny_random"], init_seed=1))
    predictor = Predictor.load(tmp_path / "m")
    assert predictor.card.backbone_digest == ""
    image, _ = reported.images.read(0)
    assert torch.equal(scores_of(predictor.model, image, 64), scores_of(model, image, 64))
    backbones._describe.cache_clear()
    with pytest.raises(ArtifactError, match="does not exist"):
        get_backbone(network)


def test_a_class_that_cannot_stand_on_three_sides_is_named(task: Any, tmp_path: Path) -> None:
    plan, _, _ = task
    few = make_mtd_tree(tmp_path / "few", per_class=2)
    with pytest.raises(
        DataError, match=r"class '\w+' has 2 images of 2 parts with masks \(one is .*num_\d+\.jpg\); it must"
    ):
        prepare(segmentation, replace(plan.config, root=few))
    rows = [row for row in plan.manifest.to_pylist() if not row["is_defect"]]
    with pytest.raises(DataError, match="has no masks"):
        segmentation.plan(plan.config, pa.Table.from_pylist(rows, schema=plan.manifest.schema))
    with pytest.raises(ConfigError, match="max_normals must not be negative"):
        replace(plan.config, max_normals=-1)


def without_masks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"mask_id": "", "mask_uri": "", "bbox": [0, 0, row["width"], row["height"]]} for row in rows]


def beside(row: dict[str, Any], defect: str) -> dict[str, Any]:
    """A second mark on the same file."""
    return row | {"image_id": f"{defect} {row['image_id']}", "defect": defect}


def test_what_has_no_mask_is_left_out_and_named(task: Any, caplog: pytest.LogCaptureFixture) -> None:
    plan, _, _ = task
    rows = plan.manifest.to_pylist()
    cracks = [row for row in rows if row["defect"] == "crack"]
    unmarked = without_masks([beside(row, "crease") for row in cracks[:2]])
    manifest = pa.Table.from_pylist(rows + unmarked, schema=plan.manifest.schema)
    with caplog.at_level("WARNING"):
        left = segmentation.plan(plan.config, manifest)
    assert left.classes == plan.classes
    used = {*left.learned_ids, *left.validated_ids, *left.reported_ids}
    assert {row["image_id"] for row in cracks} - used == {row["image_id"] for row in cracks[:2]}
    crease, files = (record.getMessage() for record in caplog.records)
    assert "class 'crease' is not learned, since none of its images has a mask" in crease
    assert "2 files are left out, since not every mark of theirs has a mask that can be used; the first is" in files
    assert cracks[0]["uri"] in files


def test_a_class_whose_files_all_have_a_mark_without_a_mask_is_named(task: Any) -> None:
    plan, _, _ = task
    rows = plan.manifest.to_pylist()
    cracks = [row for row in rows if row["defect"] == "crack"]
    unmarked = without_masks([beside(row, "fray") for row in cracks])
    manifest = pa.Table.from_pylist(rows + unmarked, schema=plan.manifest.schema)
    with pytest.raises(DataError, match="class 'crack' has masks, but each of its 20 files has another") as error:
        segmentation.plan(plan.config, manifest)
    assert cracks[0]["uri"] in str(error.value)


def test_a_file_of_which_a_mark_was_refused_is_not_learned_from(tmp_path: Path) -> None:
    root = READER_TREES["ucf_el"](tmp_path / "tree", per_class=8)
    table = root / "AnnotationsCombined.csv"
    *others, broken, spot, good = table.read_text().splitlines()
    assert "Contact_Corrosion" in broken
    assert "Interconnect_BrightSpot" in spot
    table.write_text("\n".join([*others, broken.replace("polygon", "squiggle"), spot, good]) + "\n")
    manifest = ingest("ucf_el", root, mask_folder=tmp_path / "masks").manifest
    half = next(row for row in manifest.to_pylist() if row["uri"].endswith("M0015C000001.png"))
    assert half["defect"] == "Interconnect_BrightSpot"
    plan = segmentation.plan(TaskConfig(dataset="ucf_el", root=root, split="random"), manifest)
    used = {*plan.learned_ids, *plan.validated_ids, *plan.reported_ids}
    assert len(used) == 23
    assert half["image_id"] not in used


# -- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, (2, 5, 30, 20))
    metrics = SegmentationMetrics(("a", "b", "c"))
    for number in range(5):
        metrics.update(predicted[number], truth[number])
    found = metrics.compute()
    ious, f1s, weights = [], [], []
    for label in range(4):
        both = ((truth == label) & (predicted == label)).sum()
        either = ((truth == label) | (predicted == label)).sum()
        ious.append(both / either)
        f1s.append(2 * both / ((truth == label).sum() + (predicted == label).sum()))
        weights.append((truth == label).sum())
    assert found["miou"] == pytest.approx(np.mean(ious[1:]))
    assert found["miou_background"] == pytest.approx(np.mean(ious))
    assert found["macro_f1"] == pytest.approx(np.mean(f1s[1:]))
    assert found["weighted_f1"] == pytest.approx(np.average(f1s[1:], weights=weights[1:]))
    assert found["pixel_acc"] == pytest.approx((truth == predicted).mean())
    assert found["iou b"] == pytest.approx(ious[2])


def test_metrics_agree_with_scikit_learn_and_leave_out_absent_classes() -> None:
    from sklearn.metrics import jaccard_score

    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, (2, 8, 8))
    metrics = SegmentationMetrics(("a", "b", "never"))
    metrics.update(predicted, truth)
    found = metrics.compute()
    expected = jaccard_score(truth.ravel(), predicted.ravel(), labels=[1, 2], average="macro")
    assert found["miou"] == pytest.approx(expected)
    assert "iou never" not in found


def test_what_is_tested_is_the_map_that_is_served(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, fitting, reported = task
    model: Any = segmentation.fit(RunConfig(name="fpn", method=TINY, pretrained=False), fitting, Setting(), 0)
    side = max(reported.images.read(0)[1].shape)
    logits = torch.zeros(1, len(plan.classes) + 1, side, side)
    logits[:, 1, 40:42, 40:42] = 1.0  # a speck, which is no region
    monkeypatch.setattr(model, "logits", lambda batch: logits)
    found = measured(model, reported.images, plan.classes, side)
    assert found.counts[:, 0].sum() == found.counts.sum()
    assert found.compute()["image_missed"] == 1


def test_images_are_of_the_class_with_the_most_pixels() -> None:
    def image(*sizes: int) -> np.ndarray:
        return np.repeat(np.arange(len(sizes)), sizes).reshape(1, -1)

    metrics = SegmentationMetrics(("a", "b"))
    metrics.update(image(8, 2, 1), image(8, 1, 2))  # b is called a
    metrics.update(image(5, 0, 6), image(5, 1, 5))  # b is called b
    metrics.update(image(11), image(10, 1))  # a is missed
    found = metrics.compute()
    assert found["image_acc"] == pytest.approx(1 / 3)
    assert found["image_missed"] == pytest.approx(1 / 3)
    assert "image_false_alarms" not in found  # there is no good image
    metrics.update(image(10, 1), image(11))
    metrics.update(image(11), image(11))
    assert metrics.compute()["image_false_alarms"] == 0.5
    assert metrics.compute()["image_acc"] == pytest.approx(2 / 5)
    assert metrics.compute()["image_missed"] == pytest.approx(1 / 3)


def test_metrics_refuse_what_is_no_class_map() -> None:
    metrics = SegmentationMetrics(("a",))
    with pytest.raises(DataError, match="beside a truth of"):
        metrics.update(np.zeros((2, 2), int), np.zeros((3, 2), int))
    with pytest.raises(DataError, match="classes of pixels are 0 to 1"):
        metrics.update(np.full((2, 2), 2), np.zeros((2, 2), int))
    metrics.update(np.zeros((2, 2), int), np.zeros((2, 2), int))
    with pytest.raises(DataError, match="need pixels of defects"):
        metrics.compute()


def test_a_run_is_that_of_its_seed_its_images_and_its_marks_wherever_they_lie(task: Any) -> None:
    plan, fitting, _ = task
    run = RunConfig(name="hadnet", method=TINY, pretrained=False)

    def settings(plan: Any, seed: int = 0) -> dict[str, Any]:
        return settings_of(plan, segmentation.training_of(run, fitting, Setting(seed=seed), 0), 200)

    def changed(column: str) -> Any:
        rows = plan.manifest.to_pylist()
        row = next(row for row in rows if row["mask_id"])
        row[column] = f"{row[column]}0"
        return replace(plan, manifest=pa.Table.from_pylist(rows, schema=plan.manifest.schema))

    usual = settings(plan)
    assert settings(plan) == usual
    assert settings(changed("uri")) == usual
    assert settings(plan, seed=1) != usual
    assert settings(changed("mask_id")) != usual

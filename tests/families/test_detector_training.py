"""What a detector of networks is shown: the same for every process, each image once before any comes again."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from hypdefect.errors import DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families.detector_training import DetectorTraining, jittered, unrelated
from hypdefect.families.image_files import ImageFile
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import PatchExtractor, RecipeConfig, extractor_for
from hypdefect.files import file_sha256
from hypdefect.images import read_image
from hypdefect.images.pseudo_defects import SynthesisConfig, load_textures
from hypdefect.methods.hypad import HypADConfig
from hypdefect.types import Batch
from tests.tiny_dataset import make_mtd_tree

BACKBONE = "patchcore:test_efficientnet@random"
RECIPE = RecipeConfig(whole_size=64)


@dataclass(frozen=True)
class Stored:
    """Patches of image files, as a feature store has them."""

    files: tuple[ImageFile, ...]

    def select(self, positions: Sequence[int]) -> "Stored":
        return Stored(tuple(self.files[i] for i in positions))

    def __iter__(self) -> Iterator[Batch]:
        extractor = extractor_for(get_backbone(BACKBONE), RECIPE)
        for file in self.files:
            views = extractor.forward(extractor.prepare(read_image(Path(file.uri)), None))
            none = torch.zeros(1, dtype=torch.long)
            yield Batch(image_ids=(file.uri,), views=views, labels=none, aug_index=none)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> DetectorTraining:
    tree = make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=5)
    files = tuple(ImageFile(str(path), file_sha256(path)) for path in sorted(tree.glob("MT_Free/Imgs/*.jpg")))
    config = HypADConfig(images=2, jitter=0.0, steps=7, items_per_step=3, lr=2e-3, seed=4)
    run = RunConfig(name="hypad", method=config)
    return DetectorTraining(
        run=run,
        dim=8,
        normals=Stored(files),
        files=files,
        backbone=BACKBONE,
        recipe=RECIPE,
        pictures=tuple(load_textures(SynthesisConfig())[1]),
        report_every=50,
    )


def changed(training: DetectorTraining, **config: object) -> DetectorTraining:
    return replace(training, run=RunConfig(name="hypad", method=replace(training.run.method, **config)))


def test_an_item_depends_on_its_number_alone(training: DetectorTraining) -> None:
    first, again, other = (training.item(n) for n in (3, 3, 4))
    assert first.image_ids == again.image_ids
    assert all(torch.equal(first.views[view], again.views[view]) for view in ("patch", "pixels", "unrelated"))
    assert not torch.equal(first.views["unrelated"], other.views["unrelated"])
    assert first.views["pixels"].shape == (2, 3, 64, 64)
    assert first.views["unrelated"].shape == (2, 3, 32, 32)


def test_an_item_is_the_same_wherever_a_process_runs(
    training: DetectorTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = training.item(3)
    monkeypatch.delenv("HYPDEFECT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(training.item(3).views["unrelated"], here.views["unrelated"])


def test_every_image_comes_once_before_any_comes_again(training: DetectorTraining) -> None:
    count = len(training.files)
    shown = [name for number in range(count) for name in training.item(number).image_ids]  # two images an item
    for epoch in (shown[:count], shown[count:]):
        assert Counter(epoch) == Counter(file.uri for file in training.files)
    assert shown[:count] != shown[count:]


def test_patches_are_those_of_the_image_that_is_seen(training: DetectorTraining) -> None:
    extractor = extractor_for(get_backbone(BACKBONE), RECIPE)
    assert isinstance(extractor, PatchExtractor)
    items = [changed(training, jitter=0.5).item(number) for number in range(6)]
    stored = {file.uri: next(iter(training.normals.select([i]))) for i, file in enumerate(training.files)}
    changes = 0
    for item in items:
        with torch.no_grad():
            expected = extractor.patches(list(item.views["pixels"][:, None]))
        assert torch.equal(item.views["patch"], expected)
        changes += sum(
            not torch.equal(patch, stored[name].views["patch"][0])
            for patch, name in zip(item.views["patch"], item.image_ids, strict=True)
        )
    assert 0 < changes < 12  # of the twelve images some were seen as they are


def test_the_teacher_computes_nothing_of_an_image_as_it_is(
    training: DetectorTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = PatchExtractor.patches
    with monkeypatch.context() as patch:
        patch.setattr(PatchExtractor, "patches", lambda own, x: computed.append(len(x)) or original(own, x))
        list(training.normals.select([0, 1]))
        of_the_store = len(computed)
        changed(training, jitter=0.0).item(2)
        assert len(computed) == 2 * of_the_store  # what the store's stand-in computes, and no more
        changed(training, jitter=1.0).item(2)
    assert computed[-1] == 2


def test_an_image_that_changed_is_named(training: DetectorTraining, tmp_path: Path) -> None:
    path = tmp_path / "part.jpg"
    path.write_bytes(Path(training.files[0].uri).read_bytes())
    file = ImageFile(str(path), file_sha256(path))
    assert file.read(32).shape == (3, 32, 32)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"part\.jpg changed since its manifest"):
        file.read(32)


def test_jitter_changes_what_student_and_teacher_see(training: DetectorTraining) -> None:
    plain, always = training.item(1), changed(training, jitter=1.0).item(1)
    for view in ("patch", "pixels"):
        assert not torch.equal(plain.views[view], always.views[view])
    pixels = plain.views["pixels"][0]
    share = [torch.equal(jittered(pixels, 0.2, torch.Generator().manual_seed(i)), pixels) for i in range(200)]
    assert 0.7 < sum(share) / 200 < 0.9
    many = torch.stack([jittered(pixels, 1.0, torch.Generator().manual_seed(i)) for i in range(50)])
    assert 0 <= float(many.min()) <= float(many.max()) <= 1
    assert many.mean((1, 2, 3)).std() > 0.01


def test_other_things_are_neither_normal_nor_alike(training: DetectorTraining) -> None:
    pieces = torch.stack([unrelated(training.pictures, 32, torch.Generator().manual_seed(i)) for i in range(20)])
    assert 0 <= float(pieces.min()) <= float(pieces.max()) <= 1
    assert len({tuple(piece[0, :2].flatten().tolist()) for piece in pieces}) == 20
    grey = [(piece - piece.mean(0)).abs().max() < 1e-6 for piece in pieces]
    assert 0 < sum(map(bool, grey)) < 20


def test_the_loop_is_told_the_methods_own_schedule(training: DetectorTraining) -> None:
    config = training.config
    assert (config.steps, config.items_per_step, config.lr, config.seed) == (7, 3, 2e-3, 4)
    assert config.report_every == 7

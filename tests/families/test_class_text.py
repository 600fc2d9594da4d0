"""What a class is called reaches a method where the backbone has a text tower."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.datasets.ingest import ingest
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.episodes import build_episode
from hypdefect.families.few_shot import Fitting, Setting, TaskConfig
from hypdefect.features.extract import RecipeConfig, extractor_for
from hypdefect.features.prompts import embed_prompts, load_prompts, prompts_of
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.images import read_image, read_mask
from hypdefect.types import EpisodeSpec
from tests.tiny_clip import CONFIG, clip_model, write_config
from tests.tiny_dataset import make_folder_tree

RECIPE = RecipeConfig(whole_size=32, window=48, crop_size=32, flips=False)
SETTING = Setting(k_shot=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> str:
    torch.save(clip_model().state_dict(), folder / "w.pt")
    return f"openclip:{write_config(folder)}@{folder / 'w.pt'}"


@pytest.fixture(scope="module")
def tree(folder: Path) -> Path:
    return make_folder_tree(folder / "images", classes=3, per_class=6, with_good=False)


def loaded(tree: Path, backbone: str, home: Path, **changes: Any) -> Fitting:
    """A task's fitting data; features and prompts are extracted where they are missing."""
    values: dict[str, Any] = {"dataset": "folder", "root": tree, "k_shot": 2, "copies": 0, "recipe": RECIPE}
    config = TaskConfig(backbone=backbone, **values | changes)
    plan = few_shot.plan(config, ingest("folder", tree).manifest)
    store = FeatureStore(home, plan.key)
    store.create()
    extractor = extractor_for(plan.spec, RECIPE)
    for request in plan.requests():
        if store.missing(request.row_keys()):
            image = read_image(Path(request.uri))
            mask, _ = read_mask(Path(request.mask_uri), image.shape[:2])
            views = extractor.forward(extractor.prepare(image, mask))
            store.write(request.row_keys(), {view: x.numpy() for view, x in views.items()})
    embed_prompts(plan.spec, plan.prompts, home) if plan.prompts else None
    return few_shot.load(plan, home)[0]


@pytest.fixture(scope="module")
def fitting(tree: Path, backbone: str, folder: Path) -> Fitting:
    return loaded(tree, backbone, folder / "home")


def probabilities(fitting: Fitting, run: RunConfig) -> torch.Tensor:
    seen = few_shot.transformed(fitting, few_shot.transform_of(run, fitting))
    classifier = few_shot.fit(run, seen, SETTING, 0)
    return classifier.logits(seen.pool.batch(np.arange(len(seen.pool)))).softmax(1)


def test_every_class_has_the_templates_text_by_default(fitting: Fitting, backbone: str, folder: Path) -> None:
    assert fitting.pool.text is not None
    assert fitting.pool.text.shape == (3, CONFIG["embed_dim"])
    plan_prompts = [f"a photo of a part with a {name} defect" for name in fitting.pool.class_names]
    from hypdefect.features.backbones import get_backbone

    stored = load_prompts(get_backbone(backbone), plan_prompts, folder / "home")
    np.testing.assert_array_equal(stored.numpy(), fitting.pool.text)


def test_an_episode_carries_the_text_of_its_own_classes(fitting: Fitting) -> None:
    assert fitting.pool.text is not None
    for number in range(4):
        episode = build_episode(fitting.pool, EpisodeSpec(k_shot=1, n_way=2), number)
        rows = [fitting.pool.class_names.index(name) for name in episode.class_names]
        assert episode.support.text is not None
        np.testing.assert_array_equal(episode.support.text.numpy(), fitting.pool.text[rows])


@pytest.mark.parametrize("method", ["clip_protonet", "clip_adapter", "tip_adapter"])
@pytest.mark.parametrize("whitening", [None, 3.0])
def test_text_changes_what_a_method_answers(fitting: Fitting, method: str, whitening: float | None) -> None:
    run = RunConfig(name=method, transform=TransformConfig(whitening=whitening), support_copies=0)
    assert fitting.pool.text is not None
    turned = replace(fitting, pool=replace(fitting.pool, text=np.roll(fitting.pool.text, 1, 0)))
    mute = replace(fitting, pool=replace(fitting.pool, text=None))
    answers = [probabilities(one, run) for one in (fitting, turned, mute)]
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    assert (answers[0] - answers[2]).abs().max() > 1e-4


def test_the_searched_share_of_text_acts(fitting: Fitting) -> None:
    low, high = (
        probabilities(fitting, RunConfig(name="clip_protonet", method={"text_share": share}, support_copies=0))
        for share in (0.1, 0.9)
    )
    assert (low - high).abs().max() > 1e-4


def test_prompts_of_ones_own_are_used(tree: Path, backbone: str, folder: Path, fitting: Fitting) -> None:
    own = loaded(tree, backbone, folder / "home", class_prompts=("dent=a deep dent in steel",))
    changed = [not np.array_equal(a, b) for a, b in zip(own.pool.text, fitting.pool.text, strict=True)]  # type: ignore[arg-type]
    assert changed == [name == "dent" for name in fitting.pool.class_names]


def test_without_a_text_tower_there_is_no_text(tree: Path, folder: Path) -> None:
    assert loaded(tree, "tiny_random", folder / "plain").pool.text is None


def test_trials_vary_the_prototypes_scale_or_that_of_the_text_that_stands_for_them(tree: Path, backbone: str) -> None:
    idle = []
    for name in ("tiny_random", backbone):
        config = TaskConfig(dataset="folder", root=tree, k_shot=2, copies=0, recipe=RECIPE, backbone=name)
        idle.append(few_shot.plan(config, ingest("folder", tree).manifest).idle_fields[-1])
    assert idle == ["method.text_share", "method.prototype_scale"]


def test_texts_are_centred_on_their_own_mean_where_images_are(fitting: Fitting) -> None:
    text = torch.from_numpy(fitting.pool.text)
    normals = {view: np.repeat(x, 2, 0) for view, x in fitting.pool.table.views.items()}  # ten at least
    transform = FeatureTransform.fit(normals, fitting.block_dims, TransformConfig(whitening=None), fitting.shape_dims)
    views = transform.text(text).unflatten(1, (2, -1))
    assert views.shape[2] == transform.dim
    expected = torch.nn.functional.normalize(text - text.mean(0), dim=1)
    torch.testing.assert_close(views[:, 0, : text.shape[1]], expected)
    assert not views[..., text.shape[1] :].any()  # of the region's shape a text says nothing
    with pytest.raises(DataError, match="text embeddings have 5 numbers, features 24"):
        transform.text(torch.zeros(3, 5))


def test_prompts_that_cannot_be_are_refused() -> None:
    assert prompts_of(("a_b", "c"), "x {}", {"c": "y"}) == ["x a b", "y"]
    with pytest.raises(ConfigError, match="prompts for 'd'; the classes are a, c"):
        prompts_of(("a", "c"), "x {}", {"d": "y"})
    with pytest.raises(ConfigError, match=r"has no \{\}"):
        prompts_of(("a",), "x", {})
    with pytest.raises(ConfigError, match="CLASS=PROMPT, got 'dent'"):
        TaskConfig(class_prompts=("dent",))

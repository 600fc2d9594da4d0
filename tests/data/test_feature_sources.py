"""Every family of backbones: right features, weights from a local file, preprocessing of its own."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.features import clip
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import RecipeConfig, dims_of, extractor_for, region_center, window_slices
from hypdefect.features.patches import patch_features
from hypdefect.features.region_shape import SHAPE_DIMS, region_shape
from hypdefect.features.timm_networks import Backbone, patch_grid
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.methods.baselines import PrototypeConfig
from hypdefect.predictor import ClassPredictor, Predictor, save_model
from hypdefect.types import VIEWS, Batch
from tests.reference.alpha_clip import image_features
from tests.tiny_clip import CONFIG, HEAD_WIDTH, SIDE, alpha_state, clip_model, write_alpha, write_config

import timm  # isort: skip

RECIPE = RecipeConfig(whole_size=SIDE, crop_size=SIDE, window=48, flips=False)


def setup_module() -> None:
    torch.set_num_threads(1)


def picture(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros((70, 90), bool)
    mask[20:45, 30:70] = True
    return rng.integers(0, 256, (70, 90, 3), dtype=np.uint8), mask


def pixels(n: int = 2, side: int = SIDE) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def openclip(tmp_path: Path) -> str:
    torch.save(clip_model().state_dict(), tmp_path / "w.pt")
    return f"openclip:{write_config(tmp_path)}@{tmp_path / 'w.pt'}"


# --- OpenCLIP


def test_openclip_from_a_local_checkpoint_is_the_published_tower(openclip: str, tmp_path: Path) -> None:
    spec = get_backbone(openclip)
    assert (spec.family, spec.dims) == ("openclip", (24,))
    assert spec.sha256 == hashlib.sha256((tmp_path / "w.pt").read_bytes()).hexdigest()
    model, x = clip_model(), pixels()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    with torch.inference_mode():
        expected = model.encode_image((x - mean) / std)
        (embedding,) = clip.ImageTower(spec)(x)
        torch.testing.assert_close(embedding, expected, rtol=0, atol=1e-5)
        expected = model.encode_text(clip.open_clip.SimpleTokenizer()(["a good part", "a scratch"]))
        torch.testing.assert_close(clip.text_features(spec, ["a good part", "a scratch"]), expected)
    image, mask = picture()
    features = extractor_for(spec, RECIPE)(image, mask, "x", 2)
    assert {view: tuple(x.shape) for view, x in features.items()} == dict.fromkeys(VIEWS, (3, 24 + SHAPE_DIMS))
    assert not torch.equal(features["whole"], features["crop"])


def test_the_place_of_a_weight_file_does_not_change_its_features(openclip: str, tmp_path: Path) -> None:
    save_file(clip_model().state_dict(), tmp_path / "w.safetensors")
    other = get_backbone(f"openclip:{tmp_path / 'tiny.json'}@{tmp_path / 'w.safetensors'}")
    assert other.digest != get_backbone(openclip).digest, "other bytes"
    (tmp_path / "moved.pt").write_bytes((tmp_path / "w.pt").read_bytes())
    moved = get_backbone(f"openclip:{tmp_path / 'tiny.json'}@{tmp_path / 'moved.pt'}")
    assert moved.digest == get_backbone(openclip).digest
    assert torch.equal(clip.ImageTower(other)(pixels())[0], clip.ImageTower(moved)(pixels())[0])


def test_wrong_clip_names_and_weights(openclip: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name its weights: .*@TAG or @FILE; tags: .*laion2b_s34b_b79k"):
        get_backbone("openclip:ViT-B-32")
    with pytest.raises(ConfigError, match="'nosuchtag' is no file; tags of ViT-B-32: "):
        get_backbone("openclip:ViT-B-32@nosuchtag")
    with pytest.raises(ConfigError, match="OpenCLIP has no 'ViT-X-1'"):
        get_backbone("openclip:ViT-X-1@random")
    with pytest.raises(ArtifactError, match="fetch the weights again, or correct the pin"):
        get_backbone(f"{openclip}#{'0' * 64}")
    torch.save(clip_model().visual.state_dict(), tmp_path / "part.pt")
    with pytest.raises(ArtifactError, match=r"not those of tiny\.json"):
        clip.ImageTower(get_backbone(f"openclip:{tmp_path / 'tiny.json'}@{tmp_path / 'part.pt'}"))
    with pytest.raises(ConfigError, match=r"reads 32 x 32 pixels, not 64 x 64: set --recipe.whole-size 32"):
        clip.ImageTower(get_backbone(openclip))(pixels(1, 64))
    with pytest.raises(ConfigError, match="no text tower"):
        clip.text_features(get_backbone("tiny_random"), ["x"])


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


def test_a_poisoned_checkpoint_runs_nothing(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Evil(tmp_path / "marker")}, tmp_path / "evil.pt")
    spec = get_backbone(f"openclip:{write_config(tmp_path)}@{tmp_path / 'evil.pt'}")
    with pytest.raises(ArtifactError, match="holds more than tensors"):
        clip.ImageTower(spec)
    assert not (tmp_path / "marker").exists()


# --- AlphaCLIP


def test_alpha_clip_with_a_zero_alpha_convolution_is_the_plain_tower(tmp_path: Path) -> None:
    tower = clip.ImageTower(get_backbone(write_alpha(tmp_path, alpha_scale=0.0)))
    torch.save(clip_model().state_dict(), tmp_path / "w.pt")
    plain = clip.ImageTower(get_backbone(f"openclip:{tmp_path / 'tiny.json'}@{tmp_path / 'w.pt'}"))
    x = pixels()
    for region in (None, torch.ones(2, 70, 90)):
        torch.testing.assert_close(tower(x, region)[0], plain(x)[0], rtol=0, atol=1e-5)


def test_alpha_clip_equals_the_authors_definition(tmp_path: Path) -> None:
    spec = get_backbone(write_alpha(tmp_path))
    region = torch.zeros(2, SIDE, SIDE)
    region[0, 8:24, 4:20] = 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    alpha = (region[:, None] - 0.5) / 0.26
    expected = image_features(alpha_state(), (pixels() - mean) / std, alpha, HEAD_WIDTH)
    tower = clip.ImageTower(spec)
    torch.testing.assert_close(tower(pixels(), region)[0], expected, rtol=0, atol=1e-5)
    assert (tower(pixels())[0] - expected).abs().max() > 1e-3, "the mask is looked at"


def test_alpha_clip_refuses_what_is_none(tmp_path: Path) -> None:
    name = write_alpha(tmp_path)
    path = Path(name.split("@")[1])
    torch.save({k: v for k, v in alpha_state().items() if "alpha" not in k}, path.with_name("plain.pth"))
    with pytest.raises(ArtifactError, match=r"no conv1_alpha.weight in it"):
        clip.ImageTower(get_backbone(name.replace(path.name, "plain.pth")))
    torch.save(alpha_state() | {"more": torch.zeros(1)}, path.with_name("more.pth"))
    with pytest.raises(ArtifactError, match=r"no AlphaCLIP checkpoint of tiny.json: .*more"):
        clip.ImageTower(get_backbone(name.replace(path.name, "more.pth")))
    whole = {f"visual.{k}": v.half() for k, v in alpha_state().items()} | {"logit_scale": torch.zeros(())}
    torch.save(whole, path.with_name("whole.pth"))
    full = clip.ImageTower(get_backbone(name.replace(path.name, "whole.pth")))(pixels())[0]
    torch.testing.assert_close(full, clip.ImageTower(get_backbone(name))(pixels())[0], rtol=0, atol=1e-2)


def test_an_alpha_clip_model_is_saved_and_served(tmp_path: Path) -> None:
    spec = get_backbone(write_alpha(tmp_path))
    extractor = extractor_for(spec, RECIPE)
    block_dims, shape_dims = dims_of(spec, RECIPE)
    transform = FeatureTransform.fit(None, block_dims, TransformConfig(), shape_dims)
    rows = [extractor(*picture(i), f"{i}") for i in range(6)]
    views = {view: torch.cat([row[view] for row in rows]) for view in rows[0]}
    support = Batch(
        image_ids=tuple(map(str, range(6))),
        views=transform(views),
        labels=torch.arange(6) % 2,
        aug_index=torch.zeros(6, dtype=torch.long),
    )
    run = RunConfig(name="prototype", method=PrototypeConfig())
    classifier = run.model(transform.dim)
    classifier.adapt(support, 2)
    save_model(
        tmp_path / "model",
        run_config=run,
        model=classifier,
        class_names=("a", "b"),
        transform=transform,
        backbone=spec.name,
        recipe=RECIPE,
        uses_mask=True,
        provenance={},
    )
    predictor = Predictor.load(tmp_path / "model")
    assert isinstance(predictor, ClassPredictor)
    image, mask = picture(0)
    expected = classifier.logits(support.select(torch.tensor([0])))[0].double()
    torch.testing.assert_close(predictor.logits(image, mask), expected)
    torch.save(alpha_state(seed=3), Path(spec.weights))
    _forget_specs()
    with pytest.raises(ArtifactError, match="made with another"):
        Predictor.load(tmp_path / "model")


def _forget_specs() -> None:
    from hypdefect.features import backbones

    backbones._describe.cache_clear()


# --- timm and PatchCore


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_any_timm_network_gives_two_maps(architecture: str, tmp_path: Path) -> None:
    net = timm.create_model(architecture, pretrained=False, num_classes=7)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    spec = get_backbone(f"timm:{architecture}@{tmp_path / 'w.safetensors'}")
    backbone = Backbone(spec)
    stage, head = backbone(pixels(1, 96))
    assert (stage.shape[1], head.shape[1]) == spec.dims
    assert stage.shape[2:] == (6, 6)
    assert (backbone.net.get_classifier().__class__) is nn.Identity
    image, mask = picture()
    features = extractor_for(spec, RecipeConfig(whole_size=96, crop_size=96, window=48))(image, mask)
    assert features["crop"].shape == (1, sum(spec.dims) + SHAPE_DIMS)
    assert torch.equal(features["crop"], features["crop"].half().float())
    broken = {k: v for k, v in net.state_dict().items() if not k.endswith("weight")}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ArtifactError, match=rf"not those of {architecture}: \d+ missing, e\.g\. "):
        Backbone(get_backbone(f"timm:{architecture}@{tmp_path / 'broken.safetensors'}"))


def slow_patches(maps: list[Tensor]) -> Tensor:
    """Cell by cell: neighbourhoods, upsampled, each averaged to D numbers, both averaged to D numbers."""
    dim, grid = maps[-1].shape[1], maps[0].shape[2:]
    layers = []
    for x in maps:
        around = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # N C h w 3 3
        around = around.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)  # N C*9 h w
        layers.append(F.interpolate(around, size=grid, mode="bilinear", align_corners=False).permute(0, 2, 3, 1))
    out = torch.empty(*layers[0].shape[:3], dim)
    for n in range(out.shape[0]):
        for y in range(grid[0]):
            for x in range(grid[1]):
                both = torch.cat([F.adaptive_avg_pool1d(layer[n, y, x][None, None], dim)[0, 0] for layer in layers])
                out[n, y, x] = F.adaptive_avg_pool1d(both[None, None], dim)[0, 0]
    return out


def test_patches_are_those_of_the_slow_definition() -> None:
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 10, 8, 6, generator=g), torch.randn(2, 14, 4, 3, generator=g)]
    torch.testing.assert_close(patch_features(maps), slow_patches(maps), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dim"),
    [("patchcore_lite0", 112), ("patchcore:resnet50@random", 1024), ("patchcore:wide_resnet50_2@random", 1024)],
)
def test_patchcore_gives_28_x_28_patches_of_layer_3s_width(name: str, dim: int) -> None:
    spec = get_backbone(name)
    assert spec.dims == (dim,)
    assert patch_grid(spec, 224) == (28, 28)
    if name == "patchcore_lite0":
        image, mask = picture()
        extractor = extractor_for(spec, RecipeConfig(whole_size=64))
        out = extractor.forward(extractor.prepare(image, mask, "x", 1))
        assert out["patch"].shape == (2, 8, 8, 112)
        assert not torch.equal(out["patch"][0], out["patch"][1])


# --- MVREC's region context


def test_multiview_rows_are_the_mean_and_its_windows() -> None:
    recipe = RecipeConfig(whole_size=32, crop_size=32, context="multiview", context_sizes=(32, 40, 48), flips=False)
    extractor = extractor_for(get_backbone("tiny_random"), recipe)
    image, mask = picture()
    out = extractor(image, mask, "x", 27)
    assert out["crop"].shape[0] == 28
    torch.testing.assert_close(out["crop"][0], out["crop"][1:].mean(0), rtol=0, atol=2e-3)
    assert len(out["whole"].unique(dim=0)) == 1
    shape = torch.from_numpy(region_shape(mask)).half().float()
    assert all(torch.equal(rows[:, -SHAPE_DIMS:], shape.repeat(28, 1)) for rows in out.values())
    single = RecipeConfig(whole_size=32, crop_size=32, window=32, flips=False)
    inputs = extractor.prepare(image, mask).copies[0]["crop"][0]
    centre = extractor_for(get_backbone("tiny_random"), single).prepare(image, mask).copies[0]["crop"][0]
    assert torch.equal(inputs[4], centre[0]), "size 0, offset (0, 0)"
    cy, cx = region_center(torch.from_numpy(mask))
    rows, _ = window_slices((cy - 32 / 3, cx), mask.shape, 32)
    assert rows.start == round(cy - 32 / 3 - 16)
    with pytest.raises(ConfigError, match="27 windows an image, not 28: lower --copies"):
        extractor(image, mask, "x", 28)


def test_config_text_is_part_of_the_digest(tmp_path: Path) -> None:
    name = write_alpha(tmp_path)
    digest = get_backbone(name).digest
    changed = {**CONFIG, "quick_gelu": False}
    (tmp_path / "tiny.json").write_text(str(changed).replace("'", '"').replace("False", "false"))
    _forget_specs()
    assert get_backbone(name).digest != digest

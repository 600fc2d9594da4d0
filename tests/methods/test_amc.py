"""AMC: residuals are those of the definition, each head learns, and each part of the method acts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hypdefect.distributed.reproduce_amc import ReproduceAMCConfig, reproduce_amc
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig, usual_copies
from hypdefect.families import SettlingFamily, few_shot, few_shot_patches
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.features.transform import TransformConfig
from hypdefect.methods.amc import AMC, AMCConfig, Supports, passes_of
from hypdefect.methods.residuals import Residuals
from hypdefect.methods.tempered import fitted_temperature
from hypdefect.types import Batch
from tests.tiny_dataset import make_folder_tree, make_mtd_tree

DIM, SIDE = 6, 8
HEADS = ("contrastive", "relation", "direct")
SMALL = AMCConfig(grid=4, hidden=16, width=8, lr=3e-3)


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


def maps(n_way: int = 3, k_shot: int = 4, seed: int = 0, spread: float = 0.5, copies: int = 0) -> Batch:
    """Noise, and in a corner of each map a pattern of the class."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(n_way, DIM, generator=torch.Generator().manual_seed(99))
    rows, ids, labels, aug = [], [], [], []
    for way in range(n_way):
        for shot in range(k_shot):
            for copy in range(copies + 1):
                noise = spread * torch.randn(SIDE, SIDE, DIM, generator=generator)
                noise[: SIDE // 2, : SIDE // 2] += pattern[way]
                rows.append(noise)
                ids.append(f"{seed}-{way}-{shot}")
                labels.append(way)
                aug.append(copy)
    return Batch(
        image_ids=tuple(ids),
        views={"patch": torch.stack(rows)},
        labels=torch.tensor(labels),
        aug_index=torch.tensor(aug),
    )


def fitted(head: Any = "contrastive", support: Batch | None = None, **config: Any) -> AMC:
    model = AMC(replace(SMALL, head=head, **config), DIM)
    model.adapt(maps() if support is None else support, 3)
    return model


def test_a_residual_is_the_difference_to_the_nearest_normal_patch() -> None:
    generator = np.random.default_rng(0)
    normals, patches = (generator.normal(size=(n, 5, 5, DIM)).astype(np.float32) for n in (7, 3))
    transform = Residuals.of_patches(normals, (DIM,), TransformConfig(bank_share=0.4))
    bank = transform.tensors["bank"]
    assert len(bank) == round(0.4 * 7 * 25)
    found = transform({"patch": torch.from_numpy(patches)})["patch"]
    rows = torch.from_numpy(patches).reshape(-1, DIM)
    nearest = bank[torch.cdist(rows, bank).argmin(1)]
    torch.testing.assert_close(found.reshape(-1, DIM), rows - nearest)
    everything = Residuals.of_patches(normals, (DIM,), TransformConfig(bank_share=1.0))
    own = everything({"patch": torch.from_numpy(normals)})["patch"]
    assert own.abs().max() == 0  # a normal patch of the bank leaves nothing
    other = Residuals.of_patches(normals, (DIM,), TransformConfig(bank_share=0.4, bank_seed=1))
    assert not torch.equal(other.tensors["bank"], bank)


def test_residuals_can_be_left_out_and_need_normals() -> None:
    patches = torch.randn(2, 5, 5, DIM)
    plain = Residuals.of_patches(None, (DIM,), TransformConfig(residuals=False))
    assert torch.equal(plain({"patch": patches})["patch"], patches)
    with pytest.raises(DataError, match="residuals need normal images"):
        Residuals.of_patches(None, (DIM,), TransformConfig())
    with pytest.raises(ConfigError, match="bank_share"):
        TransformConfig(bank_share=0.0)


@pytest.mark.parametrize("head", HEADS)
def test_classes_that_lie_apart_are_told_apart(head: str) -> None:
    queries = maps(k_shot=8, seed=5)
    logits = fitted(head).logits(queries)
    assert logits.shape == (24, 3)
    assert logits.dtype == torch.float64
    assert (logits.argmax(1) == queries.labels).double().mean() > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_the_same_supports_in_any_order_give_the_same_model(head: str) -> None:
    support, queries = maps(copies=1), maps(seed=5)
    torch.manual_seed(0)
    first = fitted(head, support).logits(queries)
    torch.rand(5)
    order = torch.randperm(len(support))
    again = fitted(head, support.select(order))
    assert torch.equal(first, again.logits(queries))
    again.adapt(maps(seed=9), 3)
    again.adapt(support, 3)
    assert torch.equal(first, again.logits(queries))


@pytest.mark.parametrize("head", HEADS)
def test_an_exported_model_is_restored_exactly(head: str, tmp_path: Path) -> None:
    model, queries = fitted(head), maps(seed=5)
    save_file({k: v.contiguous() for k, v in model.export().items()}, tmp_path / "m.safetensors")
    restored = AMC(model.config, DIM)
    with pytest.raises(RuntimeError, match="needs adapt"):
        restored.logits(queries)
    with pytest.raises(RuntimeError, match="needs adapt"):
        restored.export()
    restored.restore(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(restored.logits(queries), model.logits(queries))


def test_a_wrapped_model_needs_what_it_holds() -> None:
    for config in ({"temperature": 2.0}, {"transform": TransformConfig(centring="supports")}):
        assert RunConfig(name="amc", **config).model(DIM).needs == "patches"
        assert RunConfig(name="prototype", **config).model(DIM).needs == "vectors"


@pytest.mark.parametrize("head", ["contrastive", "relation"])
def test_fine_tuning_changes_the_answer_and_takes_the_papers_passes(head: Any) -> None:
    support, queries = maps(spread=2.0), maps(seed=5, spread=2.0, k_shot=20)
    none, usual = (fitted(head, support, passes=n) for n in (0, None))
    assert not torch.equal(none.logits(queries), usual.logits(queries))
    right = [float((m.logits(queries).argmax(1) == queries.labels).double().mean()) for m in (none, usual)]
    assert right[1] > right[0]
    config = replace(SMALL, head=head)
    contrastive = [0, 45, 25, 15, 15]
    assert [passes_of(config, s) for s in range(1, 6)] == ([0] + [45] * 4 if head == "relation" else contrastive)
    assert passes_of(replace(config, passes=3), 5) == 3


def test_one_shot_is_answered_without_fine_tuning() -> None:
    support, queries = maps(k_shot=1), maps(seed=5)
    model, untrained = fitted("contrastive", support), fitted("contrastive", support, passes=9)
    assert torch.equal(model.logits(queries), untrained.logits(queries))


def test_the_contrast_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row against the jth image of each class, its own left out: written down again, without the code's indices."""
    support = maps(k_shot=3)
    model, losses = AMC(SMALL, DIM), []
    original = AMC._contrast

    def recorded(self: AMC, supports: Any, number: int) -> torch.Tensor:
        loss = original(self, supports, number)
        if number == 4 and not losses:
            own = supports.image[4]
            rows = [4]
            for j in range(2):
                rows += [
                    [i for i in range(9) if supports.labels[i] == w and supports.image[i] != own][j] for w in range(3)
                ]
            z = F.normalize(self.net(supports.maps[torch.tensor(rows)]), dim=1)
            terms = [-torch.log_softmax(z[1 + 3 * j : 4 + 3 * j] @ z[0] / 0.07, 0)[supports.labels[4]] for j in (0, 1)]
            losses.append((float(loss.detach()), float((terms[0] + terms[1]).detach()) / 2))
        return loss

    monkeypatch.setattr(AMC, "_contrast", recorded)
    model.adapt(support, 3)
    ((ours, expected),) = losses
    assert ours == pytest.approx(expected, rel=1e-5)


def test_the_right_pair_weighs_as_much_as_all_wrong_ones() -> None:
    seen: dict[str, torch.Tensor] = {}

    def fixed(pairs: torch.Tensor) -> torch.Tensor:
        seen["pairs"] = pairs
        return torch.tensor([[0.3], [-0.2], [0.9]])

    model = AMC(replace(SMALL, head="relation"), DIM)
    model.adapt(maps(), 3)
    model.net = torch.nn.Module()
    model.net.forward = fixed  # type: ignore[method-assign]
    model.net.state_dict = dict  # type: ignore[method-assign]
    support = maps()
    rows = model.maps(support)
    clean = torch.arange(12).view(3, 4)
    supports = Supports(rows, support.labels, torch.arange(12), clean)
    assert model._relate(supports, 0) is None  # the first image of a class is its support
    loss = model._relate(supports, 5)  # of class 1
    assert loss is not None
    p = torch.sigmoid(torch.tensor([0.3, -0.2, 0.9]))
    expected = -(torch.log(1 - p[0]) + 2 * torch.log(p[1]) + torch.log(1 - p[2])) / 3
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(seen["pairs"][1], torch.cat([rows[4], rows[5]]))


def test_of_some_candidates_the_best_is_taken_at_its_temperature() -> None:
    labels = torch.arange(12) % 3
    noise = torch.Generator().manual_seed(0)
    guessed = [(torch.randn(12, 3, generator=noise), labels) for _ in range(4)]
    known = [(2 * F.one_hot(labels, 3) + torch.randn(12, 3, generator=noise), labels) for _ in range(4)]
    runs = [RunConfig(name="amc"), RunConfig(name="amc", method={"head": "direct"})]
    assert isinstance(few_shot_patches, SettlingFamily)  # else all of validation is answered again for a temperature
    setting, temperature = few_shot_patches.Setting(k_shot=1), fitted_temperature(known)
    assert few_shot_patches.settle(runs, [guessed, known], setting) == (
        replace(runs[1], temperature=temperature),
        [float((logits.argmax(1) == labels).double().mean()) for logits, _ in known],
    )
    assert few_shot_patches.settle(runs, [known, guessed], setting)[0] == replace(runs[0], temperature=temperature)
    assert few_shot_patches.settle(runs, [None, known], setting)[0] == replace(runs[1], temperature=temperature)
    assert few_shot_patches.settle(runs, [None, None], setting) == (runs[0], [0.0])


def test_a_class_without_supports_is_refused() -> None:
    with pytest.raises(DataError, match="every one of 4 classes"):
        AMC(SMALL, DIM).adapt(maps(), 4)
    copies_only = replace(maps(), aug_index=torch.ones(12, dtype=torch.long))
    for copies in (False, True):
        with pytest.raises(DataError, match="per class are"):
            AMC(replace(SMALL, copies=copies), DIM).adapt(copies_only, 3)


def test_copies_are_queries_if_at_all_and_never_supports() -> None:
    support = maps(copies=2)
    model = fitted("contrastive", support, copies=True)
    assert model.compared.shape[:2] == (3, 4)
    plain = support.select((support.aug_index == 0).nonzero().flatten())
    without = fitted("contrastive", plain).logits(maps(seed=5))
    assert not torch.equal(model.logits(maps(seed=5)), without)
    assert torch.equal(fitted("contrastive", support).logits(maps(seed=5)), without)


def test_vectors_are_refused_before_any_work(tmp_path: Path) -> None:
    task = TaskConfig(dataset="mtd", root=make_mtd_tree(tmp_path / "mtd"), k_shot=1)
    with pytest.raises(ConfigError, match=r"efficientnet_lite0 gives vectors.*--backbone patchcore_lite0"):
        prepare(few_shot_patches, task)
    assert few_shot_patches.Predictor.transform_type is Residuals
    plan = prepare(few_shot_patches, replace(task, backbone="patchcore_lite0"))
    assert not any(request.mask_id for request in plan.requests())
    assert max(request.copies for request in plan.requests()) == usual_copies(1)


def test_a_set_without_good_parts_is_refused_before_any_work(tmp_path: Path) -> None:
    tree = make_folder_tree(tmp_path / "own", with_good=False)
    message = "folder has no normal images, which residuals are taken from: add images of good"
    with pytest.raises(DataError, match=message):
        prepare(few_shot_patches, TaskConfig(dataset="folder", root=tree, backbone="patchcore_lite0", k_shot=1))
    figures, missing = reproduce_amc(ReproduceAMCConfig(datasets=("folder",), roots={"folder": tree}, shots=(1,)))
    assert not figures
    assert [reason[: len(message)] for reason in missing] == [message]


def test_no_candidate_of_good_parts_is_in_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path / "home"))
    tree = make_mtd_tree(tmp_path / "mtd", per_class=12)
    job = TaskConfig(dataset="mtd", root=tree, k_shot=2, good_class=True, backbone="patchcore:test_efficientnet@random")
    cells = TaskConfig(dataset="elpv", backbone="patchcore:test_efficientnet@random")  # all its normals are candidates
    for task, names in ((job, 6), (cells, 4)):
        plan = prepare(few_shot_patches, task)
        assert len(plan.classes) == names
        assert plan.normal_ids
        assert not set(plan.normal_ids) & {*plan.pool_ids, *plan.partition.query}
        good = {row["image_id"] for row in plan.manifest.to_pylist() if not row["is_defect"]}
        assert good & set(plan.pool_ids)
        assert good & set(plan.partition.query)
    with pytest.raises(ConfigError, match="a good part has no mask"):
        prepare(few_shot, replace(job, backbone="tiny_random"))

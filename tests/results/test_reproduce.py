"""jobs/reproduce.py: which rows it makes, what it says of absent data, and that its cells are those of its draws."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hypdefect.datasets.ingest import ingested
from hypdefect.distributed.reproduce import Measured
from hypdefect.errors import ConfigError
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig
from hypdefect.features.imported import import_features
from hypdefect.features.store import FeatureStore
from hypdefect.results import ledger
from hypdefect.results.published import published
from hypdefect.results.studies import (
    ReproduceConfig,
    Study,
    StudyRow,
    experiments_of,
    read_paper,
    reference_variants,
)
from hypdefect.types import VIEWS
from jobs.reproduce import main
from tests.tiny_clip import write_alpha
from tests.tiny_dataset import make_folder_tree, make_mtd_tree
from tests.trees import photo, rectangle, save_csv

CURVATURES = (0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0)
TINY = ("--backbone", "tiny_random", "--copies", "1", "--method.steps", "2")


def run(monkeypatch: pytest.MonkeyPatch, place: Path, *words: object) -> Any:
    summary = place / "summary.json"
    monkeypatch.setenv("HYPDEFECT_DATA", str(place / "nowhere"))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "hypdfs", *map(str, words), "--json", str(summary)])
    main()
    return json.loads(summary.read_text())


def test_what_is_named_twice_is_run_once() -> None:
    asked = ReproduceConfig(datasets=("mtd", "dtd"), studies=("parts",), shots=(5, 1))
    twice = replace(asked, datasets=("mtd", "dtd", "mtd"), shots=(5, 1, 5))
    assert experiments_of(twice) == experiments_of(asked)
    tables = ReproduceConfig(datasets=("mtd",), studies=("main",), shots=(1,))
    assert experiments_of(replace(tables, datasets=("mtd", "mtd"), shots=(1, 1))) == experiments_of(tables)


def make_two_products(root: Path, per_class: int = 8) -> Path:
    """MVTec-FS's layout: two of its products with two classes each and the official split."""
    for place, (product, defects) in enumerate({"carpet": ("color", "cut"), "grid": ("bent", "glue")}.items()):
        rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
        for i in range(per_class):
            part, folder = ("train", "training") if i % 2 else ("valid", "testing")
            for kind, defect in enumerate(defects):
                relative = f"{folder}/{defect}/{i:03d}.png"
                photo(root / "image" / product / relative, (kind,), i, place)
                x0, y0, x1, y1 = rectangle(kind, i)
                points = json.dumps([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
                rows[part].append({"img_rel_path": relative, "label": defect, "points": points})
        for part, lines in rows.items():
            save_csv(root / "CONFIG" / f"{product}_config1" / f"{part}.csv", lines)
    return root


def fill_store(home: Path, task: TaskConfig, *products: str) -> None:
    """Features of every image of a set, drawn at random: what these tests are about comes after extraction."""
    rng = np.random.default_rng(0)
    manifest = ingested(task.dataset, task.root, home).table
    for product in products or ("",):
        plan = few_shot.plan(replace(task, product=product), manifest)
        keys = [key for request in plan.requests() for key in request.row_keys()]
        store = FeatureStore(home, plan.key)
        store.create()
        store.write(keys, {view: rng.normal(size=(len(keys), plan.key.dim)).astype(np.float32) for view in VIEWS})


@pytest.mark.parametrize("nested", [False, True])
def test_rows_and_their_published_figures(nested: bool) -> None:
    rows = experiments_of(ReproduceConfig(nested=nested))
    by_study: dict[str, list[Any]] = {}
    for row in rows:
        by_study.setdefault(row.study, []).append(row)
    printed = {study: [row.cell and row.cell.value for row in own] for study, own in by_study.items()}
    assert printed == {
        "main": [73.7, 79.3, 86.1, 89.3, 89.4, 91.7, 55.4, 59.4, 67.6, 78.6, 78.6, 86.4],
        "adapter": [69.5, 78.1, 86.4],
        "loss": [78.1, 79.2, 86.4],
        "backbone": [52.5, 69.5],
        "ode": [None, None, None],
        "curvature": [78.1, None, None, 79.1, None, None, None, 78.9],
        "parts": [None] * 14,
    }
    full = ReproduceConfig().method
    assert by_study["main"][1].config.method == full
    assert [r.config.method.curvature for r in by_study["curvature"]] == [*CURVATURES, full.curvature]
    assert [r.config.method.learn_curvature for r in by_study["curvature"]] == [False] * len(CURVATURES) + [True]
    for study in ("loss", "ode"):
        for row in by_study[study]:
            assert getattr(row.config.method, study) == row.row
    parts = [(row.config.method.adapter, row.config.method.synthesis) for row in by_study["adapter"]]
    assert parts == [(False, False), (True, False), (True, True)]
    (_, real, synthetic), (euclidean, hyperbolic, _) = by_study["adapter"], by_study["loss"]
    assert synthetic.config.method == full
    # where the paper prints one figure for two rows, nested settings are one setting
    assert (real.config == euclidean.config) == nested
    assert (hyperbolic.config == by_study["curvature"][2].config) == nested


def test_what_a_paper_has_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no tables of 'amc' can be computed; there are hypdfs"):
        read_paper("amc")
    with pytest.raises(ConfigError, match=r"hypdfs has no studies curvatures; it has main, adapter, loss, backbone"):
        ReproduceConfig(studies=("main", "curvatures"))
    with pytest.raises(
        ConfigError, match=r"no datasets elpv; it has mvtec_fs, mtd; any image set goes with --studies parts"
    ):
        ReproduceConfig(studies=("main", "ode"), datasets=("mtd", "elpv"))
    with pytest.raises(ConfigError, match=r"unknown dataset 'elvp'; did you mean 'elpv'"):
        ReproduceConfig(datasets=("elvp",))
    with pytest.raises(ConfigError, match=r"--root is the place of one set .* beside mvtec_fs, mtd, .*; there is none"):
        ReproduceConfig(datasets=("mtd",), root=Path("tiles"))
    with pytest.raises(ConfigError, match=r"there are folder, elpv"):
        ReproduceConfig(datasets=("folder", "elpv"), root=Path("tiles"))
    with pytest.raises(ConfigError, match=r"study s: reference 'all' is none of its rows a, b"):
        Study(name="s", title="", ledger="", reference="all", rows=(StudyRow(row="a"), StudyRow(row="b")))
    with pytest.raises(ConfigError, match=r"draws >= 2"):
        ReproduceConfig(draws=1)


def test_every_row_names_one_figure_and_fields_that_exist() -> None:
    """Of the table it stands in, or none where the paper prints none; `nested` rows are configurations, too."""
    paper = read_paper("hypdfs")
    tables = {cell.table for cell in published("hypdfs").cells}
    assert {study.table for study in paper.studies} - tables == {"ablation, ode", ""}
    assert not any(row.where for study in paper.studies if not study.table for row in study.rows)
    for nested in (False, True):
        experiments = experiments_of(ReproduceConfig(nested=nested))
        assert len({(e.study, e.dataset, e.k_shot, e.row) for e in experiments}) == len(experiments)
        assert len({(e.ledger, e.dataset, e.k_shot, e.config.name) for e in experiments}) == len(experiments)
        assert {e.ledger[0].startswith("paper") for e in experiments} == ({True} if nested else {True, False})


def test_references_are_the_full_method_and_every_other_row_of_their_study_is_not() -> None:
    full = ReproduceConfig().method
    studies: dict[str, set[str]] = {}
    for row in experiments_of(ReproduceConfig()):
        if row.study in ("main", "backbone"):
            assert row.reference == ""
        elif row.reference:
            studies.setdefault(row.study, set()).add(row.reference)
            assert row.config.method != full
        else:
            assert row.config.method == full
    assert studies == {
        "adapter": {"real+synthetic"},
        "loss": {"hdcl"},
        "ode": {"fc"},
        "curvature": {"c = 0.05"},
        "parts": {"full method"},
    }
    assert reference_variants("hypdfs")["ablation/adapter"] == "adapter real+synthetic"


def test_what_stands_in_no_table_is_run_on_any_set_and_k() -> None:
    """Tables stay where they are printed."""

    def places(**asked: Any) -> dict[str, set[tuple[str, int]]]:
        found: dict[str, set[tuple[str, int]]] = {}
        for row in experiments_of(ReproduceConfig(**asked)):
            found.setdefault(row.study, set()).add((row.dataset, row.k_shot))
        return found

    assert places(studies=("parts",)) == {"parts": {("mtd", 5)}}
    asked = places(studies=("main", "ode", "parts"), datasets=("mtd", "neu_seg"), shots=(1, 3))
    both = {("mtd", 1), ("mtd", 3)}
    assert asked == {"main": both, "ode": {("mtd", 5)}, "parts": both | {("neu_seg", 1), ("neu_seg", 3)}}


def test_absent_data_is_skipped_with_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(monkeypatch, tmp_path, *TINY)
    out = " ".join(capsys.readouterr().out.split())
    assert {cell["ours"] for cell in result["cells"]} == {cell["difference"] for cell in result["cells"]} == {None}
    assert all(cell["skip"] for cell in result["cells"])
    for text in (
        "minus full method",
        "mvtec_fs is not here: get it from https://github.com/ShuaiLYU/MVTec-FS",
        "or pass --mvtec-fs DIR",
        "or pass --mtd DIR",
        "clip_l14_grit20m_fultune_2xe.pth",
        "--clip clip_vit_l14",
        "55.4",
        "SKIP",
    ):
        assert text in out, text
    assert out.count("mtd is not here") == 1  # however many rows want it


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ("neu_seg", r"neu_seg is not here: get it from .*Put it at .*nowhere/neu_seg, or pass --root DIR; layout: "),
        ("folder", r"folder has no default place on this machine \(your own files\): pass --root DIR; layout: "),
    ],
)
def test_an_absent_set_of_another_kind_is_skipped_with_where_to_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, text: str
) -> None:
    result = run(monkeypatch, tmp_path, *TINY, "--datasets", dataset)
    assert {cell["study"] for cell in result["cells"]} == {"parts"}
    assert all(re.match(text, cell["skip"]) for cell in result["cells"])


def test_what_was_named_and_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--mtd .*gone does not exist"):
        run(monkeypatch, tmp_path, *TINY, "--mtd", tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"--root .*gone does not exist"):
        run(monkeypatch, tmp_path, *TINY, "--datasets", "folder", "--root", tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"'gone\.pth' is no file"):
        run(monkeypatch, tmp_path, *TINY, "--alphaclip", "alphaclip:ViT-L-14@gone.pth")


@pytest.mark.ray
def test_cells_are_those_of_the_draws_in_the_ledger(
    ray_local: Any,
    hypdefect_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mtd, mvtec_fs, alphaclip = (
        make_mtd_tree(tmp_path / "mtd", 12),
        make_two_products(tmp_path / "fs"),
        write_alpha(tmp_path),
    )
    base = TaskConfig(dataset="mtd", root=mtd, backbone="tiny_random", copies=1, k_shot=1)
    fill_store(hypdefect_home, base)
    fill_store(hypdefect_home, replace(base, backbone=alphaclip))
    fill_store(hypdefect_home, replace(base, dataset="mvtec_fs", root=mvtec_fs), "carpet", "grid")
    data = ("--mtd", mtd, "--mvtec-fs", mvtec_fs, "--alphaclip", alphaclip)
    before = ledger.read(hypdefect_home).num_rows
    studies = ("--studies", "main", "loss", "backbone", "--shots", "1", "--draws", "2")
    result = run(monkeypatch, tmp_path, *TINY, *data, *studies)
    out = " ".join(capsys.readouterr().out.split())
    assert "with tiny_random, random split, 2 draws" in out
    assert "Ours: tiny_random, another backbone" in out
    assert "mean over products, 2 of 14 are here" in out
    assert out.count("SKIP") == 2  # the row VanillaCLIP and its reason
    rows = ledger.read(hypdefect_home).slice(before).to_pylist()
    assert {(r["label"], r["study"]) for r in rows} == {
        ("mtd", "paper"),
        ("mtd", "ablation/loss"),
        ("mtd", "ablation/backbone"),
        ("mvtec_fs-carpet", "paper"),
        ("mvtec_fs-grid", "paper"),
    }
    names = {"main": "paper", "loss": "ablation/loss", "backbone": "ablation/backbone"}
    for cell in result["cells"]:
        if cell["skip"]:
            assert cell["row"] == "VanillaCLIP"
            continue
        variant = {"main": "", "loss": f"loss {cell['row']}", "backbone": cell["row"]}[cell["study"]]
        key = (cell["dataset"], names[cell["study"]], cell["method"]["name"], variant, cell["k_shot"], cell["backbone"])
        of = [
            r for r in rows if (r["dataset"], r["study"], r["method"], r["variant"], r["k_shot"], r["backbone"]) == key
        ]
        assert len(of) == 2 * (2 if cell["dataset"] == "mvtec_fs" else 1)
        means = [np.mean([dict(r["metrics"])["acc"] for r in of if r["draw"] == draw]) for draw in (0, 1)]
        assert cell["ours"]["mean"] == pytest.approx(np.mean(means))
        assert cell["ours"]["n"] == 2
        assert cell["ours"]["std"] == pytest.approx(np.std(means, ddof=1))
        assert cell["difference"] == pytest.approx(100 * np.mean(means) - cell["published"])
        assert (cell["paired"] is None) == (cell["study"] != "loss" or cell["row"] == "hdcl")
        if cell["paired"]:
            full = next(one for one in result["cells"] if (one["study"], one["row"]) == ("loss", "hdcl"))
            assert cell["paired"]["mean"] == pytest.approx(cell["ours"]["mean"] - full["ours"]["mean"])


def test_differences_are_paired_by_draw_and_told_over_partition_means() -> None:
    """Rows of other K, sets and studies have references of their own; draws are means over products."""
    experiments = [
        row
        for row in experiments_of(
            ReproduceConfig(studies=("main", "ode", "parts"), datasets=("mtd", "neu_seg"), shots=(1, 5))
        )
        if row.row != "curvature 0"  # not run
    ]
    rng = np.random.default_rng(0)
    draws = [(partition, draw) for partition in range(3) for draw in range(2)]
    accuracies = {row: {at: list(rng.uniform(size=2)) for at in draws} for row in experiments}
    measured = Measured(accuracies)
    of = {(row.study, row.dataset, row.k_shot, row.row): np.mean([*accuracies[row].values()], 1) for row in experiments}
    told = 0
    for result in measured.results(experiments):
        row = result.experiment
        place = (row.study, row.dataset, row.k_shot)
        full = {"ode": "fc", "parts": "full method"}.get(row.study, row.row)
        if row.row == full:
            assert result.paired is None
            continue
        means = (of[*place, row.row] - of[*place, full]).reshape(3, 2).mean(1)
        assert result.paired is not None
        assert result.paired.mean == pytest.approx(means.mean())
        error = means.std(ddof=1) * (1 / 3 + 1) ** 0.5  # as many queries as support candidates
        assert result.paired.half_width == pytest.approx(stats.t.ppf(0.975, 2) * error)
        told += 1
    assert told == 2 + 4 * 12
    (absent,) = Measured().results(experiments[-1:])
    assert (absent.ours, absent.paired) == (None, None)


@pytest.mark.ray
def test_parts_are_told_on_a_set_of_ones_own(
    ray_local: Any,
    hypdefect_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = make_folder_tree(tmp_path / "own", classes=2, per_class=8)
    fill_store(hypdefect_home, TaskConfig(dataset="folder", root=root, backbone="tiny_random", copies=1, k_shot=1))
    before = ledger.read(hypdefect_home).num_rows
    words = ("--studies", "parts", "--datasets", "folder", "--root", root, "--draws", 2, "--shots", 1)
    result = run(monkeypatch, tmp_path, *TINY, *words, "--method.penalty", 0.5)
    out = " ".join(capsys.readouterr().out.split())
    assert "what each part is worth: accuracy" in out
    assert "minus full method: over the same draws" in out
    assert "published" not in out.lower()
    assert "L_s and the ODE go with it" in out
    rows = ledger.read(hypdefect_home).slice(before).to_pylist()
    assert {(row["study"], row["dataset"]) for row in rows} == {("ablation/parts", "folder")}
    acc = {(row["variant"], row["draw"]): dict(row["metrics"])["acc"] for row in rows}
    assert len(acc) == len(rows) == 2 * len(result["cells"])
    for cell in result["cells"]:
        assert (cell["dataset"], cell["published"], cell["difference"]) == ("folder", None, None)
        if cell["row"] == "full method":
            assert (cell["paired"], cell["reference"]) == (None, "")
            continue
        assert cell["reference"] == "full method"
        differences = [acc[cell["row"], draw] - acc["full method", draw] for draw in (0, 1)]
        assert cell["paired"]["mean"] == pytest.approx(np.mean(differences))
        assert f"{100 * cell['paired']['mean']:+.2f} ± {100 * cell['paired']['half_width']:.2f}" in out


@pytest.mark.ray
def test_parts_are_told_on_imported_features(
    ray_local: Any,
    hypdefect_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 8)
    features = rng.normal(size=(16, 3, 4)) + (labels == "b")[:, None, None]
    np.savez(tmp_path / "own.npz", features=features, labels=labels)
    import_features([tmp_path / "own.npz"], hypdefect_home)
    words = ("--studies", "parts", "--draws", 2, "--shots", 1, "--method.steps", 2, "--datasets")
    with pytest.raises(ConfigError, match=r"no imported features 'other' \(known: .*own"):
        run(monkeypatch, tmp_path, *words, "imported:own", "imported:other")
    before = ledger.read(hypdefect_home).num_rows
    result = run(monkeypatch, tmp_path, *words, "imported:own")
    rows = ledger.read(hypdefect_home).slice(before).to_pylist()
    assert {(row["study"], row["dataset"]) for row in rows} == {("ablation/parts", "imported:own")}
    accuracy = {cell["row"]: cell["ours"]["mean"] for cell in result["cells"]}
    assert len(accuracy) == 14
    assert min(accuracy.values()) > 0.7
    assert " with efficientnet" not in capsys.readouterr().out  # whose features they are not


@pytest.mark.ray
def test_partitions_of_an_official_split_are_refused(
    ray_local: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_two_products(tmp_path / "fs")
    with pytest.raises(ConfigError, match="official split: --partitions must be 1"):
        run(monkeypatch, tmp_path, *TINY, "--datasets", "mvtec_fs", "--mvtec-fs", tree, "--shots", 1, "--partitions", 2)

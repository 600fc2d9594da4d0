"""Which methods a comparison has, and what an image set must have for them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypdefect.config import to_mapping
from hypdefect.distributed.detection_tournament import EvaluateDetectorsConfig
from hypdefect.distributed.tournament import (
    EvaluateConfig,
    entrants,
    of_sweep,
    planned,
    planned_patches,
    validation_episodes,
)
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families.few_shot import MetaStart
from hypdefect.files import write_json
from hypdefect.methods import methods_of
from jobs.sweep import DetectionJob, SweepJob
from tests.tiny_dataset import make_elpv_tree, make_mtd_tree
from tests.trees import make_neu_seg_tree
from tune_spaces import get_space


def test_all_methods_are_those_of_vectors_and_of_patches_where_there_are_images() -> None:
    job = EvaluateConfig(dataset="mtd", methods=("all", "amc"))
    assert {"hypdfs", "prototype", "amc"} < set(job.names)
    assert job.names.count("amc") == 1
    assert job.of_family("few_shot_patches") == ("amc",)
    assert "amc" not in EvaluateConfig(dataset="imported:any", methods=("all",)).names


def test_a_detector_that_is_named_twice_is_run_once() -> None:
    assert EvaluateDetectorsConfig(dataset="mtd", methods=("patchcore", "patchcore")).names == ("patchcore",)
    names = EvaluateDetectorsConfig(dataset="mtd", methods=("hypad", "all")).names
    assert names[0] == "hypad"
    assert sorted(names) == sorted(methods_of("detection"))


def test_a_sweep_of_another_family_is_not_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    for name, job in {"amc": SweepJob(dataset="mtd"), "conditional_patchcore": DetectionJob(dataset="mtd")}.items():
        runs = {"selected": to_mapping(RunConfig(name=name)), "reference": to_mapping(RunConfig(name="patchcore"))}
        write_json(tmp_path / "sweeps" / name / "sweep.json", {"job": to_mapping(job)})
        write_json(tmp_path / "sweeps" / name / "result.json", runs | {"selected_trials": [0]})
        with pytest.raises(ConfigError, match=f"sweep '{name}' chose a method of .*; its own table is its evaluation"):
            of_sweep(EvaluateConfig(sweep=name))


def test_a_sweep_of_which_some_member_was_trained_is_not_evaluated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    scratch = RunConfig(pretrained=False, support_copies=0)
    learned, projected = replace(scratch, pretrained=True), replace(scratch, features="meta")
    runs = {name: replace(scratch, blend=(scratch, one)) for name, one in (("a", learned), ("b", projected))}
    for name, run in runs.items():
        values = {"selected": to_mapping(run), "reference": to_mapping(RunConfig(name="prototype"))}
        job = to_mapping(SweepJob(dataset="mtd")) | {"init": "runs/meta"}
        write_json(tmp_path / "sweeps" / name / "sweep.json", {"job": job})
        write_json(tmp_path / "sweeps" / name / "result.json", values | {"selected_trials": [0, 1]})
        with pytest.raises(ConfigError, match=f"sweep '{name}' started from runs/meta; its own table"):
            of_sweep(EvaluateConfig(sweep=name))
    write_json(tmp_path / "sweeps" / "b" / "sweep.json", {"job": job | {"init": None}})
    _, (ours, _) = of_sweep(EvaluateConfig(sweep="b"))
    assert ours.candidates == (runs["b"],)


def test_methods_that_need_good_parts_leave_all_where_there_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trees = {
        "mtd": make_mtd_tree(tmp_path / "mtd", per_class=12),
        "neu_seg": make_neu_seg_tree(tmp_path / "neu_seg", per_class=12),
        "elpv": make_elpv_tree(tmp_path / "elpv", per_class=6),  # good parts are classes
    }

    def job(dataset: str, *methods: str, shots: tuple[int, ...] = (1,)) -> EvaluateConfig:
        partitions = 1 if dataset == "neu_seg" else 2  # its split is official
        return EvaluateConfig(
            dataset=dataset, root=trees[dataset], methods=methods, split="random", shots=shots, partitions=partitions
        )

    good, none, _ = (planned(job(dataset, "all")) for dataset in trees)
    assert [plan.config.partition for plan in planned_patches(job("mtd", "all"), good)] == [0, 1]
    assert planned_patches(job("mtd", "prototype"), good) == []
    assert planned_patches(job("neu_seg", "all"), none) == []
    assert "amc left out of all methods: neu_seg has no normal images" in caplog.text
    with pytest.raises(DataError, match="has no normal images"):
        planned_patches(job("neu_seg", "all", "amc"), none)
    few = job("elpv", "all", shots=(1, 3))
    assert planned_patches(few, planned(few)) == []
    by_name = job("elpv", "amc", shots=(1, 3))
    with pytest.raises(DataError, match=r"class '\w+_good' has [12] support candidates beside .*; K = 3 needs as many"):
        planned_patches(by_name, planned(by_name))
    once = job("elpv", "amc")
    plans = planned_patches(once, planned(once))
    assert validation_episodes(once, plans, fixed=False) == {1: 0}  # of one image left no query can be drawn


def test_parts_of_an_image_feature_are_tried_beside_meta_trained_ones_too(tmp_path: Path) -> None:
    job = EvaluateConfig(
        dataset="mtd", root=make_mtd_tree(tmp_path, per_class=12), methods=("prototype", "hypdfs"), shots=(1,)
    )
    (plan,) = planned(job)
    start = MetaStart(method="hypdfs", projection={"whole": torch.zeros(1, 1)}, core={"x": torch.zeros(1)})
    *plain, prototype, hypdfs = entrants(job, get_space, start, plan)
    assert [(e.method, e.features) for e in plain] == [("prototype", "plain"), ("hypdfs", "plain")]
    for entrant in (*plain, prototype, hypdfs):
        transforms = [c.transform for c in entrant.candidates if c.features == "plain"]
        tried = [(t.parts, t.centring, t.whitening) for t in transforms]
        assert tried[:3] == [(None, "none", 3.0), ("0", "supports", 3.0), ("1", "supports", 0.1)]
    assert [c.features for c in hypdfs.candidates[:4]] == ["meta", *["plain"] * 3]


def test_partitions_of_an_official_split_are_no_repetitions(tmp_path: Path) -> None:
    job = EvaluateConfig(
        dataset="neu_seg", root=make_neu_seg_tree(tmp_path, per_class=12), split="random", shots=(1,), partitions=2
    )
    with pytest.raises(ConfigError, match="neu_seg has an official split: --partitions must be 1, or --split grouped"):
        planned(job)
    (one,) = planned(replace(job, partitions=1))
    assert one.partition.kind == "official"

"""The report: what it says of known numbers, and that its page holds everything, whatever the ledger lacks."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from hypdefect.config import digest, to_mapping
from hypdefect.errors import ConfigError
from hypdefect.evaluation import TWIN, RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting
from hypdefect.features.transform import TransformConfig
from hypdefect.geometry import pairwise_dist
from hypdefect.methods import METHODS
from hypdefect.results import ledger
from hypdefect.results.comparison import leaderboard
from hypdefect.results.feature_figures import fitted_points, plot_disk, plot_radius, plot_tsne
from hypdefect.results.figures import short, spread
from hypdefect.results.ledger import SCHEMA
from hypdefect.results.page import reading, replace_results, verdict
from hypdefect.statistics import Interval
from hypdefect.types import VIEWS
from jobs import report
from tests.toy_features import DIM, toy_pool

Method = tuple[str, str, str]  # name, features, variant
MAIN: dict[Method, float] = {
    ("hypdfs", "meta", ""): 0.10,
    ("hypdfs", "meta", TWIN): 0.097,
    ("hypdfs", "plain", ""): 0.03,
    ("shrinkage_lda", "meta", ""): 0.098,
    ("prototype", "meta", ""): 0.09,
    ("prototype", "plain", ""): 0.02,
    ("logistic_regression", "plain", ""): 0.0,
    ("tip_adapter_f", "plain", ""): 0.01,
}
CLASSES = ("blowhole", "break", "crack", "fray", "uneven")


def generated(
    skill: dict[Method, float],
    *,
    study: str = "main",
    label: str = "mtd",
    split: str = "grouped",
    shots: tuple[int, ...] = (1, 3, 5),
    partitions: int = 3,
    draws: int = 3,
    classes: tuple[str, ...] = CLASSES,
    created: str = "2026-11-22T12:00:00Z",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows as an evaluation writes them: draws are easy or hard for all methods alike, `skill` is what differs."""
    rng = np.random.default_rng([seed, len(study), len(split)])
    rows = []
    for k in shots:
        level = 0.55 + 0.25 * np.log(k + 1) / np.log(6) + (0.05 if split == "random" else 0)
        for partition in range(partitions):
            easy = rng.normal(0, 0.02)
            for draw in range(draws):
                luck = rng.normal(0, 0.03, len(classes))
                for (method, features, variant), gain in skill.items():
                    each = 40
                    recall = np.clip(level + gain + easy + luck + rng.normal(0, 0.005, len(classes)), 0.05, 0.99)
                    wrong = (1 - recall) / max(len(classes) - 1, 1)
                    share = np.where(np.eye(len(classes), dtype=bool), recall[:, None], wrong[:, None])
                    confusion = np.array([rng.multinomial(each, row) for row in share])
                    correct = confusion.trace() / confusion.sum()
                    rows.append(
                        {
                            "run_id": digest([study, label, split, created])[:12],
                            "created": created,
                            "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
                            "command": "python jobs/evaluate.py --dataset mtd --methods all",
                            "config_digest": digest(["config", study]),
                            "data_digest": digest(["data", label]),
                            "label": label,
                            "dataset": label,
                            "product": "",
                            "backbone": "efficientnet_lite0",
                            "study": study,
                            "split": split,
                            "protocol": "draws",
                            "method": method,
                            "variant": variant,
                            "features": features,
                            "method_config": json.dumps(to_mapping(RunConfig(name=method, features=features))),
                            "validation_acc": float(correct),
                            "k_shot": k,
                            "partition": partition,
                            "draw": draw,
                            "num_queries": int(confusion.sum()),
                            "acc": float(correct),
                            "balanced_acc": float(correct),
                            "macro_f1": float(correct) - 0.01,
                            "ece": 0.08 + gain / 2,
                            "fit_seconds": 0.5 if method == "hypdfs" else 0.004,
                            "predict_seconds": 0.01,
                            "class_names": list(classes),
                            "confusion": confusion.flatten().tolist(),
                        }
                    )
    return rows


def table(*parts: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([row for part in parts for row in part], schema=SCHEMA)


def curvature() -> list[dict[str, Any]]:
    values = {"c = 0": 0.097, "c = 0.01": 0.098, "c = 0.05": 0.1, "c = 0.3": 0.09, "c = 1.0": 0.06, "c learned": 0.1}
    return generated({("hypdfs", "meta", v): g for v, g in values.items()}, study="curvature")


def ablations() -> list[dict[str, Any]]:
    """Two studies that share nothing but the full method, as `jobs/reproduce.py` names them."""
    parts = {"adapter none": 0.0, "adapter real": 0.08, "adapter real+synthetic": 0.1}
    losses = {"loss Euclidean": 0.11, "loss hyperbolic, with a name as long as names get": 0.0, "loss HDCL": 0.1}
    rows = generated({("hypdfs", "meta", v): g for v, g in parts.items()}, study="ablation/adapter", shots=(5,))
    rows += generated({("hypdfs", "meta", v): g for v, g in losses.items()}, study="ablation/loss", shots=(5,))
    full = {"adapter real+synthetic", "loss HDCL"}
    return [row | {"method_config": "{}" if row["variant"] in full else digest(row["variant"])} for row in rows]


def run(home: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(home))
    monkeypatch.setattr("sys.argv", ["jobs/report.py", *args])
    report.main()


class Page(HTMLParser):
    """Tags, links and text of a page; complains of a tag that is closed by another."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data.replace("\xa0", " ")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def made(home: Path, monkeypatch: pytest.MonkeyPatch, *parts: list[dict[str, Any]], features: bool = False) -> Page:
    for part in parts:
        for study in dict.fromkeys(row["study"] for row in part):
            ledger.append([row for row in part if row["study"] == study], home)
    run(home, monkeypatch, "--out", str(home / "out"), *([] if features else ["--no-features"]))
    return Page((home / "out" / "index.html").read_text())


def test_the_page_holds_everything_and_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elpv = generated(MAIN, label="elpv", split="random", partitions=1, classes=("mono <good>", "poly & bad"))
    page = made(tmp_path, monkeypatch, generated(MAIN), curvature(), ablations(), elpv)
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    wanted = [f"elpv-random-{name}.png" for name in ("ahead", "confusion", "shots")]
    wanted += [f"mtd-grouped-{name}.png" for name in ("ablation", "ahead", "confusion", "curvature", "shots")]
    assert pictures == wanted
    images = page.all("img")
    assert len(images) == len(pictures)
    assert all(str(image["src"]).startswith("data:image/png;base64,") and image["alt"] for image in images)
    links = [a["href"] for a in page.all("a")]
    assert {f"#{section['id']}" for section in page.all("section")} == set(links) == {"#mtd-grouped", "#elpv-random"}
    assert not page.all("script")
    assert not page.all("link")
    for text in ("0123456789ab-dirty", "3 partitions × 3 draws", "mono <good>", "tip adapter f", TWIN):
        assert text in page.text
    assert "python jobs/evaluate.py --dataset mtd --methods all" in page.text


def test_what_is_missing_is_said_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = made(tmp_path, monkeypatch, generated({key: MAIN[key] for key in MAIN if key[1] == "plain"}, shots=(1,)))
    assert "not measured here. Made by python jobs/reproduce.py hypdfs --datasets mtd --studies curvature" in page.text
    assert "Ablations: not measured here" in page.text
    assert "Its c = 0 twin was not run." in page.text


@pytest.mark.parametrize(
    "case",
    [
        {"draws": 1, "partitions": 1},
        {"shots": (1,)},
        {
            "classes": ("a_very_long_name_of_a_defect_class_without_end", "b with many words in its long name", "c"),
            "draws": 2,
        },
        {"classes": tuple(f"class {i}" for i in range(18)), "shots": (1, 5), "draws": 2},
    ],
    ids=["one draw", "one K", "long names", "many classes"],
)
def test_unusual_ledgers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    page = made(tmp_path, monkeypatch, generated(MAIN, **case))
    assert len(page.all("img")) == 3
    assert "inf" not in page.text.replace("infer", "")
    assert "nan" not in page.text.lower()
    if case.get("draws") == 1:
        assert "One draw gives no interval" in page.text
        assert "ahead of" not in page.text
        assert "level with" not in page.text


def test_twenty_methods_or_hypdfs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in METHODS if name != "hypdfs"]
    skill = {(name, features, ""): 0.001 * i for i, name in enumerate(names) for features in ("plain", "meta")}
    page = made(tmp_path / "many", monkeypatch, generated(MAIN | skill, shots=(1, 5), draws=2))
    assert f"Beside the {len(names)} peers on plain features" in page.text
    alone = made(tmp_path / "alone", monkeypatch, generated({("hypdfs", "plain", ""): 0.0}, shots=(1, 5)))
    assert "On plain features HypDFS reaches" in alone.text
    without = made(tmp_path / "without", monkeypatch, generated({("prototype", "plain", ""): 0.0}, shots=(1, 5)))
    assert "HypDFS is not among the methods" in without.text


def plain(section: report.Section) -> dict[str, tuple[float, float]]:
    """Mean and half width of HypDFS minus each method at each K, computed without the code under test."""
    rows = section.main.to_pylist()
    found = {}
    keys = {(row["method"], row["features"], row["variant"]) for row in rows}
    for k in section.shots:
        acc = {
            (row["method"], row["features"], row["variant"], row["partition"], row["draw"]): row["acc"]
            for row in rows
            if row["k_shot"] == k
        }
        places = sorted({key[3:] for key in acc})
        for key in keys - {("hypdfs", "meta", "")}:
            by: dict[int, list[float]] = {}
            for place in places:
                by.setdefault(place[0], []).append(acc["hypdfs", "meta", "", *place] - acc[*key, *place])
            means = [np.mean(values) for values in by.values()]
            half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
            name = "its c = 0 twin" if key[2] else f"{key[0].replace('_', ' ')}, {key[1]}"
            found[f"{name}, {k}"] = (100 * float(np.mean(means)), 100 * float(half))
    return found


def test_the_reading_says_level_where_the_interval_holds_zero() -> None:
    (section,) = report.sections(table(generated(MAIN, shots=(5,), partitions=6)))
    text, truth = reading(section), plain(section)
    beside = text[text.index("given the same") : text.index("Beside its own")]
    states = {"ahead of": 0, "level with": 0, "behind": 0}
    for name in ("shrinkage lda", "prototype"):
        mean, half = truth[f"{name}, meta, 5"]
        state = "ahead of" if mean > half else "behind" if mean < -half else "level with"
        states[state] += 1
        if state != "ahead of":
            assert f"{name} ({mean:+.2f} ± {half:.2f})".replace("-", "−") in beside[beside.index(state) :]
    assert {state for state in states if state in beside} == {state for state, n in states.items() if n}
    mean, half = truth["its c = 0 twin, 5"]
    state = "ahead" if mean > half else "behind" if mean < -half else "level"
    assert f"Beside its own c = 0 twin it is {state} at K = 5 ({mean:+.2f} ± {half:.2f})".replace("-", "−") in text
    lead = min(value for key, value in truth.items() if "plain" in key and "hypdfs" not in key)
    assert f"at K = 5, {lead[0]:+.2f} ± {lead[1]:.2f})" in text
    assert "ahead of all at every K" in text


def test_the_ceiling_is_said_where_it_was_measured() -> None:
    skill = {("logistic_regression", "plain", "all labels of the pool"): 0.1}
    parts = (generated(MAIN, shots=(5,)), generated(skill, study="ceiling", shots=(0,), draws=1))
    (section,) = report.sections(table(*parts))
    (row,) = leaderboard(section.studies["ceiling"])
    said = "a linear head that is given every label of the support pool: "
    assert f"{said}{row.accuracy.percent()} % on plain features." in reading(section)
    (section,) = report.sections(table(parts[0]))
    assert said not in reading(section)


def test_the_reference_of_an_ablation_is_the_full_method_even_where_another_variant_is_better() -> None:
    rows = ablations()
    tables = {s: table([r for r in rows if r["study"] == s]) for s in ("ablation/adapter", "ablation/loss")}
    full = report.full_config(tables, 5, None)
    assert full == "{}"
    bars = report.ablation_bars(tables["ablation/loss"], 5, full)
    assert bars[0].label == "HDCL"
    assert bars[0].difference is None
    of = {bar.label: bar for bar in bars}
    assert of["Euclidean"].difference is not None
    gap = of["Euclidean"].accuracy.mean - of["HDCL"].accuracy.mean
    assert of["Euclidean"].difference.mean == pytest.approx(gap)
    assert report.full_config({"ablation/loss": tables["ablation/loss"]}, 5, "own") == "own"


@pytest.mark.parametrize(
    ("low", "high", "state"), [(0.1, 0.2, "ahead"), (-0.1, 0.2, "level"), (0.0, 0.2, "level"), (-0.3, -0.1, "behind")]
)
def test_verdicts(low: float, high: float, state: str) -> None:
    assert verdict(Interval((low + high) / 2, 0.0, (high - low) / 2, 9)) == state


def test_the_newest_run_of_each_task_is_shown() -> None:
    old = generated(MAIN, shots=(1,), created="2026-11-20T12:00:00Z")
    new = generated({("prototype", "plain", ""): 0.0}, shots=(5,), created="2026-11-21T12:00:00Z")
    other = generated(MAIN, shots=(1,), split="random")
    found = report.sections(table(new, old, other))
    assert [(section.split, section.shots) for section in found] == [("grouped", [5]), ("random", [1])]


def test_an_empty_ledger_and_an_unknown_label_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"python jobs/evaluate.py"):
        report.sections(table())
    with pytest.raises(ConfigError, match="it holds: mtd"):
        report.sections(table(generated(MAIN, shots=(1,))), "mvtec-bottle")


def test_readme_block_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(generated(MAIN), tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(
        "# before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter ünïcode\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    run(tmp_path, monkeypatch, "--readme", "README.md")
    first = readme.read_text(encoding="utf-8")
    assert first.startswith("# before\n<!-- results: begin -->\nMade by `python jobs/report.py --readme README.md`")
    assert first.endswith("<!-- results: end -->\nafter ünïcode\n")
    assert "old" not in first
    rows = [line.split("|")[1:-1] for line in first.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {2 + 3 + 3}
    (section,) = report.sections(table(generated(MAIN)))
    mean, half = plain(section)["tip adapter f, plain, 5"]
    cells = next([cell.strip() for cell in row] for row in rows if row[0].strip() == "tip adapter f")
    assert cells[-1] == f"{mean:+.2f} ± {half:.2f}"
    assert [row[0].strip() for row in rows][2:4] == ["**HypDFS**", f"HypDFS, {TWIN}"]
    run(tmp_path, monkeypatch, "--readme", "README.md")
    assert readme.read_text(encoding="utf-8") == first
    run(tmp_path, monkeypatch, "--readme", "README.md", "--peers", "1")
    kept = [line.split("|")[1].strip() for line in readme.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert kept[2:] == ["**HypDFS**", f"HypDFS, {TWIN}", "HypDFS", "prototype", "shrinkage lda"]
    assert "Left out: 3 rows of peers that read lower at K = 5." in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text", ["nothing", "<!-- results: end -->\n<!-- results: begin -->", "<!-- results: begin -->"]
)
def test_a_readme_without_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ConfigError, match="results: begin"):
        replace_results(path, "new")
    assert path.read_text() == text


def test_labels_do_not_overlap_and_keep_their_order() -> None:
    found = spread([3.0, 1.0, 1.1, 1.05], 0.5)
    assert np.argsort(found).tolist() == [1, 3, 2, 0]
    assert np.diff(np.sort(found)).min() > 0.499
    assert spread([1.0, 2.0], 0.5) == [1.0, 2.0]


def test_long_names_are_cut() -> None:
    assert short("short", 10) == "short"
    assert short("one two three four", 10) == "one two …"
    assert short("x" * 30, 10) == "x" * 9 + "…"


def toy_task(copies: int = 1, dim: int = DIM) -> tuple[Fitting, Reported]:
    pool = toy_pool(n_way=3, per_class=6, copies=copies, dim=dim)
    queries = toy_pool(n_way=3, per_class=4, dim=dim, seed=0)
    return Fitting(pool=pool, normals=None, block_dims=(dim,)), Reported(queries=queries)


@pytest.mark.parametrize(("curvature", "dim"), [(0.05, DIM), (0.0, DIM), (0.05, 40)])  # 40: fitted in its span
def test_the_points_are_those_the_classifier_scores(tmp_path: Path, curvature: float, dim: int) -> None:
    config = RunConfig(method={"curvature": curvature, "adapter_rank": 2, "n_syn": 3}, support_copies=1)
    points = fitted_points(*toy_task(dim=dim), config, Setting(k_shot=2), 0)
    nearest = pairwise_dist(points.ball[6:], points.prototypes, curvature).argmin(1)
    assert float((nearest == points.labels[6:]).double().mean()) == pytest.approx(points.accuracy)
    assert points.num_supports == 3 * 2
    assert len(points.synthetic) == 3 * config.method.n_syn
    plot_tsne(tmp_path / "tsne.png", points)
    fits = plot_disk(tmp_path / "disk.png", points)
    plot_radius(tmp_path / "radius.png", points, ["one", "one", "two"])
    assert fits[1].stress <= fits[0].stress + 1e-3
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_the_points_of_a_centred_configuration_are_those_it_scores() -> None:
    config = RunConfig(method={"adapter_rank": 2, "n_syn": 3}, transform=TransformConfig(centring="supports"))
    fitting, reported = toy_task()
    setting = Setting(k_shot=2)
    points = fitted_points(fitting, reported, config, setting, 0)
    transform = few_shot.transform_of(config, fitting)
    seen = few_shot.transformed(fitting, transform), few_shot.transformed(reported, transform)
    assert points.accuracy == pytest.approx(few_shot.score(config, *seen, setting, 0).metrics["acc"])
    bare = fitted_points(fitting, reported, replace(config, transform=TransformConfig()), setting, 0)
    assert not torch.allclose(points.plain, bare.plain)


def test_points_of_meta_features_need_the_projection() -> None:
    config = RunConfig(features="meta")
    with pytest.raises(ConfigError, match="projection"):
        fitted_points(*toy_task(), config, Setting(k_shot=2), 0)
    means = {view: torch.zeros(DIM) for view in VIEWS}
    start = MetaStart(method="hypdfs", projection={view: torch.eye(DIM)[:, :4] for view in VIEWS}, core={}, mean=means)
    assert fitted_points(*toy_task(), config, Setting(k_shot=2), 0, start).plain.shape[1] == 2 * 4


def test_features_that_are_not_there_become_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_DATA", str(tmp_path / "nothing"))
    page = made(tmp_path, monkeypatch, generated(MAIN, shots=(1,), label="mtd"), features=True)
    assert "Pictures of the features: not drawn" in page.text
    assert "python jobs/extract.py --dataset mtd --split grouped" in page.text

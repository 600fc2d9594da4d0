"""The jobs as a user runs them: other folder, own home, a small image tree, from ingestion to a published model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import hypdefect
from hypdefect.datasets.manifest import read_manifest
from hypdefect.families.starts import load_start
from hypdefect.images import read_bytes, read_image, read_mask
from hypdefect.predictor import Predictor
from hypdefect.registry import resolve
from hypdefect.results.ledger import metric, read, read_part
from tests.tiny_dataset import make_folder_tree, make_mtd_tree

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(600)]
JOBS = Path(hypdefect.__file__).parents[1] / "jobs"
NAMES = sorted(p.stem for p in JOBS.glob("*.py") if "run_job(main)" in p.read_text())
TINY = ("--backbone", "tiny_random", "--copies", "1", "--k-shot", "2")
RECIPE = ("--recipe.whole-size", "64", "--recipe.crop-size", "64", "--recipe.window", "48")
LONG = [pytest.mark.slow, pytest.mark.long]
SEARCH = ("--trials", "3", "--episodes", "4", "--rungs", "2", "--draws", "3", "--finalists", "2", "--workers", "1")
CROWD = ("--workers", "64", "--train.items-per-step", "64")
TRAIN = (
    *("--train.steps", "3", "--train.items-per-step", "2", "--train.n-way", "3", "--train.projection", "4"),
    *("--train.method.adapter", "--train.method.synthesis", "--train.method.ode", "fc", "--train.method.loss", "hdcl"),
    *("--synthesis.textures", "1", "--check-episodes", "4"),
)  # fmt: skip

# Many command lines in one process: importing torch and Ray for each would take most of the time of these tests.
MANY = """
import contextlib, io, json, runpy, sys, traceback
results = []
for argv in json.load(sys.stdin):
    out, err, code, sys.argv = io.StringIO(), io.StringIO(), 0, argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc(file=err)
            code = 1
    results.append([code, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str
    result: Any = None

    @property
    def path(self) -> Path:
        """The last line of stdout."""
        return Path(self.stdout.splitlines()[-1])


@dataclass(frozen=True)
class User:
    """Somebody with a home, a folder to stand in, and a Ray cluster to join."""

    place: Path
    cluster: str

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def tree(self) -> Path:
        return self.place / "mtd"

    def environment(self, cluster: str) -> dict[str, str]:
        added = {"HYPDEFECT_HOME": str(self.home), "HYPDEFECT_DATA": str(self.place / "nowhere"), "COLUMNS": "120"}
        return os.environ | added | ({"RAY_ADDRESS": cluster} if cluster else {})

    def run(self, job: str, *args: object) -> Done:
        """On a private Ray, which has as many workers as the machine has cores."""
        summary = self.place / "summary.json"
        summary.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, str(JOBS / f"{job}.py"), *map(str, args), "--json", str(summary)],
            cwd=self.place,
            env=self.environment(""),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{job} {args}\n{done.stdout}\n{done.stderr}"
        return Done(0, done.stdout, done.stderr, json.loads(summary.read_text()))

    def run_many(self, *commands: tuple[object, ...]) -> list[Done]:
        """One after the other, on the cluster."""
        lines = [[str(JOBS / f"{job}.py"), *map(str, args)] for job, *args in commands]
        done = subprocess.run(
            [sys.executable, "-c", MANY],
            cwd=self.place,
            env=self.environment(self.cluster),
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        return [Done(*result) for result in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def user(ray_local: Any, tmp_path_factory: pytest.TempPathFactory) -> User:
    place = tmp_path_factory.mktemp("user")
    make_mtd_tree(place / "mtd", per_class=10)
    return User(place, ray_local.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def data(user: User) -> tuple[object, ...]:
    return ("--dataset", "mtd", "--root", "mtd", *TINY, *RECIPE)  # the root as seen from where the user stands


@pytest.fixture(scope="module")
def extracted(user: User, data: tuple[object, ...]) -> Done:
    return user.run("extract", *data)


@pytest.fixture(scope="module")
def trained(user: User, data: tuple[object, ...], extracted: Done) -> Done:
    return user.run("train", *data, *TRAIN, "--workers", 2, "--name", "meta")


@pytest.fixture(scope="module")
def swept(user: User, data: tuple[object, ...], extracted: Done) -> Done:
    return user.run("sweep", *data, *SEARCH, "--name", "first")


@pytest.fixture(scope="module")
def swept_meta(user: User, data: tuple[object, ...], trained: Done, swept: Done) -> Done:
    return user.run("sweep", *data, *SEARCH, "--name", "second", "--space", "hypdfs_meta", "--init", trained.path)


def test_ingest(user: User) -> None:
    done = user.run("ingest", "--dataset", "mtd", "--root", "mtd")
    assert done.path.parent == user.home / "manifests"
    assert read_manifest(done.path).num_rows == done.result["images"] == 60


def test_extract(user: User, extracted: Done) -> None:
    assert extracted.path.parent == user.home / "features"
    assert str(extracted.path) == extracted.result["store"]
    assert list((extracted.path / "parts").glob("part-*.parquet"))
    assert (extracted.result["cached"], extracted.result["extracted"]) == (0, 60)


@pytest.mark.slow
@pytest.mark.long
def test_train(user: User, trained: Done) -> None:
    assert trained.path == user.home / "runs" / "meta"
    start, known = load_start(trained.path)
    assert known.train.method.adapter
    assert known.train.method.synthesis
    assert all(np.isfinite(x.numpy()).all() for x in start.core.values())
    assert {view: x.shape[1] for view, x in start.projection.items()} == {"whole": 4, "crop": 4}
    assert (user.home / "synthetic").is_dir()
    assert len(trained.result["losses"]) == 3
    assert trained.result["run"] == str(trained.path)
    assert "60 images cached, 0 extracted" in trained.stderr
    assert "meta-trained" in trained.stdout


@pytest.mark.parametrize("which", ["swept", pytest.param("swept_meta", marks=LONG)])
def test_sweep(user: User, which: str, request: pytest.FixtureRequest) -> None:
    done: Done = request.getfixturevalue(which)
    result = done.result
    assert "60 images cached, 0 extracted" in done.stderr
    assert len(result["trials"]) == 3
    assert set(result["selected_trials"]) <= {t["number"] for t in result["trials"]}
    assert set(result["test"]) == {"hypdfs", "hypdfs, c = 0 twin", "prototype"}
    assert "On other images hypdfs could read" in done.stdout
    for name, own in result["test"].items():
        accuracy = own["acc"]
        assert len(own["draws"]) == 3
        assert 0 <= accuracy["mean"] <= 1
        assert accuracy["half_width"] >= 0
        assert name in done.stdout

    folder = user.home / "sweeps" / result["sweep"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    predictions = pq.read_table(folder / "predictions.parquet")
    assert predictions.num_rows == 3 * 3 * result["task"]["query_images"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert json.loads((folder / "sweep.json").read_text())["finished"]

    version = ["swept", "swept_meta"].index(which) + 1
    assert done.path == Path(result["model"]["path"]) == resolve(user.home, f"hypdefect-mtd@{version}").path
    assert resolve(user.home, "hypdefect-mtd@champion").version >= version
    if which == "swept_meta":
        assert {"pretrained", "features"} < set(result["trials"][0]["params"])
        assert result["selected"]["features"] in ("plain", "meta")


@pytest.mark.parametrize(
    ("which", "version", "sweep"),
    [("swept", 1, "first"), pytest.param("swept_meta", 2, "second", marks=LONG)],
)
def test_the_published_model_predicts_as_the_sweep_did(
    user: User, which: str, version: int, sweep: str, request: pytest.FixtureRequest
) -> None:
    """The predictions of draw 0, whose supports the published model has, from image files."""
    request.getfixturevalue(which)
    predictor = Predictor.load(resolve(user.home, f"hypdefect-mtd@{version}"))
    rows = pq.read_table(user.home / "sweeps" / sweep / "predictions.parquet").to_pylist()
    expected = {r["image_id"]: r for r in rows if r["method"] == "hypdfs" and r["draw"] == 0}
    (manifest,) = (user.home / "manifests").glob("mtd-*-*.parquet")
    about = {r["image_id"]: r for r in read_manifest(manifest).to_pylist()}
    assert len(expected) == 25
    for image_id, row in expected.items():
        image = read_image(read_bytes(Path(about[image_id]["uri"])))
        mask, _ = read_mask(read_bytes(Path(about[image_id]["mask_uri"])), image.shape[:2])
        (found,) = predictor.predict([(image, mask)])
        assert found.label == row["predicted"]
        assert found.probabilities[found.label] == pytest.approx(row["probability"], abs=1e-4)


EVALUATE = ("--methods", "prototype", "hypdfs", "--shots", 1, 2, "--draws", 2, "--trials", 2, "--episodes", 2)
PLAIN = (*EVALUATE, "--features", "plain")


META = (
    *("--meta.synthesis.textures", "1", "--meta.train.steps", "2", "--meta.train.items-per-step", "2"),
    *("--meta.train.n-way", "3", "--meta.train.projection", "4"),
)


def config_of_ours(rows: pa.Table) -> Any:
    """The configuration of HypDFS on meta-trained features at the largest K."""
    own = [r for r in rows.to_pylist() if (r["method"], r["features"], r["variant"]) == ("hypdfs", "meta", "")]
    return json.loads(max(own, key=lambda r: r["k_shot"])["method_config"])


@pytest.mark.slow
def test_evaluate(user: User, data: tuple[object, ...], extracted: Done) -> None:
    """The same rows on a private Ray and on a cluster with more workers, times apart."""
    args = ("evaluate", *data, *PLAIN, "--split", "grouped", "--partitions", 2)
    alone = user.run(*map(str, args))
    (shared,) = user.run_many(args)
    assert shared.code == 0, shared.stderr
    table, again = (read_part(done.path) for done in (alone, shared))
    different = {"run_id", "created", "metrics", "validation"}  # the twin's validation is NaN
    same = [name for name in table.schema.names if name not in different]
    assert table.select(same).equals(again.select(same))
    np.testing.assert_array_equal(table["validation"].to_numpy(), again["validation"].to_numpy())
    for name in ("acc", "balanced_acc", "macro_f1", "ece"):
        np.testing.assert_array_equal(metric(table, name), metric(again, name))
    assert table.num_rows == 2 * 2 * 2 * 3  # partitions, K, draws, methods and twin
    runs = read(user.home, study="main")["run_id"].to_pylist()
    assert all(runs.count(part["run_id"][0].as_py()) == table.num_rows for part in (table, again))
    names = {"hypdfs", "prototype", "hypdfs, c = 0 twin"}
    assert {(r["name"], r["k_shot"]) for r in alone.result["leaderboard"]} == {(n, k) for n in names for k in (1, 2)}
    assert {d["reference"] for d in alone.result["paired"]} == {"prototype"}
    assert [len(alone.result["claims"][side]) for side in ("plain", "meta", "twin")] == [2, 0, 2]
    for text in (*names, "K = 2", "Best Euclidean: prototype (by validation accuracy)", "at matched distance scale"):
        assert text in alone.stdout
    assert set(read(user.home, study="ceiling")["k_shot"].to_pylist()) == {0}
    assert "every label of the support pool" in alone.stdout
    assert table["config_digest"][0].as_py() == alone.result["run"]["config_digest"]


@pytest.mark.slow
def test_evaluate_by_other_protocols(user: User, data: tuple[object, ...], swept: Done) -> None:
    line = ("evaluate", *data, *PLAIN, "--protocol", "first", "--trials", 0, "--json", "first.json")
    first, sweep, meta, page = user.run_many(
        line,
        ("evaluate", "--sweep", "first", "--draws", 3, "--json", "sweep.json"),
        ("evaluate", *data, *EVALUATE, *META, "--shots", 2, "--trials", 1),
        ("report", "--root", "mtd", "--copies", "1", *RECIPE),
    )
    assert (first.code, sweep.code) == (0, 0), first.stderr + sweep.stderr
    assert (meta.code, page.code) == (0, 0), meta.stderr + page.stderr
    rows = read_part(meta.path)
    assert set(rows["features"].to_pylist()) == {"plain", "meta"}
    shown = page.path.read_text()
    assert "Poincaré disk" in shown
    assert ("Meta-trained features, partition 0" in shown) == (config_of_ours(rows)["features"] == "meta")
    table = read_part(first.path)
    assert set(table["protocol"].to_pylist()) == {"first"}
    assert set(table["draw"].to_pylist()) == {0}
    assert np.isnan(table["validation"].to_numpy()).all()
    board = json.loads((user.place / "first.json").read_text())["leaderboard"]
    assert {row["accuracy"]["half_width"] for row in board} == {None}
    board = json.loads((user.place / "sweep.json").read_text())["leaderboard"]
    found = {row["name"]: row["accuracy"]["mean"] for row in board}
    expected = {name: result["acc"]["mean"] for name, result in swept.result["test"].items()}
    assert found["hypdfs"] == pytest.approx(expected["hypdfs"])  # the same configuration, draws and queries
    assert found["prototype"] == pytest.approx(expected["prototype"])


def test_help_and_dry_run(user: User, data: tuple[object, ...]) -> None:
    before = sorted(user.home.rglob("*")) if user.home.exists() else []
    lines: list[tuple[object, ...]] = [(name, "--help") for name in NAMES]
    resolved = [("sweep", "--seed", 7, *data), ("train", *TRAIN, *data), ("extract", *data), ("ingest",)]
    *helps, sweep, train, extract, ingest = user.run_many(*lines, *((*line, "--dry-run") for line in resolved))
    for name, done in zip(NAMES, helps, strict=True):
        assert done.code == 0, (name, done.stderr)
        assert "usage" in done.stdout.lower()
        assert "--json" in done.stdout
    for done in (sweep, train, extract, ingest):
        assert done.code == 0, done.stderr
        assert yaml.safe_load(done.stdout)["dataset"] in ("elpv", "mtd")
    assert (yaml.safe_load(sweep.stdout)["seed"], yaml.safe_load(train.stdout)["train"]["steps"]) == (7, 3)
    assert (sorted(user.home.rglob("*")) if user.home.exists() else []) == before  # nothing was started


def emptied(place: Path) -> Path:
    root = make_folder_tree(place / "emptied", per_class=4)
    (root / "zinc").mkdir()
    return root


def two_images(place: Path) -> Path:
    """Two images a class and side: K = 2 leaves no validation query."""
    return make_mtd_tree(place / "few", per_class=4)


def yaml_of(place: Path) -> Path:
    path = place / "typo.yaml"
    path.write_text("k_shots: 3\n")
    return path


BAD: dict[str, tuple[Callable[[Path], tuple[object, ...]], str]] = {
    "unknown dataset": (lambda at: ("sweep", "--dataset", "mdt"), "mdt"),
    "unknown flag": (lambda at: ("sweep", "--curvatur", 1), "curvatur"),
    "unknown field": (lambda at: ("sweep", "--config", yaml_of(at)), "did you mean 'k_shot'"),
    "no such config": (lambda at: ("sweep", "--config", at / "none.yaml"), "none.yaml does not exist"),
    "unknown backbone": (lambda at: ("extract", "--backbone", "resnet9000"), "resnet9000"),
    "missing root": (lambda at: ("sweep", "--dataset", "folder", "--root", at / "gone"), "gone does not exist"),
    "K too large": (lambda at: ("sweep", "--dataset", "mtd", "--root", at.parent / "mtd", "--k-shot", 50), "K = 50"),
    "no validation query": (
        lambda at: ("sweep", "--dataset", "mtd", "--root", two_images(at), *TINY, *RECIPE, *SEARCH),
        "too few for k_shot=2 and a query",
    ),
    "empty class folder": (lambda at: ("sweep", "--dataset", "folder", "--root", emptied(at)), "zinc"),
    "unknown method": (lambda at: ("evaluate", "--methods", "protoype"), "known: hypdfs, prototype"),
    "no such sweep": (lambda at: ("evaluate", "--sweep", "none"), "no finished sweep 'none'"),
    "no shots": (lambda at: ("evaluate", "--shots", 0), "shots must be one or more numbers"),
    "unknown space": (lambda at: ("sweep", "--space", "hypfds"), "'hypfds'"),
    "init of a segmenter": (
        lambda at: ("sweep", "--task", "segmentation", "--init", at / "run"),
        "--task segmentation takes none",
    ),
    "good parts beside masks": (
        lambda at: ("sweep", "--dataset", "mtd", "--root", at.parent / "mtd", *TINY, "--good-class"),
        "a good part has no mask, which would tell it from defects",
    ),
    "no such run": (lambda at: ("sweep", "--init", at / "run", "--space", "hypdfs_meta"), "run holds no finished"),
    "nothing to resume": (lambda at: ("sweep", "--resume"), "no unfinished sweep of 'elpv' to resume"),
    "too many workers": (
        lambda at: ("train", "--dataset", "mtd", "--root", at.parent / "mtd", *TINY, *RECIPE, *TRAIN, *CROWD),
        "64 training workers need as many CPUs",
    ),
}


@pytest.mark.slow
def test_bad_input_ends_in_one_line_and_leaves_nothing(user: User) -> None:
    clumsy = User(user.place / "clumsy", user.cluster)
    clumsy.place.mkdir()
    results = clumsy.run_many(*(make(clumsy.place) for make, _ in BAD.values()))
    for (name, (_, message)), done in zip(BAD.items(), results, strict=True):
        assert done.code in (1, 2), name
        assert message in done.stderr, (name, done.stderr)
        assert "Traceback" not in done.stderr, (name, done.stderr)
        if done.code == 1:
            assert message in done.stderr.splitlines()[-1], (name, done.stderr)
    left = [p for p in clumsy.home.rglob("*") if p.is_file()]
    assert {p.relative_to(clumsy.home).parts[0] for p in left} <= {"manifests", "features", "cache"}
    assert not [p for p in left if p.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.long
def test_a_truncated_part_is_named_and_mended(user: User, data: tuple[object, ...]) -> None:
    other = User(user.place / "other", user.cluster)  # a home of its own: every part holds rows of this task alone
    shutil.copytree(user.tree, other.tree)
    (extracted,) = other.run_many(("extract", *data))
    assert extracted.code == 0, extracted.stderr
    part = min((extracted.path / "parts").glob("part-*.parquet"))
    part.write_bytes(part.read_bytes()[:1000])
    sweep, verify = other.run_many(("sweep", *data, *SEARCH), ("extract", "--verify", "--json", "verify.json"))
    for done in (sweep, verify):
        assert done.code == 1
        assert "python jobs/extract.py --verify --repair" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert f"{part} is damaged" in sweep.stderr.splitlines()[-1]
    (store,) = json.loads((other.place / "verify.json").read_text())
    assert [problem.split(":")[0] for problem in store["problems"]] == [str(part)]
    assert not (other.home / "sweeps").exists()
    (mended,) = other.run_many(("extract", "--verify", "--repair"))  # as the message says
    assert mended.code == 0, mended.stderr
    (again,) = other.run_many(("extract", *data, "--json", "again.json"))
    assert again.code == 0, again.stderr
    report = json.loads((other.place / "again.json").read_text())
    assert 0 < report["extracted"] < 60
    assert report["cached"] + report["extracted"] == 60

"""Strict configuration: what the user typed is what runs, and a mistake names the nearest right answer."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import yaml
from rich.table import Table

from hypdefect.command_line import RAY_JOB, TYPED_IN, WRITTEN, parse_job, parse_one_of, run_job, table_console
from hypdefect.config import digest, from_mapping, load_yaml, override, to_mapping
from hypdefect.distributed.reproduce_detectors import ReproduceDetectorsConfig
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import get_family
from hypdefect.files import write_json
from hypdefect.methods import get_method
from hypdefect.methods.hypdfs import HypDFSConfig
from jobs import train
from jobs.sweep import JOBS, DetectionJob, SweepJob


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    kind: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError(f"rate must not be negative, got {self.rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """A job."""

    count: int = 3
    title: str = "x"
    flag: bool = False
    place: Path | None = None
    dims: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    limit: float | None = 1.0
    inner: Inner = field(default_factory=Inner)
    anything: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    count: int


# ---- from_mapping ------------------------------------------------------------------------------------------------


def test_an_empty_mapping_gives_the_defaults() -> None:
    assert from_mapping(Outer, {}) == Outer()


def test_every_kind_of_value_is_read() -> None:
    given = {
        "count": 7,
        "title": "t",
        "flag": True,
        "place": "/tmp/x",
        "dims": [4, 5, 6],
        "pair": [2, "b"],
        "limit": None,
        "inner": {"rate": 1, "kind": "cosine"},
        "anything": {"free": [1, None]},
    }
    read = from_mapping(Outer, given)
    assert read == Outer(
        count=7,
        title="t",
        flag=True,
        place=Path("/tmp/x"),
        dims=(4, 5, 6),
        pair=(2, "b"),
        limit=None,
        inner=Inner(rate=1.0, kind="cosine"),
        anything={"free": [1, None]},
    )
    assert type(read.inner.rate) is float
    assert from_mapping(Outer, to_mapping(read)) == read


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    by_name: dict[str, Inner]


def test_a_mapping_of_configs_is_read_and_checked_value_by_value() -> None:
    assert from_mapping(Named, {"by_name": {"a": {"rate": 1}}}) == Named(by_name={"a": Inner(rate=1.0)})
    with pytest.raises(ConfigError, match=r"config\.by_name\.a: Inner has no field 'rat'; did you mean 'rate'"):
        from_mapping(Named, {"by_name": {"a": {"rat": 1}}})
    with pytest.raises(ConfigError, match=r"config\.by_name: expected"):
        from_mapping(Named, {"by_name": [1]})


def test_a_nested_config_object_is_taken_as_it_is() -> None:
    inner = Inner(rate=2.0)
    assert from_mapping(Outer, {"inner": inner}).inner is inner


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), (2, 2.0)])
def test_floats_are_read_from_what_yaml_makes_of_them(text: Any, value: float) -> None:
    assert from_mapping(Inner, {"rate": text}).rate == value


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"cuont": 1}, r"run\.yaml: Outer has no field 'cuont'; did you mean 'count'\?"),
        ({"zzz": 1}, r"no field 'zzz'; known fields: count, title"),
        ({1: 1}, r"no field 1; known fields"),
        ({"inner": {"rat": 1}}, r"run\.yaml\.inner: Inner has no field 'rat'; did you mean 'rate'\?"),
        ({"inner": {"kind": "cosin"}}, r"run\.yaml\.inner\.kind: 'cosin' is not one of .*nearest: 'cosine'"),
        ({"inner": {"kind": 3}}, r"3 is not one of \['linear', 'cosine'\]$"),
        ({"inner": 3}, r"run\.yaml\.inner: expected a mapping for Inner, got int 3"),
        ({"inner": {"rate": -1}}, r"rate must not be negative, got -1"),
        ({"count": 1.0}, r"run\.yaml\.count: expected int, got float 1\.0"),
        ({"count": "1"}, r"expected int, got str '1'"),
        ({"count": True}, r"expected int, got bool True"),
        ({"count": None}, r"expected int, got NoneType None"),
        ({"title": 3}, r"expected str, got int 3"),
        ({"flag": 1}, r"expected bool, got int 1"),
        ({"flag": "yes"}, r"expected bool, got str"),
        ({"limit": True}, r"expected float, got bool"),
        ({"limit": "fast"}, r"expected float, got str 'fast'"),
        ({"place": 3}, r"expected Path, got int 3"),
        ({"dims": [1, "2"]}, r"run\.yaml\.dims\[1\]: expected int"),
        ({"dims": 3}, r"run\.yaml\.dims: expected"),
        ({"pair": [1, "a", 2]}, r"run\.yaml\.pair: expected 2 values, got 3"),
        ({"pair": ["a", 1]}, r"run\.yaml\.pair\[0\]: expected int"),
    ],
)
def test_a_wrong_value_says_where_and_what(mapping: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Outer, mapping, "run.yaml")


def test_tables_keep_names_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="set [a]")
    table.add_column("class [b]")
    table.add_row("scratch [deep]")
    table_console().print(table)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("set [a]", "class [b]", "scratch [deep]"))


def test_a_missing_required_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: .*'count'"):
        from_mapping(Needs, {}, "run.yaml")


def test_something_else_than_a_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a mapping for Outer, got list"):
        from_mapping(Outer, [1])  # type: ignore[arg-type]


# ---- override, digest --------------------------------------------------------------------------------------------


def test_override_replaces_dotted_fields_and_nothing_else() -> None:
    config = Outer(place=Path("/a"), inner=Inner(kind="cosine"))
    changed = override(config, {"inner.rate": 0.25, "count": 9})
    assert changed == Outer(place=Path("/a"), count=9, inner=Inner(rate=0.25, kind="cosine"))
    assert config.count == 3


def test_override_reaches_the_config_of_a_method() -> None:
    run = override(RunConfig(), {"method.curvature": 0.3, "transform.whitening": None})
    assert isinstance(run.method, HypDFSConfig)
    assert run.method.curvature == 0.3
    assert run.transform.whitening is None
    with pytest.raises(ConfigError, match="curvature"):
        override(RunConfig(), {"method.curvature": -1.0})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("inner.rte", 1, r"'inner\.rte': no field 'rte'; did you mean 'rate'\?"),
        ("inner.zzz", 1, r"no field 'zzz'; known: rate, kind$"),
        ("iner.rate", 1, r"no group 'iner'; known: count"),
        ("count.rate", 1, r"no group 'count'"),
        ("inner.rate", "fast", r"config\.inner\.rate: expected float"),
        ("inner.rate", -1, r"must not be negative"),
    ],
)
def test_override_is_strict(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Outer(), {path: value})


def test_digest_is_the_sha256_of_canonical_json() -> None:
    value = {"b": 1, "a": [1.5, "ü", None, True]}
    assert digest(value) == hashlib.sha256(b'{"a":[1.5,"\\u00fc",null,true],"b":1}').hexdigest()
    assert digest(dict(reversed(value.items()))) == digest(value)


def test_digest_of_a_config_is_that_of_its_mapping_and_sees_every_field() -> None:
    config = Outer(place=Path("/a"))
    assert digest(config) == digest(to_mapping(config)) == digest(from_mapping(Outer, to_mapping(config)))
    others = [Outer(), override(config, {"inner.kind": "cosine"}), override(config, {"dims": [2, 1]})]
    assert len({digest(c) for c in [config, *others]}) == 4


def test_digest_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        digest({"a": float("nan")})
    with pytest.raises(TypeError, match="cannot write set as JSON"):
        digest({"a": {1}})


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_config_file_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert load_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize(
    ("text", "message"), [(b"a: [1", "cannot be read as YAML"), (b"- 1", "got list"), (b"\xff\xfe\x00", "cannot be")]
)
def test_a_config_file_that_is_no_mapping_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"c\.yaml.*{message}"):
        load_yaml(tmp_path / "c.yaml")


def test_an_absent_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_yaml(tmp_path / "none.yaml")


def test_one_config_file_is_read(tmp_path: Path) -> None:
    for k in (3, 7):
        (tmp_path / f"{k}.yaml").write_text(f"k_shot: {k}\n")
    with pytest.raises(ConfigError, match=r"give --config once, not .*3\.yaml and .*7\.yaml"):
        parse_job(SweepJob, ["--config", str(tmp_path / "3.yaml"), f"--config={tmp_path / '7.yaml'}"])


@pytest.mark.parametrize(("field", "value"), [("workers", -1), ("name", "../x"), ("name", "a/b"), ("name", ".hidden")])
def test_a_sweep_of_no_workers_or_of_a_name_that_is_no_folder_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        from_mapping(SweepJob, {field: value})


def test_yaml_cannot_build_python_objects(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("count: !!python/object/apply:os.getpid []")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_yaml(tmp_path / "c.yaml")


def test_write_json_makes_its_folder_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, Path("/p")]})
    assert json.loads(path.read_text()) == {"x": [1, "/p"]}
    assert os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("fault", ["value", "replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault != "value":
        monkeypatch.setattr(os, fault, full)
    with pytest.raises((OSError, ValueError)):
        write_json(path, {"x": 2, "y": float("nan") if fault == "value" else 0.0})
    assert json.loads(path.read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 0, "filler": ["x" * 100] * 200})
    done = threading.Event()

    def write() -> None:
        for n in range(60):
            write_json(path, {"n": n, "filler": ["x" * 100] * 200})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert len(json.loads(path.read_text())["filler"]) == 200
        reads += 1
    writer.join()
    assert reads > 5


# ---- the command line --------------------------------------------------------------------------------------------


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("count: 5\ntitle: filed\ninner: {rate: 1e-4}\n")
    job, options = parse_job(Outer, ["--config", str(file), "--title", "typed", "--inner.kind", "cosine"])
    assert job == Outer(count=5, title="typed", inner=Inner(rate=1e-4, kind="cosine"))
    assert options.config == file
    assert parse_job(Outer, [f"--config={file}"])[0].count == 5
    assert parse_job(Outer, [])[0] == Outer()


def test_the_file_is_read_strictly(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cuont: 5")
    with pytest.raises(ConfigError, match=r"c\.yaml: Outer has no field 'cuont'; did you mean 'count'"):
        parse_job(Outer, ["--config", str(tmp_path / "c.yaml")])


def test_values_typed_are_checked_like_values_filed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_job(Outer, ["--inner.rate", "-1"])
    assert ended.value.code == 2
    assert "rate must not be negative, got -1" in capsys.readouterr().err


def test_dry_run_prints_the_resolved_config_and_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("count: 5")
    with pytest.raises(SystemExit) as ended:
        parse_job(Outer, ["--config", str(tmp_path / "c.yaml"), "--place", "/p", "--dry-run"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert from_mapping(Outer, printed) == Outer(count=5, place=Path("/p"))


@pytest.mark.parametrize("argv", [["--cuont", "5"], ["--count", "many"], ["--inner.kind", "square"], ["stray"]])
def test_a_flag_that_cannot_be_meant_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_job(Outer, argv)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert argv[-1].removeprefix("--") in captured.err
    assert not captured.out


@pytest.mark.parametrize("error", [ConfigError("c is -1"), DataError("no image"), ArtifactError("store is damaged")])
def test_a_user_error_is_one_line_on_stderr_and_status_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_job(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"


def test_a_home_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "home").write_text("a file")

    def main() -> None:
        (tmp_path / "home" / "manifests").mkdir(parents=True)

    with pytest.raises(SystemExit):
        run_job(main)
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path / 'home' / 'manifests'}: Not a directory.")
    assert "HYPDEFECT_HOME" in line


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        run_job(main)


def test_a_job_that_ends_well_ends_without_an_exit_code() -> None:
    run_job(lambda: None)


@pytest.mark.parametrize("job", ["sweep", "ingest"])
def test_a_reader_that_leaves_early_sees_no_traceback(job: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    script = Path(__file__).parents[1] / "jobs" / f"{job}.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


# ---- paths -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """A job with a path of every kind."""

    source: Path | None = None
    several: tuple[Path, ...] = ()
    result: Path | None = field(default=None, metadata=WRITTEN)
    backbone: str = "clip:ViT-B-32@laion"
    deep: Outer = field(default_factory=Outer)


TYPED = ["--source", "a", "--several", "b/c", "../d", "--result", "/e/f", "--deep.place", "~/g", "--json", "h.json"]


@pytest.mark.parametrize("named", [False, True], ids=["as the current folder", "by the variable"])
def test_relative_paths_start_where_the_user_typed_them(
    named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "typed" / "here", tmp_path / "copy"
    for folder in (here, elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(elsewhere if named else here)
    if named:
        monkeypatch.setenv(TYPED_IN, str(here))
        monkeypatch.setenv(RAY_JOB, "{}")
    job, options = parse_job(Places, TYPED)
    assert job == Places(
        source=here / "a",
        several=(here / "b" / "c", tmp_path / "typed" / "d"),
        result=Path("/e/f"),
        deep=Outer(place=tmp_path / "g"),
    )
    assert options.json == here / "h.json"


def test_paths_of_a_config_file_start_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TYPED_IN, str(tmp_path))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "c.yaml").write_text("source: images\nseveral: [a.pt, /b.pt]\n")
    for argv in (["--config", "configs/c.yaml"], ["--config=configs/c.yaml"]):
        job, options = parse_job(Places, argv)
        assert job == Places(source=tmp_path / "images", several=(tmp_path / "a.pt", Path("/b.pt")))
        assert options.config == tmp_path / "configs" / "c.yaml"


@pytest.mark.parametrize("typed_in", [None, "/a/folder/of/another/machine"])
def test_a_job_in_a_copy_reads_what_the_copy_has_and_refuses_the_rest(
    typed_in: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RAY_JOB, "{}")
    if typed_in:
        monkeypatch.setenv(TYPED_IN, typed_in)
    (tmp_path / "here").touch()
    assert parse_job(Places, ["--source", "here"])[0].source == tmp_path / "here"
    with pytest.raises(ConfigError, match=r"away: this Ray job runs in a copy .* the copy does not have it"):
        parse_job(Places, ["--source", "away"])
    for flag in ("--result", "--json"):
        with pytest.raises(ConfigError, match=r"here: this Ray job runs in a copy .* vanishes"):
            parse_job(Places, [flag, "here"])
        parse_job(Places, [flag, "/absolute"])


def test_a_file_that_names_another_task_than_the_command_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text("task: detection\n")
    words = ["sweep.py", "--config", str(tmp_path / "job.yaml")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(ConfigError, match="give --task detection on the command line, too"):
        parse_one_of("task", JOBS, SweepJob, None)
    monkeypatch.setattr("sys.argv", [*words, "--task", "detection"])
    job, _ = parse_one_of("task", JOBS, SweepJob, None)
    assert type(job) is DetectionJob


def test_paths_in_dicts_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    job, _ = parse_job(ReproduceDetectorsConfig, ["hypad", "--roots", "visa", "set"])
    assert job.roots == {"visa": tmp_path / "set"}


def test_every_method_that_is_trained_has_a_job_of_its_own() -> None:
    assert {"hypdfs", *train.JOBS} == set(get_args(train.MethodName))
    for name, kind in train.JOBS.items():
        job = kind(dataset="mtd")
        assert job.method == name
        assert isinstance(job, get_family(name).TaskConfig)
        if name != "amc":
            assert isinstance(job, train.DetectorJob | train.SegmenterJob)  # which decides how it is trained
            assert type(getattr(job, name)) is get_method(name).config


@pytest.mark.parametrize("method", ["hypdfs", "amc"])
def test_what_is_trained_is_checked_on_one_episode_at_least(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--method", method, "--check-episodes", "0"])
    with pytest.raises(ConfigError, match="--check-episodes must be at least 1, got 0"):
        train.main()

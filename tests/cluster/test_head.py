"""Which cluster is meant, what its jobs are told, and what happens when nothing answers there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import head, local, processes
from cluster.processes import PROJECT, ClusterError, Record
from hypdefect import registry
from hypdefect.command_line import TYPED_IN
from hypdefect.errors import ArtifactError


@pytest.fixture(autouse=True)
def _no_cluster_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*head.ADDRESS_VARIABLES, "HYPDEFECT_DATA", "HYPDEFECT_METHODS", TYPED_IN):
        monkeypatch.delenv(name, raising=False)


def our_head() -> Record:
    return Record(name=head.HEAD, pid=1, started=0.0, mark="m", argv=[], url="http://127.0.0.1:1")


def test_a_named_cluster_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert head.named_cluster() is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert head.named_cluster() is None
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    assert head.named_cluster() == "host:6379"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://host:8265")
    assert head.named_cluster() == "http://host:8265"


def test_a_named_cluster_that_is_away_is_an_error(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{processes.free_port(0)}")
    with pytest.raises(ClusterError, match="no Ray dashboard answers"):
        local.submit(entrypoint=("python", "x.py"))
    assert processes.read_record(head.HEAD) is None, "nothing is started instead"


def test_nothing_to_submit_is_an_error(state: Path) -> None:
    with pytest.raises(ClusterError, match="nothing to submit"):
        local.submit()


def test_jobs_on_our_head_see_the_submitters_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYPDEFECT_HOME", "results")
    monkeypatch.delenv("HYPDEFECT_DATA", raising=False)
    ours = head.Target(url="http://127.0.0.1:1", headers={}, head=our_head())
    assert ours.variables() == {
        "HYPDEFECT_HOME": str(tmp_path / "results"),
        "HYPDEFECT_DATA": str((PROJECT.parent / "shared" / "data").resolve()),  # it may be a link
        TYPED_IN: str(tmp_path),
    }
    monkeypatch.setenv("HYPDEFECT_DATA", "images")
    assert ours.variables()["HYPDEFECT_DATA"] == str((tmp_path / "images").resolve())


def test_jobs_elsewhere_are_told_only_what_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYPDEFECT_HOME")
    monkeypatch.delenv("HYPDEFECT_DATA", raising=False)
    theirs = head.Target(url="http://host:8265", headers={})
    assert theirs.variables() == {TYPED_IN: str(tmp_path)}
    monkeypatch.setenv("HYPDEFECT_DATA", "/data")
    assert theirs.variables() == {TYPED_IN: str(tmp_path), "HYPDEFECT_DATA": "/data"}
    monkeypatch.setenv("HYPDEFECT_METHODS", "ours.methods")
    assert theirs.variables()["HYPDEFECT_METHODS"] == "ours.methods"


def test_a_token_is_sent_where_the_head_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert head.auth_headers("token") == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("written\n")
    assert head.auth_headers("token") == {"Authorization": "Bearer written"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "set")
    assert head.auth_headers("token") == {"Authorization": "Bearer set"}
    assert head.auth_headers("disabled") == {}


def test_rays_clients_ask_neither_a_proxy_nor_another_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from requests.utils import get_environ_proxies

    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    before = dict(os.environ)
    with head._plain_environment():
        assert not get_environ_proxies("http://127.0.0.1:8265")
        assert "RAY_ADDRESS" not in os.environ
    assert dict(os.environ) == before


def test_stop_and_status_without_anything_running(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.stop() == 0
    assert "nothing" in capsys.readouterr().out
    assert local.status() == 1
    assert "no local Ray head" in capsys.readouterr().out


def test_the_pages_need_a_sweep_first(state: Path) -> None:
    with pytest.raises(ClusterError, match="make sweep"):
        local.dashboard(study="sqlite:////nowhere/study.db")


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The applications that `local.serve` hands to Ray Serve, in place of a head."""
    found: list[dict[str, Any]] = []

    class Client:
        def __init__(self, url: str, headers: dict[str, str]) -> None: ...

        def get_serve_details(self) -> dict[str, Any]:
            return {}

        def deploy_applications(self, rendered: dict[str, Any]) -> None:
            found.extend(rendered["applications"])

    @contextlib.contextmanager
    def target() -> Iterator[head.Target]:
        ours = None if head.named_cluster() else our_head()
        yield head.Target(url="http://127.0.0.1:1", headers={}, head=ours)

    monkeypatch.setattr(local, "ServeSubmissionClient", Client)
    monkeypatch.setattr(local, "target", target)
    monkeypatch.setattr(local, "_wait_served", lambda *_: None)
    monkeypatch.setattr(local, "_print_head", lambda _: None)
    return found


def test_a_moved_alias_is_deployed_anew(
    deployed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    for text in "12":
        registry.publish(tmp_path, "cells", lambda folder, text=text: (folder / "a").write_text(text), "champion")
        local.serve("cells@champion")
    asked = [(application["args"]["model"], application["args"]["version"]) for application in deployed]
    assert asked == [("cells@champion", 1), ("cells@champion", 2)]
    assert "cells@champion, version 2, at http" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "http://host:8265")  # whose registry may be another
    local.serve("cells@champion")
    assert "version" not in deployed[2]["args"]


def test_methods_of_ones_own_are_served(
    deployed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    registry.publish(tmp_path, "cells", lambda folder: (folder / "a").write_text("1"), "champion")
    local.serve("cells@champion")
    assert "runtime_env" not in deployed[0]
    monkeypatch.setenv("HYPDEFECT_METHODS", "ours.methods")
    local.serve("cells@champion")
    assert deployed[1]["runtime_env"] == {"env_vars": {"HYPDEFECT_METHODS": "ours.methods"}}


def test_what_is_no_whole_model_is_not_deployed(
    deployed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    entry = registry.publish(tmp_path, "cells", lambda folder: (folder / "a").write_text("1"), "champion")
    with pytest.raises(ArtifactError, match="models there: cells"):
        local.serve("cell@champion")
    (entry.path / "a").chmod(0o644)
    (entry.path / "a").write_text("2")
    with pytest.raises(ArtifactError, match="a was changed or damaged"):
        local.serve("cells@champion")
    assert deployed == []

"""A state directory of each test's own, as if in a checkout of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import processes


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the records of this test lie; what they name is stopped at the end."""
    folder = tmp_path / "state"
    folder.mkdir()
    monkeypatch.setenv("HYPDEFECT_CLUSTER_STATE", str(folder))
    yield folder
    for record in processes.records():
        processes.stop(record)

"""Break one line at a time and see whether the tests notice: `python -m tests.mutants.run [NAME ...]`.

Each mutant is applied to a copy of the tree, never to the tree itself. Exit status 1 where a mutant is missed, where
its line is not found exactly once, or where its tests fail without it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        print(f"no mutant {', '.join(sorted(unknown))}; known: {', '.join(m.name for m in MUTANTS)}", file=sys.stderr)
        return 2
    table = Table(title=f"{len(chosen)} broken lines")
    for column in ("mutant", "file", "seen by", "result", "s"):
        table.add_column(column, overflow="fold")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        sound = run_tests(tree, sorted({test for mutant in chosen for test in mutant.tests}), stop=False)
        if sound:
            print(f"the tests fail without any mutant:\n{sound}", file=sys.stderr)
            return 1
        for mutant in chosen:
            begun = time.monotonic()
            result = apply(tree, mutant)
            failures += result != "caught"
            print(f"{mutant.name}: {result} ({time.monotonic() - begun:.0f} s)", file=sys.stderr, flush=True)
            tests = "\n".join(test.rpartition("/")[2] for test in mutant.tests)
            table.add_row(mutant.name, mutant.file, tests, result, f"{time.monotonic() - begun:.0f}")
    Console(width=160).print(table)
    return int(failures > 0)


def copy_tree(to: Path) -> None:
    """What git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.splitlines()):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def apply(tree: Path, mutant: Mutant) -> str:
    """caught, missed, or why the mutant could not be tried."""
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"its line stands {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return "caught" if run_tests(tree, mutant.tests) else "MISSED"
    finally:
        path.write_text(text)


def run_tests(tree: Path, tests: tuple[str, ...] | list[str], stop: bool = True) -> str:
    """The end of pytest's output where a test fails; "" where all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["-x"] if stop else []), *tests]
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    return done.stdout[-2000:] + done.stderr[-500:] if done.returncode else ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

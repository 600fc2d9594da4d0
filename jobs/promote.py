"""Point an alias, by default `champion`, to a published version. What serves it picks it up when it is deployed again.

python jobs/promote.py: list every model and version

python jobs/promote.py --model hypdefect-elpv --version 2: make version 2 the champion
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hypdefect import registry
from hypdefect.command_line import parse_job, run_job
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.files import home, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteJob:
    model: str = ""
    """Name of the model; default: list all."""
    version: int | None = None
    """Version to promote; default: list those there are."""
    alias: str = "champion"
    """Alias that moves to it."""


def main() -> None:
    job, options = parse_job(PromoteJob, description=__doc__)
    if job.version is not None:
        if not job.model:
            raise ConfigError(f"--version {job.version} of which model? add --model NAME")
        entries = [registry.promote(home(), job.model, job.version, job.alias)]
    else:
        entries = [entry for entry in registry.list_models(home()) if job.model in ("", entry.name)]
        if not entries:
            raise ArtifactError(f"no version of {job.model or 'any model'} in {home() / 'registry'}")
    table = Table()
    for column in ("model", "version", "aliases", "folder"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(entry.name, str(entry.version), ", ".join(entry.aliases) or "-", str(entry.path))
    Console().print(table)
    if options.json is not None:
        rows = [
            {"name": e.name, "version": e.version, "aliases": list(e.aliases), "path": str(e.path)} for e in entries
        ]
        write_json(options.json, rows)
    print(entries[0].path if job.version is not None else home() / "registry")


if __name__ == "__main__":
    run_job(main)

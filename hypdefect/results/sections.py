"""What a page of results is made of: for each task its newest main run, and the newest runs of its studies."""

import json
import re
import shlex
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.datasets import DATASETS
from hypdefect.errors import ConfigError
from hypdefect.families.few_shot import TaskConfig
from hypdefect.results import ledger
from hypdefect.results.comparison import display_name

MAIN = "main"
CEILING = "ceiling"
"""Study of the ledger: logistic regression on all of the pool, K = 0."""
FAMILIES = ("few_shot", "few_shot_patches")
"""Of the methods that are compared with one another."""
CURVATURE = "curvature"
ABLATION = "ablation/"
"""What studies that change one field of the full method begin with."""
PARTS = "parts"
"""The study of them all that runs on any image set."""


@dataclass(frozen=True, slots=True)
class Section:
    """The newest main run of one task, and the newest runs of its studies."""

    label: str
    backbone: str
    split: str
    protocol: str
    main: pa.Table
    studies: dict[str, pa.Table]

    @property
    def title(self) -> str:
        protocol = {"draws": "", "first": ", first K images (AMC's rule)"}.get(self.protocol, f", {self.protocol}")
        return f"{self.label}, {self.split} split{protocol}"

    @property
    def slug(self) -> str:
        parts = [self.label, self.split, *([] if self.protocol == "draws" else [self.protocol])]
        parts += [] if self.backbone == TaskConfig().backbone else [self.backbone]
        return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts))

    @property
    def shots(self) -> list[int]:
        return sorted(set(self.main["k_shot"].to_pylist()))

    @property
    def partitions(self) -> list[int]:
        return sorted(set(self.main["partition"].to_pylist()))

    @property
    def draws(self) -> int:
        return len(set(self.main["draw"].to_pylist()))

    @property
    def repeated(self) -> bool:
        """Are there intervals?"""
        return len(self.partitions) > 1 or self.draws > 1

    @property
    def repetitions(self) -> str:
        """`10 partitions × 10 draws`."""
        draws = f"{self.draws} draw{'s' if self.draws > 1 else ''}"
        return f"{len(self.partitions)} partitions × {draws}" if len(self.partitions) > 1 else draws

    @property
    def classes(self) -> list[str]:
        return self.main["class_names"][0].as_py()

    @property
    def queries(self) -> str:
        """How many images each draw was scored on."""
        counts = sorted(set(self.main["num_queries"].to_pylist()))
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    @property
    def ablations(self) -> dict[str, pa.Table]:
        return {name: table for name, table in self.studies.items() if name.startswith(ABLATION)}

    def value(self, column: str) -> str:
        """What all rows of the main run have in a column."""
        return str(self.main[column][0].as_py())

    def study_command(self, *studies: str) -> str:
        """What makes the rows of HypDFS's studies, or of those that run on this image set; "" where no job does."""
        dataset = self.value("dataset")
        if dataset != "mtd":
            studies = tuple(study for study in studies if study == PARTS and dataset in DATASETS)
        if not studies:
            return ""
        command = ["python", "jobs/reproduce.py", "hypdfs", "--datasets", dataset, "--studies", *studies]
        command += ["--split", self.split, "--draws", str(max(self.draws, 2))]
        command += ["--partitions", str(len(self.partitions))] if len(self.partitions) > 1 else []
        return shlex.join(command)


def current_sections(table: pa.Table, label: str = "") -> list[Section]:
    """The newest runs of every task, or of those of one label, the grouped split of a label first.

    Raises:
        ConfigError: the ledger holds no main run, or none of this label.
    """
    newest = ledger.latest(table.filter(pc.is_in(table["family"], pa.array(FAMILIES))))
    tasks: dict[tuple[str, str, str, str], dict[str, pa.Table]] = {}
    names = ("label", "backbone", "split", "protocol", "study")
    keys = list(zip(*(newest[name].to_pylist() for name in names), strict=True))
    for key in dict.fromkeys(keys):
        rows = newest.filter(pa.array([k == key for k in keys], pa.bool_()))
        tasks.setdefault(key[:4], {})[key[4]] = rows
    sections = [Section(*task, runs.pop(MAIN), runs) for task, runs in sorted(tasks.items()) if MAIN in runs]
    if not sections:
        raise ConfigError("the ledger holds no evaluation yet; make one: python jobs/evaluate.py --dataset elpv")
    chosen = [section for section in sections if label in ("", section.label)]
    if not chosen:
        known = sorted({section.label for section in sections})
        raise ConfigError(f"the ledger holds no task {label!r}; it holds: {', '.join(known)}")
    return chosen


def config_of(table: pa.Table, name: str, k: int, partition: int | None = None) -> str | None:
    """The configuration a method used at one K, on one partition (default: its first), as `fit_of` gives it."""
    for row in table.select(["method", "features", "variant", "k_shot", "partition", "method_config"]).to_pylist():
        this = (display_name(row["method"], row["features"], row["variant"]), row["k_shot"])
        if this == (name, k) and partition in (None, row["partition"]):
            return fit_of(row["method_config"])
    return None


def fit_of(method_config: str) -> str:
    """A ledger row's configuration as JSON without its temperature, which changes no label and is fitted anew by every
    evaluation: rows that share the rest are of the same method."""
    return json.dumps({k: v for k, v in json.loads(method_config).items() if k != "temperature"}, sort_keys=True)

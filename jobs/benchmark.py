"""Time what must be fast, each as a ratio to a baseline measured in the same run.

python jobs/benchmark.py: everything

python jobs/benchmark.py store geometry: these sections

python jobs/benchmark.py detect --anomalib DIR: detectors, beside PatchCore of the anomalib in that environment
"""

import os
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from rich.table import Table
from tyro.conf import Positional

from hypdefect.command_line import configure_logging, parse_job, run_job, say, table_console
from hypdefect.distributed.benchmarks import SECTIONS, BenchmarkConfig
from hypdefect.distributed.detection_benchmarks import detectors
from hypdefect.distributed.training_benchmarks import pretraining, segmenters
from hypdefect.files import write_json

Section = Literal["geometry", "fit", "tune", "store", "detect", "segment", "pretrain"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkJob(BenchmarkConfig):
    sections: Positional[tuple[Section, ...]] = ("geometry", "fit", "tune", "store", "detect", "segment", "pretrain")
    """What to time; default: everything."""


MORE = {"detect": detectors, "segment": segmenters, "pretrain": pretraining}


def main() -> None:
    configure_logging()
    job, options = parse_job(BenchmarkJob, description=__doc__)
    torch.set_num_threads(1)
    timings = []
    for section in job.sections:
        say(f"{section} ...")
        timings += {**SECTIONS, **MORE}[section](job)
    table = Table(title=f"benchmark, one thread, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    for column in ("what", "s", "baseline", "baseline, s", "times faster", "note"):
        table.add_column(column, justify="left" if column in ("what", "baseline", "note") else "right")
    for one in timings:
        cells = (f"{one.seconds:.4f}", one.baseline, f"{one.baseline_seconds:.4f}", f"{one.ratio:.2f}", one.note)
        table.add_row(one.what, *cells)
    table_console().print(table)
    if options.json is not None:
        rows = [asdict(one) | {"ratio": one.ratio} for one in timings]
        write_json(options.json, {"rows": rows, "torch": torch.__version__, "load": os.getloadavg()})


if __name__ == "__main__":
    run_job(main)

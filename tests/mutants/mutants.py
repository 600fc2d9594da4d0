"""Lines to break, one at a time, and the tests that must notice: `run.py` tries them.

Half of them break the wiring: what a part was told is dropped on the way to where it acts.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One line to break. `old` stands in `file` exactly once; `tests` are what pytest is given."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    breaks: str


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        name="start",
        file="hypdefect/distributed/sweep.py",
        old='folder=home() / "sweeps",\n        start=start,',
        new='folder=home() / "sweeps",\n        start=None,',
        tests=("tests/ray/test_families.py::test_the_search_used_what_training_gave[small_segmenter]",),
        breaks="a sweep searches from nothing, whatever --init gave",
    ),
    Mutant(
        name="seen",
        file="hypdefect/distributed/tune.py",
        old="point not in seen",
        new="True",
        tests=("tests/ray/test_search.py",),
        breaks="a resumed search tries its first points again",
    ),
    Mutant(
        name="resumed-trials",
        file="hypdefect/distributed/sweep.py",
        old="trials=max(stored.trials or TRIALS, job.trials or 1)",
        new="trials=job.trials or TRIALS",
        tests=("tests/ray/test_search.py",),
        breaks="--resume forgets how many trials were asked for",
    ),
    Mutant(
        name="evaluation-start",
        file="hypdefect/evaluation.py",
        old="model.start_from(weights)",
        new="pass",
        tests=("tests/methods/test_contract.py", "tests/test_training.py", "tests/test_evaluation.py"),
        breaks="meta-trained weights are read and not used",
    ),
    Mutant(
        name="centring",
        file="hypdefect/evaluation.py",
        old='model = CentredClassifier(model) if self.transform.centring == "supports" else model',
        new="pass",
        tests=("tests/methods/test_centred.py", "tests/test_predictor.py", "tests/data/test_imported.py"),
        breaks="--centring changes nothing",
    ),
    Mutant(
        name="temperature",
        file="hypdefect/evaluation.py",
        old="return TemperedClassifier(model, self.temperature)",
        new="return model",
        tests=("tests/methods/test_tempered.py", "tests/test_predictor.py"),
        breaks="a temperature is fitted, stored and not used",
    ),
    Mutant(
        name="sweep-choice",
        file="hypdefect/distributed/sweep.py",
        old="ours = choose(scores[: len(candidates)])",
        new="ours = max(range(len(candidates)), key=lambda i: sum(scores[i]))",
        tests=("tests/ray/test_search.py",),
        breaks="a sweep leaves the defaults for any gain",
    ),
    Mutant(
        name="searched-parts",
        file="hypdefect/evaluation.py",
        old='trial.suggest_categorical("transform.parts", choices)',
        new="pass",
        tests=("tests/data/test_imported.py", "tests/test_evaluation.py", "tests/ray/test_search.py"),
        breaks="a sweep never tries one part alone",
    ),
    Mutant(
        name="registry-hash",
        file="hypdefect/registry.py",
        old="if file_sha256(there[name]) != wanted[name]:",
        new="if False:",
        tests=("tests/test_registry.py",),
        breaks="a damaged model is served",
    ),
    Mutant(
        name="image-hash",
        file="hypdefect/distributed/extract.py",
        old="if hashlib.sha256(data).hexdigest() != request.file_id:",
        new="if False:",
        tests=("tests/ray/test_extract.py",),
        breaks="an image that changed since its manifest is stored under the old name",
    ),
    Mutant(
        name="store-checksum",
        file="hypdefect/features/store.py",
        old="if hashlib.sha256(data).hexdigest() != commit.sha256:",
        new="if False:",
        tests=("tests/data/test_store.py",),
        breaks="a flipped byte of a part goes unseen",
    ),
    Mutant(
        name="twin-scale",
        file="hypdefect/methods/hypdfs.py",
        old="getattr(config, name) * sums[0] / sums[1]",
        new="getattr(config, name)",
        tests=("tests/test_evaluation.py",),
        breaks="the Euclidean twin sees distances of another size",
    ),
    Mutant(
        name="rank",
        file="hypdefect/training.py",
        old="for i in range(rank, config.items_per_step, world_size)]",
        new="for i in range(0, config.items_per_step, world_size)]",
        tests=("tests/test_training.py",),
        breaks="all workers train on the same episodes",
    ),
    Mutant(
        name="upload-cap",
        file="serve/uploads.py",
        old="if received > max_bytes:",
        new="if False:",
        tests=("tests/e2e/test_serve.py::test_the_cap",),
        breaks="a chunked upload without a length is read whole, whatever its size",
    ),
    Mutant(
        name="episode-groups",
        file="hypdefect/families/episodes.py",
        old='if spec.split == "grouped":',
        new="if False:",
        tests=("tests/families/test_episodes.py",),
        breaks="support and queries of one episode share a part",
    ),
    Mutant(
        name="episode-text",
        file="hypdefect/families/episodes.py",
        old="None if batch.text is None else batch.text[classes]",
        new="batch.text",
        tests=("tests/families/test_class_text.py",),
        breaks="an episode carries the text of other classes",
    ),
    Mutant(
        name="family-import",
        file="hypdefect/families/__init__.py",
        old="if name not in known:",
        new="if False:",
        tests=("tests/ray/test_families.py::test_a_family_that_no_method_names_is_not_imported",),
        breaks="a file's family name imports any module",
    ),
    Mutant(
        name="class-text",
        file="hypdefect/families/few_shot.py",
        old="text = load_prompts(plan.spec, plan.prompts, home).numpy() if plan.prompts else None",
        new="text = None",
        tests=("tests/families/test_class_text.py",),
        breaks="class names are embedded and reach no method",
    ),
    Mutant(
        name="queries",
        file="hypdefect/families/few_shot.py",
        old="return fitting, Reported(queries=labelled(plan.partition.query))",
        new="return fitting, Reported(queries=labelled(plan.pool_ids))",
        tests=("tests/families/test_few_shot.py",),
        breaks="a method is scored on the images it may fit",
    ),
    Mutant(
        name="projection-mean",
        file="hypdefect/features/transform.py",
        old='centred = out - self.tensors[f"{view}/projection_mean"]',
        new="centred = out",
        tests=("tests/data/test_features.py",),
        breaks="a learned projection reads features that are not centred",
    ),
    Mutant(
        name="overlap",
        file="hypdefect/statistics.py",
        old="return (1 + n * OVERLAP) ** 0.5 if len(set(clusters)) > 1 else 1.0",
        new="return 1.0",
        tests=("tests/test_metrics.py",),
        breaks="partitions of one set of images count as independent",
    ),
    Mutant(
        name="holm",
        file="hypdefect/results/comparison.py",
        old="corrected = holm([p for *_, p in raw])",
        new="corrected = [p for *_, p in raw]",
        tests=("tests/test_comparison.py",),
        breaks="many comparisons are read as if each were the only one",
    ),
    Mutant(
        name="tiles",
        file="hypdefect/datasets/readers/mtd.py",
        old="for rows in (defective, rows_of[NORMAL], list(range(len(stems)))):",
        new="for rows in (defective, rows_of[NORMAL]):",
        tests=("tests/data/test_mtd.py",),
        breaks="free photographs of a defective tile are another part",
    ),
    Mutant(
        name="support-folder",
        file="hypdefect/features/imported.py",
        old='"train": ("train", "support")',
        new='"train": ("train",)',
        tests=("tests/data/test_imported.py",),
        breaks="a paper's own support and query files are mixed",
    ),
    Mutant(
        name="upright-twins",
        file="hypdefect/datasets/twins.py",
        old="SAME_UPRIGHT = 0.45",
        new="SAME_UPRIGHT = 0.75",
        tests=("tests/data/test_twins.py", "tests/data/test_mtd.py"),
        breaks="a second photograph of a part counts as another part",
    ),
    Mutant(
        name="query-side",
        file="hypdefect/families/episodes.py",
        old="rest = np.setdiff1d(own, side)",
        new="rest = own",
        tests=("tests/families/test_episodes.py",),
        breaks="an image is a support and a query at once",
    ),
)

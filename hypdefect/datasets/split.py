"""How a manifest is split into images that supports are drawn from and images that are reported on."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.config import digest
from hypdefect.errors import ConfigError, DataError
from hypdefect.files import sha256
from hypdefect.types import SplitKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Image ids that supports (pool) and queries are drawn from, each sorted."""

    kind: SplitKind | Literal["official"]
    seed: int
    pool: tuple[str, ...]
    query: tuple[str, ...]


def task_classes(manifest: pa.Table, include_good: bool) -> tuple[str, ...]:
    """The classes of the few-shot task, sorted: the defects, and the normal classes where asked."""
    pairs = zip(manifest["defect"].to_pylist(), manifest["is_defect"].to_pylist(), strict=True)
    return tuple(sorted({defect for defect, is_defect in pairs if is_defect or include_good}))


def make_partition(
    manifest: pa.Table, kind: SplitKind, seed: int, classes: Sequence[str], pool_fraction: float = 0.5
) -> Partition:
    """Split the images of the task's classes into a pool for supports and queries; the same for any row order.

    "random" follows an official split that has every class on both sides (train is the pool, test the queries, val
    neither), and otherwise takes `pool_fraction` of each class by a seeded hash of the image id. "grouped" moves whole
    groups, whatever official split there is, and gets as near to that fraction of each class as the groups allow; an
    image without a group id is then a group of its own. The rows of one file are never parted.

    Raises:
        ConfigError: fraction not between 0 and 1.
        DataError: unknown class; a class too small to stand on both sides (one image, or one group); "grouped" where
            no image has a group id.
    """
    if not 0 < pool_fraction < 1:
        raise ConfigError(f"pool_fraction must lie between 0 and 1, got {pool_fraction}")
    known = sorted(set(manifest["defect"].to_pylist()))
    if unknown := sorted(set(classes) - set(known)):
        raise DataError(f"the manifest has no class {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    if not classes:
        raise DataError(f"no classes to split; the manifest has {', '.join(known)}")

    columns = ("image_id", "file_id", "defect", "split", "group_id")
    rows = manifest.select(columns).filter(pc.is_in(manifest["defect"], pa.array(sorted(set(classes))))).to_pylist()
    rows.sort(key=lambda row: row["image_id"])
    if kind == "random":
        sides = {s: [row for row in rows if row["split"] == s] for s in ("train", "test")}
        if all({row["defect"] for row in side} == set(classes) for side in sides.values()):
            ids = {s: tuple(row["image_id"] for row in side) for s, side in sides.items()}
            return Partition(kind="official", seed=seed, pool=ids["train"], query=ids["test"])
        if len({row["file_id"] for row in rows}) == len(rows):
            in_pool = _random_pool(rows, seed, pool_fraction)
        else:
            in_pool = _grouped_pool([row | {"group_id": ""} for row in rows], seed, pool_fraction)
    else:
        if not any(row["group_id"] for row in rows):
            name = manifest["dataset"][0].as_py()
            remedy = f"look for near-duplicates first: python jobs/ingest.py --dataset {name} --audit"
            if name.startswith("imported:"):  # features have no images to look at
                remedy = "import the features with their `groups`"
            raise DataError(
                f"no image has a group id, so a grouped split would be a random one: use split random, or {remedy}"
            )
        in_pool = _grouped_pool(rows, seed, pool_fraction)
    return Partition(
        kind=kind,
        seed=seed,
        pool=tuple(row["image_id"] for row in rows if row["image_id"] in in_pool),
        query=tuple(row["image_id"] for row in rows if row["image_id"] not in in_pool),
    )


def check_task(manifest: pa.Table, partition: Partition, k_shot: int) -> None:
    """Check that `k_shot` supports and one query can be drawn of every class of a partition.

    Raises:
        DataError: names the class, what it has and what it needs.
    """
    defect_of = dict(zip(manifest["image_id"].to_pylist(), manifest["defect"].to_pylist(), strict=True))
    pool = Counter(defect_of[i] for i in partition.pool)
    query = Counter(defect_of[i] for i in partition.query)
    for defect in sorted(pool.keys() | query.keys()):
        if pool[defect] < k_shot or query[defect] < 1:
            raise DataError(
                f"class {defect} has {pool[defect]} pool and {query[defect]} query images in the {partition.kind} "
                f"split of seed {partition.seed}; K = {k_shot} needs {k_shot} in the pool and at least 1 query: "
                f"lower K, leave the class out or add images"
            )


def _random_pool(rows: list[dict[str, str]], seed: int, fraction: float) -> set[str]:
    ids_of: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        ids_of[row["defect"]].append(row["image_id"])
    pool: set[str] = set()
    for defect, ids in sorted(ids_of.items()):
        if len(ids) < 2:
            raise DataError(f"class {defect} has 1 image; a split needs at least one on each side: leave the class out")
        ids.sort(key=lambda i: sha256(f"{seed}:{i}".encode()))
        pool.update(ids[: min(max(round(fraction * len(ids)), 1), len(ids) - 1)])
    return pool


def _grouped_pool(rows: list[dict[str, str]], seed: int, fraction: float) -> set[str]:
    """Whole groups on one side: greedy in a seeded order, then single moves while they help.

    The cost is the squared distance of each class's share in the pool from `fraction`, and a fine for a class that
    stands on one side only. A few orders are tried where groups spanning several classes make that hard.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[("group", row["group_id"]) if row["group_id"] else ("file", row["file_id"])].append(row)
    classes = sorted({row["defect"] for row in rows})
    for defect in classes:
        holders = [key for key, members in groups.items() if any(m["defect"] == defect for m in members)]
        if len(holders) < 2:
            raise DataError(
                f"class {defect} has one group ({holders[0][1]!r}); a grouped split needs at least one on each side: "
                f"leave the class out or use split random"
            )

    for attempt in range(32):
        order = sorted(groups, key=lambda key: sha256(f"{seed}:{attempt}:{key[0]}:{key[1]}".encode()))
        count_GC = np.array([[sum(m["defect"] == c for m in groups[key]) for c in classes] for key in order])
        chosen_G = _halve(count_GC, fraction)
        in_pool = chosen_G @ count_GC
        if ((in_pool > 0) & (in_pool < count_GC.sum(axis=0))).all():
            return {m["image_id"] for key, chosen in zip(order, chosen_G, strict=True) if chosen for m in groups[key]}
    raise DataError(
        f"no grouped split of seed {seed} puts every class on both sides, because groups span several of the classes "
        f"{', '.join(classes)}: leave a class out or use split random"
    )


def _halve(count_GC: np.ndarray, fraction: float) -> np.ndarray:
    """Which groups (G) go to the pool, given the images of each class (C) in each."""
    share_GC = count_GC / count_GC.sum(axis=0)

    def cost(pool_XC: np.ndarray) -> np.ndarray:  # X candidate pools
        one_sided = (pool_XC < 1e-9) | (pool_XC > 1 - 1e-9)
        return ((pool_XC - fraction) ** 2 + 10.0 * one_sided).sum(axis=-1)

    chosen_G = np.zeros(len(share_GC), dtype=bool)
    pool_C, query_C = np.zeros(share_GC.shape[1]), np.zeros(share_GC.shape[1])
    for g, share_C in enumerate(share_GC):
        wanted = float(share_C @ ((fraction - pool_C) / fraction - (1 - fraction - query_C) / (1 - fraction)))
        chosen_G[g] = wanted > 1e-12 or (abs(wanted) <= 1e-12 and g % 2 == 0)
        side = pool_C if chosen_G[g] else query_C
        side += share_C
    for _ in range(4 * len(share_GC)):
        moved = cost(pool_C + np.where(chosen_G, -1, 1)[:, None] * share_GC)
        best = int(moved.argmin())
        if moved[best] >= cost(pool_C[None])[0] - 1e-12:
            break
        chosen_G[best] = ~chosen_G[best]
        pool_C = chosen_G @ share_GC
    return chosen_G


def parted(unit_of: dict[str, str], share: float, seed: object) -> tuple[list[str], list[str]]:
    """Whole units taken in a seeded order until they hold `share` of the images, and the rest.

    Raises:
        DataError: one unit holds everything.
    """
    members: dict[str, list[str]] = defaultdict(list)
    for image_id, unit in unit_of.items():
        members[unit].append(image_id)
    if len(members) < 2:
        raise DataError(f"{len(unit_of)} images of one part cannot be parted: give images of more parts")
    taken: list[str] = []
    order = sorted(members, key=lambda unit: digest([seed, unit]))
    for unit in order[:-1]:
        if taken and len(taken) + len(members[unit]) / 2 > share * len(unit_of):
            break
        taken += members[unit]
    chosen = set(taken)
    return taken, [image_id for image_id in unit_of if image_id not in chosen]

"""The ledger: every evaluated draw of every method, in append-only Parquet parts under `ledger/` of the home folder."""

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),  # one evaluation: all its rows are paired by (partition, draw)
        ("created", pa.string()),  # UTC, ISO 8601
        ("commit", pa.string()),  # git commit of the code, "-dirty" appended where files differed; "" unknown
        ("config_digest", pa.string()),  # of the job's resolved configuration
        ("data_digest", pa.string()),  # of manifest, feature key and all partitions used
        ("label", pa.string()),  # the task: data set and product
        ("dataset", pa.string()),
        ("product", pa.string()),
        ("backbone", pa.string()),
        ("study", pa.string()),  # main, curvature, ablation/NAME
        ("split", pa.string()),  # random, grouped
        ("protocol", pa.string()),  # draws, first (AMC: the first K images of each class)
        ("method", pa.string()),  # name in METHODS
        ("variant", pa.string()),  # what tells rows of one method apart: "", "c = 0 twin", "no adapter" ...
        ("features", pa.string()),  # plain, meta (meta-trained projection)
        ("method_config", pa.string()),  # JSON of the RunConfig that was used on this partition
        ("k_shot", pa.int32()),
        ("partition", pa.int32()),
        ("draw", pa.int32()),
        ("num_queries", pa.int32()),
        ("acc", pa.float64()),
        ("balanced_acc", pa.float64()),
        ("macro_f1", pa.float64()),
        ("ece", pa.float64()),
        ("fit_seconds", pa.float64()),
        ("predict_seconds", pa.float64()),
        ("class_names", pa.list_(pa.string())),
        ("confusion", pa.list_(pa.int32())),  # row by row, rows are the true classes
    ]
)

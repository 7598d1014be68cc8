"""All parquet tables: schemas, and the only functions that read and write them.

Unit, range and direction of each column are in its field metadata, so that they travel with the file; as one JSON text
they are in the file's own metadata, too, where readers find them that know no Arrow.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dp2osr.errors import UserError
from dp2osr.metrics import METRICS, arrow
from dp2osr.resume import atomic

NORM = "__norm"  # suffix of a metric's normalised score
ORIGINS = b"origins"  # key in the schema's metadata: what made each metric's numbers, as JSON (iqa/origin.py)
ROW_GROUP = 16384  # rows that a reader of one group takes at least: at M = 64 those of 256 groups (docs/tables.md)
STD = "__std"  # suffix of a metric's spread over the candidates of a group

_TEXT, _INT, _FLOAT = pa.string(), pa.int32(), pa.float64()


def _column(name: str, kind: pa.DataType, description: str, unit: str = "", span: str = "") -> pa.Field:
    metadata = {"description": description, "unit": unit, "range": span}
    return pa.field(name, kind, metadata={key: value for key, value in metadata.items() if value})


def _schema(name: str, keys: Sequence[str], *columns: pa.Field) -> pa.Schema:
    notes = {field.name: {key.decode(): text.decode() for key, text in field.metadata.items()} for field in columns}
    metadata = {"table": name, "keys": ",".join(keys), "columns": json.dumps(notes, ensure_ascii=False)}
    return pa.schema(columns, metadata=metadata)


_GROUP = _column("group_id", _TEXT, "one LR image: the image_id of images.parquet")
_ROLLOUT = _column("rollout", _INT, "candidate number; its noise seed is hash(seed, group_id, rollout)", span="0..M-1")
_STEP = _column("step", _INT, "optimizer step", span="1..steps")

IMAGES = _schema(
    "images",
    ["image_id"],
    _column("image_id", _TEXT, "a crop: first 16 hex digits of the file's sha256, and the crop number"),
    _column("photo_id", _TEXT, "the photograph that the crop is from: first 16 hex digits of sha256"),
    _column("source", _TEXT, "path that begins as the entry of the config does, tar::member of one, or builtin:name"),
    _column("sha256", _TEXT, "of the file's bytes"),
    _column("width", _INT, "of the file after EXIF orientation", "px"),
    _column("height", _INT, "of the file after EXIF orientation", "px"),
    _column("crop_x", _INT, "left edge of the crop in the file, after downscaling", "px"),
    _column("crop_y", _INT, "top edge of the crop in the file, after downscaling", "px"),
    _column("crop_size", _INT, "side of the crop in the file, after downscaling; 0: the whole file", "px"),
    _column("split", _TEXT, "label of the dataset"),
    _column("shard", _INT, "shard that holds it; -1 where not used"),
    _column("status", _TEXT, "ok, rejected, duplicate, or partner: the given LR file of the photograph"),
    _column("reason", _TEXT, "why it is not used; empty where ok"),
)

PROMPTS = _schema(
    "prompts",
    ["group_id"],
    _GROUP,
    _column("prompt", _TEXT, "text given to the text encoder"),
    _column(
        "status",
        _TEXT,
        "ok; where the empty prompt stands in: missing from the prompt table, or empty, as the model named nothing",
    ),
)

SCORES = _schema(
    "scores",
    ["group_id", "rollout", "metric"],
    _GROUP,
    _ROLLOUT,
    _column("metric", _TEXT, "pyiqa's name"),
    _column("score", _FLOAT, "raw value of the metric; its direction is in the rewards table's fields"),
    _column("status", _TEXT, "ok; why there is no number: nan, inf, too_small, wrong_size (A-FINE), unparsed (vqr1)"),
)

SCALES = _schema(
    "scales",
    ["group_id", "metric"],
    _GROUP,
    _column("metric", _TEXT, "pyiqa's name"),
    _column("min", _FLOAT, "smallest raw score over the group's M candidates"),
    _column("max", _FLOAT, "largest raw score over the group's M candidates"),
)

PAIRS = _schema(
    "pairs",
    ["group_id", "chosen", "rejected"],
    _GROUP,
    _column("chosen", _INT, "rollout of the winner", span="0..M-1"),
    _column("rejected", _INT, "rollout of the loser", span="0..M-1"),
    _column("reward_chosen", _FLOAT, "reward of the winner, higher is better", span="[0, 1]"),
    _column("reward_rejected", _FLOAT, "reward of the loser, higher is better", span="[0, 1]"),
    _column("gap", _FLOAT, "reward_chosen - reward_rejected", "reward"),
    _column("w_intra", _FLOAT, "HPO weight of the gap within the group; mean 1 in each group"),
    _column("w_inter", _FLOAT, "HPO weight of the group's reward spread; mean 1 over groups"),
    _column("weight", _FLOAT, "weight of the pair's loss"),
)

TRAIN_LOG = _schema(
    "train_log",
    ["step"],
    _STEP,
    _column("loss", _FLOAT, "weighted DPO loss, mean over pairs; log 2 = 0.693 at the start, lower is better", "nat"),
    _column("implicit_accuracy", _FLOAT, "share of pairs whose logit is positive, higher is better", span="[0, 1]"),
    _column("margin", _FLOAT, "mean of (loser error - winner error), each against the reference", "squared error"),
    _column("abs_logit", _FLOAT, "mean |z| of the logistic; good runs end at 1 to 2"),
    _column("error_chosen", _FLOAT, "winner error of the policy minus that of the reference", "squared error"),
    _column("error_rejected", _FLOAT, "loser error of the policy minus that of the reference", "squared error"),
    _column("grad_norm", _FLOAT, "before clipping"),
    _column("lr", _FLOAT, "learning rate of the step"),
    _column("num_pairs", _INT, "pairs in the step"),
    _column("pairs_per_second", _FLOAT, "wall clock; the one column that differs between equal runs", "1/s"),
)

PRETRAIN_LOG = _schema(
    "pretrain_log",
    ["phase", "step"],
    _column("phase", _TEXT, "vae, denoiser or finetune"),
    _STEP,
    _column("loss", _FLOAT, "mean over the steps since the row before: L1 for the VAE, else squared error"),
)

VALIDATION = _schema(
    "validation",
    ["step"],
    _STEP,
    _column("reward", _FLOAT, "mean reward of the policy on the reference's scale, higher is better"),
    _column("fr", _FLOAT, "full-reference part, higher is better"),
    _column("nr", _FLOAT, "no-reference part, higher is better"),
    _column("diversity", _FLOAT, "std between the seeds of an image, mean over pixels", "of the [0, 1] range"),
    _column("best", pa.bool_(), "whether the step is the best so far"),
    _column("verdict", _TEXT, "ok, or why the training stopped"),
)

EVALUATION = _schema(
    "evaluation",
    ["policy", "statistic", "m"],
    _column("policy", _TEXT, "policy, or control"),
    _column("statistic", _TEXT, "mean_at_m, best_at_m, worst_at_m, std, fr, nr, win_rate, a metric or <metric>__std"),
    _column("m", _INT, "number of candidates an image"),
    _column("value", _FLOAT, "mean over photographs' images; rewards on the reference's per-image scale"),
    _column("value_low", _FLOAT, "lower end of the value's interval"),
    _column("value_high", _FLOAT, "upper end of the value's interval"),
    _column("reference", _FLOAT, "the reference's value"),
    _column("difference", _FLOAT, "value - reference"),
    _column("ci_low", _FLOAT, "lower end of the difference's paired bootstrap interval over photographs"),
    _column("ci_high", _FLOAT, "upper end of the difference's paired bootstrap interval over photographs"),
    _column("in_reward", pa.bool_(), "whether the metric is part of the reward"),
    _column("higher_better", pa.bool_(), "direction of the statistic"),
    _column("num_groups", _INT, "LR images"),
    _column("num_photos", _INT, "photographs: the units of the bootstrap"),
)

PREDICTIONS = _schema(
    "predictions",
    ["image_id", "rollout"],
    _column("image_id", _TEXT, "photograph of a downstream benchmark: its file's name without suffix"),
    _column("rollout", _INT, "number of the restoration; 0 for hr and lr"),
    _column("status", _TEXT, "ok or rejected; a rejected photograph counts for no source"),
    _column("reason", _TEXT, "why it is not used; empty where ok"),
    _column(
        "prediction",
        _TEXT,
        "JSON. detection: [x, y, width, height, score, category id] of each box, px; text: the four corners of each "
        "box, px; segmentation: class, pixels right, predicted and annotated of each class that occurs",
    ),
)

DOWNSTREAM = _schema(
    "downstream",
    ["source", "statistic"],
    _column("source", _TEXT, "what the model saw: hr, lr (enlarged by bicubic), the reference, the run's policy"),
    _column(
        "statistic",
        _TEXT,
        "ap, ap50, ap75, ap_small, ap_medium, ap_large; miou, pixel_accuracy, mean_accuracy; "
        "precision, recall, hmean. Higher is better",
        span="[0, 1]",
    ),
    _column("value", _FLOAT, "over the whole benchmark, mean over seeds; NaN where nothing is annotated"),
    _column("value_low", _FLOAT, "lower end of the value's bootstrap interval over photographs"),
    _column("value_high", _FLOAT, "upper end of the value's bootstrap interval over photographs"),
    _column("seed_std", _FLOAT, "standard deviation of the value between seeds; NaN with one seed"),
    _column("reference", _FLOAT, "the reference's value"),
    _column("difference", _FLOAT, "value - reference"),
    _column("ci_low", _FLOAT, "lower end of the difference's paired bootstrap interval over photographs"),
    _column("ci_high", _FLOAT, "upper end of the difference's paired bootstrap interval over photographs"),
    _column("higher_better", pa.bool_(), "direction of the statistic"),
    _column("num_images", _INT, "photographs: the units of the bootstrap"),
    _column("num_rejected", _INT, "photographs that could not be used"),
    _column("num_seeds", _INT, "restorations of each photograph"),
)


def rewards_schema(metrics: Sequence[str]) -> pa.Schema:
    """Return the wide rewards schema for these metrics: raw score and normalised score of each."""
    columns = [_GROUP, _ROLLOUT]
    for name in metrics:
        known = METRICS[name]
        span = f"[{known.low}, {known.high}]".replace("None", "∞")
        direction = "lower" if known.lower_better else "higher"
        columns.append(_column(name, _FLOAT, f"raw score {arrow(name)}, {direction} is better", span=span))
    for name in metrics:
        columns.append(_column(name + NORM, _FLOAT, "normalised in the group, higher is better", span="[0, 1]"))
    columns += [
        _column("fr", _FLOAT, "mean normalised score of the full-reference set, higher is better", span="[0, 1]"),
        _column("nr", _FLOAT, "mean normalised score of the no-reference set, higher is better", span="[0, 1]"),
        _column("reward", _FLOAT, "R = w·fr + (1-w)·nr, higher is better", span="[0, 1]"),
        _column("rank", _INT, "0 is the group's best; ties go to the smaller rollout; -1 where there is no reward"),
        _column("status", _TEXT, "ok, or the metrics that gave no number"),
    ]
    return _schema("rewards", ["group_id", "rollout"], *columns)


def keys(schema: pa.Schema) -> list[str]:
    """Return the key columns of a schema, by which its rows are sorted."""
    return (schema.metadata or {}).get(b"keys", b"").decode().split(",")


def check(schema: pa.Schema, wanted: pa.Schema, path: Path | str) -> None:
    """Raise UserError naming file and column where `schema` differs from `wanted` in a name or type."""
    for field in wanted:
        if field.name not in schema.names:
            raise UserError(f"table {path}: column '{field.name}' is missing, wanted {', '.join(wanted.names)}")
        found = schema.field(field.name).type
        if found != field.type:
            raise UserError(f"table {path}: column '{field.name}' is {found}, wanted {field.type}")
    if extra := set(schema.names) - set(wanted.names):
        raise UserError(f"table {path}: unknown column '{sorted(extra)[0]}', wanted {', '.join(wanted.names)}")


def load(path: Path | str, *, groups: Collection[str] | None = None) -> pa.Table:
    """Read any parquet file as an arrow table; raises UserError naming the file.

    groups: read the rows of these group_ids alone; row groups without any of them are skipped.
    """
    if not Path(path).is_file():
        raise UserError(f"table {path}: not found")
    try:
        wanted = None if groups is None else pc.field("group_id").isin(pa.array(list(groups), pa.string()))
        return pq.read_table(path, filters=wanted)
    except pa.ArrowInvalid as error:
        raise UserError(f"table {path}: no readable parquet file ({error})") from None


def read(path: Path | str, schema: pa.Schema) -> pd.DataFrame:
    """Read a table and check it against its schema."""
    table = load(path)
    check(table.schema, schema, path)
    return table.select(schema.names).to_pandas()


def read_rewards(path: Path | str, *, groups: Collection[str] | None = None) -> pd.DataFrame:
    """Read a rewards table, or its rows of some groups; its metrics are those whose normalised column it holds."""
    table = load(path, groups=groups)
    metrics = [name[: -len(NORM)] for name in table.schema.names if name.endswith(NORM)]
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UserError(f"table {path}: unknown metric '{unknown[0]}'")
    check(table.schema, rewards_schema(metrics), path)
    return table.to_pandas()


def origins(schema: pa.Schema) -> dict[str, str]:
    """Return what made the numbers of each metric, as far as the table says it: package, versions, weights."""
    return dict(json.loads((schema.metadata or {}).get(ORIGINS, b"{}")))


def common_origins(paths: Iterable[Path | str]) -> dict[str, str]:
    """Return what made the metrics of some tables; UserError where they differ in it."""
    found: dict[str, str] = {}
    for path in paths:
        merge_origins(found, read_origins(path), path)
    return found


def read_origins(path: Path | str) -> dict[str, str]:
    """Return `origins` of a table that can be read."""
    return origins(pq.read_schema(path))


def merge_origins(known: dict[str, str], more: Mapping[str, str], path: Path | str) -> None:
    """Add what a table says to `known`; UserError where a metric's numbers are of another making."""
    for name, origin in more.items():
        if known.setdefault(name, origin) != origin:
            raise UserError(
                f"table {path}: metric '{name}' is by {origin}; other tables by {known[name]}; "
                "wanted one: snakemake --forcerun score"
            )


def read_many(paths: Iterable[Path | str], schema: pa.Schema) -> pd.DataFrame:
    """Read tables of one schema, one after the other."""
    frames = [read(path, schema) for path in paths]
    if not frames:
        raise UserError(f"no {schema.metadata[b'table'].decode()} table given")
    return pd.concat(frames, ignore_index=True)


def write(
    frame: pd.DataFrame,
    path: Path | str,
    schema: pa.Schema,
    *,
    sort: bool = True,
    origins: Mapping[str, str] | None = None,
) -> None:
    """Write a table atomically, its columns checked and its rows sorted by key; origins: what made each metric."""
    if missing := [name for name in schema.names if name not in frame.columns]:
        raise ValueError(f"table {path}: column '{missing[0]}' is missing, wanted {', '.join(schema.names)}")
    if sort:
        frame = frame.sort_values(keys(schema), kind="stable")
    table = pa.Table.from_pandas(frame[schema.names], schema=schema, preserve_index=False)
    notes = {ORIGINS: json.dumps(dict(origins), sort_keys=True).encode()} if origins else {}
    table = table.replace_schema_metadata({**(schema.metadata or {}), **notes})
    repeating = [field.name for field in schema if not pa.types.is_floating(field.type)]  # scores hardly repeat
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=repeating)

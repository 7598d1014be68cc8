"""Prompts of LR images: none, one fixed text, or a table that the user brings."""

import json
import logging
from pathlib import Path

import pandas as pd

from dp2osr import tables
from dp2osr.config import PromptSettings
from dp2osr.errors import UserError

logger = logging.getLogger(__name__)

KEYS = ("image_id", "photo_id", "source")  # columns of images.parquet by which a prompt table may be keyed


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a parquet, JSONL or CSV file of prompts; all columns are text, an absent prompt is None."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prompt table {path}: not found")
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"prompt table {path}: found '{path.suffix}', wanted {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def _read_parquet(path: Path) -> pd.DataFrame:
    return tables.load(path).to_pandas()


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"prompt table {path}: no readable CSV ({' '.join(str(error).split())})") from None


def _read_jsonl(path: Path) -> pd.DataFrame:
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise UserError(f"prompt table {path}: line {number} is no object")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"prompt table {path}: line {number} is not JSON ({error})") from None
    return pd.DataFrame(rows)


def lookup(table: pd.DataFrame, path: Path | str) -> tuple[str, dict[str, str]]:
    """Return the key column of a prompt table (the first of KEYS that it has) and its prompts by key."""
    key = next((name for name in KEYS if name in table.columns), None)
    if key is None:
        raise UserError(f"prompt table {path}: no column {', '.join(KEYS)}; found {', '.join(table.columns) or 'none'}")
    if "prompt" not in table.columns:
        raise UserError(f"prompt table {path}: column 'prompt' is missing; found {', '.join(table.columns)}")
    known = table[table["prompt"].notna() & table[key].notna()]
    if not known["prompt"].map(lambda value: isinstance(value, str)).all():
        raise UserError(f"prompt table {path}: column 'prompt' holds values that are no text")
    if (twice := known[key].duplicated()).any():
        raise UserError(f"prompt table {path}: {key} '{known.loc[twice, key].iloc[0]}' has several prompts")
    return key, dict(zip(known[key].astype(str), known["prompt"], strict=True))


def assign(images: pd.DataFrame, settings: PromptSettings) -> pd.DataFrame:
    """Give each image its prompt.

    images: rows of tables.IMAGES that are in use. Returns rows of tables.PROMPTS; an image that the prompt table does
    not know gets the empty prompt and status `missing`.
    """
    frame = pd.DataFrame({"group_id": images["image_id"].to_numpy()})
    frame["status"] = "ok"
    if settings.source != "table":
        frame["prompt"] = settings.text if settings.source == "text" else ""
        return frame
    key, prompts = lookup(read_table(settings.table), settings.table)
    found = [prompts.get(str(value)) for value in images[key]]
    frame["prompt"] = [prompt or "" for prompt in found]
    frame.loc[[prompt is None for prompt in found], "status"] = "missing"
    num_missing = sum(prompt is None for prompt in found)
    logger.info(
        "prompt table %s: keyed by %s; %d of %d images have no prompt", settings.table, key, num_missing, len(frame)
    )
    return frame

"""Prompts of LR images: none, one fixed text, a table that the user brings, or what a model sees in them."""

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import pandas as pd

from dp2osr import stage, tables, weights
from dp2osr.config import CaptionSettings, TagSettings
from dp2osr.errors import UserError
from dp2osr.strict import Strict

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

KEYS = ("image_id", "photo_id", "source")  # columns of images.parquet by which a prompt table may be keyed
BATCH = 8  # LR images that a model describes at once


class PromptJob(Strict):
    """What determines the prompts of a shard: their source, and of the settings the part that it reads."""

    source: Literal["none", "text", "table", "tags", "caption"]
    text: str = ""
    table: str = ""
    tags: TagSettings | None = None
    caption: CaptionSettings | None = None


class Describer(Protocol):
    """A model that says what images show."""

    def describe(self, images: Sequence["torch.Tensor"]) -> list[str]:
        """Return a text for each LR image (3, H, W) RGB in [0, 1]; empty where there is nothing to say."""


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


def assign(images: pd.DataFrame, job: PromptJob) -> pd.DataFrame:
    """Give each image its prompt.

    images: rows of tables.IMAGES that are in use. Returns rows of tables.PROMPTS; an image that the prompt table does
    not know gets the empty prompt and status `missing`.
    """
    frame = pd.DataFrame({"group_id": images["image_id"].to_numpy()})
    frame["status"] = "ok"
    if job.source != "table":
        frame["prompt"] = job.text if job.source == "text" else ""
        return frame
    key, prompts = lookup(read_table(job.table), job.table)
    found = [prompts.get(str(value)) for value in images[key]]
    frame["prompt"] = [prompt or "" for prompt in found]
    frame.loc[[prompt is None for prompt in found], "status"] = "missing"
    num_missing = sum(prompt is None for prompt in found)
    logger.info("prompt table %s: keyed by %s; %d of %d images have no prompt", job.table, key, num_missing, len(frame))
    return frame


def describe(
    images: pd.DataFrame, lr: Iterable[tuple[str, "torch.Tensor"]], describer: Describer, *, batch: int = BATCH
) -> pd.DataFrame:
    """Give each image what a model says of its LR image.

    images: rows of tables.IMAGES that are in use. lr: group ids and LR images (3, H, W) RGB in [0, 1], in any order.
    Returns rows of tables.PROMPTS; an image of which the model says nothing gets the empty prompt and status `empty`.
    """
    wanted = images["image_id"].tolist()
    known = set(wanted)
    waiting = ((group, image) for group, image in lr if group in known)
    prompts: dict[str, str] = {}
    batches = iter(lambda: list(islice(waiting, batch)), [])
    for items in stage.progress(batches, -(-len(wanted) // batch), f"batches of {batch} LR images", logger):
        groups, pictures = zip(*items, strict=True)
        prompts.update(zip(groups, describer.describe(pictures), strict=True))
    if absent := [group for group in wanted if group not in prompts]:
        raise UserError(f"LR shard: no image {absent[0]}, which images.parquet holds; delete the shard and run again")
    frame = pd.DataFrame({"group_id": wanted, "prompt": [prompts[group] for group in wanted]})
    frame["status"] = ["ok" if prompt else "empty" for prompt in frame["prompt"]]
    logger.info("%d of %d images have an empty prompt", int((frame["status"] == "empty").sum()), len(frame))
    return frame


def load_describer(job: PromptJob, device: "torch.device") -> Describer:
    """Load the model that describes the images: the tagger, or the captioner."""
    if job.source == "tags" and job.tags is not None:
        from dp2osr.models import ram

        tags = read_lines(job.tags.tag_list, "tag list")
        thresholds = read_thresholds(job.tags, len(tags))
        dape = weights.locate(job.tags.dape) if job.tags.dape else None
        return ram.load(weights.locate(job.tags.ram), dape, tags=tags, thresholds=thresholds, device=device)
    if job.source == "caption" and job.caption is not None:
        from dp2osr.models.caption import Captioner

        folder = weights.locate(job.caption.model)
        return Captioner(folder, question=job.caption.question, max_tokens=job.caption.max_tokens, device=device)
    raise UserError(f"config: source: found '{job.source}', wanted tags or caption, and the section of that name")


def read_lines(path: str, what: str) -> list[str]:
    """Return the lines of a UTF-8 text file without white space around them; none may be empty but the last."""
    try:
        lines = [line.strip() for line in weights.locate(path).read_text(encoding="utf-8").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: not readable ({error})") from None
    if "" in lines:
        raise UserError(f"{what} {path}: line {lines.index('') + 1} is empty, wanted one entry a line")
    return lines


def read_thresholds(settings: TagSettings, count: int) -> list[float]:
    """Return the threshold of each of `count` tags: of the file where there is one, else the same for all."""
    if not settings.thresholds:
        return [settings.threshold] * count
    found = []
    for number, line in enumerate(read_lines(settings.thresholds, "thresholds"), start=1):
        try:
            found.append(float(line))
        except ValueError:
            found.append(-1.0)
        if not 0 <= found[-1] <= 1:
            raise UserError(
                f"thresholds {settings.thresholds}: line {number}: found '{line}', wanted a number in [0, 1]"
            )
    if len(found) != count:
        raise UserError(f"thresholds {settings.thresholds}: found {len(found)}, wanted {count}, one a tag of the list")
    return found

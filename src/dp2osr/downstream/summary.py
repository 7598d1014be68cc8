"""From predictions to a table: the figures of a benchmark for each source, and their differences from the reference.

The interval is a paired bootstrap over photographs: they are drawn with replacement, each figure is that of the
benchmark so drawn, and all sources see the same draws. A source with several seeds has the mean of their figures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from dp2osr import seeds
from dp2osr.downstream import ade, coco, icdar
from dp2osr.errors import UserError

Floats = npt.NDArray[np.float64]
Measure = Callable[[Floats], dict[str, float]]  # figures of a benchmark whose photographs have these weights (I,)


@dataclass(frozen=True)
class Bootstrap:
    """How often photographs are drawn, the share of draws that an interval holds, and the seed."""

    resamples: int
    confidence: float
    seed: int


def measures(kind: str, predictions: pd.DataFrame, annotations: Path) -> list[Measure]:
    """Return a measure for each seed of one source. predictions: its rows of tables.PREDICTIONS that are ok."""
    found: list[Measure] = []
    for _, rows in predictions.groupby("rollout", sort=True):
        names = rows["image_id"].tolist()
        values = [json.loads(text) for text in rows["prediction"]]
        if kind == "detection":
            found.append(coco.AveragePrecision(annotations, names, values))
        elif kind == "segmentation":
            found.append(ade.IntersectionOverUnion(values))
        else:
            found.append(icdar.HarmonicMean(annotations, names, values))
    return found


def check(sources: Mapping[str, pd.DataFrame]) -> pd.Series:
    """Return the status of each photograph, by name; raises UserError where two sources disagree about it."""
    first: pd.Series | None = None
    for name, rows in sources.items():
        found = rows.groupby("image_id")["status"].first().sort_index()
        if first is not None and not found.equals(first):
            other = sorted(set(found.items()) ^ set(first.items()))[0]
            raise UserError(f"predictions of '{name}': photograph '{other[0]}' is not as in the others; run it again")
        first = found
    if first is None or not (first == "ok").any():
        raise UserError("predictions: no photograph that could be used")
    return first


def summarise(
    sources: Mapping[str, pd.DataFrame], *, kind: str, annotations: Path, reference: str, bootstrap: Bootstrap
) -> pd.DataFrame:
    """Compare sources with the reference. sources: rows of tables.PREDICTIONS. Returns rows of tables.DOWNSTREAM."""
    status = check(sources)
    num_images = int((status == "ok").sum())
    used = {name: rows[rows["status"] == "ok"].sort_values(["rollout", "image_id"]) for name, rows in sources.items()}
    known = {name: measures(kind, rows, annotations) for name, rows in used.items()}
    figures = {name: evaluate(each, draw(num_images, bootstrap)) for name, each in known.items()}
    statistics = list(known[reference][0](np.ones(num_images)))
    frames = [
        pd.DataFrame({"source": name, "statistic": statistics, **compare(found, figures[reference], bootstrap)})
        for name, found in figures.items()
    ]
    counts = {"num_images": num_images, "num_rejected": len(status) - num_images}
    table = pd.concat(frames, ignore_index=True).assign(higher_better=True, **counts)
    return table.astype(dict.fromkeys([*counts, "num_seeds"], "int32"))


@dataclass(frozen=True)
class Figures:
    """The figures of a source: of each seed (seeds, S), and of each resample, mean over seeds (B, S)."""

    seeds: Floats
    resampled: Floats


def evaluate(each: Sequence[Measure], drawn: Floats) -> Figures:
    """Return the figures of a source by the measures of its seeds, on all photographs and on those drawn (B, I)."""
    whole = np.ones(drawn.shape[1])
    by_seed = np.array([list(measure(whole).values()) for measure in each])
    resampled = [np.mean([list(measure(weights).values()) for measure in each], axis=0) for weights in drawn]
    return Figures(by_seed, np.array(resampled))


def compare(found: Figures, reference: Figures, bootstrap: Bootstrap) -> dict[str, object]:
    """Return columns of tables.DOWNSTREAM, a row a statistic."""
    value, base = found.seeds.mean(axis=0), reference.seeds.mean(axis=0)
    low, high = interval(found.resampled, bootstrap)
    ci_low, ci_high = interval(found.resampled - reference.resampled, bootstrap)
    return {
        "value": value,
        "value_low": low,
        "value_high": high,
        "seed_std": found.seeds.std(axis=0, ddof=1) if len(found.seeds) > 1 else np.nan,
        "reference": base,
        "difference": value - base,
        "ci_low": ci_low,
        "ci_high": ci_high,
        "num_seeds": len(found.seeds),
    }


def draw(num_images: int, bootstrap: Bootstrap) -> Floats:
    """Return how often each photograph is drawn in each resample (B, I)."""
    rng = np.random.default_rng(seeds.derive(bootstrap.seed, "downstream"))
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=bootstrap.resamples).astype(float)


def interval(values: Floats, bootstrap: Bootstrap) -> tuple[Floats, Floats]:
    """Return the ends of the interval of each column of (B, S); NaN where no resample has a figure."""
    tail = (1 - bootstrap.confidence) / 2
    ends = np.full((2, values.shape[1]), np.nan)
    some = np.isfinite(values).any(axis=0)
    ends[:, some] = np.nanquantile(values[:, some], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]

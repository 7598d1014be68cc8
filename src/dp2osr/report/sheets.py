"""Contact sheets: which candidates are shown, and the sheet as one image file."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

SMALL = 128  # pixels: images under this are enlarged, and embedded without loss
_LINE = 18  # pixels of one caption line on the sheet
_GAP = 6
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # the one that figures have
_EMPTY = "#e8eaed"  # in the place of an image that does not exist
_COLOURS = {"source": "#555b63", "reference": "#b5690b", "policy": "#1f6fb2"}

Candidates = Mapping[tuple[str, int], bytes]  # (group_id, rollout) -> encoded image


@dataclass(frozen=True)
class Pick:
    """One candidate to show: whose, what it is, its rollout and its reward on the reference's scale."""

    side: str  # "reference" or "policy"
    role: str
    rollout: int
    reward: float


@dataclass(frozen=True)
class Tile:
    """An image with its caption; `side` is source, reference or policy."""

    side: str
    title: str
    caption: str
    image: Image.Image

    @property
    def data_uri(self) -> str:
        """The image inside the page: PNG where small, else high-quality WebP to keep the page light."""
        small = max(self.image.size) < SMALL
        buffer = io.BytesIO()
        self.image.save(buffer, **({"format": "PNG"} if small else {"format": "WEBP", "quality": 90}))
        return f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Block:
    """One LR image: three rows of four tiles (a source image, then worst, median, best)."""

    group_id: str
    source: str
    rows: list[list[Tile]]


def choose_groups(reference: pd.DataFrame, policy: pd.DataFrame, photos: Mapping[str, str], num: int) -> list[str]:
    """Choose groups evenly over the ranking by gain in mean reward, from the largest loss to the largest gain.

    The nearest group of a photograph that is not yet shown is preferred. Columns group_id, reward in both tables.
    """
    gain = (policy.groupby("group_id")["reward"].mean() - reference.groupby("group_id")["reward"].mean()).dropna()
    order = gain.sort_values(kind="stable").index.to_list()
    chosen: list[str] = []
    for target in np.linspace(0, len(order) - 1, min(num, len(order))):
        shown = {photos[group] for group in chosen}
        left = [at for at, group in enumerate(order) if group not in chosen]
        fresh = [at for at in left if photos[order[at]] not in shown]
        chosen.append(order[min(fresh or left, key=lambda at: abs(at - target))])
    return sorted(chosen, key=order.index)


def _ranked(rows: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Return the worst, median and best row by reward; ties go to the smaller rollout."""
    rows = rows[np.isfinite(rows["reward"])].sort_values(["reward", "rollout"], kind="stable")
    if rows.empty:
        return []
    return [("worst", rows.iloc[0]), ("median", rows.iloc[len(rows) // 2]), ("best", rows.iloc[-1])]


def pick(reference: pd.DataFrame, policy: pd.DataFrame) -> list[list[Pick]]:
    """Return three rows of candidates of one group: reference, policy with the same seeds, policy's own.

    Columns rollout, reward (the reference's scale) in both tables; each row is worst, median, best.
    """
    chosen = _ranked(reference)
    rewards = policy.set_index("rollout")["reward"]
    return [
        [Pick("reference", role, int(row["rollout"]), float(row["reward"])) for role, row in chosen],
        [
            Pick("policy", "same seed", int(row["rollout"]), float(rewards[row["rollout"]]))
            for _, row in chosen
            if row["rollout"] in rewards.index
        ],
        [Pick("policy", role, int(row["rollout"]), float(row["reward"])) for role, row in _ranked(policy)],
    ]


def read_samples(paths: Iterable[Path], groups: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """Return group_id -> fields lr.png and, where there is HR, hr.png of the LR shards, for these groups alone."""
    from dp2osr import shards

    return {key: fields for path in paths for key, fields in shards.read_shard(path) if key in set(groups)}


def read_candidates(paths: Iterable[Path], wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], bytes]:
    """Return the encoded images of the wanted (group_id, rollout) from candidate shards."""
    from dp2osr import shards

    names = {f"{group}-r{rollout:04d}": (group, rollout) for group, rollout in wanted}
    found = {}
    for path in paths:
        for key, fields in shards.read_shard(path):
            if key in names:
                found[names[key]] = fields.get("png") or fields["webp"]
    return found


def _open(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
        return image.convert("RGB")


def block(
    group_id: str,
    source: str,
    picks: Sequence[Sequence[Pick]],
    *,
    sample: Mapping[str, bytes],
    reference: Candidates,
    policy: Candidates,
) -> Block:
    """Build the tiles of one group from its sample (fields lr.png, hr.png if any) and the picked candidates."""
    lr, hr = _open(sample["lr.png"]), _open(sample["hr.png"]) if "hr.png" in sample else None
    shown = next((data for side in (reference, policy) for (group, _), data in side.items() if group == group_id), None)
    size = hr.size if hr else _open(shown).size if shown else lr.size
    original = Tile("source", "HR", "the original", hr) if hr else None
    sources = (
        Tile("source", "LR", f"{lr.width}×{lr.height} px, nearest", lr.resize(size, Image.Resampling.NEAREST)),
        Tile("source", "LR, bicubic", "what the model sees", lr.resize(size, Image.Resampling.BICUBIC)),
        original or Tile("source", "no HR", "there is no original", Image.new("RGB", size, _EMPTY)),
    )
    rows = []
    for first, line in zip(sources, picks, strict=True):
        tiles = [first]
        for found in line:
            data = (reference if found.side == "reference" else policy).get((group_id, found.rollout))
            if data is not None:
                caption = f"{found.reward:.3f} · seed {found.rollout}"
                tiles.append(Tile(found.side, f"{found.side}, {found.role}", caption, _open(data)))
        rows.append(tiles)
    return Block(group_id, source, rows)


def sheet(blocks: Sequence[Block], *, zoom: int, columns: int = 2) -> bytes:
    """Return all blocks on one white PNG; images under 128 px are enlarged `zoom` times without smoothing."""
    side = max((max(tile.image.size) for found in blocks for row in found.rows for tile in row), default=1)
    side *= zoom if side < SMALL else 1
    cell = (side + _GAP, side + 2 * _LINE + _GAP)
    width, height = 4 * cell[0] + 3 * _GAP, 3 * cell[1] + 3 * _GAP
    columns = max(min(columns, len(blocks)), 1)
    paper = Image.new("RGB", (columns * width + _GAP, -(-len(blocks) // columns) * height + _GAP), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.truetype(_FONT, 12)
    for at, found in enumerate(blocks):
        left, top = at % columns * width + 2 * _GAP, at // columns * height + 2 * _GAP
        for y, row in enumerate(found.rows):
            for x, tile in enumerate(row):
                corner = (left + x * cell[0], top + y * cell[1])
                scale = side / max(tile.image.size)
                fitted = tile.image.resize(
                    (round(tile.image.width * scale), round(tile.image.height * scale)), Image.Resampling.NEAREST
                )
                paper.paste(fitted, corner)
                pen.text((corner[0], corner[1] + side + 1), tile.title, fill=_COLOURS[tile.side], font=font)
                pen.text((corner[0], corner[1] + side + _LINE - 2), tile.caption, fill="#30343a", font=font)
    buffer = io.BytesIO()
    paper.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()

"""The field's test sets: what each is, how its folder looks, and the settings under which it is a data set here.

None of them lies in this repository. Facts are from the sources named; `unsure` says what could not be confirmed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from dp2osr.errors import UserError

SHARD = 100  # images; as limits.images_per_shard in config/config.yaml
STABLESR = "crops: S-Lab License 1.0 (noncommercial), as their home states; "


@dataclass(frozen=True)
class Layout:
    """Folders below the one that is checked: of the images (HR, or LR where there is no HR), and of given LR files."""

    images: str
    lr: str = ""


@dataclass(frozen=True)
class TestSet:
    """A test set. source: where LR images come from (config: lr.source). num_images: None where it is not known.

    layouts: tried in this order; the last is the plainest, which config/testsets.yaml has. size: (width, height) of an
    HR file, or of an LR file where there is no HR; None where sizes vary. published: its name among the published
    figures, empty where it is not sure that these are of the same images.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    name: str
    source: Literal["degraded", "given", "alone"]
    what: str
    paper: str
    home: str
    licence: str
    layouts: tuple[Layout, ...]
    num_images: int | None
    size: tuple[int, int] | None
    evaluated: str
    unsure: str = ""
    published: str = ""

    @property
    def crop(self) -> str:
        """Return the crop of its settings: whole LR images where there is no HR, else the centre."""
        return "full" if self.source == "alone" else "center"


_PAIRED = "×4, LR 128 px to HR 512 px, all crops; PSNR and SSIM are often taken on luma, here psnr is on RGB"
_LONE = "×4, whole images, no-reference metrics alone"

TESTSETS = {
    entry.name: entry
    for entry in (
        TestSet(
            name="RealSR",
            source="given",
            what="pairs of two cameras (Canon, Nikon) at two focal lengths; centre crops that StableSR published",
            paper="Cai et al., ICCV 2019, arXiv:1904.00523; crops: Wang et al., arXiv:2305.07015",
            home="github.com/csjcai/RealSR (version 3); crops: github.com/IceClear/StableSR (test sets)",
            licence=f"{STABLESR}RealSR itself: not stated",
            layouts=(Layout("RealSRVal_crop128/test_HR", "RealSRVal_crop128/test_LR"), Layout("test_HR", "test_LR")),
            num_images=100,
            size=(512, 512),
            evaluated=_PAIRED,
            unsure="the endings of file names in the two folders",
            published="RealSR",
        ),
        TestSet(
            name="DRealSR",
            source="given",
            what="pairs of five cameras at several focal lengths; centre crops that StableSR published",
            paper="Wei et al., ECCV 2020, arXiv:2008.01928; crops: Wang et al., arXiv:2305.07015",
            home="github.com/xiezw5/Component-Divide-and-Conquer-for-Real-World-Image-Super-Resolution; "
            "crops: github.com/IceClear/StableSR (test sets)",
            licence=f"{STABLESR}DRealSR itself: not stated",
            layouts=(Layout("DrealSRVal_crop128/test_HR", "DrealSRVal_crop128/test_LR"), Layout("test_HR", "test_LR")),
            num_images=93,
            size=(512, 512),
            evaluated=_PAIRED,
            unsure="the endings of file names in the two folders",
        ),
        TestSet(
            name="DIV2K-pairs",
            source="given",
            what="crops of DIV2K's validation images, degraded as in StableSR's training",
            paper="Agustsson and Timofte, CVPRW 2017, doi:10.1109/CVPRW.2017.150; pairs: Wang et al., arXiv:2305.07015",
            home="data.vision.ee.ethz.ch/cvl/DIV2K; pairs: github.com/IceClear/StableSR (test sets)",
            licence="pairs: S-Lab License 1.0 (noncommercial), as their home states; DIV2K: academic research only",
            layouts=(
                Layout("DIV2K_V2_val/gt", "DIV2K_V2_val/lq"),
                Layout("DIV2K_V2_val/test_HR", "DIV2K_V2_val/test_LR"),
                Layout("gt", "lq"),
            ),
            num_images=3000,
            size=(512, 512),
            evaluated=_PAIRED,
            unsure="which of the layouts the published archive has; others name both",
        ),
        TestSet(
            name="DIV2K-val",
            source="degraded",
            what="DIV2K's validation images, centre crops, degraded here",
            paper="Agustsson and Timofte, CVPRW 2017, doi:10.1109/CVPRW.2017.150",
            home="data.vision.ee.ethz.ch/cvl/DIV2K",
            licence="academic research only",
            layouts=(Layout("DIV2K_valid_HR"), Layout("")),
            num_images=100,
            size=None,
            evaluated="×4 on crops or whole images, by a degradation that differs from paper to paper",
            unsure="which crops and degradation the published figure (LPIPS) is of",
        ),
        TestSet(
            name="LSDIR-val",
            source="degraded",
            what="LSDIR's validation images, centre crops, degraded here",
            paper="Li et al., CVPRW 2023, doi:10.1109/CVPRW59228.2023.00178",
            home="ofsoundof.github.io/lsdir-data",
            licence="not stated here; its home asks for agreement to its terms before download",
            layouts=(Layout("HR/val"), Layout("LSDIR-val"), Layout("")),
            num_images=250,
            size=None,
            evaluated="×4 on centre crops of 512 px, by a degradation that differs from paper to paper",
            unsure="which crops and degradation the published figure (PSNR) is of",
        ),
        TestSet(
            name="Syn-Test",
            source="degraded",
            what="the synthetic test set of DP2O-SR: HR crops with ResShift's first-order degradation",
            paper="Wu et al., NeurIPS 2025, arXiv:2510.18851",
            home="github.com/cswry/DP2O-SR",
            licence="not stated",
            layouts=(Layout("HR"), Layout("gt"), Layout("")),
            num_images=None,
            size=None,
            evaluated="×4, HR 512 px, the three FR and six NR metrics of the reward and five others",
            unsure="whether it was published, and its images, number and random degradations: figures of other crops "
            "or draws are comparable in kind only",
        ),
        TestSet(
            name="RealLQ250",
            source="alone",
            what="low-quality photographs from several sources",
            paper="Ai et al. (DreamClear), NeurIPS 2024, arXiv:2410.18666",
            home="github.com/shallowdream204/DreamClear",
            licence="not stated",
            layouts=(Layout("RealLQ250/lq"), Layout("lq"), Layout("")),
            num_images=250,
            size=(256, 256),
            evaluated=_LONE,
        ),
        TestSet(
            name="RealSet65",
            source="alone",
            what="low-resolution images of common data sets and from the internet",
            paper="Yue et al. (ResShift), NeurIPS 2023, arXiv:2307.12348",
            home="github.com/zsyOAOA/ResShift (testdata/RealSet65)",
            licence="its repository: S-Lab License 1.0 (noncommercial); the images: not stated",
            layouts=(Layout("testdata/RealSet65"), Layout("RealSet65"), Layout("")),
            num_images=65,
            size=None,
            evaluated=_LONE,
        ),
        TestSet(
            name="old-films",
            source="alone",
            what="frames of old films: any folder of frames",
            paper="e.g. Wan et al., CVPR 2022, arXiv:2203.17276",
            home="github.com/raywzy/Bringing-Old-Films-Back-to-Life",
            licence="that of the films",
            layouts=(Layout("frames"), Layout("")),
            num_images=None,
            size=None,
            evaluated="×4, whole frames, NIQE",
            unsure="which frames the published figure (NIQE) is of",
        ),
    )
}
TESTED = tuple(name for name in TESTSETS if name != "DIV2K-pairs")  # 3,000 images: for who asks for them


def find(name: str) -> TestSet:
    """Return an entry of the catalogue; raises UserError that names all."""
    if name not in TESTSETS:
        raise UserError(f"test set '{name}': unknown, wanted one of {', '.join(TESTSETS)}")
    return TESTSETS[name]


def find_layout(entry: TestSet, folder: Path) -> Layout:
    """Return the first layout whose folders are there; raises UserError that names what is wanted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for layout in entry.layouts:
        if (folder / layout.images).is_dir() and (folder / layout.lr).is_dir():
            return layout
    wanted = " or ".join(" and ".join(filter(None, (each.images, each.lr))) for each in entry.layouts)
    raise UserError(f"{folder}: no folder of {entry.name} in it, wanted {wanted} below it")


def settings(entry: TestSet, folder: Path, layout: Layout) -> dict[str, Any]:
    """Return the data set's settings for the config, as far as they differ from what is usual at 512 px."""
    lr: dict[str, Any] = {"source": entry.source}
    if layout.lr:
        lr["images"] = [(folder / layout.lr).as_posix()]
    return {
        "split": "test",
        "images": [(folder / layout.images).as_posix()],
        "lr": lr,
        "hr_size": 512,
        "crop": entry.crop,
        "crops_per_image": 1,
        "downscale": 1,
        "min_std": 0.0,
        "num_shards": math.ceil((entry.num_images or 1) / SHARD),
    }


def overlay(places: dict[str, tuple[Path, Layout]], *, tests: tuple[str, ...]) -> dict[str, Any]:
    """Return a config overlay that names the test sets in `places` and has the runs test on `tests`.

    Our names are those of the catalogue; the published ones are set beside them where there are figures.
    """
    known = {name: find(name).published for name in places if find(name).published}
    found: dict[str, Any] = {
        "datasets": {name: settings(find(name), folder, layout) for name, (folder, layout) in places.items()},
        "run_defaults": {"tests": list(tests)},
    }
    return found | ({"report": {"published": {"datasets": known}}} if known else {})


def as_yaml(found: dict[str, Any]) -> str:
    """Return an overlay as text."""
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def differences(entry: TestSet, table: pd.DataFrame) -> Iterator[str]:
    """Yield a line for all that is wrong or other than the catalogue says in a folder that was ingested.

    table: rows of tables.IMAGES, made by the settings of `settings`.
    """
    bad = table[~table["status"].isin(["ok", "partner"]) & ~table["reason"].str.startswith("no image suffix")]
    for row in bad.to_dict("records"):
        yield f"{row['source']}: {row['reason']}"
    used = table[table["status"] == "ok"].drop_duplicates("photo_id")
    if entry.num_images is not None and len(used) != entry.num_images:
        yield f"{len(used)} images can be used, wanted {entry.num_images}"
    if entry.size is not None:
        width, height = entry.size
        kind = "LR" if entry.source == "alone" else "HR"
        for row in used[(used["width"] != width) | (used["height"] != height)].to_dict("records"):
            yield f"{row['source']}: {kind} is {row['width']}x{row['height']}, wanted {width}x{height}"


def listing() -> str:
    """Return the catalogue as a table of plain text."""
    rows = [("name", "LR images", "images", "size", "what")]
    for entry in TESTSETS.values():
        size = "varies" if entry.size is None else f"{entry.size[0]}x{entry.size[1]}"
        count = "?" if entry.num_images is None else str(entry.num_images)
        rows.append((entry.name, entry.source, count, size, entry.what))
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    return "\n".join(lines)


def details(entry: TestSet) -> str:
    """Return all that the catalogue says of a test set."""
    layouts = (", ".join(filter(None, (each.images or "the folder itself", each.lr))) for each in entry.layouts)
    size = "varies" if entry.size is None else f"{entry.size[0]}x{entry.size[1]} px"
    facts = {
        "what": entry.what,
        "paper": entry.paper,
        "home": entry.home,
        "licence": entry.licence,
        "LR images": {"degraded": "made here", "given": "given, paired by name", "alone": "alone, no HR"}[entry.source],
        "images": "not known" if entry.num_images is None else str(entry.num_images),
        "size of a file": f"{size} ({'LR' if entry.source == 'alone' else 'HR'})",
        "folders": " | ".join(layouts),
        "evaluated": entry.evaluated,
        "unsure": entry.unsure or "–",
    }
    return "\n".join([entry.name, *(f"  {name + ':':<16}{text}" for name, text in facts.items())])

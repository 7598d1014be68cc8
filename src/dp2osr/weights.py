"""Weights ahead of time: what a config needs, where it lies in the cache folder, and whether it is intact.

One folder holds everything that libraries would download: `hub/` (huggingface_hub's layout), `torch/hub/` (checkpoints
of torchvision, pyiqa and CLIP) and `manifest.json` with the size and sha256 of each file. `dp2osr fetch-weights` fills
it (fetch.py); a stage that finds DP2OSR_WEIGHTS set takes weights from there alone, and never from the network.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError

from dp2osr.errors import UserError
from dp2osr.metrics import METRICS
from dp2osr.resume import write_bytes
from dp2osr.strict import Strict

if TYPE_CHECKING:
    from dp2osr.config import Config

VARIABLE = "DP2OSR_WEIGHTS"  # the cache folder; set from the config's `weights` by rules/common.smk
CONFIGFILES = "DP2OSR_CONFIGFILES"  # the overlays of the run, for the command that an error names
MANIFEST = "manifest.json"
DEFAULT_REVISION = "main"
_HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?")


@dataclass(frozen=True)
class HubName:
    """`hub:OWNER/NAME[@REVISION][/SUB/PATH]`: a repository of the hub, or a folder or file inside it."""

    repo: str
    revision: str
    inner: str

    @property
    def storage(self) -> str:
        """The repository's folder in huggingface_hub's cache."""
        return "models--" + self.repo.replace("/", "--")


class FileFacts(Strict):
    """What is known of a file of the cache; size in bytes."""

    size: int
    sha256: str


def _below(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("a path leads out of the cache")
    return path


Inside = Annotated[str, AfterValidator(_below)]


class Item(Strict):
    """What one thing that a config names is made of: paths below the cache, and the package that chose them."""

    files: list[Inside]
    made_with: str


class Manifest(Strict):
    """The whole of manifest.json; `items` are keyed by `metric:NAME` or `hub:…`, `files` by path below the cache."""

    format: Literal[1]
    items: dict[str, Item]
    files: dict[Inside, FileFacts]


def parse_hub(text: str) -> HubName:
    """Parse a `hub:` name; raises UserError where it is none or would lead out of its folder."""
    match = _HUB.fullmatch(text)
    parts = PurePosixPath(match[3] or "").parts if match else ()
    if match is None or {"..", "/"} & {*parts, *match[1].split("/"), match[2]}:
        raise UserError(f"model {text}: wanted hub:OWNER/NAME[@REVISION][/PATH/INSIDE]")
    return HubName(match[1], match[2] or DEFAULT_REVISION, "/".join(parts))


def needs(config: "Config") -> list[str]:
    """Return the items that a config needs, sorted: `hub:…` values anywhere, and metrics that have weights."""
    data = config.model_dump()
    data["policies"] = {name: policy for name, policy in data["policies"].items() if not policy["derive"]}
    found = {text for text in _texts(data) if text.startswith("hub:")}
    for text in found:
        parse_hub(text)
    scored = {metric for members in config.iqa.groups.values() for metric in members}
    return sorted(found) + sorted(f"metric:{name}" for name in scored if METRICS[name].needs_weights)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def made_with(item: str) -> str:
    """Return the package and version that say which files an item is made of; empty for what the user names."""
    return f"pyiqa {version('pyiqa')}" if item.startswith("metric:") else ""


def in_use() -> Path | None:
    """Return the cache folder that this process was told to use, or None."""
    folder = os.environ.get(VARIABLE)
    return Path(folder).absolute() if folder else None


def environment(folder: Path, *, offline: bool) -> dict[str, str]:
    """Return the variables by which torch, torchvision, pyiqa, timm, transformers and diffusers use the cache."""
    return {
        "TORCH_HOME": str(folder / "torch"),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }


def use() -> None:
    """Send every library of this process to the cache in use, without network; before any of them is imported."""
    if (folder := in_use()) is not None:
        os.environ.update(environment(folder, offline=True))


def command(folder: Path | None) -> str:
    """Return the command that fetches what is missing."""
    files = os.environ.get(CONFIGFILES) or "CONFIG.yaml"
    return f"dp2osr fetch-weights --configfile {files} --cache {shlex.quote(str(folder)) if folder else 'FOLDER'}"


def remedy(folder: Path | None) -> str:
    """Return the end of each error about missing weights."""
    return f"on a machine with network run: {command(folder)}"


def read_manifest(folder: Path) -> Manifest | None:
    """Return the cache's manifest, or None where there is none; raises UserError where it cannot be read."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"weights {path}: no manifest of this project ({first['msg']}); {remedy(folder)}") from None


def add_item(folder: Path, name: str, files: Iterable[str]) -> None:
    """Write an item and the facts of its files, which stand complete, into the manifest."""
    paths = sorted(files)
    facts = {path: facts_of(folder / path) for path in paths}
    known = read_manifest(folder) or Manifest(format=1, items={}, files={})
    items = {**known.items, name: Item(files=paths, made_with=made_with(name))}
    used = {path for item in items.values() for path in item.files}
    merged = {path: fact for path, fact in {**known.files, **facts}.items() if path in used}
    data = Manifest(format=1, items=items, files=merged).model_dump()
    write_bytes(folder / MANIFEST, json.dumps(data, indent=1, sort_keys=True).encode() + b"\n")


def facts_of(path: Path) -> FileFacts:
    """Return size and sha256 of a file."""
    with path.open("rb") as handle:
        return FileFacts(size=path.stat().st_size, sha256=hashlib.file_digest(handle, "sha256").hexdigest())


def item_problems(manifest: Manifest, items: Iterable[str]) -> Iterator[str]:
    """Yield a line for each item that the manifest lacks, or whose files another version of pyiqa chose."""
    for name in items:
        if name not in manifest.items:
            yield f"{name}: not in the weights cache"
        elif manifest.items[name].made_with != made_with(name):
            yield f"{name}: fetched with {manifest.items[name].made_with}, installed is {made_with(name)}"


def file_problems(folder: Path, manifest: Manifest, paths: Iterable[str], *, sizes_only: bool) -> Iterator[str]:
    """Yield a line for each file that is missing, has another size or, unless `sizes_only`, another content."""
    for path in paths:
        fact, found = manifest.files.get(path), folder / path
        if fact is None or not found.is_file():
            yield f"{path}: missing"
        elif (size := found.stat().st_size) != fact.size:
            yield f"{path}: {size} bytes, wanted {fact.size}"
        elif not sizes_only and facts_of(found) != fact:
            yield f"{path}: content differs from the manifest's sha256"


def check(folder: Path, items: Iterable[str], *, sizes_only: bool) -> list[str]:
    """Return one line a problem: what the config needs is in the manifest, and each file of the manifest is intact."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST}: missing in {folder}"]
    problems = list(item_problems(manifest, items))
    return problems + list(file_problems(folder, manifest, sorted(manifest.files), sizes_only=sizes_only))


def intact(folder: Path, item: str) -> bool:
    """Whether the manifest lists an item as this installation wants it, with files of the right sizes."""
    manifest = read_manifest(folder)
    return manifest is not None and next(_problems(folder, manifest, item), None) is None


def require(item: str) -> None:
    """Raise UserError that names the first missing file of an item and the command, where a cache is in use.

    A cache without manifest was filled by hand: what it lacks shows when it is loaded.
    """
    folder = in_use()
    if folder is None or (manifest := read_manifest(folder)) is None:
        return
    for problem in _problems(folder, manifest, item):
        name = item.removeprefix("metric:")
        what = f"metric '{name}'" if item.startswith("metric:") else f"model {name}"
        raise UserError(f"{what}: {problem.removeprefix(f'{item}: ')} (weights cache {folder}); {remedy(folder)}")


def _problems(folder: Path, manifest: Manifest, item: str) -> Iterator[str]:
    yield from item_problems(manifest, [item])
    yield from file_problems(folder, manifest, manifest.items[item].files, sizes_only=True)


def locate(text: str) -> Path:
    """Return where a model lies: at its path, or as a `hub:` name in the cache."""
    return resolve_hub(text) if text.startswith("hub:") else Path(text)


def hub_cache() -> Path:
    """Return the folder of repositories in huggingface_hub's layout: of the cache in use, else the library's own."""
    if (folder := in_use()) is not None:
        return folder / "hub"
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def resolve_hub(text: str) -> Path:
    """Return where a `hub:` name lies in the cache in use, else in huggingface_hub's own; never touches the network."""
    name, folder, cache = parse_hub(text), in_use(), hub_cache()
    require(text)
    found = snapshot(cache, name)
    if found is None or not (found / name.inner).exists():
        raise UserError(f"model {text}: not found in {cache}; {remedy(folder)}")
    return found / name.inner


def snapshot(cache: Path, name: HubName) -> Path | None:
    """Return the folder of a repository's revision in huggingface_hub's layout, or None."""
    storage = cache / name.storage
    ref = storage / "refs" / name.revision
    commit = ref.read_text().strip() if ref.is_file() else name.revision
    if not re.fullmatch(r"[\w.-]+", commit) or commit in {".", ".."}:
        raise UserError(f"weights {ref}: found '{commit[:50]}', wanted a commit")
    found = storage / "snapshots" / commit
    return found if found.is_dir() else None

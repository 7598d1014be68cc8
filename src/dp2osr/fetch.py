"""`dp2osr fetch-weights`: fill the cache that weights.py describes; the one place that downloads models.

Each item is fetched by a process of its own (`python -m dp2osr.fetch`), whose environment sends all libraries to the
cache before they are imported; it prints the files that the item is made of. Downloads are the libraries' own: each
file is written beside and renamed. The manifest gains an item when its files stand, so a killed fetch is run again, and
brings the files that had not arrived.
"""

import contextlib
import glob
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from dp2osr import stage, weights
from dp2osr.errors import UserError, in_one_line

LOG = logging.getLogger("weights")
# A metric that is one whole repository is fetched without being created: Q-Align takes 16 GB of memory.
REPOSITORIES = {"qalign": "hub:q-future/one-align"}
_SETTINGS = {".json", ".txt", ".model", ".jinja"}
_SAFE = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors")
_TORCH = re.compile(r"(diffusion_)?pytorch_model(-\d{5}-of-\d{5})?\.bin")
IDLE_S = 3600.0  # no download leaves its temporary file untouched for so long
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.pth")  # torch.hub's convention: the start of the sha256


def fetch(items: Iterable[str], cache: Path, *, offline: bool) -> None:
    """Fetch what the manifest does not list as intact; `offline` records what lies there and uses no network.

    Files that differ from the manifest are discarded and fetched again. Raises UserError that names the items that
    failed, after the others.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(cache)
    failed = []
    for item in items:
        if not _damaged(item, cache, discard=not offline):
            LOG.info("%s: stands", item)
            continue
        LOG.info("%s: %s", item, "recording" if offline else "fetching")
        files = _in_child(item, cache, offline=offline)
        if files is None:
            failed.append(item)
            continue
        weights.add_item(cache, item, files)
        LOG.info("%s: %d files, %s", item, len(files), size_text(cache / path for path in files))
    if failed:
        raise UserError(f"weights {cache}: {', '.join(failed)}: not fetched; the rest is kept, run the command again")


def verify(items: Sequence[str], cache: Path, *, sizes_only: bool) -> None:
    """Write one line a problem to standard output and raise UserError, or say that all is intact."""
    problems = weights.check(cache, items, sizes_only=sizes_only)
    for problem in problems:
        sys.stdout.write(problem + "\n")
    if problems:
        raise UserError(f"weights {cache}: {len(problems)} problems; {weights.remedy(cache)}")
    manifest = weights.read_manifest(cache)
    assert manifest is not None
    size = size_text(cache / path for path in manifest.files)
    sys.stdout.write(f"{len(items)} items needed, {len(manifest.files)} files, {size}: intact\n")


def size_text(paths: Iterable[Path]) -> str:
    """Return the size of files in GB or MB."""
    size = sum(path.stat().st_size for path in paths)
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _clear_leftovers(cache: Path) -> None:
    """Remove what killed downloads of the hub's client and of torch left; their names are never used again."""
    for path in [*cache.glob("hub/*/blobs/*.incomplete"), *cache.glob("torch/hub/*/*.partial")]:
        with contextlib.suppress(FileNotFoundError):  # another fetch was faster
            if time.time() - path.stat().st_mtime > IDLE_S:
                path.unlink()


def _damaged(item: str, cache: Path, *, discard: bool) -> bool:
    """Whether an item is not in the manifest as wanted; with `discard`, files of another content are removed."""
    manifest = weights.read_manifest(cache)
    if manifest is None or next(weights.item_problems(manifest, [item]), None):
        return True
    files = manifest.items[item].files
    bad = [path for path in files if next(weights.file_problems(cache, manifest, [path], sizes_only=False), None)]
    for path in bad if discard else []:
        blob = (cache / path).resolve()
        if blob.is_relative_to(cache.resolve()):
            blob.unlink(missing_ok=True)
        (cache / path).unlink(missing_ok=True)
    return bool(bad)


def _in_child(item: str, cache: Path, *, offline: bool) -> list[str] | None:
    """Fetch one item in a process of its own; returns its files, or None where that failed, with the reason logged."""
    command = [sys.executable, "-m", "dp2osr.fetch", item, "--cache", str(cache)]
    environment = os.environ | weights.environment(cache, offline=offline)
    environment.pop(weights.VARIABLE, None)
    done = subprocess.run(
        command + ["--offline"] * offline, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        LOG.error("%s: failed with exit code %d, see above", item, done.returncode)
        return None
    return list(json.loads(done.stdout))


def obtain(item: str, cache: Path, *, offline: bool) -> list[str]:
    """Bring one item into the cache; returns the paths of its files below the cache."""
    if item.startswith("hub:"):
        return _repository(item, cache, offline=offline)
    name = item.removeprefix("metric:")
    if name in REPOSITORIES:
        return _repository(REPOSITORIES[name], cache, offline=offline)
    return _metric(name, cache, offline=offline)


def choose(names: Iterable[str], inner: str) -> list[str]:
    """Return the files of a repository that from_pretrained reads, below the folder `inner` or that one file.

    Settings, tokenizers and weights under the libraries' standard names: no variants (.fp16), no single-file
    checkpoints, no code. A folder's pytorch_model.bin is taken only where it has no safetensors.
    """
    names = sorted(names)
    if inner in names:
        return [inner]
    paths = [PurePosixPath(name) for name in names if not inner or name.startswith(f"{inner}/")]
    paths = [path for path in paths if "safety_checker" not in path.parts]
    safe = {path for path in paths if _SAFE.fullmatch(path.name)}
    folders = {path.parent for path in safe}
    taken = safe | {path for path in paths if _TORCH.fullmatch(path.name) and path.parent not in folders}
    taken |= {path for path in paths if path.suffix in _SETTINGS}
    return sorted(map(str, taken))


def _repository(text: str, cache: Path, *, offline: bool) -> list[str]:
    """Fetch a `hub:` name; what the cache holds of a repository's branch stays at the commit that it had first."""
    name = weights.parse_hub(text)
    hub = cache / "hub"
    found = weights.snapshot(hub, name)
    if not offline:
        found, chosen = _download(text, name, hub, revision=found.name if found else name.revision)
    elif found is not None:
        present = (path for path in found.rglob("*") if path.is_file())
        chosen = choose((path.relative_to(found).as_posix() for path in present), name.inner)
    if found is None or not chosen:
        raise UserError(f"model {text}: nothing to load in {found or hub}; wanted safetensors in the libraries' layout")
    if absent := [path for path in chosen if not (found / path).is_file()]:
        raise UserError(f"model {text}: {absent[0]} did not arrive")
    ref = hub / name.storage / "refs" / name.revision
    paths = [found / path for path in chosen] + [ref] * ref.is_file()
    return [path.relative_to(cache).as_posix() for path in paths]


def _download(text: str, name: weights.HubName, hub: Path, *, revision: str) -> tuple[Path | None, list[str]]:
    from huggingface_hub import HfApi, snapshot_download

    try:
        chosen = choose(HfApi().list_repo_files(name.repo, revision=revision), name.inner)
        if chosen:
            wanted = [glob.escape(path) for path in chosen]
            snapshot_download(name.repo, revision=revision, cache_dir=hub, allow_patterns=wanted)
    except Exception as error:  # of the hub's client, of its HTTP library or of the disk
        raise UserError(f"model {text}: not downloaded ({in_one_line(error)})") from error
    return weights.snapshot(hub, name), chosen


def _metric(name: str, cache: Path, *, offline: bool) -> list[str]:
    """Let pyiqa create a metric, and return what it opened in the cache: all files that it needs."""
    import torch

    from dp2osr.iqa import pretrained

    opened = watch()
    try:
        pretrained.load(name, torch.device("cpu"), folder=cache, offline=offline)
    except Exception as error:  # pyiqa's metrics load through five libraries, each with errors of its own
        broken = [] if offline else _discard_broken(cache, recorded(cache, opened))
        again = f"; removed {', '.join(broken)}, whose sha256 is not the one in its name" if broken else ""
        raise UserError(f"metric '{name}': cannot be created ({in_one_line(error)}){again}") from error
    files = recorded(cache, opened)
    if not files:
        raise UserError(f"metric '{name}': pyiqa took no file from {cache}, wanted its weights there")
    return files


def watch() -> set[str]:
    """Return a set that from now on gains the path of each file that Python opens in this process."""
    opened: set[str] = set()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            opened.add(os.fsdecode(arguments[0]))

    sys.addaudithook(note)
    return opened


def recorded(cache: Path, opened: Iterable[str]) -> list[str]:
    """Return the files below `torch/` that were opened and still exist, and all of each hub repository that was used.

    safetensors opens its files out of Python's sight, but huggingface_hub reads the repository's ref before.
    """
    inside = [path.relative_to(cache) for path in map(Path, map(os.path.abspath, opened)) if path.is_relative_to(cache)]
    files = {path for path in inside if path.parts[:1] == ("torch",) and (cache / path).is_file()}
    storages = {path.parts[1] for path in inside if path.parts[:1] == ("hub",) and len(path.parts) > 2}
    for storage in (cache / "hub" / name for name in storages if name.startswith("models--")):
        refs = [path for path in storage.glob("refs/*") if path.is_file()]
        snapshots = [storage / "snapshots" / ref.read_text().strip() for ref in refs]
        found = [*refs, *(path for folder in snapshots for path in folder.rglob("*") if path.is_file())]
        files |= {path.relative_to(cache) for path in found}
    return sorted(path.as_posix() for path in files)


def _discard_broken(cache: Path, files: Iterable[str]) -> list[str]:
    """Remove files whose content does not fit the hash in their name: torch.hub does not notice half a download."""
    broken = []
    for path in files:
        match = _HASH_IN_NAME.search(path)
        if match and not weights.facts_of(cache / path).sha256.startswith(match[1]):
            (cache / path).unlink()
            broken.append(path)
    return broken


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch one item and print its files; `dp2osr fetch-weights` calls this for each."""
    parser = stage.parser(__doc__)
    parser.add_argument("item", help="metric:NAME or hub:OWNER/NAME[@REVISION][/PATH]")
    parser.add_argument("--cache", type=Path, required=True, help="cache folder; the environment points there, too")
    parser.add_argument("--offline", action="store_true", help="use no network: record what lies in the cache")
    args = stage.parse_args(parser, argv)
    sys.stdout.write(json.dumps(obtain(args.item, args.cache, offline=args.offline)))


if __name__ == "__main__":
    stage.run(main)

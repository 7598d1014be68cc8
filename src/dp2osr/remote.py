"""What lies elsewhere: addresses of S3 or HTTP in a data set's `images` or a policy's `control`, and their copies.

A copy lies in `fetched/`, beside images.parquet or at the top of the results, under a name that follows from its
address. Tables name the address, so that no result depends on where a copy is. No network here: Snakemake's storage
plugins fetch (rules/ingest.smk).
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dp2osr.errors import UserError

if TYPE_CHECKING:
    from dp2osr.config import Config

PLUGINS = {"s3": "s3", "http": "http", "https": "http"}  # by scheme: snakemake-storage-plugin-NAME
FOLDER = "fetched"
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Keys of paths that nothing fetches; `control` is one of them unless it is the address of one file.
LOCAL = frozenset({"annotations", "autoencoder", "backbone", "control", "dape", "images", "lr", "model", "output"})
LOCAL |= {"ram", "results", "table", "tag_list", "thresholds", "weights"}


def is_remote(entry: str) -> bool:
    """Say whether a config entry, or the source of a row of tables.IMAGES, is an address."""
    scheme, mark, _ = entry.partition("://")
    return bool(mark) and scheme in PLUGINS


def plugin(address: str) -> str:
    """Return the name of the storage plugin that fetches an address."""
    return PLUGINS[address.partition("://")[0]]


def expand(entry: str) -> list[str]:
    """Expand WebDataset's ranges: "s3://b/x-{08..10}.tar" gives x-08, x-09 and x-10; any other address itself."""
    found = RANGE.search(entry)
    if not found:
        return [entry]
    first, last = int(found[1]), int(found[2])
    if first > last:
        raise UserError(f"images: {entry}: found an empty range, wanted {{first..last}}")
    numbers = [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
    return [address for number in numbers for address in expand(entry.replace(found[0], number, 1))]


def addresses(entries: list[str]) -> list[str]:
    """Return the addresses of all files that the entries of a data set name; local entries give none."""
    return [address for entry in entries if is_remote(entry) for address in expand(entry)]


def copy_name(address: str) -> str:
    """Return the name of an address's copy: a hash of the address, and its last part with its suffix."""
    last = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(address).path).name, flags=re.ASCII)
    return f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{last}"


def local(source: str, copies: Path | None) -> Path:
    """Return the file that a local path or an address stands for; raises UserError where there can be no copy."""
    if not is_remote(source):
        return Path(source)
    if copies is None:
        raise UserError(f"images: {source}: an address; the workflow fetches it, wanted a file")
    return copies / copy_name(source)


def is_branch(control: str) -> bool:
    """Say whether a policy's `control` is an address from which the workflow fetches: that of one file."""
    return is_remote(control) and urlsplit(control).path.endswith(".safetensors")


def branches(config: "Config") -> list[str]:
    """Return the addresses of the policies' control branches, each once."""
    return list(dict.fromkeys(policy.control for policy in config.policies.values() if is_branch(policy.control)))


def check(config: "Config") -> None:
    """Check all addresses that are fetched, and that what fetches them is installed; raises UserError with the key."""
    for name, dataset in config.datasets.items():
        for entry in filter(is_remote, [*dataset.images, *dataset.lr.images]):
            _check_address(f"config: datasets.{name}.images", entry)
    for name, policy in config.policies.items():
        if is_branch(policy.control):
            key = f"config: policies.{name}.control"
            _check_address(key, policy.control)
            if RANGE.search(policy.control):
                raise UserError(f"{key}: found '{policy.control}', wanted the address of one file")


def _check_address(key: str, entry: str) -> None:
    parts = urlsplit(entry)
    if parts.query or parts.fragment or "@" in parts.netloc or "::" in entry:
        raise UserError(
            f"{key}: found '{entry}', wanted an address without credentials, query or '::', since tables record"
            " it (docs/storage.md: credentials come from the environment)"
        )
    if not parts.netloc or entry.endswith("/") or re.search(r"[*{}]", expand(entry)[0]):
        raise UserError(f"{key}: found '{entry}', wanted the address of one file, or of many as {{0000..0299}}")
    module = f"snakemake_storage_plugin_{plugin(entry)}"
    if find_spec(module) is None:
        raise UserError(
            f"{key}: '{entry}' wants {module.replace('_', '-')}, which is not installed; pip install 'dp2o-sr[storage]'"
        )


def check_local(config: "Config") -> None:
    """Refuse addresses where a path on disk is wanted, before they are taken for a path; raises UserError."""
    for key, value in _texts(config.model_dump()):
        name = key.rpartition(".")[2]
        if is_remote(value) and name in LOCAL and not (name == "control" and is_branch(value)):
            copy = f"aws s3 sync {value} FOLDER" if value.startswith("s3:") else "by any means"
            raise UserError(
                f"config: {key}: found '{value}', wanted a path on disk. The workflow fetches images, and control "
                f"branches of one .safetensors file; copy the rest before ({copy}; docs/storage.md)"
            )


def _texts(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and value of each text of nested settings; lists are none."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value

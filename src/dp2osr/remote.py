"""Images that lie elsewhere: addresses of S3 or HTTP in a data set's `images`, and the copies that the workflow makes.

A copy lies in `fetched/` beside images.parquet, under a name that follows from its address. Tables name the address,
so that no result depends on where a copy is. No network here: Snakemake's storage plugins fetch (rules/ingest.smk).
"""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dp2osr.errors import UserError

if TYPE_CHECKING:
    from dp2osr.config import Config

PLUGINS = {"s3": "s3", "http": "http", "https": "http"}  # by scheme: snakemake-storage-plugin-NAME
FOLDER = "fetched"
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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


def check(config: "Config") -> None:
    """Check the addresses of all data sets, and that what fetches them is installed; raises UserError with the key."""
    for name, dataset in config.datasets.items():
        key = f"config: datasets.{name}.images"
        for entry in filter(is_remote, [*dataset.images, *dataset.lr.images]):
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
                    f"{key}: '{entry}' wants {module.replace('_', '-')}, which is not installed;"
                    " pip install 'dp2o-sr[storage]'"
                )

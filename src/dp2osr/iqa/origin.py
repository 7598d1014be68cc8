"""Where a metric's numbers come from: the package and its version, our own version, the weights by name and sha256.

A score table carries one line a metric in its schema's metadata; rewards, scales and evaluations carry on what their
score tables say (tables.write). The names of the weights are those of the metric table; where they lie is asked of the
libraries that load them.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from dp2osr import versions, weights
from dp2osr.config_metrics import Vqr1Settings
from dp2osr.metrics import METRICS

_TORCH = ("pyiqa", "checkpoints", "clip")  # folders of torch.hub's that pyiqa, torchvision, timm and CLIP load from


def origins(names: Sequence[str], *, niqe: Path | None, vqr1: Vqr1Settings | None) -> dict[str, str]:
    """Return one line for each metric, whose weights have been loaded: `pyiqa 0.1.16, score 1; FILE sha256:…, …`."""
    found = {}
    for name in names:
        package = "transformers" if METRICS[name].own else "pyiqa"
        line = f"{package} {version(package)}, score {versions.SCORE}"
        files = [f"{path.name} sha256:{sha256(path)}" for path in sorted(_files(name, niqe, vqr1))]
        found[name] = "; ".join(filter(None, [line, ", ".join(files)]))
    return found


def sha256(path: Path) -> str:
    """Return the sha256 of a file: as the manifest of the cache in use has it, else by reading the file."""
    folder = weights.in_use()
    manifest = weights.read_manifest(folder) if folder else None
    if folder and manifest and path.absolute().is_relative_to(folder):
        fact = manifest.files.get(path.absolute().relative_to(folder).as_posix())
        if fact is not None:
            return fact.sha256
    return weights.facts_of(path).sha256


def _files(name: str, niqe: Path | None, vqr1: Vqr1Settings | None) -> Iterator[Path]:
    """Yield the files of a metric's weights; a file that lies at none of the known places is passed over."""
    if name == "niqe" and niqe is not None:
        yield niqe
    if name == "vqr1" and vqr1 is not None:
        yield from weights.locate(vqr1.model).glob("*.safetensors")
    for file in METRICS[name].weights:
        yield from _repository(file) if file.startswith("hub:") else _by_name(file)


def _repository(text: str) -> list[Path]:
    """Return the weights of a repository that pyiqa chose, which the cache's manifest files under the metric."""
    folder = weights.snapshot(weights.hub_cache(), weights.parse_hub(text))
    if folder is None:
        return []
    return [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]


def _by_name(file: str) -> list[Path]:
    """Return where a file lies that is loaded by URL; A-FINE's CLIP lies in the home folder where no cache is used."""
    hub = Path(torch.hub.get_dir())
    places = [hub / folder / file for folder in _TORCH] + [Path.home() / ".cache" / "clip" / file]
    return [path for path in places if path.is_file()][:1]

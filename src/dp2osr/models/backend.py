"""What the pipeline asks of a model. Nothing outside `models/` knows which backend it holds.

A backend owns the frozen parts (backbone, VAE, text encoder); control branches are passed in, so that reference
and policy share everything else, in memory too.
"""

import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

import dp2osr
from dp2osr.config import PolicySettings, SamplingSettings
from dp2osr.errors import UserError
from dp2osr.resume import fingerprint, write_bytes
from dp2osr.weights import resolve_hub

if TYPE_CHECKING:
    from dp2osr.models.parts import Autoencoder

Embeddings = dict[str, torch.Tensor]
PARTS = frozenset({"backbone", "vae", "text"})


class Backend(Protocol):
    """A generative model with a control branch. Images are (B, 3, H, W) float RGB in [0, 1]."""

    device: torch.device
    sharded: bool
    """Whether the backbone is shared out over processes, which then all run it equally often (models/sharding.py)."""
    backbone: nn.Module
    """The frozen UNet or transformer."""
    backbone_folder: str
    """Name of its folder in the model's."""
    autoencoder: "Autoencoder"
    latent_factor: int
    """Pixels per latent cell along each side."""
    control_factor: int
    """Pixels per cell of the prepared control: 1 where it is an image."""
    size_multiple: int
    """Images are padded to a multiple of this many pixels."""
    native_size: int
    """Side in pixels of the images that the model was trained on: the tile of larger images."""

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return scaled latents (B, C, h, w): the mode of the VAE's posterior."""

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) float32, clamped to [0, 1]."""

    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Return text embeddings; the first dimension of each tensor counts prompts."""

    def prepare_control(self, images: torch.Tensor) -> torch.Tensor:
        """Return the control branch's input for upsampled LR images (B, 3, H, W)."""

    def load_control(self, path: str | Path) -> nn.Module:
        """Load a control branch from a diffusers folder or a bare safetensors state dict."""

    def save_control(self, branch: nn.Module, folder: Path) -> None:
        """Write a control branch as a diffusers folder."""

    def sample(
        self,
        branch: nn.Module,
        control: torch.Tensor,
        embeddings: Embeddings,
        negative: Embeddings,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        *,
        tile: int = 0,
        overlap: int = 0,
    ) -> torch.Tensor:
        """Return latents (B, C, h, w) denoised from the noise of `seeds`, one generator a candidate.

        `tile` > 0 predicts in overlapping windows of that many latent cells and blends the predictions.
        """

    def checkpoint_gradients(self, branch: nn.Module) -> None:
        """Recompute activations of branch and backbone in the backward pass instead of keeping them."""

    def draw_timesteps(self, count: int, generator: torch.Generator, density: str = "uniform") -> torch.Tensor:
        """Return `count` training timesteps; density is uniform or logit_normal."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_t of x_0 and noise."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the model is trained to predict at x_t."""

    def shared(self) -> AbstractContextManager[None]:
        """Within it `predict` is called for the same images, timesteps and embeddings, and several control branches.

        What no branch has a say in is then computed once, by the first call. It holds no graph.
        """

    def predict(
        self,
        branch: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
    ) -> torch.Tensor:
        """Return the prediction (B, C, h, w) of the backbone under control of `branch`."""


def logit_normal(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return (count,) numbers in (0, 1), the sigmoid of standard normal ones (Esser et al. 2024, section 3.1)."""
    return torch.randn(count, generator=generator).sigmoid()


def load_backend(
    policy: PolicySettings, *, device: torch.device, parts: frozenset[str] = PARTS, sharded: bool = False
) -> Backend:
    """Load the frozen parts of a policy's model; `parts` names what is needed: backbone, vae, text.

    sharded: the processes of a training, which torch.distributed knows by then, share the backbone out.
    """
    _import_diffusers()
    if policy.backend == "flux":
        from dp2osr.models.flux import FlowBackend

        return FlowBackend(policy, device=device, parts=parts, sharded=sharded)
    from dp2osr.models.sd import DiffusionBackend

    return DiffusionBackend(policy, device=device, parts=parts, sharded=sharded)


def _import_diffusers() -> None:
    """Import diffusers for the first time as if bitsandbytes were not installed.

    Else it would import that, and with it torch's compiler, when a job starts: seconds for what only models need that
    bitsandbytes has quantized, and none is read here.
    """
    if "diffusers" in sys.modules or "bitsandbytes" in sys.modules:
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("diffusers")
    finally:
        del sys.modules["bitsandbytes"]


def resolve(path: str | Path) -> Path:
    """Return the path of a model: `builtin:` in the package, `hub:` in the cache. UserError where it is missing."""
    text = str(path)
    if text.startswith("hub:"):
        return resolve_hub(text)
    builtin = text.startswith("builtin:")
    found = Path(dp2osr.__file__).parent / "assets" / text.removeprefix("builtin:") if builtin else Path(text)
    if not found.exists():
        raise UserError(f"model {text}: not found; wanted a folder in diffusers' layout or a .safetensors file")
    return found


def weights_hash(*paths: Path) -> str:
    """Return 16 hex digits that change with the weights and settings of models, not with notes that lie beside them."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    kinds = {".json", ".safetensors", ".txt"}
    return fingerprint(*(file for file in files if file.suffix in kinds and file.name != "policy.json"))


def write_embeddings(
    path: Path | str, groups: Sequence[str], prompts: Sequence[str], embed: Embeddings, negative: Embeddings
) -> None:
    """Write the embeddings of distinct texts and which group uses which.

    prompts: one a group; embed: tensors whose first dimension counts the distinct prompts in sorted order;
    negative: the same tensors of the negative prompt, first dimension 1.
    """
    distinct = sorted(set(prompts))
    tensors = {f"prompt.{name}": tensor.contiguous().cpu() for name, tensor in embed.items()}
    tensors |= {f"negative.{name}": tensor.contiguous().cpu() for name, tensor in negative.items()}
    lines = {"groups": list(groups), "index": [distinct.index(prompt) for prompt in prompts], "prompts": distinct}
    write_bytes(path, save(tensors, metadata={"table": json.dumps(lines)}))


def read_embeddings(path: Path | str) -> tuple[dict[str, Embeddings], Embeddings]:
    """Return (embeddings of each group without batch dimension, those of the negative prompt likewise)."""
    handle, table = _open_embeddings(path)
    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    embed = {name.removeprefix("prompt."): t for name, t in tensors.items() if name.startswith("prompt.")}
    negative = {name.removeprefix("negative."): t[0] for name, t in tensors.items() if name.startswith("negative.")}
    pairs = zip(table["groups"], table["index"], strict=True)
    return {group: {name: t[index] for name, t in embed.items()} for group, index in pairs}, negative


class StoredEmbeddings(Mapping[str, Embeddings]):
    """The embeddings of the groups of several files, each read when it is asked for: those of FLUX fill no memory."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._places: dict[str, tuple[safe_open, int]] = {}
        for path in paths:
            handle, table = _open_embeddings(path)
            self._places |= {
                group: (handle, index) for group, index in zip(table["groups"], table["index"], strict=True)
            }

    def __getitem__(self, group: str) -> Embeddings:
        """Return the embeddings of a group, without batch dimension."""
        handle, index = self._places[group]
        names = [name for name in handle.keys() if name.startswith("prompt.")]  # noqa: SIM118
        return {name.removeprefix("prompt."): handle.get_slice(name)[index] for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _open_embeddings(path: Path | str) -> tuple[safe_open, dict[str, list[Any]]]:
    """Return the open file and its table of groups; raises UserError where it cannot be read."""
    try:
        handle = safe_open(str(path), framework="pt")
        return handle, json.loads((handle.metadata() or {})["table"])
    except FileNotFoundError:
        raise UserError(f"embeddings {path}: not found") from None
    except Exception as error:
        raise UserError(f"embeddings {path}: no readable safetensors file ({error})") from None


def stack(items: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> Embeddings:
    """Stack embeddings of single prompts to a batch on `device`."""
    return {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}

"""Stand-ins of the weights of pyiqa's metrics, in the files, names and shapes of the true ones (see stand_ins.py)."""

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stand_ins
from dp2osr import weights

TIMM = {
    "maniqa": "vit_base_patch8_224",
    "nima": "inception_resnet_v2",
    "topiq_fr": "resnet50",
    "topiq_nr": "resnet50",
}
SCALARS = {"logit_scale": 4.6, "yita4": 20.0}
CLIP = {"clipiqa+": "RN50", "afine_fr": "ViT-B/32", "afine_nr": "ViT-B/32"}
# Width, depth, heads of OpenAI's text encoders, vocabulary and context; vision as in the published checkpoints.
CLIP_SHAPES = {
    "RN50": {"embed_dim": 1024, "vision_layers": (3, 4, 6, 3), "vision_width": 64, "vision_patch_size": None},
    "ViT-B/32": {"embed_dim": 512, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 32},
}
CLIP_TEXT = {
    "image_resolution": 224,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
}


def add(cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write what pyiqa's metric `name` needs into a weights cache; CLIP's published hash becomes the stand-in's."""
    torch_home = cache / "torch"
    if name == "lpips":
        stand_ins.add_alexnet(torch_home)
        stand_ins.lpips_state(torch_home / "hub" / "pyiqa" / stand_ins.lpips_name())
        return
    if name in TIMM:
        add_timm(cache / "hub", TIMM[name])
    if name in CLIP:
        add_clip(torch_home / "hub" / "clip", CLIP[name], monkeypatch)
    if name == "topiq_iaa":
        add_swin(torch_home / "hub" / "checkpoints")
    url, state, key = STATES[name]()
    file = torch_home / "hub" / "pyiqa" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    filled = fill(state)
    torch.save({key: filled} if key else filled, file)


def fill(state: Any, name: str = "") -> Any:
    """Put stand-ins in the place of the tensors of a nested dict."""
    if isinstance(state, dict):
        return {key: fill(value, key) for key, value in state.items()}
    return stand_ins.stand_in(name, tuple(state.shape), state.dtype)


def add_timm(hub: Path, architecture: str) -> None:
    """Write timm's backbone as a hub repository of zeros; pyiqa's own checkpoint overwrites them."""
    import timm

    with meta():
        backbone = timm.create_model(architecture, pretrained=False)
    cfg = backbone.pretrained_cfg
    repo = cfg["hf_hub_id"] if not cfg["hf_hub_id"].endswith("/") else f"{cfg['hf_hub_id']}{architecture}.{cfg['tag']}"
    storage = hub / ("models--" + repo.replace("/", "--"))
    if storage.exists():
        return
    stand_ins.save_hole(storage / "snapshots" / stand_ins.COMMIT / "model.safetensors", backbone.state_dict())
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(stand_ins.COMMIT)


def add_clip(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write OpenAI's CLIP as a state dict under its published name."""
    from pyiqa.archs import afineclip_model, clip_model

    module, kind = (clip_model, "CLIP") if name == "RN50" else (afineclip_model, "AFINECLIP")
    path = folder / module._MODELS[name].rpartition("/")[2]
    if not path.exists():
        with meta():
            shapes = getattr(module, kind)(**CLIP_SHAPES[name], **CLIP_TEXT).state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.jit.script(_tree(shapes)).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(module._MODELS, name, f"https://clip.invalid/{digest}/{path.name}")


class _Node(torch.nn.Module):
    """A module of any parameters and children, which a TorchScript archive can hold."""

    def forward(self) -> int:
        return 0


def _tree(shapes: dict[str, Any]) -> torch.nn.Module:
    """Return modules whose state dict has these names and shapes."""
    root = _Node()
    for name, tensor in shapes.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, _Node())
            node = node._modules[part]
        node.register_buffer(last, stand_ins.stand_in(name, tuple(tensor.shape), tensor.dtype))
    return root


def add_swin(folder: Path) -> None:
    """Write the Swin backbone of TOPIQ-IAA, which is fetched by URL."""
    from pyiqa.archs import topiq_swin

    name = "swin_base_patch4_window12_384"
    with meta():
        model = getattr(topiq_swin, name)(pretrained=False)
    url = topiq_swin.default_cfgs[name]["url"]
    stand_ins.save_state(folder / url.rpartition("/")[2], model.state_dict(), key="model")


@contextlib.contextmanager
def meta() -> Iterator[None]:
    """Make modules without numbers or weights; Swin reads its rates of stochastic depth from a tensor."""
    import timm

    create = timm.create_model
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Swin loads its file into them, which does nothing
        patch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
        patch.setattr(timm, "create_model", lambda name, **options: create(name, **{**options, "pretrained": False}))
        yield


def _network(kind: Any, **options: Any) -> Any:
    with meta():
        return kind(**options).state_dict()


def topiq(name: str) -> tuple[str, Any, str]:
    from pyiqa.archs.topiq_arch import CFANet, default_model_urls
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    options = {k: v for k, v in DEFAULT_CONFIGS[name]["metric_opts"].items() if k != "type"}
    state = _network(CFANet, **options, pretrained=False, backbone_pretrain=False)
    return default_model_urls[options["model_name"]], state, "params"


def maniqa() -> tuple[str, Any, str]:
    from pyiqa.archs.maniqa_arch import MANIQA, default_model_urls

    return default_model_urls["koniq"], _network(MANIQA, pretrained=False, scale=0.8), ""


def musiq() -> tuple[str, Any, str]:
    from pyiqa.archs.musiq_arch import MUSIQ, default_model_urls

    return default_model_urls["koniq10k"], _network(MUSIQ, pretrained=False), ""


def nima() -> tuple[str, Any, str]:
    from pyiqa.archs.nima_arch import NIMA, default_model_urls

    return (
        default_model_urls["inception_resnet_v2-ava"],
        _network(NIMA, base_model_name="inception_resnet_v2", pretrained=False),
        "params",
    )


def clipiqa() -> tuple[str, Any, str]:
    from pyiqa.archs.clipiqa_arch import default_model_urls

    return default_model_urls["clipiqa+"], torch.empty(2, 16, 512), ""


def afine() -> tuple[str, Any, str]:
    from pyiqa.archs import afine_arch, afineclip_model

    parts = {
        "finetuned_clip": _network(afineclip_model.AFINECLIP, **CLIP_SHAPES["ViT-B/32"], **CLIP_TEXT),
        "natural": _network(afine_arch.AFINEQhead),
        "fidelity": _network(afine_arch.AFINEDhead),
        "fidelity_scale": _network(afine_arch.AFINENLM_FR_Fit_with_limit),
        "natural_scale": _network(afine_arch.AFINENLM_NR_Fit),
        "adapter": _network(afine_arch.AFINELearnLambda),
    }
    return afine_arch.default_model_urls["afine"], parts, ""


STATES: dict[str, Callable[[], tuple[str, Any, str]]] = {
    "topiq_fr": lambda: topiq("topiq_fr"),
    "topiq_nr": lambda: topiq("topiq_nr"),
    "topiq_iaa": lambda: topiq("topiq_iaa"),
    "maniqa": maniqa,
    "musiq": musiq,
    "nima": nima,
    "clipiqa+": clipiqa,
    "afine_fr": afine,
    "afine_nr": afine,
}


def use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process's libraries to a cache, as weights.use does before they are imported."""
    from huggingface_hub import constants
    from pyiqa.utils import download_util

    monkeypatch.setenv(weights.VARIABLE, str(cache))
    for name, value in weights.environment(cache, offline=True).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(cache / "torch" / "hub" / "pyiqa"))


def names_in(cache: Path) -> set[str]:
    """Return what a cache holds, as metrics.METRICS names it."""
    files = {path.name for path in (cache / "torch" / "hub").rglob("*") if path.is_file()}
    storages = [path.name.removeprefix("models--") for path in cache.glob("hub/models--*")]
    return files | {f"hub:{name.replace('--', '/')}" for name in storages}


@torch.no_grad()
def randomise(metric: Any) -> None:
    """Give a loaded metric random weights of which no two rows are alike; norms let everything through."""
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(5))
    kept = getattr(metric.net, "clip_model", [])
    for network in [metric.net, *(kept if isinstance(kept, list) else [])]:
        for name, value in network.named_parameters():
            if value.ndim > 1:
                count, width = value.numel(), value[0].numel()
                value.copy_(noise.repeat(-(-count // len(noise)))[:count].view_as(value) * width**-0.5)
            elif name.endswith("weight"):
                value.fill_(1.0)
            elif value.ndim == 0:  # CLIP's temperature and A-FINE's logistic curves, about as published
                value.fill_(next((number for end, number in SCALARS.items() if name.endswith(end)), 1.0))


def shorten(network: Any, name: str) -> None:
    """Leave out two thirds of the layers of the largest networks, once they are loaded: for the sake of time."""
    if name == "maniqa":
        network.test_sample = 1  # crops; 20 by default
        for number, block in enumerate(network.vit.blocks):
            if number not in range(6, 10):  # those whose outputs are taken
                block.forward = torch.nn.Identity()
    if name == "topiq_iaa":
        stage = network.semantic_model.layers[2]
        stage.blocks = stage.blocks[:2]


def calibration_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return pyiqa's five distorted images and their references, (5, 3, 384, 512) each, from its wheel."""
    spec = find_spec("pyiqa")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]).parent / "ResultsCalibra"
    names = ("I03", "I04", "I06", "I08", "I19")
    sides = []
    for side in ("dist_dir", "ref_dir"):
        arrays = [np.array(Image.open(folder / side / f"{name}.bmp").convert("RGB")) for name in names]
        sides.append(torch.stack([torch.from_numpy(array).permute(2, 0, 1).float().div(255) for array in arrays]))
    return sides[0], sides[1]

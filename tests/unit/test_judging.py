"""The table of metrics' networks against pyiqa's own on `meta`, RAM's memory, and what a plan makes of both."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from dp2osr.iqa.metric import Scorer
from dp2osr.metrics import METRICS
from dp2osr.models import judging
from dp2osr.models.footprint import META, parameters
from dp2osr.models.judging import COSTS
from dp2osr.models.ledger import forward_bytes, weights
from dp2osr.models.memory import total

TEXT = {"context_length": 77, "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8}
CLIP: dict[str, Any] = {**TEXT, "transformer_layers": 12, "image_resolution": 224}  # of both that metrics take
RESNET = {"embed_dim": 1024, "vision_layers": (3, 4, 6, 3), "vision_width": 64, "vision_patch_size": None}
VIT_B_32 = {"embed_dim": 512, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 32}


@contextmanager
def without_weights() -> Iterator[None]:
    """Let pyiqa's classes build networks on `meta` and load nothing."""
    from pyiqa.archs import clip_model, clipiqa_arch
    from pyiqa.archs.q_align import modeling_mplug_owl2 as owl

    make = timm.create_model
    with (
        META,
        mock.patch.object(torch, "linspace", partial(torch.linspace, device="cpu")),  # whose values are read
        mock.patch.object(
            timm, "create_model", lambda *names, **options: make(*names, **options | {"pretrained": False})
        ),
        mock.patch.object(WeightsEnum, "get_state_dict", lambda *_, **__: torchvision.models.alexnet().state_dict()),
        mock.patch.object(clipiqa_arch, "load", lambda *_: clip_model.CLIP(**CLIP, **RESNET)),
        mock.patch.object(owl, "LlamaTokenizer", mock.MagicMock()),
        mock.patch.object(owl, "CLIPImageProcessor", mock.MagicMock()),
    ):
        yield


def arch(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"pyiqa.archs.{module}"), name)


def build(name: str) -> nn.Module:
    """Return the network of a metric on `meta`, as pyiqa's default settings of it say."""
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    options = {key: value for key, value in DEFAULT_CONFIGS[name]["metric_opts"].items() if key != "type"}
    with without_weights():
        if name.startswith("afine"):
            heads = [arch("afine_arch", kind)() for kind in ("AFINEQhead", "AFINEDhead")]
            return nn.ModuleList([arch("afineclip_model", "AFINECLIP")(**CLIP, **VIT_B_32), *heads])
        if name == "qalign":
            settings = arch("q_align.configuration_mplug_owl2", "MPLUGOwl2Config")()
            return arch("q_align.modeling_mplug_owl2", "MPLUGOwl2LlamaForCausalLM")(settings)
        kinds = {"lpips": "LPIPS", "maniqa": "MANIQA", "musiq": "MUSIQ", "clipiqa+": "CLIPIQA", "nima": "NIMA"}
        kind = kinds.get(name, "CFANet")
        more = {"backbone_pretrain": False} if kind == "CFANet" else {}
        module = "topiq_arch" if kind == "CFANet" else f"{kind.lower()}_arch"
        return arch(module, kind)(**options | {"pretrained": False} | more).to(META)


def parts(network: Any) -> list[nn.Module]:
    """Return a network and the CLIP that CLIP-IQA hides in a list."""
    return [network, *(network.clip_model if isinstance(getattr(network, "clip_model", None), list) else [])]


@pytest.mark.parametrize("name", [name for name, cost in COSTS.items() if cost.parameters])
def test_parameters_are_those_of_pyiqas_networks(name: str) -> None:
    found = sum(map(parameters, parts(build(name))))
    assert found == pytest.approx(COSTS[name].parameters, rel=1e-4)  # A-FINE has four scales beside its heads


@pytest.mark.parametrize("name", ["lpips", "topiq_fr", "topiq_nr", "clipiqa+", "nima"])
def test_working_memory_is_that_of_pyiqas_networks(name: str) -> None:
    network: Any = build(name).eval()
    for size in (96, 512):
        images = [torch.empty(1, 3, size, size, device=META) for _ in range(2 if METRICS[name].kind == "fr" else 1)]
        counted = forward_bytes(lambda given=images: network(*given), known=[*weights(*parts(network)), *images])
        found = COSTS[name].fixed + COSTS[name].per_pixel * size**2
        assert counted <= found and (size == 96 or found < 1.2 * counted)


@pytest.mark.parametrize("size", [96, 512])
def test_as_many_images_at_once_as_the_scorer_takes(size: int) -> None:
    scorer: Any = SimpleNamespace(device=torch.device("cuda"), batch_size=16, _models={}, _limits={})
    for name in METRICS:
        assert judging.at_once(name, batch=16, size=size) == Scorer.micro_batch(scorer, name, size, size)


def test_a_group_of_metrics_by_hand() -> None:
    needs = judging.score(["qalign", "psnr", "lpips"], batch=16, size=512)
    held = {need.what: need.bytes for need in needs if need.lasting}
    assert held == {
        "qalign, float16": 2 * COSTS["qalign"].parameters,
        "lpips, float32": 4 * COSTS["lpips"].parameters,
    }
    (most,) = [need for need in needs if not need.lasting]
    assert most.what == "lpips of 16 images" and most.bytes == 16 * 512 * 512 * COSTS["lpips"].per_pixel
    assert total(needs) == sum(held.values()) + most.bytes
    assert [need.lasting for need in judging.score(["psnr", "ssim"], batch=16, size=512)] == [False]
    guarded = judging.guard(["qalign", "lpips"], batch=16, size=512)
    assert guarded[0].bytes == sum(held.values()) and guarded[0].what == "metrics, for the guard"
    assert [need.what for need in judging.guard(["psnr"], batch=2, size=96)] == ["the guard's psnr of 2 images"]


def test_ram_is_swin_l_with_its_tags() -> None:
    weights_of_ram, work = judging.describe()
    swin_l = 195_198_516  # of 384 px, without its classifier of 1,000 classes
    assert swin_l < weights_of_ram.bytes / 4 < 1.1 * swin_l
    assert work.what == "tagging, 8 images" and not work.lasting and work.bytes > 4 * 8 * 3 * 384 * 384

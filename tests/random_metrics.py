"""pyiqa's trained metrics with random weights: true networks, no file and no download."""

from typing import Any

import torch

from dp2osr.iqa.pretrained import replaced

CPU = torch.device("cpu")
NAMES = ("lpips", "topiq_fr", "afine_fr", "afine_nr", "topiq_nr", "musiq")


def create(name: str, device: torch.device = CPU) -> Any:
    """Return pyiqa's metric `name` with random weights, the same at each call."""
    import pyiqa

    with torch.random.fork_rng():
        torch.manual_seed(7)
        if name == "lpips":
            return _lpips(device)
        if name.startswith("afine"):
            return _afine(name, device)
        options = {"backbone_pretrain": False} if name.startswith("topiq") else {}
        return pyiqa.create_metric(name, device=device, pretrained=False, **options)


def _lpips(device: torch.device) -> Any:
    import pyiqa
    from torchvision import models

    plain = models.alexnet
    with replaced(models, "alexnet", lambda **_: plain(weights=None)):
        metric = pyiqa.create_metric("lpips", device=device, pretrained=False)
    for layer in metric.net.lins:
        layer.model[-1].weight.data.abs_()  # as LPIPS's own
    return metric


def _afine(name: str, device: torch.device) -> Any:
    """Return A-FINE on CLIP's ViT-B/32 with a small text part, its loaders given the parts that it makes itself."""
    import pyiqa
    from pyiqa.archs import afine_arch
    from pyiqa.archs.afineclip_model import AFINECLIP

    clip = AFINECLIP(512, 224, 12, 768, 32, context_length=8, vocab_size=8, **_text(64))
    parts = {
        "finetuned_clip": clip,
        "natural": afine_arch.AFINEQhead(),
        "fidelity": afine_arch.AFINEDhead(),
        "fidelity_scale": afine_arch.AFINENLM_FR_Fit_with_limit(yita3=0.5, yita4=0.15),
        "natural_scale": afine_arch.AFINENLM_NR_Fit(),
        "adapter": afine_arch.AFINELearnLambda(),
    }
    states = {key: part.state_dict() for key, part in parts.items()}
    with replaced(afine_arch, "load", lambda *_, **__: (clip, None)), replaced(torch, "load", lambda *_, **__: states):
        return pyiqa.create_metric(name, device=device, pretrained_model_path="random")


def _text(width: int) -> dict[str, int]:
    return {"transformer_width": width, "transformer_heads": 1, "transformer_layers": 1}

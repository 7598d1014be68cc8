"""Equal neighbours in a batch: computed once, with the values and gradients of computing each."""

import copy
from pathlib import Path

import torch
from diffusers import ControlNetModel

from dp2osr.models.backend import load_backend
from dp2osr.models.sd import SharedConditioning
from dp2osr.repeats import once_an_image
from training_rig import policy_settings


def test_repeated_images_are_computed_once() -> None:
    seen = []

    def double(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return images * 2

    values = torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0]).reshape(5, 1, 1, 1)
    assert torch.equal(once_an_image(double)(values), values * 2)
    assert torch.equal(once_an_image(lambda images: [double(images)])(values)[0], values * 2)
    assert seen == [3, 3]


def test_a_control_branch_embeds_a_group_once(tiny_model: Path) -> None:
    backend = load_backend(policy_settings(tiny_model), device=torch.device("cpu"))
    ours, plain = (
        backend.load_control(tiny_model / "controlnet"),
        ControlNetModel.from_pretrained(tiny_model / "controlnet"),
    )
    assert isinstance(ours, ControlNetModel)
    generator = torch.Generator().manual_seed(0)
    control = torch.rand(2, 3, 32, 32, generator=generator).repeat_interleave(3, dim=0)
    seen: list[int] = []
    copied = copy.deepcopy(ours)
    copied.controlnet_cond_embedding.conv_in.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    embedded = [branch.controlnet_cond_embedding(control) for branch in (copied, plain)]
    assert isinstance(copied.controlnet_cond_embedding, SharedConditioning) and seen == [2]
    assert torch.allclose(*embedded, atol=1e-6) and embedded[0].abs().max() > 1e-3
    weights = torch.rand(embedded[0].shape, generator=generator)
    for part in embedded:
        (part * weights).sum().backward()
    gradients = [branch.controlnet_cond_embedding.conv_in.weight.grad for branch in (copied, plain)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    assert list(ours.state_dict()) == list(plain.state_dict())

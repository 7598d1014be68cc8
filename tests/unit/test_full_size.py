"""The published models at their full size, on `meta`: counts, the control branch's state dict, shapes of predictions.

The configurations are the packaged ones (src/dp2osr/assets/architectures), which `dp2osr plan` uses.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxControlNetModel

from dp2osr import config
from dp2osr.config import PolicySettings
from dp2osr.errors import UserError
from dp2osr.models import footprint, memory
from dp2osr.models.footprint import Footprint

ABSENT = "absent/model"


def policy(config_dict: dict[str, Any], **changes: Any) -> PolicySettings:
    settings = config_dict["policy_defaults"] | {"model": ABSENT, "control": ABSENT} | changes
    dtype = "bfloat16" if settings["backend"] == "flux" else "float16"
    settings["sampling"] = settings["sampling"] | {"dtype": dtype, "guidance": 3.5, "steps": 50}
    return PolicySettings(**settings)


@pytest.fixture(scope="module")
def defaults(root: Any) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((root / "config" / "config.yaml").read_text())


@pytest.fixture(scope="module")
def sd2(defaults: dict[str, Any]) -> Footprint:
    return footprint.load(policy(defaults), architecture="sd2-base")


@pytest.fixture(scope="module")
def flux(defaults: dict[str, Any]) -> Footprint:
    return footprint.load(policy(defaults, backend="flux"), architecture="flux-dev")


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_counts_are_as_published(sd2: Footprint, flux: Footprint) -> None:
    assert sd2.sizes() == {
        "backbone": 865_910_724,
        "control branch": 364_228_240,
        "VAE": 83_653_863,
        "text encoders": 340_387_840,
    }
    assert flux.sizes()["backbone"] == 11_901_408_320
    assert flux.sizes()["text encoders"] == 123_060_480 + 4_762_310_656  # CLIP-L and the encoder of T5 v1.1 XXL
    assert flux.sizes()["VAE"] == 83_819_683


def test_nothing_is_held(sd2: Footprint, flux: Footprint) -> None:
    for found in (sd2, flux):
        for module in (found.backbone, found.branch, found.vae, *found.texts):
            assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_control_branch_of_sd2_is_that_of_from_unet(sd2: Footprint) -> None:
    with footprint.META:
        expected = shapes(ControlNetModel.from_unet(sd2.backbone))
    found = shapes(sd2.branch)
    assert found == expected and len(found) == 340
    assert found["controlnet_cond_embedding.conv_in.weight"] == (16, 3, 3, 3)
    assert found["controlnet_down_blocks.11.weight"] == found["controlnet_mid_block.weight"] == (1280, 1280, 1, 1)
    assert not any(name.startswith("up_blocks") for name in found)


def test_control_branch_of_flux_is_that_of_from_transformer(flux: Footprint) -> None:
    with footprint.META:
        branch = FluxControlNetModel.from_transformer(flux.backbone, num_layers=4, num_single_layers=0)
    found = shapes(flux.branch)
    assert found == shapes(branch)
    assert found["controlnet_blocks.3.weight"] == (3072, 3072) and found["controlnet_x_embedder.weight"] == (3072, 64)
    assert {name.split(".")[1] for name in found if name.startswith("transformer_blocks.")} == set("0123")
    assert not any("single" in name for name in found)
    double_block = sum(torch.Size(shape).numel() for name, shape in found.items() if "transformer_blocks.0." in name)
    assert double_block == 339_831_296
    assert flux.sizes()["control branch"] == 1_442_333_696


def test_a_bare_state_dict_says_which_branch_it_is(sd2: Footprint, flux: Footprint) -> None:
    """What the authors publish is one safetensors file; the backends build the branch from its names and shapes."""
    for found, num_bytes in ((sd2, 1_456_912_960), (flux, 5_769_334_784)):
        bare = {name: torch.empty(shape, device="meta") for name, shape in shapes(found.branch).items()}
        assert sum(tensor.nbytes for tensor in bare.values()) == num_bytes
        with footprint.META:
            assert shapes(found.backend._empty_control(bare)) == shapes(found.branch)


def test_predictions_have_the_shape_of_latents(sd2: Footprint, flux: Footprint) -> None:
    for found, channels in ((sd2, 4), (flux, 16)):
        with torch.no_grad():
            half = torch.nn.Module.to(copy.deepcopy(found.branch), dtype=found.dtype)
            predicted = found.backend.predict(half, *found.inputs(2, 512, found.dtype))
        assert predicted.shape == (2, channels, 64, 64) and predicted.dtype == found.dtype


def test_sizes_on_disk(sd2: Footprint, flux: Footprint) -> None:
    assert sd2.embedding_bytes() == 77 * 1024 * 2
    assert flux.embedding_bytes() == (512 * 4096 + 768) * 2
    assert sd2.encoded_bytes(512, 16, lr_bytes=30_000) == 4 * 16 * 4 * 64 * 64 + 30_000
    assert flux.encoded_bytes(512, 8, lr_bytes=30_000) == (4 * 8 + 2) * 16 * 64 * 64


def test_training_of_c_flux_fits_an_80_gb_card(root: Path, flux: Footprint, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of 2N = 8 images at 512 px in bfloat16, activations of branch and backbone recomputed in backward."""
    settings = config.read(root / "config" / "config.yaml", root / "config" / "c-flux.yaml").runs["default"].train
    fixed = {"micro_batch": 8, "ema_decay": 0.0, "optimizer": "adamw", "precision": "bf16"}
    fixed |= {"gradient_checkpointing": True, "guard": settings.guard.model_copy(update={"every": 0})}
    counted: list[tuple[int, int]] = []
    count = memory.step_bytes
    monkeypatch.setattr(
        memory, "step_bytes", lambda *found, **options: counted.append(count(*found, **options)) or counted[0]
    )
    needs = memory.train(flux, settings.model_copy(update=fixed), top=4, size=512)
    lasting = sum(need.bytes for need in needs if need.lasting)
    # policy, reference and gradients of 4 bytes, two moments of 4, a frozen backbone of 2
    assert lasting == (4 + 4 + 4 + 8) * flux.sizes()["control branch"] + 2 * flux.sizes()["backbone"]
    ((kept, most),) = counted
    states = (4 + 19 + 38) * 8 * (1024 + 512) * 3072 * 2  # what each block takes: tokens of image and text, bfloat16
    assert states < kept < 1.1 * states
    assert memory.total(needs) == lasting + most < 60 * 2**30


def test_missing_model_is_named(defaults: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="absent/model: not found here; its sizes need --architecture flux-dev or sd2"):
        footprint.load(policy(defaults))
    with pytest.raises(UserError, match="--architecture sd3: unknown; wanted one of flux-dev, sd2-base"):
        footprint.check_architecture("sd3")

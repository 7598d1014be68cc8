"""The ledger against sums by hand, and the memory of stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp2osr.config import PolicySettings, TrainSettings
from dp2osr.models import footprint, memory
from dp2osr.models.footprint import META, Footprint
from dp2osr.models.ledger import backward_bytes, forward_bytes, weights
from dp2osr.models.memory import Need


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device=META)


def test_forward_counts_what_lives_at_once() -> None:
    net = nn.Sequential(linear(4, 8), linear(8, 16), linear(16, 2))
    x = torch.empty(2, 4, device=META)
    # outputs of 2 x 8, 2 x 16 and 2 x 2 numbers; an input is held until the layer after it is done
    assert forward_bytes(lambda: net(x), known=[*weights(net), x]) == 4 * (2 * 8 + 2 * 16)
    assert forward_bytes(lambda: net(x).view(-1), known=[*weights(net), x]) == 4 * (2 * 8 + 2 * 16)


def test_backward_counts_the_graph() -> None:
    net, x = linear(4, 8), torch.empty(2, 4, device=META)
    net.weight.grad = torch.empty_like(net.weight)
    kept, most = backward_bytes(lambda: net(x), known=[*weights(net), net.weight.grad, x], lower=None)
    assert kept == 4 * 2 * 8 + 4  # the output, for the square's gradient, and the loss
    assert most >= kept + 4 * 2 * 8 + 4 * 4 * 8  # the output's gradient, and the weight's before it is added


def test_mixed_precision_keeps_casts() -> None:
    net, x = linear(4, 8), torch.empty(2, 4, device=META)
    kept, _ = backward_bytes(lambda: net(x), known=[*weights(net), x], lower=torch.bfloat16)
    # input in bfloat16 for the weight's gradient, output in float32 for the square, and the loss; the input wants no
    # gradient, so the weight's cast is dropped
    assert kept in (2 * 2 * 4 + 4 * 2 * 8 + 4, 2 * 2 * 4 + 2 * 4 * 8 + 4 * 2 * 8 + 4)


def test_attention_keeps_no_weights() -> None:
    query = torch.empty(1, 2, 512, 8, device=META, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    kept, most = backward_bytes(lambda: attend(query, query, query), known=[query], lower=None)
    assert kept < most < 4 * 2 * 512 * 512


def test_checkpointing_keeps_inputs_alone() -> None:
    blocks = nn.ModuleList(nn.Sequential(linear(64, 256), nn.GELU(), linear(256, 64)) for _ in range(8))
    x = torch.empty(32, 64, device=META)

    def work(recompute: bool) -> torch.Tensor:
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False) if recompute else block(y)
        return y

    known = [*weights(blocks), x]
    plain, _ = backward_bytes(lambda: work(False), known=known, lower=None)
    kept, _ = backward_bytes(lambda: work(True), known=known, lower=None)
    assert kept == 8 * 4 * 32 * 64 + 4  # each block's output, and the loss
    assert plain >= kept + 8 * 2 * 4 * 32 * 256  # both sides of GELU


@pytest.fixture(scope="module")
def defaults(root: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((root / "config" / "config.yaml").read_text())


@pytest.fixture(scope="module")
def tiny(defaults: dict[str, Any]) -> Footprint:
    return footprint.load(PolicySettings(**defaults["policy_defaults"]))


def tensor_bytes(path: Path) -> int:
    with safe_open(path, framework="pt") as handle:
        return sum(handle.get_tensor(name).nbytes for name in handle.keys())  # noqa: SIM118


def test_weights_of_the_embedded_model_are_those_of_its_files(tiny: Footprint) -> None:
    folder = footprint.find("builtin:tiny-sd")
    assert folder is not None
    files = {part: sum(map(tensor_bytes, (folder / part).glob("*.safetensors"))) for part in ("unet", "vae")}
    files |= {part: sum(map(tensor_bytes, (folder / part).glob("*.safetensors"))) for part in ("controlnet",)}
    held = {need.what: need.bytes for need in memory.rollout(tiny, images=1, size=96) if need.lasting}
    assert held == {
        "backbone, float32": files["unet"],
        "control branch, float32": files["controlnet"],
        "VAE, float32": files["vae"],
    }
    text = sum(map(tensor_bytes, (folder / "text_encoder").glob("*.safetensors")))
    assert memory.embed(tiny)[0].bytes == text


def settings(defaults: dict[str, Any], **changes: Any) -> TrainSettings:
    return TrainSettings(**(defaults["run_defaults"]["train"] | changes))


def test_images_in_one_backward_pass(defaults: dict[str, Any]) -> None:
    def images(top: int, **changes: Any) -> int:
        return memory.graph_images(settings(defaults, **changes), top=top)

    assert images(4, micro_batch=32, groups_per_step=4, accumulation=1) == 32
    assert images(4, micro_batch=32, groups_per_step=4, accumulation=2) == 16
    assert images(4, micro_batch=20, groups_per_step=4) == 16
    assert images(4, micro_batch=6) == 6
    assert images(4, micro_batch=32, batching="pairs", pairs_per_step=8) == 16


def test_training_needs(tiny: Footprint, defaults: dict[str, Any]) -> None:
    count = tiny.sizes()["control branch"]
    needs = memory.train(
        tiny, settings(defaults, guard=defaults["run_defaults"]["train"]["guard"] | {"every": 0}), top=4, size=96
    )
    held = {need.what: need.bytes for need in needs if need.lasting}
    assert held == {
        "backbone, float32": 4 * tiny.sizes()["backbone"],
        "policy, float32": 4 * count,
        "reference, float32": 4 * count,
        "gradients, float32": 4 * count,
        "adamw": 8 * count,
        "moving average, float32": 4 * count,
    }
    assert memory.total([Need("a", 5), Need("b", 2, lasting=False), Need("c", 3, lasting=False)]) == 8


def test_a_sharded_backbone_by_hand(tiny: Footprint, defaults: dict[str, Any]) -> None:
    """A process of two holds half of it, three of the largest blocks, and what lies in no block."""
    off = defaults["run_defaults"]["train"]["guard"] | {"every": 0}

    def held(processes: int, **changes: Any) -> dict[str, int]:
        needs = memory.train(tiny, settings(defaults, guard=off, **changes), top=4, size=96, processes=processes)
        return {need.what: need.bytes for need in needs if need.lasting}

    unet = tiny.backbone
    sizes = [footprint.parameters(block) for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)]
    whole = tiny.sizes()["backbone"]
    found = held(2, sharding="backbone")
    assert found["backbone, float32, a share of 2"] == 2 * whole
    assert found["blocks of it, gathered"] == 4 * (3 * max(sizes) + whole - sum(sizes))
    assert held(1, sharding="backbone") == held(2) == held(1)
    assert held(1)["backbone, float32"] == 4 * whole


def test_checkpointing_and_batch_change_what_is_kept(tiny: Footprint, defaults: dict[str, Any]) -> None:
    plain, _ = memory.step_bytes(tiny, settings(defaults), images=2, size=96)
    double, _ = memory.step_bytes(tiny, settings(defaults), images=4, size=96)
    lean, _ = memory.step_bytes(tiny, settings(defaults, gradient_checkpointing=True), images=2, size=96)
    assert double == pytest.approx(2 * plain, rel=0.05)
    assert lean < plain

"""The step's gradient and the loop around it, on the tiny random model."""

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dp2osr.config import TrainSettings
from dp2osr.errors import UserError
from dp2osr.stopping import StopRequest
from dp2osr.training.batches import Schedule
from dp2osr.training.checkpoint import Store
from dp2osr.training.guard import Measurement
from dp2osr.training.loop import Trainer, learning_rate
from training_rig import make_backend, make_feed, make_pairs, train_settings, write_files


@pytest.fixture(scope="module")
def rig(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    backend = make_backend(tiny_model)
    return make_feed(write_files(tmp_path_factory.mktemp("rig")), backend), tiny_model / "controlnet"


def make_trainer(rig: Any, folder: Path, settings: TrainSettings, **options: Any) -> Trainer:
    feed, control = rig
    base: dict[str, Any] = {
        "accelerator": Accelerator(cpu=True),
        "feed": feed,
        "schedule": Schedule(make_pairs(), settings=settings, seed=3),
        "policy": feed.backend.load_control(control),
        "reference": feed.backend.load_control(control),
        "settings": settings,
        "guard": None,
        "store": Store(folder, "mark", record={}),
        "stop": StopRequest(),
    }
    return Trainer(**base | options)


def nudge(trainer: Trainer) -> None:
    """Move the policy away from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def gradients(rig: Any, folder: Path, **changes: Any) -> tuple[list[torch.Tensor], dict[str, float]]:
    trainer = make_trainer(rig, folder, train_settings(**changes))
    nudge(trainer)
    stats = trainer.gradient.step(trainer.schedule.step(1))
    return [parameter.grad for parameter in trainer.policy.parameters()], {k: v.item() for k, v in stats.items()}


def test_the_first_loss_is_log_2_and_only_the_policy_learns(rig: Any, tmp_path: Path) -> None:
    trainer = make_trainer(rig, tmp_path, train_settings())
    units = trainer.schedule.step(1)
    stats = trainer.gradient.step(units)
    weights = [weight for unit in units for weight in unit.weights]
    assert stats["loss"].item() == pytest.approx(math.log(2) * sum(weights) / len(weights), rel=1e-6)
    assert stats["abs_logit"] == 0
    assert all(parameter.grad is None for parameter in trainer.reference.parameters())
    assert all(parameter.grad is None for parameter in trainer.feed.backend.unet.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in trainer.policy.parameters())


@pytest.mark.parametrize("batching", ["groups", "pairs"])
def test_micro_batches_and_accumulation_leave_the_gradient(rig: Any, tmp_path: Path, batching: str) -> None:
    """Whole step at once, unit by unit, and units cut into two passes (micro_batch 3 of 4 images)."""
    options = {"batching": batching, "beta": 50.0}
    wanted, stats = gradients(rig, tmp_path, micro_batch=32, **options)
    for changes in ({"micro_batch": 4}, {"micro_batch": 3}, {"micro_batch": 1}, {"accumulation": 2}):
        found, others = gradients(rig, tmp_path, **{"micro_batch": 32} | changes | options)
        assert others == pytest.approx(stats, rel=1e-4, abs=1e-6), changes
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("micro_batch", "down", "up"), [(32, 1, 2), (3, 8, 12)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_policy_and_reference_share_is_computed_once_and_changes_no_bit(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, micro_batch: int, down: int, up: int
) -> None:
    """The policy's first pass takes the UNet's way down from the reference's; its second pass computes it again."""
    backend, calls = rig[0].backend, {"down": 0, "up": 0}

    def step() -> tuple[torch.Tensor, Any]:
        trainer = make_trainer(rig, tmp_path, train_settings(beta=50.0, micro_batch=micro_batch))
        nudge(trainer)
        if checkpointing:
            backend.checkpoint_gradients(trainer.policy)
        stats = trainer.gradient.step(trainer.schedule.step(1))
        return torch.cat([parameter.grad.flatten() for parameter in trainer.policy.parameters()]), stats

    def count(name: str) -> Any:
        return lambda module, given: calls.update({name: calls[name] + 1})

    both = {"down": backend.unet.down_blocks[0], "up": backend.unet.up_blocks[-1]}
    hooks = [block.resnets[0].register_forward_pre_hook(count(name)) for name, block in both.items()]
    try:
        shared, stats = step()
        assert calls["down"] == down and (calls["up"] == up or checkpointing)
        monkeypatch.setattr(type(backend), "shared", lambda self: nullcontext())
        apart, others = step()
    finally:
        backend.unet.disable_gradient_checkpointing()
        for hook in hooks:
            hook.remove()
    assert torch.equal(shared, apart) and shared.abs().max() > 0
    assert all(torch.equal(stats[name], others[name]) for name in stats)


def test_gradient_checkpointing_and_bf16_keep_the_direction(rig: Any, tmp_path: Path) -> None:
    def flat(accelerator: Accelerator, *, checkpointing: bool) -> torch.Tensor:
        trainer = make_trainer(rig, tmp_path, train_settings(beta=50.0), accelerator=accelerator)
        nudge(trainer)
        if checkpointing:
            trainer.policy.enable_gradient_checkpointing()
        trainer.gradient.step(trainer.schedule.step(1))
        return torch.cat([parameter.grad.flatten() for parameter in trainer.policy.parameters()])

    wanted = flat(Accelerator(cpu=True), checkpointing=False)
    torch.testing.assert_close(flat(Accelerator(cpu=True), checkpointing=True), wanted, rtol=1e-4, atol=1e-7)
    AcceleratorState._reset_state(True)
    half = flat(Accelerator(cpu=True, mixed_precision="bf16"), checkpointing=False)
    AcceleratorState._reset_state(True)
    assert torch.cosine_similarity(half, wanted, dim=0) > 0.95


def test_the_loss_equals_the_formula_in_plain_diffusers(rig: Any, tmp_path: Path, tiny_model: Path) -> None:
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

    trainer = make_trainer(rig, tmp_path, train_settings(beta=40.0))
    nudge(trainer)
    units = trainer.schedule.step(2)
    stats = trainer.gradient.step(units)
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    reference = ControlNetModel.from_pretrained(tiny_model / "controlnet")
    schedule = DDPMScheduler.from_pretrained(tiny_model / "scheduler")
    losses = []
    for unit in units:
        latents, control = trainer.feed.pack.load(unit.group_id, unit.rollouts)
        generator = torch.Generator().manual_seed(unit.seed)
        t = torch.randint(0, 1000, (1,), generator=generator)
        noise = torch.randn(latents.shape[1:], generator=generator)
        text = trainer.feed.embeddings[unit.group_id]["prompt_embeds"][None]

        def error(branch: torch.nn.Module, place: int, *, shared: Any = (latents, control, t, noise, text)) -> float:
            latents, control, t, noise, text = shared
            alpha = schedule.alphas_cumprod[t].sqrt()
            noisy = alpha * latents[place] + (1 - alpha**2).sqrt() * noise
            down, middle = branch(noisy[None], t, text, control[None], return_dict=False)
            options = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return ((unet(noisy[None], t, text, **options).sample[0] - noise) ** 2).mean().item()

        moved = [error(trainer.policy, place) - error(reference, place) for place in range(len(unit.rollouts))]
        for winner, loser, weight in zip(unit.chosen, unit.rejected, unit.weights, strict=True):
            losses.append(weight * math.log1p(math.exp(20 * (moved[winner] - moved[loser]))))
    assert stats["loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_order_within_a_step_does_not_matter(rig: Any, tmp_path: Path) -> None:
    trainer = make_trainer(rig, tmp_path, train_settings(beta=50.0))
    nudge(trainer)
    units = trainer.schedule.step(1)
    forward, backward = (trainer.gradient.step(order)["loss"].item() for order in (units, units[::-1]))
    assert forward == pytest.approx(backward, rel=1e-5)


@pytest.mark.parametrize("changes", [{"ema_decay": 0.5}, {"batching": "pairs"}])
def test_an_interrupted_training_ends_with_the_same_bytes(rig: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = train_settings(**changes)
    whole = make_trainer(rig, tmp_path / "whole", settings)
    whole.run()
    first = make_trainer(rig, tmp_path / "cut", settings)
    first.gradient = StopAfter(first, 3)  # type: ignore[assignment]
    with pytest.raises(SystemExit) as stopped:
        first.run()
    assert stopped.value.code == 143 and first.store.steps() == [2, 3]
    second = make_trainer(rig, tmp_path / "cut", settings)
    second.run()
    for name, value in whole.final_weights().items():
        assert torch.equal(value, second.final_weights()[name])
    rows = [
        [{k: v for k, v in row.items() if k != "pairs_per_second"} for row in trainer.progress.log]
        for trainer in (whole, second)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_stopped_within_a_validation_keeps_the_policy_and_not_its_average(rig: Any, tmp_path: Path) -> None:
    settings = train_settings(ema_decay=0.5, guard={"every": 3, "patience": 9}, checkpoint_every=100)
    whole = make_trainer(rig, tmp_path / "whole", settings, guard=Ward(*[(0.5, 0.1)] * 3))
    whole.run()
    first = make_trainer(rig, tmp_path / "cut", settings, guard=Ward((0.5, 0.1), (0.5, 0.1)))
    first.guard.stops = first.stop  # type: ignore[union-attr]
    with pytest.raises(SystemExit):
        first.run()
    assert first.store.steps() == [3] and len(first.progress.validation) == 1
    second = make_trainer(rig, tmp_path / "cut", settings, guard=Ward((0.5, 0.1), (0.5, 0.1)))
    second.run()
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, second.policy.state_dict()[name])
    assert whole.progress.validation == second.progress.validation


class StopAfter:
    """Ask for a stop, as SIGTERM does, during one step."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.gradient, self.trainer, self.left = trainer.gradient, trainer, step

    def step(self, units: Any) -> Any:
        self.left -= 1
        self.trainer.stop.requested = self.left == 0
        return self.gradient.step(units)


def test_a_loss_that_is_no_number_stops_before_the_step(rig: Any, tmp_path: Path) -> None:
    trainer = make_trainer(rig, tmp_path, train_settings(checkpoint_every=100))
    step = trainer.gradient.step
    good: dict[str, torch.Tensor] = {}

    class Spoiled:
        def step(self, units: Any) -> Any:
            stats = step(units)
            if trainer.progress.step == 2:
                good.update({name: value.clone() for name, value in trainer.policy.state_dict().items()})
                stats["loss"] = torch.tensor(math.nan)
            return stats

    trainer.gradient = Spoiled()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"step 3: loss nan.*weights of step 2.*Lower train.learning_rate"):
        trainer.run()
    kept = trainer.store.load()
    assert kept is not None and kept.progress.step == 2
    assert all(torch.equal(kept.policy[name], value) for name, value in good.items())


class Ward:
    """A guard that reads its measurements from a list."""

    def __init__(self, *found: tuple[float, float]) -> None:
        self.found = list(found)
        self.stops: StopRequest | None = None  # asked to stop within the second measurement

    def measure(self, branch: Any, *, pause: Any) -> Measurement:
        if self.stops and len(self.found) == 1:
            self.stops.requested = True
        pause()
        reward, diversity = self.found.pop(0)
        return Measurement(reward, reward, reward, diversity)


def test_the_guard_stops_a_collapse_and_keeps_the_best(rig: Any, tmp_path: Path) -> None:
    settings = train_settings(steps=8, guard={"every": 1, "patience": 3})
    ward = Ward((0.5, 0.1), (0.6, 0.1), (0.55, 0.08), (0.9, 0.01))
    trainer = make_trainer(rig, tmp_path, settings, guard=ward)
    progress = trainer.run()
    assert progress.step == 3 and progress.best_step == 1
    assert progress.verdict.startswith("diversity between seeds")
    state = json.loads((trainer.store.path(3) / "state.json").read_text())
    assert [row["best"] for row in state["progress"]["validation"]] == [True, True, False, False]
    best = trainer.final_weights()
    assert any(not torch.equal(best[name], value) for name, value in trainer.policy.state_dict().items())


def test_without_gain_the_policy_is_the_reference(rig: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = train_settings(guard={"every": 2, "patience": 9, "max_reward_drop": 1.0})
    trainer = make_trainer(rig, tmp_path, settings, guard=Ward((0.5, 0.1), (0.4, 0.1), (0.4, 0.1)))
    assert trainer.run().step == 4
    for name, value in trainer.reference.state_dict().items():
        assert torch.equal(trainer.final_weights()[name], value)
    assert "the policy is the reference" in caplog.text


def test_warm_up_is_linear_then_constant() -> None:
    settings = train_settings(learning_rate=1e-2, warmup_steps=4)
    assert [learning_rate(step, settings) for step in (1, 2, 4, 9)] == pytest.approx([0.0025, 0.005, 0.01, 0.01])


def test_8_bit_adam_without_its_package_is_one_error(rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="bitsandbytes"):
        make_trainer(rig, tmp_path, train_settings(optimizer="adamw8bit"))

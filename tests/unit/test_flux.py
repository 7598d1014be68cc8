"""The flow backend: tokens, control weights in each layout, samplers, tiles, half precision."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import CPU, SIZE, controls, policy

from dp2osr import config, upscale
from dp2osr.errors import UserError
from dp2osr.models.backend import load_backend, logit_normal
from dp2osr.models.flux import FlowBackend, pack, unpack

WEIGHTS = "diffusion_pytorch_model.safetensors"
Settings = config.PolicySettings


@pytest.fixture
def settings(tiny_flux: Path) -> Settings:
    scheduler = "FlowMatchEulerDiscreteScheduler"
    return policy(tiny_flux, "flux", steps=2, guidance=2.5, text_tokens=16, scheduler=scheduler)


@pytest.fixture
def backend(settings: Settings) -> FlowBackend:
    found = load_backend(settings, device=CPU)
    assert isinstance(found, FlowBackend)
    return found


def sample(backend: FlowBackend, settings: Settings, images: torch.Tensor, **tiles: int) -> torch.Tensor:
    branch = backend.load_control(settings.control)
    prompt, negative = (backend.embed_prompts([text] * len(images)) for text in ("a cat", ""))
    control = backend.prepare_control(images)
    return backend.sample(branch, control, prompt, negative, range(len(images)), settings.sampling, **tiles)


def test_tokens_are_those_of_diffusers() -> None:
    latents = torch.randn(2, 3, 4, 6)
    theirs = diffusers.FluxControlNetPipeline._pack_latents(latents, 2, 3, 4, 6)
    assert torch.equal(pack(latents), theirs) and theirs.shape == (2, 6, 12)
    assert torch.equal(unpack(theirs, latents.shape), latents)


def test_sizes(backend: FlowBackend, settings: Settings) -> None:
    assert (backend.latent_factor, backend.size_multiple, backend.native_size) == (2, 4, SIZE)
    wide = settings.model_copy(update={"native_size": 0})
    assert load_backend(wide, device=CPU, parts=frozenset()).native_size == 512  # the paper's
    embeddings = backend.embed_prompts(["", "a cat"])
    assert embeddings["prompt_embeds"].shape == (2, 16, 16) and embeddings["pooled"].shape == (2, 16)


def test_flow_of_the_method(backend: FlowBackend) -> None:
    """x_t = (1 - t) x_0 + t ε, target ε - x_0 (method.md, DPO)."""
    latents, noise = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), -1.0)
    t = torch.tensor([0.25, 1.0])
    assert backend.add_noise(latents, noise, t)[:, 0, 0, 0].tolist() == [1.25, -1.0]
    assert backend.target(latents, noise, t).unique().tolist() == [-3.0]


def test_timestep_densities(backend: FlowBackend, tiny_model: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = backend.draw_timesteps(4000, generator)
    assert uniform.min() > 0 and uniform.max() <= 1 and uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    middle = backend.draw_timesteps(4000, generator, "logit_normal")
    assert middle.mean() == pytest.approx(0.5, abs=0.02) and middle.std() == pytest.approx(0.2083, abs=0.01)
    assert torch.equal(
        logit_normal(3, generator.manual_seed(1)), torch.randn(3, generator=generator.manual_seed(1)).sigmoid()
    )
    diffusion = load_backend(policy(tiny_model, "sd"), device=CPU, parts=frozenset())
    steps = diffusion.draw_timesteps(4000, generator, "logit_normal")
    assert steps.dtype == torch.int64 and steps.min() >= 0 and steps.max() < 1000
    assert steps.float().std() == pytest.approx(208.3, abs=10)


def test_shift_depends_on_the_size(backend: FlowBackend) -> None:
    """mu is linear from 0.5 at 256 tokens to 1.15 at 4096; sigma -> e^mu / (e^mu + 1/sigma - 1)."""
    name = "FlowMatchEulerDiscreteScheduler"
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
        sigmas = backend.make_scheduler(name, steps=4, tokens=tokens).sigmas
        shift = torch.tensor(mu).exp()
        wanted = [float(shift / (shift + 1 / sigma - 1)) for sigma in (1.0, 0.75, 0.5, 0.25)]
        assert sigmas.tolist() == pytest.approx([*wanted, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchNoneSuch", "AutoencoderKL"])
def test_wrong_scheduler_is_named(backend: FlowBackend, name: str) -> None:
    with pytest.raises(UserError, match=f"sampling.scheduler: found '{name}', wanted a FlowMatch"):
        backend.make_scheduler(name, steps=2, tokens=64)


def test_guidance_is_an_input(settings: Settings) -> None:
    images = controls(1)
    found = []
    for guidance in (1.0, 2.5):
        strength = settings.sampling.model_copy(update={"guidance": guidance})
        changed = settings.model_copy(update={"sampling": strength})
        found.append(sample(load_backend(changed, device=CPU), changed, images))  # type: ignore[arg-type]
    assert not torch.equal(*found)


def test_true_guidance_is_for_flux_alone(config_dict: dict[str, Any]) -> None:
    config_dict["policy_defaults"]["sampling"]["true_guidance"] = 2.0
    with pytest.raises(UserError, match=r"policies\.base\.sampling\.true_guidance: found 2, wanted 1 for backend sd"):
        config.load(config_dict)


def test_tiles_blend_in_latent_space(backend: FlowBackend, settings: Settings) -> None:
    images = controls(1)
    whole = sample(backend, settings, images)
    assert torch.equal(sample(backend, settings, images, tile=16, overlap=4), whole)  # no larger than a tile
    tiled = sample(backend, settings, images, tile=8, overlap=4)
    assert tiled.shape == whole.shape and tiled.isfinite().all() and not torch.equal(tiled, whole)


@pytest.mark.parametrize(("width", "height"), [(10, 7), (9, 13)])
def test_upscale_any_size(settings: Settings, width: int, height: int) -> None:
    restorer = upscale.load(settings, device=CPU, prompt="a cat", scale=4, tile=24)
    lr = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    restored = restorer.restore(lr, seed=3)
    assert restored.shape == (3, 4 * height, 4 * width) and restored.min() >= 0 and restored.max() <= 1
    assert torch.equal(restored, restorer.restore(lr, seed=3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_networks_beside_a_float32_vae(settings: Settings, dtype: str) -> None:
    half = settings.model_copy(update={"sampling": settings.sampling.model_copy(update={"dtype": dtype})})
    backend = load_backend(half, device=CPU)
    assert backend.backbone.dtype == getattr(torch, dtype)
    assert backend.autoencoder.vae.dtype == torch.float32
    latents = sample(backend, half, controls(2))  # type: ignore[arg-type]
    assert latents.dtype == getattr(torch, dtype)
    whole = sample(load_backend(settings, device=CPU), settings, controls(2))  # type: ignore[arg-type]
    assert (latents.float() - whole).abs().mean() < 0.1 * whole.std()


def bare(model: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """Write the control branch of a model as one state dict; None leaves a weight out."""
    state = {**load_file(model / "controlnet" / WEIGHTS), **changes}
    save_file({name: value for name, value in state.items() if value is not None}, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_control_weights_read_and_written_in_both_layouts(
    name: str, tiny_model: Path, tiny_flux: Path, tmp_path: Path
) -> None:
    """A folder and a bare state dict are the same branch; what is saved loads in diffusers."""
    model = tiny_flux if name == "flux" else tiny_model
    backend = load_backend(policy(model, name), device=CPU, parts=frozenset({"backbone"}))
    one, other = backend.load_control(model / "controlnet"), backend.load_control(bare(model, tmp_path))
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    backend.save_control(other, tmp_path / "saved")
    kind = diffusers.FluxControlNetModel if name == "flux" else diffusers.ControlNetModel
    theirs = kind.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in one.state_dict().items())
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_control_weights_that_do_not_fit_are_named(
    name: str, tiny_model: Path, tiny_flux: Path, tmp_path: Path
) -> None:
    model = tiny_flux if name == "flux" else tiny_model
    backend = load_backend(policy(model, name), device=CPU, parts=frozenset({"backbone"}))
    key = "x_embedder.weight" if name == "flux" else "conv_in.weight"
    wrong: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({key: None}, f"'{key}' is missing of the control branch"),
        ({"extra": torch.zeros(1)}, "'extra' is no part of the control branch"),
        ({key: torch.zeros(2, 2)}, rf"'{key}' has shape \(2, 2\), wanted \("),
    ]
    for changes, message in wrong:
        path = bare(model, tmp_path, **changes)
        with pytest.raises(UserError, match=message):
            backend.load_control(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.safetensors: no readable safetensors file"):
        backend.load_control(path)


def test_missing_parts_are_named(tiny_flux: Path, tmp_path: Path) -> None:
    for part in ("vae", "transformer", "scheduler"):
        (tmp_path / part).symlink_to(tiny_flux / part)
    settings = policy(tmp_path, "flux")
    load_backend(settings, device=CPU, parts=frozenset({"backbone", "vae"}))
    with pytest.raises(UserError, match="tokenizer: cannot be loaded"):
        load_backend(settings, device=CPU)
    (tmp_path / "scheduler").unlink()
    with pytest.raises(UserError, match="scheduler: no readable settings"):
        load_backend(settings, device=CPU, parts=frozenset())


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_gradient_checkpointing_changes_no_gradient(name: str, tiny_model: Path, tiny_flux: Path) -> None:
    model = tiny_flux if name == "flux" else tiny_model
    found = []
    for checkpointing in (False, True):
        backend = load_backend(policy(model, name, text_tokens=16), device=CPU)
        branch = backend.load_control(model / "controlnet")
        if checkpointing:
            backend.checkpoint_gradients(branch)
            assert branch.is_gradient_checkpointing and backend.backbone.is_gradient_checkpointing
        latents = backend.encode_images(controls(2))
        t = backend.draw_timesteps(2, torch.Generator().manual_seed(0))
        control = backend.prepare_control(controls(2))
        backend.predict(branch, latents, t, control, backend.embed_prompts(["", "x"])).square().sum().backward()
        found.append([parameter.grad for parameter in branch.parameters() if parameter.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_truncated_file_names_its_part(part: str, tiny_flux: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux, tmp_path / "model")
    folder = tmp_path / "model" / part
    file = next(folder.glob("*.safetensors"), folder / "tokenizer.json")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{part}: cannot be loaded"):
        load_backend(policy(tmp_path / "model", "flux"), device=CPU)

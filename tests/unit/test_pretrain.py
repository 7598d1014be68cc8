"""Pretraining: the pool, a VAE that starts by carrying colours, interruption in every phase, a given backbone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from dp2osr import config, resume, tables
from dp2osr.config import ArchitectureSettings, DatasetSettings, PolicySettings, PretrainSettings
from dp2osr.errors import UserError
from dp2osr.models import build
from dp2osr.models.backend import load_backend
from dp2osr.stages import ingest
from dp2osr.stages import pretrain as stage
from dp2osr.stopping import StopRequest
from dp2osr.training import pool, pretrain
from training_rig import DEFAULTS, policy_settings

SIZE, STEPS = 32, 3
CPU = torch.device("cpu")
SHAPES = DEFAULTS["pretrain"]["architecture"] | {
    "vae_channels": [8, 8, 16],
    "latent_channels": 4,
    "unet_channels": [16, 16],
    "conditioning_channels": [8, 8, 8],
    "text_width": 8,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def settings(**changes: Any) -> PretrainSettings:
    """Return three phases of three steps on tiny networks, with `changes`; a checkpoint every second step."""
    phases = {
        name: DEFAULTS["pretrain"][name] | {"steps": STEPS, "batch_size": 2, "crop": 16}
        for name in ("vae", "denoiser", "finetune")
    }
    small = {"pool_size": 6, "checkpoint_every": 2, "architecture": SHAPES}
    return PretrainSettings(**{**DEFAULTS["pretrain"], **phases, **small, **changes})


def dataset() -> DatasetSettings:
    """Return the defaults of a dataset at 32 pixels."""
    return DatasetSettings(**DEFAULTS["dataset_defaults"] | {"hr_size": SIZE, "images": ["builtin:skimage/brick"]})


def smooth(count: int, size: int = SIZE) -> torch.Tensor:
    """Return (count, 3, size, size) random images in [0, 1] of slowly changing colours."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def sources() -> list[tuple[np.ndarray, bool]]:
    """Return two photographs, which are bright, and a procedural image, which is dark."""
    arrays = (smooth(3, 48) * 127).byte().permute(0, 2, 3, 1).numpy()
    return [(arrays[0] + 128, True), (arrays[1] + 128, True), (arrays[2] // 4, False)]


@pytest.fixture(scope="module")
def pairs() -> pool.Pool:
    return pool.draw(sources(), dataset(), settings(), seed=0)


def policy(backend: str = "sd") -> PolicySettings:
    """Return the policy that a model is made for; where it lies does not matter."""
    flow = {"backend": backend, "native_size": SIZE}
    sampling = {"scheduler": "FlowMatchEulerDiscreteScheduler", "text_tokens": 8} if backend == "flux" else {}
    return policy_settings(Path("nowhere"), **sampling).model_copy(update=flow)


def trainer_of(pairs: pool.Pool, folder: Path, backend: str = "sd", **changes: Any) -> pretrain.Trainer:
    return pretrain.Trainer(settings(**changes), policy(backend), pairs, folder, seed=0, device=CPU)


def train(pairs: pool.Pool, folder: Path, backend: str = "sd", **changes: Any) -> pretrain.Trainer:
    trainer = trainer_of(pairs, folder, backend, **changes)
    trainer.run()
    return trainer


@pytest.fixture(scope="module", params=["sd", "flux"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(kind: str, pairs: pool.Pool, tmp_path_factory: pytest.TempPathFactory) -> pretrain.Trainer:
    return train(pairs, tmp_path_factory.mktemp("undisturbed"), kind)


@pytest.fixture(scope="module")
def base(undisturbed: pretrain.Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    undisturbed.save(folder)
    return folder


def weights(trainer: pretrain.Trainer) -> dict[str, torch.Tensor]:
    parts = {"vae": trainer.vae, "backbone": trainer.backend.backbone, "control": trainer.control}
    parts["text"] = trainer.backend.text_encoder  # type: ignore[attr-defined]
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def test_pool_is_a_function_of_seed_and_number(pairs: pool.Pool) -> None:
    """A crop does not depend on how many are drawn, and a second drawing gives the same bytes."""
    again = pool.draw(sources(), dataset(), settings(pool_size=4), seed=0)
    assert torch.equal(again.hr, pairs.hr[:4]) and torch.equal(again.lr, pairs.lr[:4])
    assert torch.equal(again.photograph, pairs.photograph[:4])
    other = pool.draw(sources(), dataset(), settings(pool_size=4), seed=1)
    assert not torch.equal(other.hr, again.hr)
    assert pairs.hr.shape == (6, 3, SIZE, SIZE) and pairs.hr.dtype == torch.uint8
    assert pairs.lr.shape == (6, 3, SIZE // 4, SIZE // 4) and pairs.lr.dtype == torch.uint8
    shrunk = functional.avg_pool2d(pairs.hr.float(), 4)
    assert (pairs.lr.float() - shrunk).abs().mean() < 10  # noise and blur, but the same image


@pytest.mark.parametrize(("share", "kinds"), [(0.0, {True}), (1.0, {False}), (0.5, {True, False})])
def test_pool_shares(share: float, kinds: set[bool]) -> None:
    drawn = pool.draw(sources(), dataset(), settings(pool_size=24, procedural_share=share), seed=0)
    assert set(drawn.photograph.tolist()) == kinds
    assert drawn.photograph.float().mean().item() == pytest.approx(1 - share, abs=0.25)
    bright = drawn.hr.amax((1, 2, 3)) > 80  # gamma and gains leave the one kind above, the other below
    assert torch.equal(bright, drawn.photograph)


def test_pool_of_one_kind_alone() -> None:
    for photograph in (True, False):
        only = [source for source in sources() if source[1] is photograph]
        drawn = pool.draw(only, dataset(), settings(pool_size=3, procedural_share=0.5), seed=0)
        assert set(drawn.photograph.tolist()) == {photograph}


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES | {"vae_channels": [6, 6], "latent_channels": 3}])
def test_the_vae_starts_as_carrier_of_colours(shapes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vae = build.vae(ArchitectureSettings(**shapes))
    images = smooth(8) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.mode()).sample
    assert posterior.logvar.mean() < -3
    small = [functional.avg_pool2d(tensor, 4) for tensor in (images, restored)]
    for axis in build.COLOUR_AXES:
        wanted, found = (torch.einsum("c,bchw->bhw", axis, tensor).flatten() for tensor in small)
        assert torch.corrcoef(torch.stack([wanted, found]))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae_channels": [4, 8, 16]}, "vae_channels.0: Input should be greater than or equal to 6, found 4"),
        ({"latent_channels": 2}, "latent_channels: Input should be greater than or equal to 3, found 2"),
        ({"unet_channels": [12, 16]}, "unet_channels.0: Input should be a multiple of 8, found 12"),
        ({"conditioning_channels": [8, 8]}, "conditioning_channels has 2 entries, wanted 3 as vae_channels"),
    ],
)
def test_impossible_widths_are_named(config_dict: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config_dict["pretrain"]["architecture"] |= changes
    with pytest.raises(UserError, match=message) as found:
        config.load(config_dict)
    assert "pretrain" in str(found.value) and "\n" not in str(found.value)


def test_unknown_dataset_is_named(config_dict: dict[str, Any]) -> None:
    config_dict["pretrain"]["dataset"] = "bsae"
    with pytest.raises(UserError, match=r"pretrain\.dataset: found 'bsae'"):
        config.load(config_dict)


def test_parts_load_in_the_backend_and_sample(kind: str, base: Path, undisturbed: pretrain.Trainer) -> None:
    settings = policy(kind).model_copy(update={"model": str(base)})
    backend = load_backend(settings, device=CPU)
    branch = backend.load_control(base / "controlnet")
    assert (backend.latent_factor, backend.native_size) == (4, SIZE)
    for name, found in (("vae", backend.autoencoder.vae), ("backbone", backend.backbone), ("control", branch)):
        for key, value in found.state_dict().items():
            assert torch.equal(value, weights(undisturbed)[f"{name}.{key}"])
    images = smooth(2)
    latents = backend.encode_images(images)
    assert latents.shape == (2, 4, SIZE // 4, SIZE // 4) and 0.5 < latents.std() < 2
    prompt, negative = backend.embed_prompts(["a bird", ""]), backend.embed_prompts(["dead leaves"])
    assert not torch.equal(*prompt["prompt_embeds"])
    control = backend.prepare_control(images)
    sampled = backend.sample(branch, control, prompt, negative, [1, 2], settings.sampling)
    assert backend.decode_latents(sampled).isfinite().all() and sampled.isfinite().all()


def test_training_moves_every_network(
    kind: str, undisturbed: pretrain.Trainer, pairs: pool.Pool, tmp_path: Path
) -> None:
    fresh = weights(trainer_of(pairs, tmp_path, kind))
    moved = {name.split(".")[0] for name, value in weights(undisturbed).items() if not torch.equal(value, fresh[name])}
    assert moved == {"vae", "backbone", "control"}
    assert [(row["phase"], row["step"]) for row in undisturbed.rows] == [
        ("vae", STEPS),
        ("denoiser", STEPS),
        ("finetune", STEPS),
    ]


def interrupt(monkeypatch: pytest.MonkeyPatch, call: int) -> Callable[[], None]:
    """Let optimizer step `call` of what follows end in an error; return what takes that back."""
    average, calls = pretrain._average, iter(range(100))

    def stop(*args: Any) -> None:
        if next(calls) == call:
            raise InterruptedError
        average(*args)

    monkeypatch.setattr(pretrain, "_average", stop)
    return monkeypatch.undo


def test_interrupted_in_every_phase_equals_undisturbed(
    kind: str, undisturbed: pretrain.Trainer, pairs: pool.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt ends in the last step of the next phase; the checkpoint is of the step before."""
    for call in (2, 3, 3):  # calls within the attempt: it first repeats the last step of the phase before
        take_back = interrupt(monkeypatch, call)
        with pytest.raises(InterruptedError):
            train(pairs, tmp_path, kind)
        take_back()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["denoiser.pt", "finetune.pt", "start", "vae.pt"]
    assert torch.load(tmp_path / "finetune.pt", weights_only=True)["step"] == 2
    for _ in range(2):  # to the end, and once more from the end
        found = train(pairs, tmp_path, kind)
        assert found.rows == undisturbed.rows
        wanted = weights(undisturbed)
        assert all(torch.equal(value, wanted[name]) for name, value in weights(found).items())


def test_sigterm_saves_the_step_in_hand(
    kind: str, undisturbed: pretrain.Trainer, pairs: pool.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average = pretrain._average
    monkeypatch.setattr(pretrain, "STOP", StopRequest())

    def told(*args: Any) -> None:
        average(*args)
        pretrain.STOP.requested = True

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(pretrain, "_average", told)
        train(pairs, tmp_path, kind)
    assert stopped.value.code == 143
    assert torch.load(tmp_path / "vae.pt", weights_only=True)["step"] == 1
    pretrain.STOP.requested = False
    found, wanted = train(pairs, tmp_path, kind), weights(undisturbed)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(found).items())


def test_a_given_backbone_stays_as_it_is(kind: str, base: Path, pairs: pool.Pool, tmp_path: Path) -> None:
    trainer = train(pairs, tmp_path / "checkpoints", kind, backbone=str(base))
    trainer.save(tmp_path / "model")
    for part in ("vae", trainer.backend.backbone_folder, "text_encoder"):
        name = "model.safetensors" if part == "text_encoder" else WEIGHTS
        assert (tmp_path / "model" / part / name).read_bytes() == (base / part / name).read_bytes()
    texts = [file.read_text() for file in (tmp_path / "model").rglob("*.json")]
    assert not any(str(base) in text for text in texts)  # no path of this machine
    before, after = (load_file(folder / "controlnet" / WEIGHTS) for folder in (base, tmp_path / "model"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    last = "controlnet_mid_block.weight" if kind == "sd" else "controlnet_blocks.0.weight"
    assert after[last].abs().max() > 0  # zero at the start
    assert {row["phase"] for row in trainer.rows} == {"denoiser", "finetune"}


def test_a_given_vae_is_kept(base: Path, kind: str, pairs: pool.Pool, tmp_path: Path) -> None:
    trainer = train(pairs, tmp_path / "checkpoints", "flux", autoencoder=str(base))
    trainer.save(tmp_path / "model")
    assert (tmp_path / "model/vae" / WEIGHTS).read_bytes() == (base / "vae" / WEIGHTS).read_bytes()
    assert {row["phase"] for row in trainer.rows} == {"denoiser", "finetune"}
    with pytest.raises(UserError, match=r"autoencoder .*: its latents have 4 channels, .*latent_channels says 6"):
        trainer_of(pairs, tmp_path / "other", autoencoder=str(base), architecture=SHAPES | {"latent_channels": 6})


def test_missing_backbone_is_named(pairs: pool.Pool, tmp_path: Path) -> None:
    (tmp_path / "backbone").mkdir()
    for name, message in (("absent", "absent: not found"), ("backbone", "backbone/scheduler: no readable settings")):
        with pytest.raises(UserError, match=message):
            trainer_of(pairs, tmp_path, backbone=str(tmp_path / name))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step(
    what: str, pairs: pool.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainer: pretrain.Trainer, generator: torch.Generator) -> torch.Tensor:
        weight = trainer.vae.quant_conv.weight
        return weight.sum() * torch.nan if what == "loss" else (weight - weight.detach()).abs().sqrt().sum()

    trainer = trainer_of(pairs, tmp_path)
    monkeypatch.setattr(pretrain.Trainer, "_vae_loss", broken)
    with pytest.raises(UserError, match=r"phase vae, step 1: loss .* gradient norm nan.*lower pretrain\.vae"):
        trainer.run()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


def command(folder: Path, *, seed: int = 0, **changes: Any) -> list[str]:
    job = {
        "pretrain": settings(**changes).model_dump(),
        "policy": policy().model_dump(),
        "dataset": dataset().model_dump(),
        "seed": seed,
    }
    inputs = ["--images", folder / "images.parquet", "--checkpoints", folder / "checkpoints", "--device", "cpu"]
    outputs = ["--model", folder / "model", "--log-table", folder / "log.parquet"]
    return [str(part) for part in (*inputs, *outputs, "--config", json.dumps(job))]


def ingest_images(folder: Path) -> None:
    """Write images.parquet of a photograph and a procedural image."""
    keys = ingest.IngestJob.model_fields.keys() & DatasetSettings.model_fields.keys()
    images = {"images": ["builtin:skimage/brick", "builtin:dead-leaves/0..0"], "downscale": 1, "seed": 0}
    job = dataset().model_dump(include=keys) | images
    ingest.main(["--images", str(folder / "images.parquet"), "--config", json.dumps(job)])


def test_command_line_from_images_to_model(tmp_path: Path) -> None:
    ingest_images(tmp_path)
    stage.main(command(tmp_path))
    log = tables.read(tmp_path / "log.parquet", tables.PRETRAIN_LOG)
    assert sorted(log["phase"]) == ["denoiser", "finetune", "vae"] and (log["step"] == STEPS).all()
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"vae", "unet", "controlnet", "scheduler"}
    first = resume.fingerprint(tmp_path / "model")
    stage.main(command(tmp_path, checkpoint_every=1))  # goes on from the end
    assert resume.fingerprint(tmp_path / "model") == first
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    stage.main(command(tmp_path, seed=1))  # never from another setting's checkpoints
    assert resume.fingerprint(tmp_path / "model") != first
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_crop_larger_than_the_images_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = DEFAULTS["pretrain"]["vae"] | {"crop": 64}
    with pytest.raises(SystemExit):
        stage.main(command(tmp_path, vae=vae))
    assert "pretrain.vae.crop=64, wanted at most the dataset's hr_size=32" in capsys.readouterr().err

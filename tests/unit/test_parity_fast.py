"""The fast path of each backend beside diffusers' own pipelines, and each switch beside the path without it."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch.utils._python_dispatch import TorchDispatchMode

from dp2osr import config
from dp2osr.config import PolicySettings
from dp2osr.config_rollout import SpeedSettings
from dp2osr.errors import UserError
from dp2osr.iqa.metric import Scorer
from dp2osr.models import parts, speed
from dp2osr.models.backend import load_backend
from dp2osr.repeats import computed_once
from parity_rig import (
    FLUX_SAMPLERS,
    NEGATIVE,
    PROMPTS,
    SD_SAMPLERS,
    SEEDS,
    SIZE,
    controls,
    policy,
    theirs_flux,
    theirs_sd,
)
from training_rig import DEFAULTS

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[2] / "config"
SAMPLERS = {"sd": SD_SAMPLERS["ddpm"] | {"steps": 10}, "flux": FLUX_SAMPLERS["flux.1-dev"] | {"steps": 8}}
OVERLAYS = {"sd": "c-sd2.yaml", "flux": "c-flux.yaml"}
CELLS = SIZE // 2
EULER = {"scheduler": "FlowMatchEulerDiscreteScheduler"}

Models = dict[str, Path]


@pytest.fixture
def models(tiny_model: Path, tiny_flux: Path) -> Models:
    return {"sd": tiny_model, "flux": tiny_flux}


def settings(name: str, models: Models, **changes: Any) -> PolicySettings:
    sampling = SAMPLERS[name] | (EULER if name == "flux" else {}) | {"negative_prompt": NEGATIVE} | changes
    return policy(models[name], name, **sampling)


def switches(**changes: Any) -> SpeedSettings:
    return SpeedSettings(**DEFAULTS["rollout"]["speed"] | changes)


def images(
    found: PolicySettings, how: SpeedSettings, *, seeds: tuple[int, ...] = SEEDS, device: torch.device = CPU
) -> torch.Tensor:
    """Return candidates of the prompts and control images in turn, in one batch, as a rollout samples them."""
    backend = load_backend(found, device=device)
    branch = backend.load_control(found.control)
    speed.prepare(backend, branch, how)
    places = [place % len(PROMPTS) for place in range(len(seeds))]
    control = backend.prepare_control(controls(len(PROMPTS))[places])
    prompt = backend.embed_prompts([PROMPTS[place] for place in places])
    negative = backend.embed_prompts([NEGATIVE] * len(seeds))
    with speed.attention(how):
        return backend.decode_latents(backend.sample(branch, control, prompt, negative, seeds, found.sampling)).cpu()


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_papers_settings_equal_diffusers_one_image_at_a_time(name: str, models: Models) -> None:
    """config/c-sd2.yaml and config/c-flux.yaml, with every switch that needs no compiler turned on besides."""
    found = settings(name, models)
    theirs = theirs_sd if name == "sd" else theirs_flux
    wanted = torch.cat([theirs(found, row, models[name] / "controlnet") for row in range(len(SEEDS))])
    paper = config.read(CONFIG / "config.yaml", CONFIG / OVERLAYS[name]).rollout.speed
    for how in (paper, paper.model_copy(update={"fuse_qkv": True, "channels_last": True, "attention": "flash"})):
        assert (images(found, how) - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.01


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_switch_changes_nothing_but_rounding(name: str, models: Models) -> None:
    found = settings(name, models, steps=3)
    plain = images(found, switches())
    for change in ({"channels_last": False}, {"fuse_qkv": True}, {"attention": "math"}, {"attention": "cudnn"}):
        assert (images(found, switches(**change)) - plain).abs().max() < 1e-5, change


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_attention_of_backbone_and_branch_is_fused(name: str, models: Models) -> None:
    backend = load_backend(settings(name, models), device=CPU, parts=frozenset({"backbone"}))
    branch = backend.load_control(models[name] / "controlnet")
    for network in (backend.backbone, branch):
        speed.fuse_qkv(network)
        attentions = [part for part in network.modules() if hasattr(part, "fuse_projections")]
        assert attentions
        for part in attentions:
            fused = part.to_kv if getattr(part, "is_cross_attention", False) else part.to_qkv
            assert len(fused.weight) in (2 * len(part.to_k.weight), 3 * len(part.to_k.weight))
            used: list[int] = []
            fused.register_forward_hook(lambda module, given, out, used=used: used.append(1))
            part.to_k.register_forward_hook(lambda module, given, out, used=used: used.append(-1))
            part.used = used
    control = controls(1) if name == "sd" else torch.zeros(1, 4, CELLS, CELLS)
    embeddings = {"prompt_embeds": torch.zeros(1, 8, 16), "pooled": torch.zeros(1, 16)}
    backend.predict(branch, torch.zeros(1, 4, CELLS, CELLS), torch.ones(1), control, embeddings)
    for network in (backend.backbone, branch):
        assert all(part.used == [1] for part in network.modules() if hasattr(part, "fuse_projections"))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Forget what the test compiled."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", OVERLAYS)
def test_blocks_as_torch_compile_takes_them_change_nothing_but_rounding(
    name: str, models: Models, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    """Every block of backbone and branch is traced whole and in its shapes; the code itself is not generated here."""
    traced = []

    def compile(block: torch.nn.Module, **how: Any) -> None:
        traced.append(type(block).__name__)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", fullgraph=True, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    found = settings(name, models, steps=2, text_tokens=16)
    fast = images(found, switches(compile=True, fuse_qkv=True))
    assert (fast - images(found, switches())).abs().max() < 1e-5
    wanted = {"BasicTransformerBlock", "ResnetBlock2D"}
    assert set(traced) == (wanted if name == "sd" else speed.BLOCKS - wanted)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler (g++), which torch.compile needs on a CPU")
def test_compiled_code_changes_nothing_but_rounding_and_is_cached(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    monkeypatch.setattr(speed, "BLOCKS", frozenset({"FluxSingleTransformerBlock"}))  # each kind takes its seconds
    found = settings("flux", models, steps=2, text_tokens=16)
    fast = images(found, switches(compile=True, compile_cache=str(tmp_path / "cache")))
    assert (fast - images(found, switches())).abs().max() < 1e-5
    assert any((tmp_path / "cache").rglob("*.so"))


def test_a_machine_without_a_compiler_is_told_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"rollout\.speed\.compile: found true on cpu without g\+\+ or clang\+\+"):
        speed.check_compiler(CPU)


def test_a_cache_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"rollout\.speed\.compile_cache: .*file"):
        speed.compile_blocks((), str(tmp_path / "file"))


def test_the_attention_kernel_of_the_settings_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(speed, "sdpa_kernel", lambda *given, **how: taken.append((given[0], how)) or nullcontext())
    for name in ("auto", "cudnn", "math"):
        speed.attention(switches(attention=name))
    kernels = speed.SDPBackend
    others = [kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH]
    assert taken == [([kernels.CUDNN_ATTENTION, *others], {"set_priority": True}), (kernels.MATH, {})]


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, on the device `meta` in its place: values read, tensors sent."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        meta = isinstance(args[0], torch.Tensor) and args[0].is_meta if args else False
        if name in ("_local_scalar_dense", "nonzero") and meta:
            self.read += 1  # no neighbours in the batch are equal; a timestep stands at the first place
            return True if name == "_local_scalar_dense" else torch.zeros(1, 1, dtype=torch.int64)
        found = func(*args, **(kwargs or {}))
        if name == "_to_copy" and not meta and isinstance(found, torch.Tensor) and found.is_meta:
            self.sent += 1
        return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_sampling_does_not_wait_for_the_gpu(name: str, models: Models) -> None:
    """More steps read no more values of the GPU; DDPM alone sends something in each step, its candidates' own noise."""

    meta = torch.device("meta")
    shape = (2, 3, SIZE, SIZE) if name == "sd" else (2, 4, CELLS, CELLS)
    control, prompt = torch.empty(shape, device=meta), torch.empty(2, 77, 16, device=meta)
    embeddings = {"prompt_embeds": prompt, "pooled": prompt[:, 0]}

    def count(steps: int) -> Syncs:
        found = settings(name, models, steps=steps)
        backend = load_backend(found, device=meta, parts=frozenset({"backbone"}))
        branch = backend.load_control(found.control)
        with Syncs() as counted:
            backend.sample(branch, control, embeddings, embeddings, [1, 2], found.sampling)
        return counted

    few, many = count(2), count(3)
    assert many.read == few.read
    assert many.sent - few.sent == (1 if name == "sd" else 0)


def test_a_control_image_is_embedded_once_unless_it_is_cut_into_tiles(models: Models) -> None:
    found = settings("sd", models, steps=3)
    backend = load_backend(found, device=CPU)
    branch = backend.load_control(found.control)
    calls: list[int] = []
    first = branch.controlnet_cond_embedding.conv_in
    first.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    prompt = backend.embed_prompts(PROMPTS[:2])
    for tile, wanted in ((0, 1), (CELLS, 1), (CELLS // 2, 3 * 4)):
        calls.clear()
        control = backend.prepare_control(controls(2))
        backend.sample(branch, control, prompt, prompt, (1, 2), found.sampling, tile=tile)
        assert len(calls) == wanted
    assert "forward" not in vars(branch.controlnet_cond_embedding)


def test_the_first_call_alone_is_computed() -> None:
    layer, calls = torch.nn.Linear(2, 2), []
    forward = layer.forward

    def counted(given: torch.Tensor) -> torch.Tensor:
        calls.append(given)
        return forward(given)

    layer.forward = counted  # type: ignore[method-assign]
    with pytest.raises(KeyError), computed_once([layer]):
        first = layer(torch.ones(1, 2))
        assert layer(torch.ones(1, 2)) is first and not first.requires_grad
        raise KeyError
    assert len(calls) == 1 and layer.forward is counted
    assert layer(torch.ones(1, 2)).requires_grad and len(calls) == 2


def test_a_batch_is_decoded_in_pieces(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [parts.decoded_at_once(side * side) for side in (96, 512, 2048)] == [113, 4, 1]
    backend = load_backend(settings("sd", models), device=CPU)
    latents = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, sizes = backend.decode_latents(latents), []
    monkeypatch.setattr(parts, "DECODED_PIXELS", 2 * 32 * 32)
    hook = lambda module, given: sizes.append(len(given[0]))  # noqa: E731
    backend.autoencoder.vae.decoder.register_forward_pre_hook(hook)
    assert (backend.decode_latents(latents) - whole).abs().max() < 1e-6
    assert sizes == [2, 2, 1]


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


@pytest.mark.gpu
@pytest.mark.parametrize("name", OVERLAYS)
def test_bfloat16_on_a_gpu_keeps_images_and_the_order_of_rewards(name: str, models: Models) -> None:
    """The fast path in bfloat16 on the GPU beside the plain path in float32 on the CPU: PSNR, and ranks of a metric."""
    seeds = tuple(range(24))
    plain = images(settings(name, models), switches(channels_last=False, attention="math"), seeds=seeds)
    cuda = torch.device("cuda")
    lower = settings(name, models, dtype="bfloat16", vae_dtype="bfloat16")
    ways = {"auto": {}, "fused": {"fuse_qkv": True, "cudnn_benchmark": True}, "cudnn": {"attention": "cudnn"}}
    scorer = Scorer(["piqe"], device=CPU, niqe=None, niqe_block=32, batch_size=8)
    wanted = scorer.score(plain)["piqe"]
    for change in ways.values():
        fast = images(lower, switches(**change), seeds=seeds, device=cuda)
        assert psnr(fast, plain) > 30
        assert spearmanr(scorer.score(fast)["piqe"], wanted).statistic > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", OVERLAYS)
def test_compiled_blocks_on_a_gpu(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    found = settings(name, models, dtype="bfloat16", steps=4)
    cuda = torch.device("cuda")
    fast = images(found, switches(compile=True, compile_cache=str(tmp_path)), device=cuda)
    assert psnr(fast, images(found, switches(), device=cuda)) > 35

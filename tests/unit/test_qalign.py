"""Q-Align: a tiny model in the layout of its repository goes the whole way, from the cache to scores."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import iqa_stand_ins
import stand_ins
import tiny_one_align
from dp2osr import fetch, weights
from dp2osr.errors import UserError
from dp2osr.iqa import origin, pretrained
from dp2osr.iqa.metric import Scorer
from dp2osr.metrics import METRICS

CPU = torch.device("cpu")
IMAGE = -200  # stands for the image among the tokens


ROUNDING = 1 / 128  # float16 has steps of 1/512 and 1/256 here, and sums follow where a tensor lies in memory


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_one_align.build(tmp_path_factory.mktemp("qalign") / "published")


@pytest.fixture(scope="module")
def scorer(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    with pytest.MonkeyPatch.context() as patch:
        fill(tmp_path_factory.mktemp("cache"), repository, patch)
        yield load()


def fill(cache: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.add_repository(cache / "hub", "q-future/one-align", repository)
    iqa_stand_ins.use(cache, monkeypatch)


def load(device: torch.device = CPU) -> Scorer:
    return Scorer(["qalign"], device=device, niqe=None, niqe_block=32, batch_size=8)


def network(scorer: Scorer) -> Any:
    model: Any = scorer._models["qalign"]
    return model.net.model


def pictures(height: int = 64, width: int = 64) -> torch.Tensor:
    """Return three unlike images (3, 3, H, W) of whole grey levels."""
    noise = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(3))
    smooth = F.avg_pool2d(noise[1:2], 9, 1, 4)
    return torch.cat([noise[:1], smooth, 0.5 + 0.5 * noise[2:]]).mul(255).round() / 255


def asked(model: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Score images and return what the model was given: tokens and pixels."""
    found: dict[str, Any] = {}
    original = model.prepare_inputs_labels_for_multimodal

    def note(tokens: torch.Tensor, *others: Any) -> Any:
        found.update(tokens=tokens[0].tolist(), pixels=others[-1])
        return original(tokens, *others)

    monkeypatch.setattr(model, "prepare_inputs_labels_for_multimodal", note)
    return found


def test_scores_are_those_of_single_images(scorer: Scorer) -> None:
    assert not METRICS["qalign"].batch_safe and scorer.micro_batch("qalign", 64, 64) == 1
    found = scorer.score(pictures())["qalign"]
    assert found.shape == (3,) and np.isfinite(found).all() and (found >= 1).all() and (found <= 5).all()
    assert np.ptp(found) > 0.05 and (found == found.astype(np.float16)).all()
    single = [scorer.score(image[None])["qalign"].item() for image in pictures()]
    np.testing.assert_allclose(found, single, rtol=0, atol=ROUNDING)
    assert np.isnan(scorer.score(pictures(31, 64))["qalign"]).all()
    metric: Any = scorer._models["qalign"]
    with pytest.raises(AssertionError, match="batch size 1"):
        metric(pictures())


def test_weights_are_those_of_the_files_in_float16(scorer: Scorer, repository: Path) -> None:
    loaded = network(scorer)
    assert loaded.dtype == torch.float16 and not loaded.training
    written: dict[str, torch.Tensor] = {}
    for file in repository.glob("*.bin"):
        written |= torch.load(file, weights_only=True)
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert set(written) == set(loaded.state_dict())
    for name, value in loaded.named_parameters():
        assert value.dtype == torch.float16 and torch.equal(value, written[name].half()), name


def test_the_tables_say_what_files_made_the_score(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fetch-weights takes of the repository is enough; a second model says the same."""
    names = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
    chosen = fetch.choose(names, "")
    assert not any(name.endswith(".py") for name in chosen)
    for name in chosen:
        (tmp_path / "chosen").mkdir(exist_ok=True)
        (tmp_path / "chosen" / name).write_bytes((repository / name).read_bytes())
    fill(tmp_path / "cache", tmp_path / "chosen", monkeypatch)
    assert iqa_stand_ins.names_in(tmp_path / "cache") == set(METRICS["qalign"].weights) == {pretrained.ONE_ALIGN}
    first, second = (load().score(pictures())["qalign"].tolist() for _ in range(2))
    assert first == second
    made = origin.origins(["qalign"], niqe=None, vqr1=None)["qalign"]
    for file in repository.glob("*.bin"):
        assert f"{file.name} sha256:{weights.facts_of(file).sha256}" in made


def test_safetensors_score_as_the_older_format(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "cache", tiny_one_align.build(tmp_path / "made", safetensors=True), monkeypatch)
    found, wanted = (judge.score(pictures())["qalign"] for judge in (load(), scorer))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("says", "first"), [(None, [1]), (True, [1]), (False, [])])
def test_the_prompt_begins_as_the_model_was_trained(
    says: bool | None, first: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BOS (1) stands there unless the tokenizer's settings forbid it; all else as SentencePiece itself splits it."""
    folder = tiny_one_align.build(tmp_path / "made", bos=says)
    fill(tmp_path / "cache", folder, monkeypatch)
    scorer, own = load(), tiny_one_align.pieces(folder)
    found = asked(network(scorer), pictures(), monkeypatch)
    scorer.score(pictures()[:1])
    parts = [own.encode(text) for text in (tiny_one_align.BEFORE, tiny_one_align.AFTER)]
    assert found["tokens"] == [*first, *parts[0], IMAGE, *parts[1]]
    words = [own.piece_to_id(f"▁{word}") for word in tiny_one_align.WORDS]
    assert network(scorer).preferential_ids_ == words and own.unk_id() not in words


def test_an_image_is_padded_to_a_square_with_clips_mean(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(network(scorer), pictures(), monkeypatch)
    wide = pictures(64, 112)[:1]
    score = scorer.score(wide)["qalign"].item()
    assert found["pixels"].shape == (1, 3, tiny_one_align.SIDE, tiny_one_align.SIDE)
    square = (torch.tensor([122.0, 116.0, 104.0]) / 255).view(1, 3, 1, 1).repeat(1, 1, 112, 112)
    square[:, :, 24:88] = wide
    assert scorer.score(square)["qalign"].item() == score
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]))
    torch.testing.assert_close(found["pixels"][0].float(), (square[0] - mean) / std, atol=5e-3, rtol=0)


def llama(model: Any, hidden: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Return logits (S, V) of embeddings (S, C) by LLaMA's definition; kinds (S,): 1 for the image's tokens.

    mPLUG-Owl2's norms, keys and values have weights of their own for each of the two kinds.
    """
    heads = model.config.num_attention_heads
    length, size = len(hidden), hidden.shape[1] // heads
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (S, 1, size / 2)

    def norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return value * (value.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight

    def rotate(value: torch.Tensor) -> torch.Tensor:
        a, b = value.view(length, heads, size).chunk(2, -1)
        turned = torch.complex(a, b) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def of_kind(module: Any) -> torch.Tensor:
        return torch.stack([each.weight for each in module.multiway])[kinds]

    for layer in model.model.layers:
        attention = layer.self_attn
        x = norm(hidden, of_kind(layer.input_layernorm))
        query = rotate(x @ attention.q_proj.weight.T)
        key = rotate(torch.einsum("sc,sdc->sd", x, of_kind(attention.k_proj)))
        value = torch.einsum("sc,sdc->sd", x, of_kind(attention.v_proj)).view(length, heads, size)
        logits = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(size)
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value).reshape(length, -1)
        hidden = hidden + mixed @ attention.o_proj.weight.T
        x = norm(hidden, of_kind(layer.post_attention_layernorm))
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.T for name in ("gate", "up", "down"))
        hidden = hidden + (F.silu(x @ gate) * (x @ up)) @ down
    return norm(hidden, model.model.norm.weight) @ model.lm_head.weight.T


@torch.no_grad()
def test_the_score_is_that_of_a_llama_by_definition(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa puts its layers, attention and forward into transformers' LLaMA; here is none of the two."""
    model = network(scorer)
    found = asked(model, pictures(), monkeypatch)
    scores, given = [], []
    for image in pictures():
        scores.append(scorer.score(image[None])["qalign"].item())
        given.append(dict(found))
    monkeypatch.undo()
    exact = model.float()
    try:
        for score, one in zip(scores, given, strict=True):
            tokens, features = torch.tensor(one["tokens"]), exact.encode_images(one["pixels"].float())[0]
            assert features.shape == (tiny_one_align.QUERIES + 1, tiny_one_align.WIDTH)
            at = one["tokens"].index(IMAGE)
            embedded = exact.model.embed_tokens(tokens.clamp(min=0))
            hidden = torch.cat([embedded[:at], features, embedded[at + 1 :]])
            kinds = torch.tensor([0] * at + [1] * len(features) + [0] * (len(tokens) - at - 1))
            wanted = llama(exact, hidden, kinds)
            logits = exact(tokens[None], images=one["pixels"].float())["logits"][0]
            torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)
            mean = wanted[-1, exact.preferential_ids_].softmax(0) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
            assert abs(score - mean.item()) < 0.02
    finally:
        exact.half()


def test_a_mask_is_turned_into_what_attention_adds() -> None:
    found = pretrained._inverted(torch.tensor([[1.0, 1.0, 0.0]]), dtype=torch.float16)
    assert found.tolist() == [[[[0.0, 0.0, -65504.0]]]]


def drop(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()

    return spoil


def halve(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return spoil


def drop_a_tensor(folder: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    index = folder / "pytorch_model.bin.index.json"
    data = json.loads(index.read_text())
    file = folder / data["weight_map"].pop(name)
    index.write_text(json.dumps(data))
    torch.save({key: value for key, value in torch.load(file).items() if key != name}, file)


def pickle_more(folder: Path) -> None:
    torch.save({"model.norm.weight": Path("x")}, folder / "pytorch_model-00001-of-00002.bin")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        *[(drop(name), f"{name} of {pretrained.ONE_ALIGN} is missing") for name in pretrained.ONE_ALIGN_FILES],
        (drop("pytorch_model-00002-of-00002.bin"), "pytorch_model-00002-of-00002.bin"),
        (halve("tokenizer.model"), f"tokenizer.model of {pretrained.ONE_ALIGN} is no SentencePiece model"),
        (halve("config.json"), "config.json"),
        (halve("pytorch_model-00002-of-00002.bin"), "(OSError|RuntimeError)"),
        (drop_a_tensor, r"1 tensors are missing, the first is model\.layers\.1\.self_attn\.q_proj\.weight"),
        (pickle_more, "Weights only load failed"),
    ],
)
def test_what_is_missing_or_broken_is_one_error(
    spoil: Callable[[Path], None], told: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(repository, folder)
    spoil(folder)
    fill(tmp_path / "cache", folder, monkeypatch)
    with pytest.raises(UserError, match=rf"metric 'qalign': no weights in .*{told}.*dp2osr fetch-weights") as found:
        load()
    assert "\n" not in str(found.value)


def test_an_empty_cache_names_file_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iqa_stand_ins.use(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"config\.json of hub:q-future/one-align is missing.*dp2osr fetch-weights"):
        load()


@pytest.mark.gpu
def test_the_gpu_scores_nearly_as_the_cpu(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "cache", repository, monkeypatch)
    found = [load(torch.device(where)).score(pictures())["qalign"] for where in ("cpu", "cuda")]
    np.testing.assert_allclose(found[1], found[0], atol=0.02)

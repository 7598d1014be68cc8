"""RAM under its published names: the forward pass, DAPE's updates, what is refused, and which tags are named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

import tiny_ram
from dp2osr.errors import UserError
from dp2osr.models import ram

CPU = torch.device("cpu")
SQUARE: dict[str, Any] = tiny_ram.SMALL | {"window": 4, "image_size": 128}  # stages as at full size, in small


def load(folder: Path, **changes: Any) -> ram.Tagger:
    """Load the files of `folder`, written there unless they are."""
    files = {"ram": folder / "ram.pth", "dape": folder / "dape.pth"}
    if not files["ram"].is_file():
        tiny_ram.write(folder)
    options = {"tags": tiny_ram.TAGS, "thresholds": [0.5] * len(tiny_ram.TAGS), "device": CPU} | changes
    return ram.load(options.pop("ram", files["ram"]), options.pop("dape", files["dape"]), **options)


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, height, width, generator=generator) for height, width in ((24, 24), (24, 24), (30, 50))]


def listed(part: str, root: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of tests/data/ram_layout.json, written out."""
    layout = json.loads((root / "tests" / "data" / "ram_layout.json").read_text())
    found: dict[str, tuple[int, ...]] = {}
    for pattern, shape in layout[part].items():
        for stage, sizes in enumerate(layout["stages"]):
            numbers = [sizes[size[-1]] * int(size[:-1] or 1) if isinstance(size, str) else size for size in shape]
            for block in range(sizes["blocks"]):
                for layer in range(layout["query_layers"]):
                    name = pattern.format(stage=stage, block=block, layer=layer, merge=min(stage, 2))
                    found.setdefault(name, tuple(numbers))
    return found


def test_forward_pass_equals_a_plain_one_by_published_names() -> None:
    weights = tiny_ram.random_weights(SQUARE)
    network = ram.Ram(ram.Architecture(**SQUARE)).eval()
    ram.check(network, weights, Path("ram.pth"))
    network.load_state_dict({name: weights[ram.published(name)] for name in network.state_dict()})
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = network(images)
    reference = tiny_ram.Reference(weights, SQUARE)
    wanted = torch.stack([reference.logits(image) for image in images])
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_cross_attention_by_hand() -> None:
    config = BertConfig(hidden_size=3, num_attention_heads=1, layer_norm_eps=1e-12)
    attention = ram.CrossAttention(config, token_width=2).eval()
    with torch.no_grad():
        for name, layer in attention.named_modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(torch.eye(*layer.weight.shape))
                layer.bias.zero_()
                assert name in ("self.query", "self.key", "self.value", "output.dense")
    found = attention(torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[[1.0, 0], [0, 1]]]))
    # scores 1/sqrt(3) and 0, so weights .640458 and .359542; added to the query and normalised: mean 2/3, std .704045
    assert found.flatten().tolist() == pytest.approx([1.383137, -0.436229, -0.946909], abs=1e-4)


def test_low_rank_updates_by_hand() -> None:
    down, up = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0], [2], [3], [4]])
    joint = ram.low_rank(down, up, torch.Size([6, 2]))
    assert joint is not None
    assert joint.tolist() == [[1, 2], [2, 4], [0, 0], [0, 0], [9, 12], [12, 16]]  # query, key, value
    plain = ram.low_rank(down, up.reshape(2, 2), torch.Size([2, 2]))
    assert plain is not None
    assert plain.tolist() == [[3.5, 5], [7.5, 11]]  # B A, over the rank 2
    assert ram.low_rank(down, up, torch.Size([5, 2])) is None
    assert ram.low_rank(down, torch.empty(0), torch.Size([6, 2])) is None
    assert ram.low_rank(down, torch.empty(6, 0), torch.Size([6, 2])) is None


def test_dape_is_merged_into_the_weights(tmp_path: Path) -> None:
    tagger = load(tmp_path)
    weights = torch.load(tmp_path / "ram.pth", weights_only=True)["model"]
    lora = torch.load(tmp_path / "dape.pth", weights_only=True)
    for name, value in tagger.network.state_dict().items():
        layer, wanted = ram.published(name).removesuffix(".weight"), weights[ram.published(name)].clone()
        if f"{layer}.lora_A" in lora:
            down, up = lora[f"{layer}.lora_A"], lora[f"{layer}.lora_B"]
            if layer.endswith("qkv"):
                width = len(up) // 2
                wanted[:width] += 0.5 * up[:width] @ down[:2]
                wanted[2 * width :] += 0.5 * up[width:] @ down[2:]
            else:
                wanted += 0.5 * up @ down
            assert not torch.allclose(value, weights[ram.published(name)])
        torch.testing.assert_close(value, wanted)
    plain = load(tmp_path, dape=None).network.state_dict()
    assert all(torch.equal(value, weights[ram.published(name)]) for name, value in plain.items())


def test_a_batch_equals_its_images_alone(tmp_path: Path) -> None:
    tagger = load(tmp_path)
    images = ram.prepare(pictures(), 384)
    with torch.no_grad():
        together = tagger.network(images)
        alone = torch.cat([tagger.network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).max() > 1e-3  # the images do make a difference
    assert tagger.describe(pictures()) == [tagger.describe([image])[0] for image in pictures()]


def test_tags_are_those_above_their_thresholds_in_the_order_of_the_list(tmp_path: Path) -> None:
    tagger = load(tmp_path)
    with torch.no_grad():
        chances = tagger.network(ram.prepare(pictures()[:1], 384))[0].sigmoid()
    below = [float(chance) - 0.01 for chance in chances]
    assert load(tmp_path, thresholds=below).describe(pictures()[:1]) == ["bird, sea, stone wall, night, car"]
    some = [threshold if index in (1, 3) else 1.0 for index, threshold in enumerate(below)]
    assert load(tmp_path, thresholds=some).describe(pictures()[:1]) == ["sea, night"]
    assert load(tmp_path, thresholds=[1.0] * 5).describe(pictures()) == ["", "", ""]
    tagger.thresholds = chances  # greater, not equal
    assert tagger.describe(pictures()[:1]) == [""]


def test_images_are_resized_and_normalised() -> None:
    grey = torch.full((3, 10, 20), 0.5)
    found = ram.prepare([grey, torch.zeros(3, 600, 400)], 384)
    assert found.shape == (2, 3, 384, 384)
    wanted = [(0.5 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(found[0].mean((1, 2)), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    ramp = torch.tensor([0.0, 1.0]).expand(3, 1, 2)
    row = ram.prepare([ramp], 4)[0, 0, 0] * 0.229 + 0.485
    assert row.tolist() == pytest.approx([0.0, 0.25, 0.75, 1.0], abs=1e-6)


def test_names_and_shapes_at_full_size(root: Path) -> None:
    with torch.device("meta"):
        network = ram.Ram(ram.Architecture())
    found = {ram.published(name): tuple(value.shape) for name, value in network.state_dict().items()}
    assert found == listed("ram", root)
    assert len(found) == 24 * 13 + 3 * 3 + 4 + 2 + 7 + 2 * 16
    weights = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
    assert ram.infer(weights, Path("ram.pth")) == ram.Architecture()


def test_updates_at_full_size(root: Path) -> None:
    weights = {name: torch.empty(shape, device="meta") for name, shape in listed("ram", root).items()}
    updates = {name: torch.empty(shape, device="meta") for name, shape in listed("dape", root).items()}
    merged = ram.merge(weights, updates, Path("DAPE.pth"))
    assert {name: value.shape for name, value in merged.items()} == {name: w.shape for name, w in weights.items()}
    changed = [name for name in weights if merged[name] is not weights[name]]
    assert len(changed) == len(updates) / 2 == 24 + 2 * 2


def test_networks_of_captions_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load(tmp_path)
    assert "ram.pth: no part of tagging: tag_encoder, text_decoder" in caplog.text
    assert "dape.pth: no part of tagging: tag_encoder" in caplog.text


def test_an_older_name_of_the_tagging_head(tmp_path: Path) -> None:
    wanted = load(tmp_path)
    weights = torch.load(tmp_path / "ram.pth", weights_only=True)["model"]
    older = {name.replace("tagging_head.", "vision_multi."): value for name, value in weights.items()}
    torch.save({"model": older}, tmp_path / "older.pth")
    found = load(tmp_path, ram=tmp_path / "older.pth")
    assert found.describe(pictures()) == wanted.describe(pictures())


class Trap:
    """Something that would run code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def spoil(kind: str, weights: dict[str, Any]) -> Any:
    """Return what is saved in place of RAM's file."""
    if kind == "unsafe":
        return {"model": weights, "extra": Trap()}
    if kind == "no state dict":
        return {"model": {"fc": {"weight": 1}}}
    if kind == "list":
        return [1, 2]
    changes: dict[str, Any] = {
        "missing": {"visual_encoder.layers.1.downsample.norm.bias": None},
        "missing matrix": {"label_embed": None},
        "foreign": {"visual_encoder.layers.9.odd": torch.zeros(1)},
        "misshapen": {"image_proj.weight": torch.zeros(8, 9)},
        "fewer tags": {"label_embed": weights["label_embed"][:4]},
    }[kind]
    return {"model": {name: value for name, value in {**weights, **changes}.items() if value is not None}}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unsafe", r"spoilt.pth: refused \(it holds posix.mkdir\); wanted a torch file of tensors alone"),
        ("no state dict", "spoilt.pth: no state dict"),
        ("list", "spoilt.pth: no state dict"),
        ("missing", "spoilt.pth: 'visual_encoder.layers.1.downsample.norm.bias' is missing"),
        ("missing matrix", "spoilt.pth: 'label_embed' is missing or no matrix"),
        ("foreign", "spoilt.pth: 'visual_encoder.layers.9.odd' is no part of RAM"),
        ("misshapen", r"spoilt.pth: 'image_proj.weight' has shape \(8, 9\), wanted \(8, 64\)"),
        ("fewer tags", "tags.tag_list: found 5 tags, wanted 4 as 'label_embed' of .*spoilt.pth"),
    ],
)
def test_wrong_weights_are_named(kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_ram.write(tmp_path)
    weights = torch.load(tmp_path / "ram.pth", weights_only=True)["model"]
    torch.save(spoil(kind, weights), tmp_path / "spoilt.pth")
    with pytest.raises(UserError, match=message) as found:
        load(tmp_path, ram=tmp_path / "spoilt.pth")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("cut", [0, 10, 1000, -200])
def test_a_truncated_file_is_named(cut: int, tmp_path: Path) -> None:
    tiny_ram.write(tmp_path)
    whole = (tmp_path / "ram.pth").read_bytes()
    (tmp_path / "spoilt.pth").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"spoilt\.pth: refused") as found:
        load(tmp_path, ram=tmp_path / "spoilt.pth")
    assert "\n" not in str(found.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth: not found"):
        load(tmp_path, dape=tmp_path / "absent.pth")


QKV = "visual_encoder.layers.0.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_embed": torch.zeros(5, 8)}, "'label_embed' is no low-rank update of a layer of RAM"),
        ({"visual_encoder.layers.7.mlp.lora_A": torch.zeros(1)}, "layers.7.mlp.lora_A' is no low-rank update"),
        (
            {f"{QKV}.lora_B": torch.zeros(6, 2)},
            r"attn.qkv.lora_A, lora_B' are \(4, 8\) and \(6, 2\), unfit for \(24, 8\)",
        ),
        ({f"{QKV}.lora_A": None}, r"attn.qkv.lora_A, lora_B' are \(0,\) and \(16, 2\)"),
        ({f"{QKV}.lora_B": None}, r"attn.qkv.lora_A, lora_B' are \(4, 8\) and \(0,\)"),
        (None, "no low-rank updates"),
    ],
)
def test_wrong_updates_are_named(changes: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    tiny_ram.write(tmp_path)
    lora = torch.load(tmp_path / "dape.pth", weights_only=True) if changes is not None else {}
    spoilt = {name: value for name, value in {**lora, **(changes or {})}.items() if value is not None}
    torch.save(spoilt, tmp_path / "spoilt.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path, dape=tmp_path / "spoilt.pth")

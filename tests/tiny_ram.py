"""A small random RAM in the layout of the published files, and its forward pass once more in plain torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Weights = Mapping[str, torch.Tensor]

TAGS = ["bird", "sea", "stone wall", "night", "car"]
SMALL: dict[str, Any] = {
    "width": 8,
    "depths": (1, 2, 1, 1),
    "heads": (1, 1, 2, 2),
    "num_tags": len(TAGS),
    "token_width": 8,
    "query_width": 16,
    "inner_width": 24,
}
RANK = 2  # of the low-rank updates; DAPE's is 8


def random_weights(sizes: dict[str, Any], seed: int = 0) -> "dict[str, torch.Tensor]":
    """Return a state dict under the published names, of a size at which the logits follow from the image."""
    import torch

    from dp2osr.models import ram

    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in ram.Ram(ram.Architecture(**sizes)).state_dict().items():
        scale = 2 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.3
        mean = (
            1.0 if name.lower().rpartition(".")[0].endswith(("norm", "norm1", "norm2")) and "bias" not in name else 0.0
        )
        found[ram.published(name)] = mean + scale * torch.randn(value.shape, generator=generator)
    return found


def random_lora(weights: "Weights", seed: int = 1) -> "dict[str, torch.Tensor]":
    """Return low-rank updates as DAPE has them, with those of a captioning network, under their published names."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = {"tag_encoder.encoder.layer.0.crossattention.self.query.lora_A": torch.ones(RANK, 8)}
    for name, value in weights.items():
        layer, rows, columns = name.removesuffix(".weight"), len(value), value.shape[-1]
        if name.endswith("attn.qkv.weight"):
            shapes = (2 * RANK, columns), (2 * rows // 3, RANK)
        elif name.endswith(("self.query.weight", "self.key.weight")):
            shapes = (RANK, columns), (rows, RANK)
        else:
            continue
        for kind, shape in zip(("lora_A", "lora_B"), shapes, strict=True):
            found[f"{layer}.{kind}"] = torch.randn(shape, generator=generator)
    return found


def write(folder: Path) -> dict[str, str]:
    """Write RAM, DAPE and the list of tags; returns the settings of `tags` that name them."""
    import torch

    weights = random_weights(SMALL)
    others = {
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(144, 144, dtype=torch.long),
        "tag_encoder.embeddings.word_embeddings.weight": torch.zeros(2, 2),
        "text_decoder.cls.predictions.bias": torch.zeros(2),
    }
    torch.save({"model": {**weights, **others}, "epoch": 3}, folder / "ram.pth")
    torch.save(random_lora(weights), folder / "dape.pth")
    (folder / "tags.txt").write_text("\n".join(TAGS) + "\n")
    return {"ram": str(folder / "ram.pth"), "dape": str(folder / "dape.pth"), "tag_list": str(folder / "tags.txt")}


class Reference:
    """RAM's logits by published names: all tokens attend to all, masked to those of the same shifted window."""

    def __init__(self, weights: "Weights", sizes: dict[str, Any]) -> None:
        self.weights, self.sizes = weights, sizes

    def linear(self, name: str, states: "torch.Tensor") -> "torch.Tensor":
        """Apply a linear layer to the last dimension."""
        return states @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name: str, states: "torch.Tensor", eps: float = 1e-5) -> "torch.Tensor":
        """Normalise the last dimension."""
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, parts: "tuple[torch.Tensor, ...]", heads: int, bias: "torch.Tensor | float") -> "torch.Tensor":
        """Return softmax(q k / sqrt(width of a head) + bias) v of (L, C)."""
        import torch

        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in parts)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + bias
        return (torch.softmax(scores, dim=-1) @ value).transpose(0, 1).flatten(1)

    def window_bias(self, name: str, side: int, shift: int) -> "torch.Tensor":
        """Return (heads, L, L): the table's entry within a window, minus infinity beyond it."""
        import torch

        window, table = self.sizes["window"], self.weights[f"{name}.relative_position_bias_table"]
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        cells = (places - shift) % side // window
        apart = places[:, None] - places[None]
        together = (cells[:, None] == cells[None]).all(-1) & (apart.abs() < window).all(-1)
        index = (apart.clamp(1 - window, window - 1) + window - 1) @ torch.tensor([2 * window - 1, 1])
        return table[index].permute(2, 0, 1).masked_fill(~together, -torch.inf)

    def encode(self, image: "torch.Tensor") -> "torch.Tensor":
        """Return the image tokens (L, C) of a normalised image (3, S, S)."""
        import torch
        from torch.nn.functional import conv2d, gelu

        name = "visual_encoder.patch_embed"
        grid = conv2d(image[None], self.weights[f"{name}.proj.weight"], self.weights[f"{name}.proj.bias"], stride=4)[0]
        states, side = self.norm(f"{name}.norm", grid.flatten(1).T), grid.shape[-1]
        for stage, depth in enumerate(self.sizes["depths"]):
            for block in range(depth):
                name = f"visual_encoder.layers.{stage}.blocks.{block}"
                shift = self.sizes["window"] // 2 if block % 2 and side > self.sizes["window"] else 0
                parts = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", states)).chunk(3, dim=-1)
                bias = self.window_bias(f"{name}.attn", side, shift)
                found = self.attend(parts, self.sizes["heads"][stage], bias)
                states = states + self.linear(f"{name}.attn.proj", found)
                wide = gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", states)))
                states = states + self.linear(f"{name}.mlp.fc2", wide)
            if stage + 1 < len(self.sizes["depths"]):
                name, grid = f"visual_encoder.layers.{stage}.downsample", states.unflatten(0, (side, side))
                four = [grid[row::2, column::2] for column in (0, 1) for row in (0, 1)]
                states, side = torch.cat(four, dim=-1).flatten(0, 1), side // 2
                states = self.linear(f"{name}.reduction", self.norm(f"{name}.norm", states))
        return self.norm("visual_encoder.norm", states)

    def logits(self, image: "torch.Tensor") -> "torch.Tensor":
        """Return (num_tags,) of a normalised image (3, S, S)."""
        import torch
        from torch.nn.functional import gelu

        states = self.encode(image)
        tokens = self.linear("image_proj", torch.cat([states.mean(0, keepdim=True), states]))
        queries = self.linear("wordvec_proj", self.weights["label_embed"]).clamp(min=0)
        for layer in range(2):
            name = f"tagging_head.encoder.layer.{layer}"
            inputs = {"query": queries, "key": tokens, "value": tokens}
            parts = tuple(self.linear(f"{name}.crossattention.self.{kind}", each) for kind, each in inputs.items())
            found = self.linear(f"{name}.crossattention.output.dense", self.attend(parts, 4, 0.0))
            queries = self.norm(f"{name}.crossattention.output.LayerNorm", found + queries, eps=1e-12)
            wide = gelu(self.linear(f"{name}.intermediate.dense", queries))
            queries = self.norm(f"{name}.output.LayerNorm", self.linear(f"{name}.output.dense", wide) + queries, 1e-12)
        return self.linear("fc", queries)[:, 0]

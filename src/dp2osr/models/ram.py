"""RAM, the tagger of the paper's prompts: recognize-anything's Swin-L at 384 px, with the weights of SeeSR's DAPE.

Inference alone, under the names of the published state dicts. timm's Swin Transformer makes an image 144 tokens; with
their mean in front they are what one query a tag attends to, in BERT layers that have no self-attention.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput

from dp2osr.errors import UserError

logger = logging.getLogger(__name__)

Weights = Mapping[str, torch.Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB
LORA_ALPHA = 1.0  # loralib's default, which DAPE was trained with: the update is alpha / rank times B A

_PARTS = ("visual_encoder", "image_proj", "label_embed", "wordvec_proj", "tagging_head", "fc")
# Of the parts in use, what the published file may hold beside the weights: buffers, and layers that tagging leaves out.
_SPARE = re.compile(
    r".*\.(relative_position_index|attn_mask)|visual_encoder\.head\..*"
    r"|tagging_head\.(embeddings|encoder\.layer\.\d+\.attention)\..*"
)
_BLOCK = re.compile(r"visual_encoder\.layers\.(\d+)\.blocks\.\d+\.norm1\.weight")


@dataclass(frozen=True)
class Architecture:
    """Sizes of the networks; the defaults are those of ram_swin_large_14m.pth."""

    width: int = 192  # channels of the first stage; each further one has twice as many
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12
    num_tags: int = 4585
    token_width: int = 512  # of image tokens and tag embeddings, that of CLIP's text encoder
    query_width: int = 768
    inner_width: int = 3072
    query_layers: int = 2
    query_heads: int = 4  # the weights do not tell it, as they do not tell the side of the image
    image_size: int = 384


class CrossAttention(nn.Module):
    """Attention of queries (B, T, query_width) to tokens (B, N, token_width), with BERT's residual and LayerNorm."""

    def __init__(self, config: BertConfig, token_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        inputs = {"query": width, "key": token_width, "value": token_width}
        self.self = nn.ModuleDict({name: nn.Linear(size, width) for name, size in inputs.items()})
        self.output = BertSelfOutput(config)

    def _split(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Project (B, L, C) and return (B, heads, L, width of a head)."""
        return self.self[name](states).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return (B, T, query_width)."""
        found = functional.scaled_dot_product_attention(
            self._split("query", queries), self._split("key", tokens), self._split("value", tokens)
        )
        return self.output(found.transpose(1, 2).flatten(2), queries)


class QueryLayer(nn.Module):
    """A BERT layer without self-attention: cross-attention, then the feed-forward part."""

    def __init__(self, config: BertConfig, token_width: int) -> None:
        super().__init__()
        self.crossattention = CrossAttention(config, token_width)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return (B, T, query_width)."""
        queries = self.crossattention(queries, tokens)
        return self.output(self.intermediate(queries), queries)


class Ram(nn.Module):
    """The tagging half of RAM: one logit a tag."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.visual_encoder = SwinTransformer(
            img_size=sizes.image_size,
            embed_dim=sizes.width,
            depths=sizes.depths,
            num_heads=sizes.heads,
            window_size=sizes.window,
            num_classes=0,
        )
        self.image_proj = nn.Linear(self.visual_encoder.num_features, sizes.token_width)
        self.label_embed = nn.Parameter(torch.zeros(sizes.num_tags, sizes.token_width))
        self.wordvec_proj = nn.Linear(sizes.token_width, sizes.query_width)
        bert = BertConfig(
            hidden_size=sizes.query_width,
            intermediate_size=sizes.inner_width,
            num_attention_heads=sizes.query_heads,
            layer_norm_eps=1e-12,
        )
        layers = nn.ModuleList(QueryLayer(bert, sizes.token_width) for _ in range(sizes.query_layers))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = nn.Linear(sizes.query_width, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, num_tags) of normalised images (B, 3, image_size, image_size)."""
        grid = self.visual_encoder.forward_features(images).flatten(1, 2)  # (B, 144, 1536) at full size
        tokens = self.image_proj(torch.cat([grid.mean(1, keepdim=True), grid], dim=1))
        queries = self.wordvec_proj(self.label_embed).relu().expand(len(images), -1, -1)
        for layer in self.tagging_head.get_submodule("encoder.layer").children():
            queries = layer(queries, tokens)
        return self.fc(queries).squeeze(-1)


class Tagger:
    """RAM with its list of tags."""

    def __init__(
        self, network: Ram, tags: Sequence[str], thresholds: Sequence[float], *, image_size: int, device: torch.device
    ) -> None:
        self.network = network.to(device).requires_grad_(False).eval()
        self.tags, self.image_size, self.device = list(tags), image_size, device
        self.thresholds = torch.tensor(thresholds)

    @torch.no_grad()
    def describe(self, images: Sequence[torch.Tensor]) -> list[str]:
        """Return the tags of LR images (3, H, W) RGB in [0, 1], of any sizes, in the order of the list, joined by ", ".

        The image is the LR image itself, as in SeeSR's code, and not the upsampled one that the control branch gets
        (docs/prompts.md). A tag counts where its probability is greater than its threshold.
        """
        batch = prepare(images, self.image_size).to(self.device)
        hits = self.network(batch).float().sigmoid().cpu() > self.thresholds
        return [", ".join(tag for tag, hit in zip(self.tags, row, strict=True) if hit) for row in hits.tolist()]


def prepare(images: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """Resize (3, H, W) in [0, 1] bilinearly to squares, without aliasing, and normalise; returns (B, 3, size, size)."""
    resized = [
        functional.interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True) for image in images
    ]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.cat(resized).cpu() - mean) / std


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a torch file, bare or under `model`; nothing but tensors is unpickled."""
    if not path.is_file():
        raise UserError(f"weights {path}: not found")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and its unpickler raise whatever a wrong file leads them to
        raise UserError(f"weights {path}: refused ({_reason(error)}); wanted a torch file of tensors alone") from None
    found = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"weights {path}: no state dict; wanted names and tensors, bare or under 'model'")
    return found


def _reason(error: Exception) -> str:
    """Return in a few words why torch refused a file; its own advice is to load it all the same."""
    text = str(error).strip()
    if held := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds {held[1]}"
    return "damaged" if not text or "weights_only" in text else text.split("\n")[0].rstrip(" .")


def select(weights: Weights, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights that tagging uses; RAM's file holds the networks of its captions, too."""
    renamed = {name.replace("vision_multi.", "tagging_head."): value for name, value in weights.items()}
    used = {name: value for name, value in renamed.items() if name.split(".")[0] in _PARTS}
    if rest := sorted({name.split(".")[0] for name in renamed.keys() - used.keys()}):
        logger.info("weights %s: no part of tagging: %s", path, ", ".join(rest))
    return {name: value for name, value in used.items() if not _SPARE.fullmatch(name)}


def infer(weights: Weights, path: Path) -> Architecture:
    """Read off the shapes of a state dict what they tell of the architecture."""

    def shape(name: str) -> torch.Size:
        if name not in weights or weights[name].ndim != 2:
            raise UserError(
                f"weights {path}: '{name}' is missing or no matrix; wanted those of RAM with a Swin encoder"
            )
        return weights[name].shape

    blocks = Counter(int(match[1]) for name in weights if (match := _BLOCK.fullmatch(name)))
    stages = [f"visual_encoder.layers.{stage}.blocks.0" for stage in range(max(blocks, default=0) + 1)]
    biases = [shape(f"{stage}.attn.relative_position_bias_table") for stage in stages]
    inner = shape("tagging_head.encoder.layer.0.intermediate.dense.weight")
    head = {name.split(".")[3] for name in weights if name.startswith("tagging_head.encoder.layer.")}
    return Architecture(
        width=shape(f"{stages[0]}.attn.proj.weight")[0],
        depths=tuple(blocks[stage] for stage in range(len(stages))),
        heads=tuple(bias[1] for bias in biases),
        window=(math.isqrt(biases[0][0]) + 1) // 2,
        num_tags=shape("label_embed")[0],
        token_width=shape("label_embed")[1],
        query_width=inner[1],
        inner_width=inner[0],
        query_layers=len(head),
    )


def published(name: str) -> str:
    """Return the name in the published file of a weight of `Ram`: timm merges patches before a stage, RAM after it."""
    match = re.fullmatch(r"(visual_encoder\.layers\.)(\d+)(\.downsample\..*)", name)
    return f"{match[1]}{int(match[2]) - 1}{match[3]}" if match else name


def check(network: Ram, weights: Weights, path: Path) -> None:
    """Raise UserError that names a weight of a published file which is missing, foreign or misshapen."""
    wanted = {published(name): value.shape for name, value in network.state_dict().items()}
    if odd := sorted(wanted.keys() ^ weights.keys()):
        raise UserError(f"weights {path}: '{odd[0]}' {'is missing' if odd[0] in wanted else 'is no part of RAM'}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            found = tuple(weights[name].shape)
            raise UserError(f"weights {path}: '{name}' has shape {found}, wanted {tuple(shape)}")


def merge(weights: Weights, lora: Weights, path: Path) -> dict[str, torch.Tensor]:
    """Return `weights` with the low-rank updates of `lora`, W + (alpha / rank) B A.

    DAPE tunes query and value of the encoder's joint projections, and query and key of the attention of tags. Its file
    has updates of the captioning networks, too; its loss does not reach them, and they are left out as those are.
    """
    updates = select(lora, path)
    for name in updates:
        layer, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B") or f"{layer}.weight" not in weights:
            raise UserError(f"weights {path}: '{name}' is no low-rank update of a layer of RAM")
    if not updates:
        raise UserError(f"weights {path}: no low-rank updates (lora_A, lora_B) of RAM in it")
    merged = dict(weights)
    for layer in sorted({name.rpartition(".")[0] for name in updates}):
        down, up = (updates.get(f"{layer}.{kind}", torch.empty(0)) for kind in ("lora_A", "lora_B"))
        target = weights[f"{layer}.weight"]
        if (update := low_rank(down, up, target.shape)) is None:
            found = " and ".join(str(tuple(part.shape)) for part in (down, up))
            raise UserError(f"weights {path}: '{layer}.lora_A, lora_B' are {found}, unfit for {tuple(target.shape)}")
        merged[f"{layer}.weight"] = target.float() + update
    return merged


def low_rank(down: torch.Tensor, up: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Return (alpha / rank) B A of the wanted shape, or None where A (`down`) and B (`up`) do not give it.

    A joint projection of query, key and value has updates of the first and the last third: A is (2 rank, in), B is
    (2 out / 3, rank), and each half of the one multiplies its half of the other.
    """
    if down.ndim != 2 or up.ndim != 2 or down.shape[1] != shape[1] or not up.shape[1]:
        return None
    rank, scale = up.shape[1], LORA_ALPHA / up.shape[1]
    if (len(down), len(up)) == (rank, shape[0]):
        return scale * up.float() @ down.float()
    if (len(down), 3 * len(up)) == (2 * rank, 2 * shape[0]):
        query, value = (b @ a for a, b in zip(down.float().chunk(2), up.float().chunk(2), strict=True))
        return scale * torch.cat([query, torch.zeros_like(query), value])
    return None


def load(
    ram: Path, dape: Path | None, *, tags: Sequence[str], thresholds: Sequence[float], device: torch.device
) -> Tagger:
    """Load RAM, merge DAPE's low-rank updates where there are any, and name its outputs by `tags`."""
    weights = select(read_weights(ram), ram)
    sizes = infer(weights, ram)
    if len(tags) != sizes.num_tags:
        raise UserError(
            f"config: tags.tag_list: found {len(tags)} tags, wanted {sizes.num_tags} as 'label_embed' of {ram} has rows"
        )
    network = Ram(sizes)
    check(network, weights, ram)
    if dape is not None:
        weights = merge(weights, read_weights(dape), dape)
    network.load_state_dict({name: weights[published(name)] for name in network.state_dict()})
    return Tagger(network, tags, thresholds, image_size=sizes.image_size, device=device)

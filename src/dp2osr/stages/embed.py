"""Text embeddings of one shard, computed once for each distinct prompt, and those of the negative prompt."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import stage, tables
from dp2osr.config import PolicySettings

if TYPE_CHECKING:
    from dp2osr.models.backend import Backend, Embeddings

LOG = logging.getLogger("embed")
BATCH = 32  # prompts in one pass of the text encoder


def embed(backend: "Backend", prompts: Sequence[str]) -> "Embeddings":
    """Return the embeddings of prompts, first dimension P, computed in batches."""
    import torch

    starts = range(0, len(prompts), BATCH)
    each = stage.progress(starts, len(starts), f"batches of {BATCH} prompts", LOG)
    batches = [backend.embed_prompts(prompts[start : start + BATCH]) for start in each]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the prompts of a shard, write their embeddings."""
    parser = stage.parser(__doc__)
    parser.add_argument("--prompts", type=Path, required=True, help="prompts of the shard")
    parser.add_argument("--embeddings", type=Path, required=True, help="output: safetensors")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    stage.config_arg(parser, PolicySettings)
    args = stage.parse_args(parser, argv)
    from dp2osr.models.backend import load_backend, write_embeddings

    table = tables.read(args.prompts, tables.PROMPTS)
    backend = load_backend(args.config, device=stage.device(args.device), parts=frozenset({"text"}))
    prompts = table["prompt"].tolist()
    negative = backend.embed_prompts([args.config.sampling.negative_prompt])
    distinct = embed(backend, sorted(set(prompts))) if prompts else negative
    write_embeddings(args.embeddings, table["group_id"].tolist(), prompts, distinct, negative)


if __name__ == "__main__":
    stage.run(main)

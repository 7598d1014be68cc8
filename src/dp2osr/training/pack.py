"""The training pack: encoded candidates of each group in tar shards, read by random access.

A sample is a group; its one field `safetensors` holds `latents` (K, C, h, w), `rollouts` (K,) int64 and `control`.
"""

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from dp2osr.errors import UserError

FIELD = "safetensors"


class TarIndex:
    """Where each sample's fields lie in some tar shards: only headers are read until a field is wanted."""

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self._places: dict[str, tuple[Path, int, int]] = {}
        for path in map(Path, paths):
            try:
                with tarfile.open(path) as tar:
                    for member in tar:
                        self._places[member.name] = (path, member.offset_data, member.size)
            except (tarfile.TarError, EOFError) as error:
                raise UserError(f"shard {path}: truncated or damaged ({error}); delete it and run again") from None

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes:
        """Return the bytes of member `name`, which is `key.field`."""
        path, offset, size = self._places[name]
        with path.open("rb") as handle:
            handle.seek(offset)
            data = handle.read(size)
        if len(data) != size:
            raise UserError(f"shard {path}: truncated at {name}; delete it and run again")
        return data


def dump_group(latents: torch.Tensor, rollouts: Sequence[int], control: torch.Tensor) -> bytes:
    """Return one group's sample: latents (K, ...) of the rollouts in order, control (...) of the LR image."""
    tensors = {
        "latents": latents.float().cpu().contiguous(),
        "rollouts": torch.tensor(rollouts, dtype=torch.int64),
        "control": control.float().cpu().contiguous(),
    }
    return save(tensors)


class Pack:
    """The encoded groups of a run."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._index = TarIndex(paths)
        self._paths = ", ".join(str(path) for path in paths)

    def check(self, group_ids: Iterable[str]) -> None:
        """Raise UserError where a group is missing."""
        for group_id in group_ids:
            if f"{group_id}.{FIELD}" not in self._index:
                raise UserError(f"encoded shards {self._paths}: group {group_id} is missing, though pairs has it")

    def load(self, group_id: str, rollouts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents (len(rollouts), C, h, w) and the control (...) of a group, float32 on the CPU."""
        tensors = load(self._index.read(f"{group_id}.{FIELD}"))
        places = {rollout: place for place, rollout in enumerate(tensors["rollouts"].tolist())}
        if missing := [rollout for rollout in rollouts if rollout not in places]:
            raise UserError(f"encoded shards {self._paths}: rollout {missing[0]} of group {group_id} is missing")
        return tensors["latents"][[places[rollout] for rollout in rollouts]], tensors["control"]

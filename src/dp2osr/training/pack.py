"""The training pack: encoded candidates of each group in tar shards, read by random access.

A sample is a group. Its field `safetensors` holds `latents` (K, C, h, w) float32 and `rollouts` (K,) int64; with them
`control`, where the control branch takes latents. Where it takes the upsampled LR image, `scale` stands in its place,
and beside it the LR image itself, as field `lr.png`: upsampled at each read it is the same to the last bit, at a
hundredth of the size.
"""

import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from dp2osr.errors import UserError
from dp2osr.sampling import images_control
from dp2osr.shards import decode_image

FIELD, LR_FIELD = "safetensors", "lr.png"


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


def dump_group(
    latents: torch.Tensor, rollouts: Sequence[int], *, control: torch.Tensor | None = None, scale: int = 0
) -> bytes:
    """Return the field `safetensors` of a group: latents (K, ...) of the rollouts in order.

    control (...): of the LR image; without it, `scale` says how much larger it is than the field `lr.png`.
    """
    tensors = {"latents": latents.float().cpu().contiguous(), "rollouts": torch.tensor(rollouts, dtype=torch.int64)}
    if control is None:
        return save(tensors | {"scale": torch.tensor(scale)})
    return save(tensors | {"control": control.cpu().contiguous()})


class Pack:
    """The encoded groups of a run."""

    def __init__(self, paths: Sequence[Path | str], prepare: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """prepare: makes the control branch's input of upsampled LR images, `prepare_control` of the backend."""
        self._index, self._prepare = TarIndex(paths), prepare
        self._paths = ", ".join(str(path) for path in paths)

    def check(self, group_ids: Iterable[str]) -> None:
        """Raise UserError where a group is missing."""
        for group_id in group_ids:
            if f"{group_id}.{FIELD}" not in self._index:
                raise UserError(f"encoded shards {self._paths}: group {group_id} is missing, though pairs has it")

    def load(self, group_id: str, rollouts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents (len(rollouts), C, h, w) and the control (...) of a group, both float32."""
        tensors = load(self._index.read(f"{group_id}.{FIELD}"))
        places = {rollout: place for place, rollout in enumerate(tensors["rollouts"].tolist())}
        if missing := [rollout for rollout in rollouts if rollout not in places]:
            raise UserError(f"encoded shards {self._paths}: rollout {missing[0]} of group {group_id} is missing")
        control = tensors["control"] if "control" in tensors else self._control(group_id, int(tensors["scale"]))
        return tensors["latents"][[places[rollout] for rollout in rollouts]], control.float().contiguous()

    def _control(self, group_id: str, scale: int) -> torch.Tensor:
        """Return the control of a group's LR image, by the very steps of a rollout."""
        lr = decode_image(self._index.read(f"{group_id}.{LR_FIELD}"))
        return self._prepare(images_control(lr[None], scale))[0]

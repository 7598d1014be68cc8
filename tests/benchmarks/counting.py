"""Floating-point operations and bytes of each stage: of a call that runs, or at true size on torch's `meta` device.

`counted` watches a call. `report` counts a rollout, an encode and a DPO step without computing anything, and sets them
beside what cards can do: the least seconds a unit, and which share of the card a time means. Counted, not measured:
products and convolutions count (2 a multiply-add), sums, norms and activations do not.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import random_model
import torch
import ways
from diffusers import ModelMixin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dp2osr import config
from dp2osr.iqa.pretrained import replaced
from dp2osr.models import parts, sd
from dp2osr.models.footprint import META
from dp2osr.models.ledger import LikeGpu, recomputing
from dp2osr.models.memory import LOWER


@dataclass(frozen=True)
class Count:
    """What a unit takes. flops: of products and convolutions in all; slow: those of them in float32.

    weights: bytes of parameters that are read; moved: bytes if every operation reads its inputs from memory and writes
    its outputs there. What a card moves is between the two: kernels that do several operations in one move less.
    """

    flops: float = 0.0
    slow: float = 0.0
    weights: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Count") -> "Count":
        names = self.__dataclass_fields__
        return Count(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __mul__(self, factor: float) -> "Count":
        return Count(**{name: getattr(self, name) * factor for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Card:
    """FLOP/s of dense products in half precision, and of float32 convolutions as torch does them (TF32); bytes/s."""

    name: str
    half: float
    single: float
    memory: float

    def seconds(self, count: Count) -> float:
        """Return the least seconds: arithmetic at the card's rates, or reading the weights where that takes longer."""
        arithmetic = (count.flops - count.slow) / self.half + count.slow / self.single
        return max(arithmetic, count.weights / self.memory)

    def traffic(self, count: Count) -> float:
        """Return the seconds in which memory moves what operations one by one read and write."""
        return count.moved / self.memory


# H200: 790 measured by others for dense bfloat16, of 989 in its data sheet; TF32 and memory from the data sheet.
CARDS = (Card("H200", 790e12, 495e12, 4.8e12), Card("A800", 312e12, 156e12, 2.0e12))
PAPER_CARD, GOAL_CARD = CARDS[1], CARDS[0]
PAPER_SECONDS = {"sd2-base": 2.52, "flux-dev": 6.48}  # of an A800 for a candidate
GOAL_SECONDS = {"sd2-base": 0.35, "flux-dev": 2.4}  # of an H200


class Counter(TorchDispatchMode):
    """Operations, by the formulas of torch's FlopCounterMode, and bytes of their inputs and outputs, while entered.

    Views and empty tensors move nothing. FlopCounterMode itself follows modules, too, which takes longer than `meta`
    does and stumbles over trainable weights under no_grad (A-FINE's).
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights: set[int] = set()  # storages of parameters, which linear layers use by a view
        self.flops = self.weights = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                found = func.decompose(*args, **kwargs)  # what is made of other operations is counted as these
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=found) if formula else 0
        self._add_bytes(func, _tensors((args, kwargs)), _tensors(found))
        return found

    def _add_bytes(self, func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        self._weights |= {_place(each) for each in given if isinstance(each, nn.Parameter)}
        view = not func._schema.is_mutable and not {_place(each) for each in made}.isdisjoint(map(_place, given))
        if not view and "empty" not in func._schema.name:
            self.moved += sum(map(_bytes, (*given, *made)))
            self.weights += sum(_bytes(each) for each in given if _place(each) in self._weights)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; one that is expanded has no more than its storage."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def counted(work: Callable[[], Any]) -> Count:
    """Return what a call takes."""
    with Counter() as counter:
        work()
    return Count(flops=counter.flops, weights=counter.weights, moved=counter.moved)


class HollowAccelerator:
    """What training asks of accelerate, for one process on `meta`, with autocast to `lower` as a GPU has it."""

    device = META
    process_index, num_processes = 0, 1

    def __init__(self, lower: torch.dtype | None) -> None:
        self._lower = lower

    def autocast(self) -> LikeGpu:
        """Return the context of a forward pass."""
        return LikeGpu(self._lower)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate."""
        loss.backward()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """Return the sum over one process."""
        return tensor


@contextlib.contextmanager
def sharing(neighbours: int) -> Iterator[None]:
    """Take so many neighbours in a batch as equal images, 0: all. Which are is in their values; `meta` holds none."""

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(images: torch.Tensor, **options: Any) -> torch.Tensor:
            each = neighbours or len(images)
            found: torch.Tensor = function(images[::each], **options)
            return found.repeat_interleave(each, dim=0)

        return wrapped

    with replaced(sd, "once_an_image", once), replaced(parts, "once_an_image", once):
        yield


@contextlib.contextmanager
def recomputed(lower: torch.dtype | None) -> Iterator[None]:
    """Let what gradient checkpointing recomputes be as on a GPU, too."""
    enable = ModelMixin.enable_gradient_checkpointing
    with replaced(ModelMixin, "enable_gradient_checkpointing", lambda module: enable(module, recomputing(lower))):
        yield


def rollout(setup: ways.Setup) -> tuple[Count, Count]:
    """Return what a candidate takes in all steps of sampling, and in the VAE: decoding, and its share of the control.

    A step is counted and multiplied: what a scheduler does beside the networks is sums.
    """
    backend, sampler = setup.backend, setup.policy.sampling
    branch = setup.branch(backend.dtype).requires_grad_(False)
    two = backend.backbone_folder == "unet" and sampler.guidance > 1
    count = setup.batch * (2 if two else 1)
    latents = torch.empty(count, *random_model.latent_shape(backend, setup.size), device=META, dtype=backend.dtype)
    images = torch.empty(setup.batch, 3, setup.size, setup.size, device=META)
    with torch.no_grad(), sharing(0), LikeGpu(None):
        prepared = counted(lambda: backend.prepare_control(images))
        control = backend.prepare_control(torch.empty(count, *images.shape[1:], device=META))
        inputs = (latents, torch.empty(count, device=META), control, setup.embeddings(count))
        step = counted(lambda: backend.predict(branch, *inputs))
        decoding = counted(lambda: backend.decode_latents(latents[: setup.batch]))
    passes = 2 if not two and sampler.true_guidance > 1 else 1
    return step * (sampler.steps * passes / setup.batch), _single(decoding + prepared, setup) * (1 / setup.batch)


def _single(count: Count, setup: ways.Setup) -> Count:
    """Return the VAE's count, in float32 where that is its dtype."""
    return replace(count, slow=count.flops if setup.policy.sampling.vae_dtype == "float32" else 0.0)


def encode(setup: ways.Setup) -> Count:
    """Return what a candidate's encoding takes, all candidates being different."""
    images = torch.empty(setup.batch, 3, setup.size, setup.size, device=META)
    with torch.no_grad(), sharing(1), LikeGpu(None):
        found = counted(lambda: setup.backend.encode_images(images))
    return _single(found, setup) * (1 / setup.batch)


def dpo(setup: ways.Setup, way: str) -> Count:
    """Return what a pair takes in a step of 2N images: way is `groups`, `pairs` or `textbook`."""
    settings = ways.step_settings(setup, "groups" if way == "groups" else "pairs")
    make = ways.textbook if way == "textbook" else ways.our_step
    with sharing(0 if way == "groups" else 2), recomputed(LOWER[settings.precision]):
        step = make(setup, settings)
        found = counted(step)
    return found * (1 / (setup.top**2 if way == "groups" else setup.top))


def hollow(
    policy: config.PolicySettings, train: config.TrainSettings, *, size: int, batch: int, top: int
) -> ways.Setup:
    """Return models on `meta`; policy: of configurations that random_model.policy has written."""
    backend = random_model.load(policy, META)
    accelerator, speed = HollowAccelerator(LOWER[train.precision]), random_model.settings("sd2-base").rollout.speed
    return ways.Setup(backend, policy, train, size, batch, top, backend.dtype, accelerator, speed)


def stages(
    policy: config.PolicySettings, train: config.TrainSettings, *, size: int, batch: int, top: int
) -> Iterator[tuple[str, Count]]:
    """Yield what is counted and its count, a unit: a candidate (an image) or a pair."""
    sizes = {"size": size, "top": top}
    setup = hollow(policy, train, batch=batch, **sizes)
    sampled, pixels = rollout(setup)
    yield "candidate: all steps", sampled
    yield "candidate: VAE", pixels
    yield CANDIDATE, sampled + pixels
    yield "candidate, one at a time", sum(rollout(hollow(policy, train, batch=1, **sizes)), start=Count())
    yield "encode, image", encode(setup)
    yield GROUPS, dpo(setup, "groups")
    kept = train.model_copy(update={"gradient_checkpointing": False})
    if train.gradient_checkpointing:
        yield "pair of a group, all kept", dpo(hollow(policy, kept, batch=batch, **sizes), "groups")
    yield "pair by pair", dpo(setup, "pairs")
    yield TEXTBOOK, dpo(setup, "textbook")


CANDIDATE, GROUPS, TEXTBOOK = "candidate", "pair of a group", "pair, textbook"


def report(
    architecture: str, policy: config.PolicySettings, train: config.TrainSettings, *, size: int, batch: int, top: int
) -> Iterator[str]:
    """Yield the lines of the table, and what it says of the paper's time and of the goal."""
    yield f"counted, not measured; {batch} candidates at once, {2 * top} images a DPO step; a unit takes"
    least = "".join(f"{'least s, ' + card.name:>15}{'traffic s':>11}" for card in CARDS)
    yield f"{'unit':27}{'TFLOP':>9}{'GB weights':>12}{'GB moved':>10}{least}"
    found = {}
    for name, count in stages(policy, train, size=size, batch=batch, top=top):
        found[name] = count
        cards = "".join(f"{card.seconds(count):>15.4f}{card.traffic(count):>11.4f}" for card in CARDS)
        yield f"{name:27}{count.flops / 1e12:>9.3f}{count.weights / 1e9:>12.2f}{count.moved / 1e9:>10.1f}{cards}"
    whole = found[CANDIDATE]
    for what, card, seconds in (
        ("the paper's", PAPER_CARD, PAPER_SECONDS[architecture]),
        ("the goal of", GOAL_CARD, GOAL_SECONDS[architecture]),
    ):
        share = whole.flops / seconds / card.half
        yield f"{what} {seconds} s a candidate on one {card.name}: {share:.0%} of {card.half / 1e12:.0f} TFLOP/s"
    yield f"textbook / group, a pair, by operations alone: {found[TEXTBOOK].flops / found[GROUPS].flops:.2f}"

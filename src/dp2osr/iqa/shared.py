"""What a full-reference metric computes of the HR image alone, computed once for all candidates of its group.

pyiqa's metrics call functions of one image for the candidates and for the HR image, in an order that repeats. FEATURES
names those functions and the order. While a metric runs, each is replaced by itself with a memory: the HR image's
result is kept from batch to batch, and is used again only where every argument is equal to the kept call's. So another
HR image, another size or another order of calls in a later pyiqa costs time, never a wrong score. Only the calls marked
r trust what pyiqa does with them; a test holds it to that.

The memory holds one HR image a function and call. An HR image is always computed alone, in a batch of one, so that no
score depends on where a job began or went on.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dp2osr.iqa.kernels import KERNELS, Wrap
from dp2osr.iqa.pretrained import replaced


@dataclass(frozen=True)
class Feature:
    """A function of one image: `module.function` of pyiqa.archs, or `net.…` of the metric.

    calls: whose image its calls in one run of the metric are for, again and again: c the candidates', h the HR image's;
    b: the HR image's too, where the metric needs no copy for each candidate: one image, which torch broadcasts, so that
    what the metric computes of it further on is computed of one image;
    r: nobody's, for the metric does not use what it computes of it, so the result of the call before is repeated.
    """

    place: str
    calls: str = "ch"


SSIM = Feature("ssim_arch.filter2", "chchc")  # of X, Y, X², Y² and XY, at each scale
FEATURES: dict[str, tuple[Feature, ...]] = {
    "ssim": (Feature("func_util.to_y_channel", "cb"), SSIM),
    "ms_ssim": (Feature("func_util.to_y_channel"), SSIM),
    "fsim": (Feature("fsim_arch._phase_congruency"), Feature("fsim_arch.rgb2yiq", "cb")),
    "vif": (
        Feature("vif_arch.SteerablePyramidSpace"),
        Feature("net.corrDn_win", "hcchc"),
        Feature("net.refparams_vecgsm", "h"),
    ),
    "vsi": (Feature("vsi_arch.sdsp"), Feature("vsi_arch.rgb2lmn")),
    "gmsd": (Feature("gmsd_arch.to_y_channel", "cb"),),
    "nlpd": (Feature("nlpd_arch.to_y_channel", "cb"), Feature("net.pyramid")),
    "mad": (Feature("mad_arch.gaborconvolve", "hc"), Feature("mad_arch.ical_stat", "hc")),
    "lpips": (Feature("net.net.forward", "hc"),),
    "topiq_fr": (Feature("net.semantic_model.forward"),),
    "afine_fr": (Feature("net.clip_model.encode_image"), Feature("net.net_qhead.forward")),
    # pyiqa compares the image with itself, and then returns what it has computed of the image alone
    "afine_nr": (Feature("net.clip_model.encode_image", "cr"), Feature("net.net_qhead.forward", "cr")),
}
# Functions of the image's size alone, which pyiqa computes anew for each batch.
CONSTANTS: dict[str, tuple[str, ...]] = {
    "ssim": ("ssim_arch.fspecial",),
    "ms_ssim": ("ssim_arch.fspecial",),
    "fsim": ("fsim_arch._construct_filters",),
    "vif": ("vif_arch.sp5_filters",),
    "vsi": ("vsi_arch._log_gabor",),
    "mad": ("mad_arch.make_csf",),
}
# Functions of the metric's own filters, or of these (h) and of images (c) in turn: what they return of filters is kept.
FILTERS: dict[str, tuple[Feature, ...]] = {
    "fsim": (Feature("fsim_arch.torch.fft.ifft2", "hc"),),
    "nlpd": (Feature("nlpd_arch.tf.rotate", "h"),),
}
SIZES = 4  # image sizes whose constants are kept


class Library:
    """A library as one module of pyiqa sees it: the same, but for the functions that are set here."""

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        """Return what the library has."""
        return getattr(self._library, name)


Libraries = dict[tuple[Any, str], Library]  # by the module that sees it and its name there


class SharedHr:
    """The functions of one metric, with a memory or faster; without effect for a metric that is not in the tables."""

    def __init__(self, model: Any) -> None:
        name = getattr(model, "metric_name", "")  # pyiqa's, of whatever variant
        libraries: Libraries = {}
        functions: dict[tuple[Any, str], Callable[..., Any]] = {}
        self._kept: list[Kept] = []

        def put(place: str, wrap: Wrap) -> None:
            where = _find(place, model, libraries)
            functions[where] = wrap(functions.get(where, getattr(*where)))

        for place, faster in KERNELS.get(name, {}).items():
            put(place, faster)
        for feature in (*FEATURES.get(name, ()), *FILTERS.get(name, ())):
            put(feature.place, functools.partial(self._keep, calls=feature.calls))
        for place in CONSTANTS.get(name, ()):
            put(place, once_a_size)
        self._replaced: list[tuple[Any, str, Any]] = [
            (*where, function) for where, function in (*libraries.items(), *functions.items())
        ]

    def _keep(self, function: Callable[..., Any], calls: str) -> "Kept":
        self._kept.append(Kept(function, calls))
        return self._kept[-1]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Replace the functions while the metric scores one batch beside one HR image."""
        with contextlib.ExitStack() as stack:
            for kept in self._kept:
                kept.begin()
            for owner, key, function in self._replaced:
                stack.enter_context(replaced(owner, key, function))
            yield

    def forget(self) -> None:
        """Free what is kept."""
        for kept in self._kept:
            kept.forget()


class Kept:
    """A function of one image that keeps its results for the HR image.

    Tensors have the batch as first dimension; one of another length is the same for all images.
    """

    def __init__(self, function: Callable[..., Any], calls: str) -> None:
        self._function = function
        self._calls = calls
        self._count = 0
        self._last: Any = None
        self._memory: dict[int, tuple[Any, Any]] = {}

    def begin(self) -> None:
        """Say that the metric begins to score a batch."""
        self._count, self._last = 0, None

    def forget(self) -> None:
        """Free what is kept."""
        self._memory.clear()

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return what the function returns for these images."""
        call, self._count = self._count, self._count + 1
        whose = self._calls[call % len(self._calls)]
        if whose == "r":
            return self._last
        if whose == "c":
            result = self._function(*args, **options)
            self._last = result if "r" in self._calls else None
            return result
        given, batch = (args, options), len(args[0][0] if isinstance(args[0], list) else args[0])
        known, result = self._memory.get(call, (None, None))
        if not _same(given, known):
            one = _map(lambda part: part[:1] if part.ndim and len(part) == batch else part, given)
            if not _same(given, one):
                return self._function(*args, **options)
            known = _map(torch.clone, one)
            result = self._function(*one[0], **one[1])
            self._memory[call] = (known, result)
        if batch == 1 or whose == "b":
            return result
        return _map(lambda part: part.expand(batch, *part.shape[1:]), result)


def once_a_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that looks at no image, only at its size, kind and device; the last few sizes are kept."""
    kept: dict[Any, Any] = {}

    def wrapped(*args: Any, **options: Any) -> Any:
        parts = (*args, *sorted(options.items()))
        key = tuple((part.shape[-2:], part.dtype, part.device) if torch.is_tensor(part) else part for part in parts)
        if key not in kept:
            if len(kept) == SIZES:
                del kept[next(iter(kept))]
            kept[key] = function(*args, **options)
        return kept[key]

    return wrapped


def _find(place: str, model: Any, libraries: Libraries) -> tuple[Any, str]:
    """Return the owner of a function and its name there; `libraries` gets those on the way, for this module alone."""
    root, *path, name = place.split(".")
    owner = getattr(model, root) if root == "net" else importlib.import_module(f"pyiqa.archs.{root}")
    for step in path:
        part = getattr(owner, step)
        if isinstance(part, ModuleType):
            part = libraries.setdefault((owner, step), Library(part))
        owner = part
    return owner, name


def _map(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Apply a function to the tensors in lists, tuples and dicts."""
    if torch.is_tensor(tree):
        return function(tree)
    if isinstance(tree, list | tuple):
        parts = [_map(function, part) for part in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    if isinstance(tree, dict):
        return {key: _map(function, part) for key, part in tree.items()}
    return tree


def _same(found: Any, one: Any) -> bool:
    """Whether all arguments are those of `one`, in which a batch of images is a batch of one."""
    if torch.is_tensor(found) and torch.is_tensor(one):
        alike = (found.shape[1:], found.dtype, found.device) == (one.shape[1:], one.dtype, one.device)
        return alike and len(one) in (1, len(found)) and torch.equal(found, one.expand_as(found))
    if isinstance(found, list | tuple) and isinstance(one, list | tuple):
        return len(found) == len(one) and all(map(_same, found, one))
    if isinstance(found, dict) and isinstance(one, dict):
        return found.keys() == one.keys() and all(_same(part, one[key]) for key, part in found.items())
    if isinstance(found, np.ndarray):
        return np.array_equal(found, one)
    return bool(type(found) is type(one) and found == one)

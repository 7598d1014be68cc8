"""Metrics with weights: where pyiqa finds them, how they are loaded safely, and what is said where they are missing.

pyiqa's metrics load through torch.hub's folder (torchvision, timm, pyiqa's and CLIP's files) and huggingface_hub's
cache (timm, transformers). Both follow the environment (weights.environment); A-FINE's CLIP lies in the home folder.
"""

import contextlib
import functools
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from dp2osr import weights
from dp2osr.errors import UserError, in_one_line

CONNECT_S = 15.0  # seconds that a download of weights may wait for an answer
ONE_ALIGN = "hub:q-future/one-align"  # the repository that pyiqa's Q-Align loads
ONE_ALIGN_FILES = ("config.json", "preprocessor_config.json", "tokenizer.model")  # and weights, which it checks itself
SAFE_LOAD = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load then overrides pyiqa's weights_only=False


def create(name: str, device: torch.device) -> Any:
    """Return pyiqa's metric `name`, from the cache in use alone where there is one; else it may be downloaded.

    Whatever fails becomes one UserError.
    """
    weights.require(f"metric:{name}")
    folder = weights.in_use()
    try:
        return load(name, device, folder=folder, offline=folder is not None)
    except Exception as error:  # pyiqa's metrics load through five libraries, each with errors of its own
        where = f"the weights cache {folder}" if folder else f"{_default_places()}, and they could not be downloaded"
        raise UserError(
            f"metric '{name}': no weights in {where} ({in_one_line(error)}); {weights.remedy(folder)}"
        ) from error


def load(name: str, device: torch.device, *, folder: Path | None, offline: bool) -> Any:
    """Let pyiqa create a metric, without running code from a pickle or a hub; `offline`: no file is fetched by URL."""
    import pyiqa

    waiting = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_S)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            stack.enter_context(_safe_load())
            if offline:
                stack.enter_context(_no_downloads())
            if name.startswith("afine") and folder is not None:
                stack.enter_context(_clip_in(folder))
            if name == "qalign":
                stack.enter_context(_one_align(offline=offline))
            return pyiqa.create_metric(name, device=device)
    finally:
        socket.setdefaulttimeout(waiting)


def _default_places() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE
    from pyiqa.utils.download_util import DEFAULT_CACHE_DIR

    return f"{DEFAULT_CACHE_DIR}, {torch.hub.get_dir()} or {HF_HUB_CACHE}"


@contextlib.contextmanager
def _safe_load() -> Iterator[None]:
    before = os.environ.get(SAFE_LOAD)
    os.environ[SAFE_LOAD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_LOAD]
        else:
            os.environ[SAFE_LOAD] = before


class _Refusing(urllib.request.OpenerDirector):
    """What urlopen uses while nothing may be downloaded: the error names the file."""

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        """Raise FileNotFoundError."""
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        raise FileNotFoundError(f"{url.rpartition('/')[2]} is missing")


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
    urllib.request.install_opener(_Refusing())
    try:
        yield
    finally:
        urllib.request.install_opener(urllib.request.build_opener())


@contextlib.contextmanager
def _clip_in(folder: Path) -> Iterator[None]:
    """A-FINE's copy of CLIP's loader looks into the home folder; let it look where pyiqa's other CLIP metrics do."""
    from pyiqa.archs import afine_arch

    root = str(folder / "torch" / "hub" / "clip")
    with replaced(afine_arch, "load", functools.partial(afine_arch.load, download_root=root)):
        yield


@contextlib.contextmanager
def _one_align(*, offline: bool) -> Iterator[None]:
    """Let pyiqa load Q-Align through `_load_one_align`; `offline`: what the cache lacks is an error that names it."""
    from pyiqa.archs import qalign_arch

    if offline:
        _require_one_align()
    loader = SimpleNamespace(from_pretrained=functools.partial(_load_one_align, qalign_arch.MPLUGOwl2LlamaForCausalLM))
    with replaced(qalign_arch, "MPLUGOwl2LlamaForCausalLM", loader):
        yield


def _require_one_align() -> None:
    """Raise what names a file that is missing, or a broken tokenizer: what transformers says of them does not."""
    from sentencepiece import SentencePieceProcessor

    folder = weights.snapshot(weights.hub_cache(), weights.parse_hub(ONE_ALIGN))
    for name in ONE_ALIGN_FILES:
        if folder is None or not (folder / name).is_file():
            raise FileNotFoundError(f"{name} of {ONE_ALIGN} is missing")
    assert folder is not None
    try:
        SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except RuntimeError as error:
        raise ValueError(f"tokenizer.model of {ONE_ALIGN} is no SentencePiece model") from error


def _load_one_align(kind: Any, repo: str, **options: Any) -> Any:
    """Load pyiqa's class of Q-Align whole, without the repository's code, and mend what transformers 5 broke of it.

    pyiqa 0.1.16 calls a method that PreTrainedModel has lost: without it no image is scored. And Llama's tokenizer used
    to begin each text with BOS unless its settings said no; now it does where they say yes. Q-Align's prompt has one.
    """
    model, told = kind.from_pretrained(repo, **options | {"trust_remote_code": False, "output_loading_info": True})
    if missing := sorted(told["missing_keys"]):  # transformers fills them with random numbers and warns
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    abstractor = model.get_model().visual_abstractor
    abstractor.invert_attention_mask = functools.partial(_inverted, dtype=model.dtype)
    if "add_bos_token" not in model.tokenizer.init_kwargs:
        model.tokenizer.add_bos_token = True
    return model


def _inverted(mask: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Return what attention adds to its logits, (B, 1, 1, S): 0 where a mask (B, S) is 1, the lowest number where 0."""
    return (1 - mask[:, None, None].to(dtype)) * torch.finfo(dtype).min


@contextlib.contextmanager
def replaced(owner: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    """Give a module or class another function, or what else it has, for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)

"""Models that lie in folders in transformers' layout, loaded without the network and without code from the folder."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from dp2osr.errors import UserError

SAFE = {"local_files_only": True, "trust_remote_code": False}

disable_progress_bar()  # of weights that are loaded in a moment; logs are plain lines


def load(kind: Any, folder: Path, *, what: str, **options: Any) -> Any:
    """Load a part of a model by a class of transformers, with its options; UserError names `what` and the folder."""
    try:
        return kind.from_pretrained(folder, **options, **SAFE)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{what} {folder}: cannot be loaded ({first}); wanted transformers' layout") from None

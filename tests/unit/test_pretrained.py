"""Weights of pyiqa's metrics: none is a pickle that runs, and one that is missing is named and not downloaded."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dp2osr import weights
from dp2osr.errors import UserError
from dp2osr.iqa import pretrained


class Executed:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_no_pickle_of_a_metric_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa itself loads with weights_only=False."""
    from pyiqa.archs import musiq_arch
    from pyiqa.utils import download_util

    monkeypatch.delenv(weights.VARIABLE, raising=False)
    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path))
    name = musiq_arch.default_model_urls["koniq10k"].rpartition("/")[2]
    (tmp_path / name).write_bytes(pickle.dumps({"x": Executed(tmp_path / "executed")}))
    with pytest.raises(UserError, match=r"metric 'musiq': no weights .*UnpicklingError.*dp2osr fetch-weights"):
        pretrained.create("musiq", torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "file"), [("afine_nr", "ViT-B-32.pt"), ("clipiqa+", "RN50.pt"), ("musiq", "musiq_koniq_ckpt-")]
)
def test_a_missing_file_is_named_and_not_downloaded(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without manifest, too; A-FINE's CLIP is looked for in the cache, not in the home folder."""
    from pyiqa.utils import download_util

    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path / "pyiqa"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=rf"metric '.*': no weights in the weights cache .*{file}.* is missing"):
        pretrained.create(name, torch.device("cpu"))
    assert not (tmp_path / "home").exists()

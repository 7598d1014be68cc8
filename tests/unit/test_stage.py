"""What all stage command lines share: errors in one line, settings as JSON, device, progress."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dp2osr import config, stage
from dp2osr.errors import UserError

STAGES = sorted(path.stem for path in (Path(stage.__file__).parent / "stages").glob("[!_]*.py"))
EVALUATE = {"bootstrap": 10, "confidence": 0.9}


def failing(error: Exception) -> Callable[[], None]:
    """Return a main function that raises `error`."""

    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("table s.parquet: not found"), "table s.parquet: not found"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.tar"), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "out.tar"), "Read-only file system"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "weights"), "weights"),
    ],
)
def test_a_users_error_is_one_line(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DP2OSR_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        stage.run(failing(error))
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert line in printed
    assert printed.count("\n") == 1


def test_a_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DP2OSR_DEBUG", "1")
    with pytest.raises(UserError):
        stage.run(failing(UserError("wrong")))


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        stage.run(failing(ZeroDivisionError()))


def test_settings_are_validated_json() -> None:
    parser = stage.parser("A stage.")
    stage.config_arg(parser, config.EvaluateSettings)
    args = stage.parse_args(parser, ["--config", json.dumps(EVALUATE)])
    assert args.config == config.EvaluateSettings(**EVALUATE)


@pytest.mark.parametrize("text", ["{", json.dumps(EVALUATE | {"bootstrp": 1})])
def test_wrong_settings_are_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = stage.parser("A stage.")
    stage.config_arg(parser, config.EvaluateSettings)
    with pytest.raises((SystemExit, UserError)) as found:
        stage.parse_args(parser, ["--config", text])
    message = capsys.readouterr().err + str(found.value)
    assert "not JSON" in message or "bootstrp" in message
    assert "Traceback" not in message


def test_device() -> None:
    import torch

    assert stage.device("cpu") == torch.device("cpu")
    assert stage.device("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device"):
            stage.device("cuda")


def test_progress_yields_everything_and_says_so_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert list(stage.progress(iter("abc"), 3, "images", logging.getLogger("x"))) == ["a", "b", "c"]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("images: 3 of 3")


def test_progress_leaves_out_of_the_rate_what_was_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 3.0, 5.0, 7.0])
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        assert len(list(stage.progress("abcd", 5, "images", logging.getLogger("x"), every_s=4, kept=1))) == 4
    assert caplog.messages == ["images: 3 of 5, 0.50/s, 4 s left"]


def test_progress_where_all_was_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        list(stage.progress("ab", 2, "images", logging.getLogger("x"), kept=2))
    assert caplog.messages == ["images: 2 of 2, 0.00/s, 0 s left"]


def test_help_of_every_stage_loads_no_torch() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    main = importlib.import_module(f'dp2osr.stages.{name}').main\n"
        "    try:\n"
        "        main(['--help'])\n"
        "    except SystemExit as stopped:\n"
        "        assert not stopped.code, name\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    command = [sys.executable, "-c", code, *STAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("usage:") == len(STAGES)


def test_a_model_loads_without_bitsandbytes_which_stays_at_hand(tiny_model: Path, root: Path) -> None:
    code = (
        "import importlib.util, pathlib, sys, training_rig\n"
        "training_rig.make_backend(pathlib.Path(sys.argv[1]))\n"
        "assert 'diffusers' in sys.modules and 'bitsandbytes' not in sys.modules\n"
        "assert importlib.util.find_spec('bitsandbytes') is not None\n"
    )
    environment = os.environ | {"PYTHONPATH": str(root / "tests")}
    command = [sys.executable, "-c", code, str(tiny_model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

"""What all stage command lines share: arguments, logging, errors in one line, device, progress."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from dp2osr import strict, weights
from dp2osr.errors import UserError
from dp2osr.stopping import STOP, TERMINATED

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LOG = logging.getLogger("stage")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser whose description is the module's docstring."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return found


def config_arg(found: argparse.ArgumentParser, model: type[strict.Strict], name: str = "--config") -> None:
    """Add `--config JSON`, or another `name`, validated as `model`."""

    def parse(text: str) -> strict.Strict:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
        try:
            return strict.parse(model, data)
        except UserError as error:  # argparse hides the text of a ValueError
            raise argparse.ArgumentTypeError(str(error)) from None

    found.add_argument(name, type=parse, required=True, metavar="JSON", help=f"settings ({model.__name__})")


def parse_args(found: argparse.ArgumentParser, argv: Any) -> argparse.Namespace:
    """Parse the command line and set up logging to standard error."""
    args = found.parse_args(argv)
    logging.basicConfig(level=args.log_level, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", force=True)
    for noisy in ("PIL", "matplotlib", "httpx", "fsspec", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return args


def run(main: Callable[[], None]) -> None:
    """Run a command; a user's error is one line on standard error and exit code 1 (DP2OSR_DEBUG=1: a traceback).

    SIGTERM ends it with exit code 143: between the items of a `progress`, anywhere else at once.
    """
    STOP.listen()
    weights.use()
    try:
        main()
    except (UserError, OSError) as error:
        if os.environ.get("DP2OSR_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def device(name: str) -> "torch.device":
    """Return the torch device for auto | cpu | cuda, and log it; raises UserError where CUDA is wanted and missing."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("config: device: found 'cuda', but torch sees no CUDA device; wanted auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    LOG.info("device %s", f"cuda ({torch.cuda.get_device_name()})" if name == "cuda" else name)
    return torch.device(name)


def progress(
    items: Iterable[T], total: int, what: str, logger: logging.Logger, *, every_s: float = 10.0, kept: int = 0
) -> Iterator[T]:
    """Yield the items; log a plain line with count, rate and time left every `every_s` seconds and at the end.

    kept: how many of the first items an earlier attempt has finished; they say nothing about the rate. On SIGTERM the
    process ends after the item in hand, which its user has kept by then; after the last one it goes on.
    """
    start = last = time.monotonic()
    with STOP.in_hand():
        for done, item in enumerate(items, start=1):
            yield item
            if STOP.requested and done < total:
                text = "%s: stopped by SIGTERM after %d of %d; the same command goes on from what was kept"
                logger.info(text, what, done, total)
                raise SystemExit(TERMINATED)
            now = time.monotonic()
            if done <= kept:
                start = last = now
            if now - last >= every_s or done == total:
                rate = max(done - kept, 0) / max(now - start, 1e-9)
                left = (total - done) / rate if rate else 0.0
                logger.info("%s: %d of %d, %.2f/s, %.0f s left", what, done, total, rate, left)
                last = now

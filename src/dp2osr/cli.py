"""The `dp2osr` command: restore photographs with a policy, and look into the tables of a run."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dp2osr import config, stage
from dp2osr.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a user's error is one line on standard error."""
    stage.run(lambda: dispatch(argv))


def dispatch(argv: Sequence[str] | None) -> None:
    """Parse the command line and call what it names."""
    parser = stage.parser(__doc__)
    parser.prog = "dp2osr"
    parser.add_argument("--version", action="version", version=f"dp2osr {version('dp2o-sr')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_upscale(commands.add_parser("upscale", help="restore and enlarge photographs of any size"))
    add_show(commands.add_parser("show", help="summarise any of the project's parquet tables"))
    args = stage.parse_args(parser, argv)
    args.run(args)


def add_upscale(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr upscale`."""
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="photographs, or folders of photographs")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .png file for one image, else a folder")
    parser.add_argument(
        "--policy", default="builtin", help="a run's policy folder, a name in the config, control weights, or builtin"
    )
    parser.add_argument("--model", default="", help="model folder, where it is not the one that the policy names")
    parser.add_argument(
        "--config", type=Path, default=Path("config/config.yaml"), help="read where settings are needed"
    )
    parser.add_argument("--prompt", default="", help="what the photographs show")
    parser.add_argument("--scale", type=positive, default=4, help="enlargement that the policy was trained for")
    parser.add_argument(
        "--candidates",
        type=positive,
        default=1,
        metavar="K",
        help="restorations of each image; without --best-of all are written: NAME-0000.png, NAME-0001.png ...",
    )
    parser.add_argument(
        "--best-of",
        default="",
        metavar="METRIC",
        help="write only the best of the K candidates as NAME.png, by a no-reference metric such as niqe",
    )
    parser.add_argument("--niqe", type=Path, help="niqe.mat, where it is not the one that the config names")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal images")
    parser.add_argument("--tile", type=int, default=0, help="output pixels of a tile; 0: the model's own size")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.set_defaults(run=run_upscale)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, wanted at least 1")
    return value


def run_upscale(args: argparse.Namespace) -> None:
    """Check everything that can be checked before the model is loaded, then restore."""
    from dp2osr import upscale

    if args.best_of:
        upscale.check_judge(args.best_of)
    inputs = upscale.expand(args.inputs)
    upscale.plan_outputs(inputs, args.out, num_files=1 if args.best_of else args.candidates)
    policy = upscale.find_policy(args.policy, model=args.model, config_path=args.config)
    scorer = make_scorer(args) if args.best_of else None
    device = stage.device(args.device)
    upscaler = upscale.load(policy, device=device, prompt=args.prompt, scale=args.scale, tile=args.tile)
    options = {"candidates": args.candidates, "best_of": args.best_of, "seed": args.seed, "scorer": scorer}
    upscale.run(upscaler, inputs, args.out, **options)


def make_scorer(args: argparse.Namespace) -> object:
    """Return the judge of `--best-of`; NIQE takes the parameters that the workflow has fitted."""
    from dp2osr.iqa.metric import Scorer

    niqe, block = args.niqe, 96
    if args.best_of == "niqe":
        settings = config.read(args.config)
        block = settings.iqa.niqe.block_size
        niqe = niqe or Path(settings.results) / settings.iqa.niqe.dataset / "niqe.mat"
        if not niqe.is_file():
            raise UserError(f"--best-of niqe: {niqe} not found; run the workflow first or name one with --niqe")
    device = stage.device(args.device)
    return Scorer([args.best_of], device=device, niqe=niqe, niqe_block=block, batch_size=1)


def add_show(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr show`."""
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="parquet files")
    parser.set_defaults(run=run_show)


def run_show(args: argparse.Namespace) -> None:
    """Print the summary of each table."""
    from dp2osr.show import summarise

    for path in args.tables:
        sys.stdout.write(summarise(path).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()

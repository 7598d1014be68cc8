"""The `dp2osr` command: restore photographs with a policy, look into the tables of a run, fetch weights."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dp2osr import config, stage
from dp2osr.errors import UserError
from dp2osr.strict import parse


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
    add_export(commands.add_parser("export", help="write a tuned policy's weights as one bare state dict"))
    add_fetch(commands.add_parser("fetch-weights", help="bring or check everything that a config needs from a hub"))
    add_plan(commands.add_parser("plan", help="jobs, hours, disk and GPU memory of a config, before anything runs"))
    add_status(commands.add_parser("status", help="how far a run is, from its results folder, while it runs or after"))
    add_datasets(
        commands.add_parser("datasets", help="the field's test sets: what they are, and whether a folder is one")
    )
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


def add_fetch(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr fetch-weights`."""
    parser.add_argument(
        "--configfile", nargs="*", default=[], type=Path, metavar="YAML", help="overlays on config/config.yaml"
    )
    parser.add_argument("--cache", type=Path, help="cache folder, where it is not the config's `weights`")
    parser.add_argument("--check", action="store_true", help="verify the cache against its manifest, fetch nothing")
    parser.add_argument("--quick", action="store_true", help="with --check: sizes only, no sha256")
    parser.add_argument("--offline", action="store_true", help="use no network: record a cache that was filled by hand")
    parser.set_defaults(run=run_fetch)


def run_fetch(args: argparse.Namespace) -> None:
    """Fetch or verify what the config needs."""
    from dp2osr import fetch, weights

    os.environ.setdefault(weights.CONFIGFILES, shlex.join(map(str, args.configfile)) or "config/config.yaml")
    settings = config.read("config/config.yaml", *args.configfile)
    if not (folder := args.cache or weights.in_use() or settings.weights):
        raise UserError("fetch-weights: no cache folder; wanted --cache FOLDER or the config's `weights`")
    items, cache = weights.needs(settings), Path(folder).expanduser().resolve()
    if args.check:
        fetch.verify(items, cache, sizes_only=args.quick)
    else:
        fetch.fetch(items, cache, offline=args.offline)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr export`."""
    parser.add_argument("policy", type=Path, help="folder of a tuned policy or control branch")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file, such as model.safetensors")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> None:
    """Write the bare state dict."""
    from dp2osr.export import export

    export(args.policy, args.out, dtype=args.dtype)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr plan`."""
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="where all settings stand")
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], metavar="YAML", help="overlays, in order")
    for name, metavar, text in (
        ("--images", "NAME=N", "images of a data set, where they are not counted or another number is meant"),
        ("--seconds", "STAGE=S", "seconds of one image on one GPU, instead of measured ones"),
    ):
        parser.add_argument(name, nargs="+", action="extend", default=[], type=named_number, metavar=metavar, help=text)
    parser.add_argument("--architecture", default="", help="sd2-base or flux-dev, where the model folder is not here")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run_plan)


def named_number(text: str) -> tuple[str, float]:
    """Parse NAME=NUMBER, the number above 0."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"found '{text}', wanted NAME=NUMBER, the number above 0")
    return name, value


def run_plan(args: argparse.Namespace) -> None:
    """Print what a config asks for."""
    from dp2osr import plan_report

    settings = config.read(args.config, *args.configfile)
    images = {name: int(count) for name, count in args.images}
    options = {"seconds": dict(args.seconds), "architecture": args.architecture}
    title = plan_report.title(args.config, args.configfile, settings.results)
    found = plan_report.make(settings, title=title, images=images, **options)
    sys.stdout.write(plan_report.as_json(found) if args.json else plan_report.text(found))


def add_status(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr status`."""
    parser.add_argument("results", nargs="?", type=Path, help="the folder, where it is not the config's `results`")
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="where all settings stand")
    parser.add_argument("--configfile", nargs="+", type=Path, default=[], metavar="YAML", help="overlays of the run")
    parser.add_argument(
        "--stale", type=positive, default=15, metavar="MINUTES", help="silence after which a job counts as dead"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run_status)


def run_status(args: argparse.Namespace) -> None:
    """Print how far a run is; without a config that fits the folder, all but what is left."""
    from dp2osr import status_files, status_report

    results, settings = status_plan(args)
    if settings is None and not results.is_dir():
        raise UserError(f"results folder {results}: not found")
    plan_of = " + ".join(map(str, (args.config, *args.configfile)))
    found = status_files.look(results, settings, plan_of=plan_of, now=time.time(), stale_s=60 * args.stale)
    sys.stdout.write(status_report.as_json(found) if args.json else status_report.text(found, stale_min=args.stale))


def status_plan(args: argparse.Namespace) -> tuple[Path, config.Config | None]:
    """Return the results folder and the config that filled it; None where none is named and the default has another."""
    if args.results and not args.configfile and not args.config.is_file():
        return args.results, None
    settings = config.read(args.config, *args.configfile)
    results = args.results or Path(settings.results)
    fits = args.configfile or results.resolve() == Path(settings.results).resolve()
    return results, settings if fits else None


def add_datasets(parser: argparse.ArgumentParser) -> None:
    """Declare `dp2osr datasets`."""
    parser.add_argument("name", nargs="?", default="", help="a test set of the catalogue; without it all are listed")
    parser.add_argument(
        "--path", type=Path, metavar="FOLDER", help="check a folder, and print the config that names it"
    )
    parser.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="where all settings stand")
    parser.set_defaults(run=run_datasets)


def run_datasets(args: argparse.Namespace) -> None:
    """List the catalogue, tell of one entry, or check a folder; an error where the folder differs from its entry."""
    from dp2osr import testsets

    if args.path and not args.name:
        raise UserError("datasets --path: wanted the name of a test set before it")
    if not args.path:
        told = testsets.details(testsets.find(args.name)) if args.name else testsets.listing()
        sys.stdout.write(told + "\n")
        return
    lines, overlay = check_testset(args.name, args.path, config_path=args.config)
    comments = ["# " + " ".join(line.splitlines()) for line in lines]
    sys.stdout.write("\n".join([*comments, overlay]))
    if lines:
        raise UserError(f"{args.path}: differs from {args.name} of the catalogue in {len(lines)} points (listed)")


def check_testset(name: str, folder: Path, *, config_path: Path) -> tuple[list[str], str]:
    """Ingest a folder as the workflow would. Returns what differs from the catalogue, and the overlay that names it."""
    from dp2osr import config_datasets, testsets
    from dp2osr.stages import ingest

    entry = testsets.find(name)
    overlay = testsets.overlay({name: (folder, testsets.find_layout(entry, folder))}, tests=(name,))
    keys = config_datasets.ingest_keys(config.read(config_path, changes=overlay).datasets[name])
    lenient = {"max_rejected_share": 1.0, "num_shards": 1, "seed": 0}  # so that all faults are found at once
    table = ingest.ingest(parse(ingest.IngestJob, keys | lenient))
    return list(testsets.differences(entry, table)), testsets.as_yaml(overlay)


if __name__ == "__main__":
    main()

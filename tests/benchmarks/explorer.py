"""The group explorer at full scale: size of its files, and time and memory of the page in headless Chromium.

Every group has its row and its small picture; the candidates of a few shards are written in full, with pictures of the
size that is wanted, for a page of the explorer is opened one file at a time. A shard of 512 px candidates is then made
small by the stage itself, to say what a job costs.

    python tests/benchmarks/explorer.py --groups 30000 --rollouts 64
"""

import argparse
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from dp2osr import shards, tables
from dp2osr.config import ExplorerSettings, RewardSettings
from dp2osr.images import load_builtin
from dp2osr.metrics import METRICS
from dp2osr.preference.reward import ranks
from dp2osr.report import explorer

PAPER = ["lpips", "topiq_fr", "afine_fr", "maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]
SETS = {kind: [name for name in PAPER if METRICS[name].kind == kind] for kind in ("fr", "nr")}
REWARD = RewardSettings(**SETS, weight_fr=0.5, num_rollouts=64)
SHARD = 100  # groups
PUT = '(e => { e.value = "%s"; e.dispatchEvent(new Event("input")) })(document.getElementById("%s"))'


def photograph(size: int) -> Image.Image:
    """Return a crop of a photograph that is at hand."""
    with Image.open(io.BytesIO(load_builtin("skimage/astronaut"))) as image:
        return image.convert("RGB").crop((0, 0, 512, 512)).resize((size, size))


def frame(rng: np.random.Generator, group: str, rollouts: int) -> pd.DataFrame:
    """Return a rewards table of one group with random scores."""
    columns: dict[str, Any] = {"group_id": group, "rollout": np.arange(rollouts, dtype=np.int32)}
    columns |= {name: rng.random(rollouts) for name in PAPER}
    columns |= {name + tables.NORM: rng.random(rollouts) for name in PAPER}
    for kind, names in SETS.items():
        columns[kind] = np.mean([columns[name + tables.NORM] for name in names], axis=0)
    columns["reward"] = (columns["fr"] + columns["nr"]) / 2
    return pd.DataFrame(columns).assign(rank=ranks(columns["reward"][None])[0], status="ok")


def like(rows: dict, small: bytes, ids: list[str], shard: str, rng: np.random.Generator) -> dict[str, bytes]:
    """Return the rows and small pictures of another shard, its numbers its own."""
    others = []
    for each, row in zip(ids, rows["rows"], strict=True):
        numbers = {name: round(row[name] + rng.normal(0, 0.05), 4) for name in explorer.NUMBERS if name != "missing"}
        others.append(row | {"id": each, "source": f"photos/{each}.png"} | numbers)
    renamed = b'dp2osr("shard-%s/small"' % shard.encode() + small[small.index(b",") :]
    return {"rows.json": json.dumps({"metrics": rows["metrics"], "rows": others}).encode(), "small.js": renamed}


def write_site(folder: Path, args: argparse.Namespace) -> None:
    """Write the page; of the shards from `args.full` on only the rows and the small pictures."""
    rng = np.random.default_rng(0)
    settings = ExplorerSettings(thumbnail=args.thumbnail, quality=85, groups_per_page=args.groups_per_page)
    picture, names = photograph(args.thumbnail), [f"{at:04d}" for at in range(args.groups // SHARD)]
    for number, name in enumerate(names):
        ids = [f"{number * SHARD + at:016x}-000" for at in range(SHARD)]
        if number < args.full:
            pictures = dict.fromkeys(range(args.rollouts), picture)
            groups = (
                explorer.Group(each, f"photos/{each}.png", frame(rng, each, args.rollouts), picture, picture, pictures)
                for each in ids
            )
            files = dict(explorer.shard_files(groups, name, settings))
            rows, small = json.loads(files["rows.json"]), files["small.js"]
        else:
            files = like(rows, small, ids, name, rng)
        target = folder / "data" / f"shard-{name}"
        target.mkdir(parents=True)
        for file, data in files.items():
            (target / file).write_bytes(data)
    ids = [f"{at:016x}-000" for at in range(args.groups)]
    wins = {"group_id": np.repeat(ids, 8), "chosen": np.tile(np.arange(8), len(ids))}
    pairs = pd.DataFrame(wins | {"rejected": np.tile(np.arange(56, 64), len(ids))})
    words = {"dataset": "train", "policy": "base", "reward": "default", "definition": REWARD}
    job = explorer.ExplorerJob(**words, shards=names, runs=["tuned"])
    for name, data in explorer.page_files(job, folder / "data", {"tuned": pairs}).items():
        (folder / name).write_bytes(data)


def timed(page: Page, action: str, ready: str) -> float:
    """Run JavaScript and wait for an expression to hold; return milliseconds, measured in the page itself."""
    code = f"""async () => {{ const start = performance.now(); {action};
      while (!({ready})) await new Promise(requestAnimationFrame); return performance.now() - start; }}"""
    return page.evaluate(code)


def resident(browser: Browser) -> float:
    """Return the resident memory of the largest renderer process in MiB."""
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    sizes = []
    for process in processes:
        if process["type"] == "renderer":
            status = Path(f"/proc/{process['id']}/status").read_text()
            sizes += [int(size) / 1024 for size in re.findall(r"VmRSS:\s+(\d+)", status)]
    return max(sizes)


def measure_page(address: str) -> dict[str, float]:
    """Return seconds, milliseconds and MiB of what a person does."""
    found: dict[str, float] = {}
    with sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto("about:blank")
        start = time.perf_counter()
        page.goto(address)
        page.wait_for_selector(".card")
        found["first image shown, s"] = time.perf_counter() - start

        where = 'document.getElementById("where").textContent'
        for name, changes, ready in (
            ("search by id, ms", {"search": "000000000000007b"}, f'{where}.includes("of 1 found")'),
            ("filter and sort, ms", {"search": "", "filter": "fr_over_nr", "order": "fr_over_nr"}, "true"),
        ):
            found[name] = timed(page, ";".join(PUT % (value, name) for name, value in changes.items()), ready)
        heading = 'document.querySelector("h2")?.textContent.includes("{}") && document.querySelector(".card")'
        for name, at in (("an image of another data file, ms", 130), ("an image of the same data file, ms", 131)):
            ready = heading.format(f"{at:016x}-000")
            found[name] = timed(page, f'location.hash = "{at:016x}-000"', ready)
        found["memory of the page, MiB"] = resident(browser)
        for at in range(0, 200, 25):
            page.evaluate(f'location.hash = "{at:016x}-000"')
            page.wait_for_selector(f"h2:has-text('{at:016x}-000')")
        found["the same after eight data files, MiB"] = resident(browser)
        browser.close()
    return found


def measure_shard(folder: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Run the shard's stage on 512 px PNGs; return CPU seconds a candidate without the start, and its peak in GiB."""
    rng = np.random.default_rng(0)
    large = np.asarray(photograph(512)).astype(np.int16)

    def png() -> bytes:
        noisy = (large + rng.normal(0, 4, large.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    hr = png()
    ids = [f"{at:016x}-000" for at in range(args.timed)]
    shards.write_shard(folder / "lr.tar", [(each, {"hr.png": hr, "lr.png": hr}) for each in ids])
    keys = [(f"{each}-r{rollout:04d}", {"png": png()}) for each in ids for rollout in range(args.rollouts)]
    shards.write_shard(folder / "candidates.tar", keys)
    wide = pd.concat([frame(rng, each, args.rollouts) for each in ids])
    tables.write(wide, folder / "rewards.parquet", tables.rewards_schema(PAPER))
    images = {field.name: "" if field.type == "string" else 0 for field in tables.IMAGES}
    tables.write(pd.DataFrame([images | {"image_id": each} for each in ids]), folder / "images.parquet", tables.IMAGES)
    command = [sys.executable, "-m", "dp2osr.stages.explorer_shard", "--folder", str(folder / "shard-0000")]
    command += ["--rewards", str(folder / "rewards.parquet"), "--images", str(folder / "images.parquet")]
    command += ["--lr", str(folder / "lr.tar"), "--candidates", str(folder / "candidates.tar")]
    settings = {"thumbnail": args.thumbnail, "quality": 85, "groups_per_page": args.groups_per_page}
    subprocess.run([*command, "--config", json.dumps(settings)], check=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) / len(keys), usage.ru_maxrss / 2**20


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"groups": 30000, "rollouts": 64, "thumbnail": 96, "groups-per-page": 25, "full": 3, "timed": 4}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds, memory = measure_shard(folder, args)
        print(f"a shard's job: {1000 * seconds:.0f} ms of CPU a candidate of 512 px, start included; {memory:.2f} GiB")
        write_site(folder / "site", args)
        index = (folder / "site" / "index.js").stat().st_size / 2**20
        pages = [path.stat().st_size for path in folder.rglob("page-*.js")]
        num_files = args.groups // SHARD * (2 + -(-SHARD // args.groups_per_page)) + 3
        print(f"index.js {index:.1f} MiB; a data file {np.mean(pages) / 2**20:.1f} MiB; {num_files:,} files in all")
        print(f"all data files: {np.mean(pages) * args.groups / args.groups_per_page / 2**30:.1f} GiB")
        for name, value in measure_page((folder / "site" / "index.html").as_uri()).items():
            print(f"{name}: {value:.1f}")


if __name__ == "__main__":
    main()

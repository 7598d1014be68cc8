"""The group explorer: its numbers, its data files, and the page in a real browser, from file:// and offline."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import spearmanr

from dp2osr import tables
from dp2osr.config import ExplorerSettings, RewardSettings
from dp2osr.errors import UserError
from dp2osr.preference.reward import ranks
from dp2osr.report import explorer, thumbs
from dp2osr.stages import explorer as page_stage
from dp2osr.stages import explorer_shard
from made_up_run import GROUPS, M, images_table, pairs_table, rewards_table, write_shards

SETTINGS = ExplorerSettings(thumbnail=16, quality=80, groups_per_page=10)
REWARD = RewardSettings(fr=["ssim"], nr=["niqe"], weight_fr=0.5, num_rollouts=4)
NUM = 35  # groups of a shard
EVIL = '<img src=x onerror="window.hacked=1">'


def group(number: int) -> explorer.Group:
    """Return a group of four candidates of one colour each: rewards .2 .5 .8 and none; fr .1 .5 .9, nr .3 .5 .7.

    FR - NR reaches .2 at the best candidate; a number adds a thousandth of itself to that.
    """
    fr = np.array([0.1, 0.5, 0.9 + number / 1000, np.nan])
    nr = np.array([0.3, 0.5, 0.7, np.nan])
    frame = pd.DataFrame({"rollout": range(4), "fr": fr, "nr": nr, "reward": (fr + nr) / 2})
    frame = frame.assign(
        ssim=fr, niqe=10 - nr, ssim__norm=fr, niqe__norm=nr, status=["ok", "ok", "ok", "no number: niqe"]
    )
    frame["rank"] = ranks(frame["reward"].to_numpy()[None])[0]
    pictures = {at: Image.new("RGB", (16, 16), (60 * at, 0, 0)) for at in range(3)}  # the fourth was pruned
    source = EVIL if number == 1 else f"photo-{number}.png"
    small, large = Image.new("RGB", (4, 4), "blue"), Image.new("RGB", (16, 16), "green")
    return explorer.Group(f"{number:016x}-000", source, frame, small, large, pictures)


def chosen_pairs() -> pd.DataFrame:
    """Return pairs of the first group: candidate 2 wins over 0 and 1."""
    return pd.DataFrame({"group_id": ["0" * 16 + "-000"] * 2, "chosen": [2, 2], "rejected": [0, 1]})


def write_site(folder: Path) -> Path:
    """Write an explorer of two shards with NUM groups each; return the page."""
    for shard in range(2):
        target = folder / "data" / f"shard-{shard:04d}"
        target.mkdir(parents=True)
        groups = map(group, range(shard * NUM, (shard + 1) * NUM))
        for name, data in explorer.shard_files(groups, f"{shard:04d}", SETTINGS):
            (target / name).write_bytes(data)
    words = {"dataset": "train", "policy": "base", "reward": "default", "definition": REWARD}
    job = explorer.ExplorerJob(**words, shards=["0000", "0001"], runs=["tuned"])
    for name, data in explorer.page_files(job, folder / "data", {"tuned": chosen_pairs()}).items():
        (folder / name).write_bytes(data)
    return folder / "index.html"


def payload(data: bytes) -> Any:
    """Return what a data file hands to the page."""
    match = re.fullmatch(r'dp2osr\("[^"]+",(.*)\);\n', data.decode(), re.DOTALL)
    assert match
    return json.loads(match[1])


def test_numbers_of_a_group_by_hand() -> None:
    frame = pd.DataFrame(
        {"fr": [0.9, 0.2, 0.4, np.nan], "nr": [0.1, 0.5, 0.4, 0.3], "reward": [0.5, 0.35, 0.4, np.nan]}
    )
    assert explorer.numbers(frame) == {
        "spread": pytest.approx(np.std([0.5, 0.35, 0.4]), abs=1e-4),
        "gap": 0.15,
        "fr_over_nr": 0.8,
        "nr_over_fr": 0.3,
        "rho": -1.0,
        "missing": 1.0,
    }


def test_numbers_that_cannot_be_said_are_none() -> None:
    nothing = pd.DataFrame({"fr": [np.nan] * 2, "nr": [0.1, 0.2], "reward": [0.1, 0.2]})  # a reward without FR
    found = explorer.numbers(nothing)
    assert found["fr_over_nr"] is None and found["nr_over_fr"] is None and found["rho"] is None
    assert found["gap"] == 0.1 and found["missing"] == 0


def test_rank_correlation_with_ties() -> None:
    first, second = np.array([1.0, 2, 2, 5, 3]), np.array([0.3, 0.1, 0.1, 0.1, 0.9])
    assert explorer.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert np.isnan(explorer.spearman(first, np.ones(5))) and np.isnan(explorer.spearman(first[:1], second[:1]))


def test_sprite_holds_each_tile_at_its_place() -> None:
    import io

    images = [Image.new("RGB", (4, 4), "red"), None, Image.new("RGB", (16, 16), "blue")]
    found = thumbs.sprite(images, quality=95)
    assert (found.width, found.height, found.columns, found.has) == (16, 16, 2, [True, False, True])
    sheet = np.asarray(Image.open(io.BytesIO(found.webp)).convert("RGB")).astype(int)
    assert sheet.shape == (32, 32, 3)
    for (y, x), colour in (((8, 8), (255, 0, 0)), ((8, 24), thumbs.GREY), ((24, 8), (0, 0, 255))):
        assert np.abs(sheet[y, x] - colour).max() < 16
    with pytest.raises(UserError, match=r"explorer\.thumbnail: 400 tiles of 1000 × 1000 px .* wanted at most 16383"):
        thumbs.sprite([Image.new("RGB", (1000, 1000))] * 400, quality=10)


def test_data_files_of_a_shard() -> None:
    files = dict(explorer.shard_files(map(group, range(NUM)), "0007", SETTINGS))
    assert list(files) == ["page-000.js", "page-001.js", "page-002.js", "page-003.js", "small.js", "rows.json"]
    assert files["page-001.js"].startswith(b'dp2osr("shard-0007/page-001",')
    found = payload(files["page-003.js"])["groups"]
    assert len(found) == NUM - 30 and found[4]["id"] == group(34).group_id
    assert found[4]["fr"] == [0.1, 0.5, 0.934, None] and found[4]["rank"] == [2, 1, 0, -1]
    assert found[4]["raw"][1] == [9.7, 9.5, 9.3, None] and found[4]["norm"][1] == [0.3, 0.5, 0.7, None]
    assert found[4]["sprite"]["missing"] == [5] and found[4]["status"] == {"3": "no number: niqe"}
    rows = json.loads(files["rows.json"])
    assert rows["metrics"] == ["ssim", "niqe"]
    assert (rows["rows"][12]["page"], rows["rows"][12]["at"]) == (1, 2)
    assert rows["rows"][34]["fr_over_nr"] == pytest.approx(0.234)


def test_an_empty_shard_has_its_files() -> None:
    files = dict(explorer.shard_files(iter(()), "0000", SETTINGS))
    assert list(files) == ["small.js", "rows.json"] and json.loads(files["rows.json"])["rows"] == []


def test_a_script_cannot_be_left() -> None:
    data = explorer.script("x", {"text": "</script><script>alert(1)"})
    assert b"</" not in data and payload(data) == {"text": "</script><script>alert(1)"}


def test_marks_are_distinct_and_in_the_order_of_groups() -> None:
    frame = pd.DataFrame({"group_id": ["b", "b", "a"], "chosen": [3, 3, 1], "rejected": [9, 2, 0]})
    assert explorer.marks(frame, ["c", "b", "a"]) == {"chosen": [[], [3], [1]], "rejected": [[], [2, 9], [0]]}


def test_missing_data_of_a_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard-0003/rows\.json: not there"):
        explorer.read_rows(tmp_path, ["0003"])


def test_stages_on_real_shards(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    wide = rewards_table(0.0, 1)
    tables.write(
        wide, tmp_path / "rewards.parquet", tables.rewards_schema([n[:-6] for n in wide if n.endswith("__norm")])
    )
    tables.write(images_table(), tmp_path / "images.parquet", tables.IMAGES)
    tables.write(pairs_table(), tmp_path / "pairs.parquet", tables.PAIRS)
    folder = tmp_path / "explorer" / "data" / "shard-0000"
    argv = ["--rewards", f"{tmp_path}/rewards.parquet", "--images", f"{tmp_path}/images.parquet"]
    argv += ["--lr", str(paths["lr"]), "--candidates", str(paths["candidates-reference"]), "--folder", str(folder)]
    for _ in range(2):  # a second writer of the same folder is harmless
        explorer_shard.main([*argv, "--config", SETTINGS.model_dump_json()])
    found = payload((folder / "page-000.js").read_bytes())["groups"]
    assert [each["id"] for each in found] == GROUPS and found[0]["rollout"] == list(range(M))
    assert found[0]["sprite"] | {"webp": ""} == {
        "width": 16,
        "height": 16,
        "columns": 3,
        "tiles": M + 2,
        "missing": [],
        "webp": "",
    }
    definition = REWARD.model_dump()
    job = {"dataset": "train", "policy": "base", "reward": "default", "definition": definition, "shards": ["0000"]}
    page = tmp_path / "explorer" / "index.html"
    argv = ["--data", str(folder.parent), "--pairs", f"tuned={tmp_path}/pairs.parquet", "--page", str(page)]
    page_stage.main([*argv, "--config", json.dumps(job | {"runs": ["tuned"]})])
    index = payload((page.parent / "index.js").read_bytes())
    assert index["groups"]["source"][0] == "photo <0>.png" and index["runs"]["tuned"]["rejected"][0] == [2, 3]
    assert [each["name"] for each in index["metrics"] if each["in_reward"]] == ["ssim", "niqe"]


@pytest.mark.parametrize("field", ["lr", "candidates-reference"])
def test_a_picture_that_cannot_be_read_is_named(field: str, tmp_path: Path) -> None:
    from dp2osr import shards

    paths = write_shards(tmp_path)
    tables.write(
        rewards_table(0.0, 1),
        tmp_path / "r.parquet",
        tables.rewards_schema(["fsim", "gmsd", "nlpd", "niqe", "psnr", "ssim", "piqe"]),
    )
    tables.write(images_table(), tmp_path / "i.parquet", tables.IMAGES)
    broken = [
        (key, {name: data[:40] if name.endswith("png") else data for name, data in fields.items()})
        for key, fields in shards.read_shard(paths[field])
    ]
    shards.write_shard(paths[field], broken)
    groups = explorer.read_groups(
        tmp_path / "r.parquet", tmp_path / "i.parquet", paths["lr"], [paths["candidates-reference"]], SETTINGS
    )
    with pytest.raises(UserError, match=rf"{paths[field].name}: {GROUPS[0]}.*no readable image"):
        list(groups)


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a headless Chromium, the one of the machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: the page was not looked at")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of an explorer with 70 groups."""
    return write_site(tmp_path_factory.mktemp("explorer"))


@pytest.fixture
def page(browser: Any, site: Path) -> Iterator[Any]:
    """Return the open page; what it wrote to the console as an error fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1300, "height": 900})
    found, problems, asked = context.new_page(), [], []
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    found.on("request", lambda request: asked.append(request.url))
    found.goto(site.as_uri())
    found.wait_for_selector(".card")
    yield found
    assert problems == [] and all(url.startswith(("file:", "blob:")) for url in asked)
    context.close()


def seeds(page: Any) -> list[str]:
    """Return the candidates in the order that the cards have."""
    return [re.sub(r",.*", "", text) for text in page.eval_on_selector_all(".card", "c => c.map(e => e.ariaLabel)")]


def names(page: Any) -> list[str]:
    """Return the names in the list."""
    return page.locator("#list .name").all_inner_texts()


def test_the_first_image_with_its_candidates_by_reward(page: Any) -> None:
    assert page.title() == "Candidates of base on train · DP²O-SR"
    assert page.inner_text("#where") == "1–50 of 70 found of 70"
    assert page.inner_text("h2") == "photo-0.png"
    assert seeds(page) == ["seed 2", "seed 1", "seed 0", "seed 3"]  # the one without a reward last
    assert page.locator(".card.winner .mark").all_inner_texts() == ["▲ winner"]
    assert page.locator(".card.loser").count() == 2
    assert page.locator(".card").nth(3).locator(".none").inner_text() == "no image"
    numbers = page.locator("#numbers tbody tr").first.locator("td").all_inner_texts()
    assert [text.split() for text in numbers] == [
        ["2"], ["0"], ["▲", "winner"], ["0.8000"], ["0.9000"], ["0.7000"], ["0.9000", "0.900"], ["9.3000", "0.700"]
    ]  # fmt: skip


def test_candidates_are_sorted_filtered_and_compared(page: Any) -> None:
    page.select_option("#by", "nr_over_fr")
    assert seeds(page) == ["seed 0", "seed 1", "seed 2", "seed 3"]
    page.click("#head-niqe")
    assert seeds(page)[0] == "seed 2" and page.get_attribute("th:has(#head-niqe)", "aria-sort") == "ascending"
    page.click("#head-niqe")
    assert seeds(page) == ["seed 0", "seed 1", "seed 2", "seed 3"]
    assert page.get_attribute("th:has(#head-niqe)", "aria-sort") == "descending"
    page.select_option("#side", "loser")
    assert seeds(page) == ["seed 0", "seed 1"]
    page.click(".card >> nth=1")
    assert "seed 1, rank 1, reward 0.500" in page.inner_text("#large figure:last-child")
    assert page.get_attribute("#numbers tr[aria-selected=true]", "data-candidate") == "1"


def test_images_are_paged_searched_filtered_and_sorted(page: Any) -> None:
    page.click("#next")
    assert page.inner_text("#where") == "51–70 of 70 found of 70" and len(names(page)) == 20
    assert page.is_disabled("#next") and page.is_enabled("#back")
    page.fill("#search", "PHOTO-6")
    assert names(page) == ["photo-6.png", *(f"photo-{at}.png" for at in range(60, 70))]
    page.fill("#search", "0000000000000040-000")
    assert names(page) == ["photo-64.png"]
    page.fill("#search", "")
    page.select_option("#filter", "fr_over_nr")
    page.fill("#limit", "0.266")
    assert page.inner_text("#where") == "1–4 of 4 found of 70"
    page.select_option("#order", "fr_over_nr")
    assert names(page) == ["photo-69.png", "photo-68.png", "photo-67.png", "photo-66.png"]
    page.click("#list button >> nth=1")
    page.wait_for_selector("h2:has-text('photo-68.png')")
    assert page.url.endswith(f"#{68:016x}-000")
    page.fill("#limit", "0.9")
    assert page.inner_text("#where") == "0 found of 70" and names(page) == []


def test_keys_alone_will_do(page: Any) -> None:
    page.focus("#list button >> nth=0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("h2:has-text('photo-2.png')")
    page.focus(".card >> nth=0")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.get_attribute(".card >> nth=1", "aria-pressed") == "true"


def test_a_name_is_text_whatever_it_holds(page: Any) -> None:
    page.click("#list button >> nth=1")
    page.wait_for_selector("h2:has-text('onerror')")
    assert page.inner_text("h2") == EVIL and page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0


def test_an_address_opens_its_image_and_an_unknown_one_is_said(page: Any) -> None:
    page.evaluate(f"location.hash = '{40:016x}-000'")
    page.wait_for_selector("h2:has-text('photo-40.png')")
    page.evaluate("location.hash = 'nobody'")
    page.wait_for_selector("#notice:has-text('No image has the id nobody.')")


def test_a_missing_data_file_is_named(browser: Any, tmp_path: Path) -> None:
    address = write_site(tmp_path).as_uri()
    (tmp_path / "data" / "shard-0001" / "page-002.js").unlink()
    found = browser.new_page()
    found.goto(f"{address}#{NUM + 25:016x}-000")
    found.wait_for_selector("#notice:has-text('data/shard-0001/page-002.js was not found beside this page.')")
    (tmp_path / "index.js").unlink()
    found.reload()
    found.wait_for_selector("#notice:has-text('index.js was not found beside this page.')")
    found.close()

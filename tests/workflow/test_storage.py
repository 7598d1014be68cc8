"""Images on S3 and behind HTTP, a control branch on S3, results on another disk: a few stages really run."""

import functools
import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

import workflow_rig
from dp2osr import images, tables
from workflow_rig import CONFIG, SMALLEST, Workflow, count

LR = "results/holdout/lr/shard-0000.tar"
CANDIDATES = "results/holdout/base/candidates/shard-0000.block-000.tar"


def shard(*names: str) -> bytes:
    """Return a WebDataset shard of built-in images."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            data = images.load_builtin(name)
            entry = tarfile.TarInfo(f"{name.replace('/', '-')}.bmp")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a client of a local S3 server, which the environment names to the workflow, too."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "SNAKEMAKE_STORAGE_S3_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "reader",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    client.create_bucket(Bucket="photos")
    yield client
    server.stop()


@pytest.fixture
def http(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a folder and the address under which a local server offers it."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_on_s3_and_http(s3: Any, http: tuple[Path, str], tmp_path: Path) -> None:
    for number in (8, 9, 10):
        s3.put_object(Bucket="photos", Key=f"set/x-{number:02d}.tar", Body=shard(f"dead-leaves/{number}"))
    folder, address = http
    (folder / "one.png").write_bytes(images.load_builtin("skimage/coffee"))
    entries = ["s3://photos/set/x-{08..10}.tar", f"{address}/one.png"]
    changes = {"datasets": {"holdout": {"images": entries}}}
    workflow = Workflow(tmp_path / "run", [CONFIG, SMALLEST])
    assert count(workflow.plan(LR, changes=changes)) == {"fetch_images": 4, "ingest": 1, "degrade": 1}
    workflow.run("--", LR, changes=changes)
    table = tables.read(workflow.directory / "results/holdout/images.parquet", tables.IMAGES)
    wanted = [f"s3://photos/set/x-{number:02d}.tar::dead-leaves-{number}.bmp" for number in (8, 9, 10)]
    assert sorted(table["source"]) == sorted([*wanted, f"{address}/one.png"])
    assert set(table["status"]) == {"ok"}
    assert not list((workflow.directory / ".snakemake" / "storage").rglob("*.*"))  # its own copies are gone again
    shutil.rmtree(workflow.directory / "results/holdout/fetched")
    assert workflow.plan(LR, changes=changes) == []  # nor are ours needed any more
    gone = {"datasets": {"holdout": {"images": ["s3://photos/set/x-77.tar"]}}}
    done = workflow.snakemake("--dry-run", "--", LR, changes=gone)
    assert done.returncode != 0 and "images: s3://photos/set/x-77.tar: not found" in done.stdout, done.stdout[-3000:]


def pictures(path: Path) -> dict[str, bytes]:
    """Return the images of a shard of candidates by name."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".png")]
        return {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def test_control_branch_on_s3(s3: Any, smallest: Workflow, tiny_model: Path, tmp_path: Path) -> None:
    """Fetched once, and sampled as the folder that it is of."""
    branch = (tiny_model / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes()
    s3.put_object(Bucket="photos", Key="c/model.safetensors", Body=branch)
    shutil.copytree(smallest.directory, tmp_path / "run", symlinks=True)
    workflow = workflow_rig.smallest(tmp_path / "run", tiny_model)
    changes = {"policy_defaults": {"control": "s3://photos/c/model.safetensors"}}
    workflow.run("--rerun-triggers", "mtime", "--", CANDIDATES, changes=changes)  # the embeddings stay as they are
    (copy,) = (workflow.directory / "results" / "fetched").iterdir()
    assert copy.name.endswith("-model.safetensors") and copy.read_bytes() == branch
    found = pictures(workflow.directory / CANDIDATES)
    assert len(found) == 8 and found == pictures(smallest.directory / CANDIDATES)
    gone = {"policy_defaults": {"control": "s3://photos/c/other.safetensors"}}
    done = workflow.snakemake("--dry-run", "--", CANDIDATES, changes=gone)
    assert done.returncode != 0 and "s3://photos/c/other.safetensors" in done.stdout, done.stdout[-3000:]


def test_results_on_another_disk(tmp_path: Path) -> None:
    """An absolute `results`, and a working directory of its own: the same files, and nothing beside them."""
    made = []
    for name, changes in (("given", {"results": str(tmp_path / "disk")}), ("directory", {})):
        workflow = Workflow(tmp_path / name, [CONFIG, SMALLEST])
        results = Path(changes.get("results", workflow.directory / "results"))
        target = str(results / "holdout/lr/shard-0000.tar") if changes else LR
        workflow.run("--", target, changes=changes)
        assert workflow.plan("--", target, changes=changes) == []
        full = workflow.plan(changes=changes)
        assert {"rollout", "score", "train", "report"} <= {rule for rule, _ in full}
        files = {path.relative_to(results).as_posix(): path for path in results.rglob("*") if path.is_file()}
        made.append({name: path.read_bytes() for name, path in files.items() if not name.startswith(("logs", "bench"))})
    assert made[0] == made[1] and set(made[0]) == {"holdout/images.parquet", "holdout/lr/shard-0000.tar"}
    assert not (tmp_path / "given" / "results").exists()

"""A weights cache of stand-ins in the true layout: true names, shapes and formats, contents of little information.

A tensor of many numbers is one row that is expanded, so that torch.save writes the row alone; a safetensors file is a
header and a hole.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FULL = 20_000  # numbers of a tensor that is written in full


def add_repository(hub: Path, repo: str, source: Path) -> Path:
    """File a folder as huggingface_hub does: blobs by hash, a snapshot of links, a ref. Returns the snapshot."""
    storage = hub / ("models--" + repo.replace("/", "--"))
    snapshot = storage / "snapshots" / COMMIT
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = storage / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = snapshot / file.relative_to(source)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    return snapshot


def stand_in(name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a tensor of a shape: small random numbers, the same along the first axis where it is large."""
    import torch

    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    if name.endswith("running_var"):
        return torch.ones(shape)
    large = math.prod(shape) > FULL
    return (0.05 * torch.randn(shape[1:] if large else shape)).expand(shape)


def save_state(path: Path, shapes: dict[str, Any], *, key: str = "") -> None:
    """Write a state dict of stand-ins, under `key` where one is given; shapes: tensors, of which none is read."""
    import torch

    state: Any = {name: stand_in(name, tuple(tensor.shape), tensor.dtype) for name, tensor in shapes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: state} if key else state, path)


def save_hole(path: Path, shapes: dict[str, Any]) -> None:
    """Write a safetensors file of zeros that takes no disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in shapes.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = "F32" if tensor.dtype.is_floating_point else "I64"
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)


def add_alexnet(torch_home: Path) -> Path:
    """Write torchvision's AlexNet, LPIPS's backbone."""
    import torch
    from torchvision.models import AlexNet_Weights, alexnet

    with torch.device("meta"):
        shapes = alexnet().state_dict()
    path = torch_home / "hub" / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    save_state(path, shapes)
    return path


def lpips_state(path: Path) -> Path:
    """Write LPIPS's own weights."""
    import torch

    widths = [64, 192, 384, 256, 256]
    save_state(path, {f"lin{i}.model.1.weight": torch.empty(1, width, 1, 1) for i, width in enumerate(widths)})
    return path


def lpips_name() -> str:
    """Return the name of LPIPS's own weights."""
    from pyiqa.archs.lpips_arch import default_model_urls

    return str(default_model_urls["0.1_alex"]).rpartition("/")[2]


def add_topiq_nr(cache: Path) -> None:
    """Write what TOPIQ-NR needs: timm's ResNet-50 as a hub repository, and pyiqa's checkpoint."""
    import timm
    import torch
    from pyiqa.archs.topiq_arch import CFANet, default_model_urls

    with torch.device("meta"):
        backbone = timm.create_model("resnet50", pretrained=False)
        network = CFANet("resnet50", use_ref=False, pretrained=False, backbone_pretrain=False)
    cfg = backbone.pretrained_cfg
    repo = cfg["hf_hub_id"] if not cfg["hf_hub_id"].endswith("/") else f"{cfg['hf_hub_id']}resnet50.{cfg['tag']}"
    storage = cache / "hub" / ("models--" + repo.replace("/", "--"))
    save_hole(storage / "snapshots" / COMMIT / "model.safetensors", backbone.state_dict())
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    name = default_model_urls["cfanet_nr_koniq_res50"].rpartition("/")[2]
    save_state(cache / "torch" / "hub" / "pyiqa" / name, network.state_dict(), key="params")


@contextmanager
def hub_server(repositories: dict[str, Path], stalled: Container[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as a hub does, on the loopback; yields its address and the list of requests, which grows.

    Of a file whose name is in `stalled` only the first half is sent.
    """
    requests: list[str] = []
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            found = answer(self.path.partition("?")[0], repositories)
            data, headers = found or (b"not found", {})
            self.send_response(404 if found is None else 200)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and self.path.rpartition("/")[2] in stalled:
                self.wfile.write(data[: len(data) // 2])
                requests.append("stalled")
                closing.wait(60)
            elif self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def answer(path: str, repositories: dict[str, Path]) -> tuple[bytes, dict[str, str]] | None:
    """Return content and headers: a repository's facts, its list of files, or a file; None where there is none."""
    for repo, folder in repositories.items():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if path.startswith(f"/api/models/{repo}/revision/"):
            return json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), {}
        if path.startswith(f"/api/models/{repo}/tree/"):
            names = [file.relative_to(folder).as_posix() for file in files]
            facts = [{"type": "file", "path": name, "size": (folder / name).stat().st_size} for name in names]
            return json.dumps([{**fact, "oid": hashlib.sha1(b"").hexdigest()} for fact in facts]).encode(), {}
        for revision in ("main", COMMIT):
            prefix = f"/{repo}/resolve/{revision}/"
            if path.startswith(prefix) and (folder / path.removeprefix(prefix)) in files:
                data = (folder / path.removeprefix(prefix)).read_bytes()
                return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    return None

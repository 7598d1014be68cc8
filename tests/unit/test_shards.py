"""Shards: deterministic, lossless, and closed to truncated files and foreign names."""

import io
import os
import tarfile
import time
from pathlib import Path

import pytest
import torch

from dp2osr import shards
from dp2osr.errors import UserError

SAMPLES = [("a-000", {"hr.png": b"x" * 700, "json": b"{}"}), ("b-000", {"json": b"[1]"})]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Return a shard of two samples, three members."""
    path = tmp_path / "shard.tar"
    shards.write_shard(path, SAMPLES)
    return path


def write_members(path: Path, *members: tarfile.TarInfo) -> Path:
    """Write a tar of the given members, each with the content `data`."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            member.size = 4 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"data"))
    return path


def test_samples_are_read_as_written(shard: Path) -> None:
    assert list(shards.read_shard(shard)) == SAMPLES


def test_samples_are_counted(shard: Path, tmp_path: Path) -> None:
    assert shards.count_samples(shard) == len(list(shards.read_shard(shard)))
    (tmp_path / "no.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"no.tar: truncated or damaged"):
        shards.count_samples(tmp_path / "no.tar")


def test_an_empty_shard(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "shard.tar", [])
    assert list(shards.read_shard(tmp_path / "shard.tar")) == []


def test_the_same_samples_give_the_same_bytes(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 2e9)
    old = os.umask(0o077)
    try:
        shards.write_shard(tmp_path / "other.tar", iter(SAMPLES))
    finally:
        os.umask(old)
    assert (tmp_path / "other.tar").read_bytes() == shard.read_bytes()


def test_members_say_nothing_of_this_machine(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_any_webdataset_reader_finds_the_samples(shard: Path) -> None:
    import webdataset

    found = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["a-000", "b-000"]
    assert found[0]["hr.png"] == SAMPLES[0][1]["hr.png"]


# Members of the shard: header 0-511, 700 bytes to 1535; header 1536-2047, 2 bytes; header 2560-3071, 3 bytes; the end.
@pytest.mark.parametrize("size", [0, 100, 512, 1000, 1211, 1536, 1600, 2048, 2049, 2560, 3072, 3584, 4096])
def test_a_truncated_shard_is_refused_wherever_it_is_cut(shard: Path, size: int) -> None:
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(UserError, match=r"shard\.tar"):
        list(shards.read_shard(shard))
    with pytest.raises(UserError, match=r"shard\.tar"):
        shards.count_samples(shard)


def test_a_file_that_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(os.urandom(5000))
    with pytest.raises(UserError, match=r"shard\.tar"):
        list(shards.read_shard(path))


@pytest.mark.parametrize(
    "name", ["../a.json", "/etc/a.json", "a/b.json", "a", "a..json/../x", "a b.json", "ä.json", "a.json\n"]
)
def test_a_foreign_name_is_refused(tmp_path: Path, name: str) -> None:
    path = write_members(tmp_path / "shard.tar", tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"shard\.tar: unexpected member"):
        list(shards.read_shard(path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_plain_files_are_read(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("a-000.json")
    member.type, member.linkname = kind, "/etc/hostname"
    path = write_members(tmp_path / "shard.tar", member)
    with pytest.raises(UserError, match="unexpected member"):
        list(shards.read_shard(path))


@pytest.mark.parametrize("key", ["../a", "a/b", "a.b/c", "", "a b"])
def test_a_foreign_name_is_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="member name"):
        shards.write_shard(tmp_path / "shard.tar", [(key, {"json": b""})])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_images_are_kept_without_loss(image_format: str) -> None:
    image = torch.randint(0, 256, (3, 17, 23), generator=torch.Generator().manual_seed(0)).float() / 255
    data = shards.encode_image(image, image_format)
    assert torch.equal(shards.decode_image(data), image)
    assert shards.encode_image(image, image_format) == data


def test_images_are_rounded_and_clamped() -> None:
    image = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.3]).expand(3, 1, 5)
    found = shards.decode_image(shards.encode_image(image)) * 255
    assert found[0, 0].round().tolist() == [0, 0, 1, 255, 255]


def test_only_our_own_formats_are_decoded() -> None:
    from PIL import Image, UnidentifiedImageError

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="GIF")
    with pytest.raises(UnidentifiedImageError):
        shards.decode_image(buffer.getvalue())

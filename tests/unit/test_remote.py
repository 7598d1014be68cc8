"""Addresses of images: what they expand to, what their copies are called, and which are refused."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from dp2osr import config, images, remote
from dp2osr.errors import UserError
from dp2osr.stages import ingest


def test_ranges_expand_as_webdataset_writes_them() -> None:
    assert remote.expand("s3://b/x-{08..10}.tar") == ["s3://b/x-08.tar", "s3://b/x-09.tar", "s3://b/x-10.tar"]
    assert remote.expand("https://h/{0..1}/{1..2}.tar") == [f"https://h/{a}/{b}.tar" for a in (0, 1) for b in (1, 2)]
    assert remote.expand("s3://b/one.tar") == ["s3://b/one.tar"]
    with pytest.raises(UserError, match="found an empty range"):
        remote.expand("s3://b/{2..1}.tar")


def test_what_is_an_address() -> None:
    assert [remote.plugin(entry) for entry in ("s3://b/x.tar", "http://h/x", "https://h/x")] == ["s3", "http", "http"]
    for entry in ("data/train", "builtin:skimage/coffee", "/data/x.tar", "ftp://h/x.tar", "s3:x"):
        assert not remote.is_remote(entry)
    assert remote.addresses(["data", "s3://b/{0..1}.tar"]) == ["s3://b/0.tar", "s3://b/1.tar"]


def test_copies_of_equal_names_lie_side_by_side() -> None:
    names = [remote.copy_name(address) for address in ("s3://a/x 1.tar", "s3://b/x 1.tar")]
    assert len(set(names)) == 2 and all(name.endswith("-x_1.tar") for name in names)


WRONG = {
    "https://h/x.tar?token=1": "without credentials",
    "https://me:secret@h/x.tar": "without credentials",
    "s3://b/a::b.tar": "without credentials",
    "s3://b/folder/": "wanted the address of one file",
    "s3://b/*.tar": "wanted the address of one file",
    "s3://b/{a,b}.tar": "wanted the address of one file",
    "s3:///x.tar": "wanted the address of one file",
}


@pytest.mark.parametrize("entry", WRONG)
def test_refused(entry: str, config_dict: dict[str, Any]) -> None:
    config_dict["datasets"]["train"]["images"] = [entry]
    with pytest.raises(UserError, match=f"datasets.train.images: found .*{WRONG[entry]}"):
        remote.check(config.load(config_dict))


BRANCHES = {
    "s3://b/x.safetensors?versionId=1": "wanted an address without credentials",
    "s3://b/x-{0..1}.safetensors": "wanted the address of one file",
}


@pytest.mark.parametrize("control", BRANCHES)
def test_refused_control_branches(control: str, config_dict: dict[str, Any]) -> None:
    config_dict["policies"]["base"] = {"control": control}
    with pytest.raises(UserError, match=f"policies.base.control: found .*{BRANCHES[control]}"):
        remote.check(config.load(config_dict))


def test_control_branches_are_fetched_once(config_dict: dict[str, Any]) -> None:
    config_dict["policy_defaults"]["control"] = "s3://b/c/model.safetensors"
    known = config.load(config_dict)
    remote.check(known)
    assert remote.branches(known) == ["s3://b/c/model.safetensors"]  # of all policies, derived ones too


LOCAL = {
    ("policy_defaults", "model"): "s3://b/sd2",
    ("policy_defaults", "control"): "s3://b/controlnet",
    ("pretrain", "backbone"): "https://h/unet",
    ("results",): "s3://b/results",
}


@pytest.mark.parametrize("keys", LOCAL)
def test_what_nothing_fetches_is_refused(keys: tuple[str, ...], config_dict: dict[str, Any]) -> None:
    *parents, key = keys
    section = config_dict[parents[0]] if parents else config_dict
    section[key] = LOCAL[keys]
    with pytest.raises(UserError, match=f"{key}: found '{LOCAL[keys]}', wanted a path on disk") as caught:
        config.load(config_dict)
    assert ("aws s3 sync s3://b/" in str(caught.value)) == LOCAL[keys].startswith("s3:")


def test_missing_plugin_is_named(config_dict: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config_dict["datasets"]["train"]["images"] = ["s3://b/x.tar"]
    remote.check(config.load(config_dict))
    find = importlib.util.find_spec
    monkeypatch.setattr(remote, "find_spec", lambda name: None if name.endswith("_s3") else find(name))
    with pytest.raises(UserError, match=r"wants snakemake-storage-plugin-s3, .* pip install 'dp2o-sr\[storage\]'"):
        remote.check(config.load(config_dict))


def test_tables_name_the_address_wherever_its_copy_is(config_dict: dict[str, Any], tmp_path: Path) -> None:
    address = "https://host/photos/coffee.png"
    keys = set(ingest.IngestJob.model_fields)
    settings = {key: value for key, value in config_dict["dataset_defaults"].items() if key in keys}
    job = ingest.IngestJob(**settings | {"images": [address], "seed": 0})
    found = []
    for name in ("here", "there"):
        copy = remote.local(address, tmp_path / name)
        copy.parent.mkdir()
        copy.write_bytes(images.load_builtin("skimage/coffee"))
        found.append(ingest.ingest(job, copies=copy.parent))
    assert set(found[0]["source"]) == {address}
    assert found[0].equals(found[1])


def test_a_lost_copy_says_how_to_get_it_again(tmp_path: Path) -> None:
    for source in ("s3://b/x.png", "s3://b/x.tar::1.png"):
        with images.Sources(tmp_path) as sources, pytest.raises(UserError, match="--forcerun fetch_images"):
            sources.read(source, "0" * 64)


def test_a_truncated_shard_stops_ingest(tmp_path: Path) -> None:
    address = "s3://b/x.tar"
    remote.local(address, tmp_path).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="truncated or damaged tar"):
        list(images.find(address, max_bytes=10**6, copies=tmp_path))

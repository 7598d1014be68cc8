import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_shards
from dp2osr import config, sampling, seeds
from dp2osr.errors import UserError
from dp2osr.models import speed
from dp2osr.models.backend import StoredEmbeddings, read_embeddings, weights_hash
from dp2osr.sampling import images_control
from dp2osr.shards import decode_image, encode_image, read_shard, write_shard
from dp2osr.stages import rollout


class Killed(Exception):
    pass


@pytest.fixture
def job(tmp_path: Path, config_dict: dict[str, Any], tiny_model: Path) -> list[str]:
    """Return the command line of a job of 3 groups x 4 rollouts; the output is tmp_path/out.tar."""
    groups = tiny_shards.names(3)
    policy = tiny_shards.policy(config_dict, tiny_model)
    tiny_shards.write_lr(tmp_path / "lr.tar", groups)
    tiny_shards.write_embeddings(tmp_path / "embeddings.safetensors", groups, policy)
    return command(tmp_path, policy)


def command(
    folder: Path,
    policy: config.PolicySettings,
    *,
    first: int = 0,
    count: int = 4,
    batch: int = 5,
    out: str = "out.tar",
    **speed: Any,
) -> list[str]:
    settings = rollout.RolloutJob(policy=policy, seed=7, first=first, count=count, scale=4, image_format="png")
    inputs = ["--lr", str(folder / "lr.tar"), "--embeddings", str(folder / "embeddings.safetensors")]
    how = ["--control", policy.control, "--batch-size", str(batch), *tiny_shards.speed(**speed), "--device", "cpu"]
    return [*inputs, *how, "--config", settings.model_dump_json(), "--candidates", str(folder / out)]


def restored(batch: rollout.Batch) -> str:
    return batch[0][0]


def encoded(batch: rollout.Batch, image: str) -> list[Any]:
    assert image == batch[0][0]
    return [(f"{image}-r0000", {"json": b"{}"})]


def test_plan_keeps_a_group_together() -> None:
    assert rollout.plan(["a", "b"], 2, 2, 3) == [[("a", 2), ("a", 3), ("b", 2)], [("b", 3)]]


def test_no_batch_spans_two_shapes() -> None:
    images = {"a": torch.zeros(3, 4, 4), "b": torch.zeros(3, 4, 4), "c": torch.zeros(3, 5, 4)}
    assert rollout.plan_shapes(images, 0, 2, 3) == [
        [("a", 0), ("a", 1), ("b", 0)],
        [("b", 1)],
        [("c", 0), ("c", 1)],
    ]


def test_whole_photographs_of_any_size(
    tmp_path: Path, job: list[str], config_dict: dict[str, Any], tiny_model: Path
) -> None:
    """A photograph of the crops' size gives the very same candidates; others are padded, and tiled where larger."""
    rollout.main(job)
    groups, policy = tiny_shards.names(3), tiny_shards.policy(config_dict, tiny_model)
    samples = dict(read_shard(tmp_path / "lr.tar"))
    for group, (height, width) in {groups[1]: (5, 7), groups[2]: (30, 9)}.items():
        samples[group] = {"lr.png": encode_image(torch.rand(3, height, width)), "json": b"{}"}
    write_shard(tmp_path / "lr.tar", samples.items())
    command_line = command(tmp_path, policy, out="whole.tar")
    settings = json.loads(command_line[command_line.index("--config") + 1]) | {"whole": True}
    command_line[command_line.index("--config") + 1] = json.dumps(settings)
    rollout.main(command_line)
    found = dict(read_shard(tmp_path / "whole.tar"))
    shapes = {key: tuple(decode_image(fields["png"]).shape[1:]) for key, fields in found.items()}
    assert [shapes[f"{group}-r0000"] for group in groups] == [(32, 32), (20, 28), (120, 36)]
    crop, whole = (
        decode_image(each[f"{groups[0]}-r0000"]["png"]) for each in (dict(read_shard(tmp_path / "out.tar")), found)
    )
    assert torch.allclose(crop, whole, atol=1.5 / 255)


def test_pack_round_trip() -> None:
    samples = [("b-r0000", {"png": b"\x00\xff", "json": b"{}"}), ("a-r0001", {"png": b"", "json": b"[]"})]
    assert rollout.unpack(rollout.pack(samples)) == samples


def test_control_image_is_bicubic() -> None:
    def keys(x: float, a: float = -0.75) -> float:  # cubic convolution with torch's parameter
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    line = torch.linspace(0.2, 0.8, 8) ** 2
    up = images_control(line.expand(1, 3, 8, 8), 4)
    assert up.shape == (1, 3, 32, 32)
    position = 16.5 / 4 - 0.5
    expected = sum(float(line[i]) * keys(position - i) for i in range(2, 6))
    assert up[0, 0, 10, 16] == pytest.approx(expected, abs=1e-6)
    edges = images_control(torch.eye(8).expand(1, 3, 8, 8), 4)
    assert edges.min() == 0
    assert edges.max() <= 1


def test_candidates_say_where_they_come_from(tmp_path: Path, job: list[str]) -> None:
    rollout.main(job)
    samples = list(read_shard(tmp_path / "out.tar"))
    group = tiny_shards.names(3)[1]
    assert [key for key, _ in samples[4:8]] == [f"{group}-r{number:04d}" for number in range(4)]
    facts = json.loads(samples[5][1]["json"])
    assert (facts["group_id"], facts["rollout"]) == (group, 1)
    assert facts["seed"] == seeds.candidate(7, group, 1)
    assert facts["sampling"]["steps"] == 2
    assert len(facts["policy_hash"]) == 16
    assert decode_image(samples[0][1]["png"]).shape == (3, 32, 32)
    assert len({fields["png"] for _, fields in samples}) == 12
    assert not list(tmp_path.glob("*.parts"))


def test_policy_hash_is_of_weights_and_settings(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weights, notes = tmp_path / "unet" / "model.safetensors", [tmp_path / "README.md", tmp_path / "policy.json"]
    weights.write_bytes(b"one")
    before = weights_hash(tmp_path)
    for note in notes:
        note.write_text("made at another commit")
    assert weights_hash(tmp_path) == before
    weights.write_bytes(b"two")
    assert weights_hash(tmp_path) != before


def test_more_rollouts_only_add_blocks(
    tmp_path: Path, job: list[str], config_dict: dict[str, Any], tiny_model: Path
) -> None:
    rollout.main(job)
    policy = tiny_shards.policy(config_dict, tiny_model)
    rollout.main(command(tmp_path, policy, first=2, count=2, batch=1, out="block.tar"))
    whole = dict(read_shard(tmp_path / "out.tar"))
    for key, fields in read_shard(tmp_path / "block.tar"):
        assert torch.allclose(decode_image(fields["png"]), decode_image(whole[key]["png"]), atol=1.5 / 255)


def test_killed_job_goes_on_with_the_same_bytes(
    tmp_path: Path, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout.main(job)
    undisturbed = (tmp_path / "out.tar").read_bytes()
    (tmp_path / "out.tar").unlink()
    real, calls = rollout.Sampler.restore, []

    def counted(self: rollout.Sampler, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise Killed
        return real(self, batch)

    monkeypatch.setattr(rollout.Sampler, "restore", counted)
    with pytest.raises(Killed):
        rollout.main(job)
    assert not (tmp_path / "out.tar").exists()
    rollout.main(job)
    assert len(calls) == 4  # two kept batches, the one that was killed, and that one again
    assert (tmp_path / "out.tar").read_bytes() == undisturbed


def test_parts_of_other_settings_are_not_mixed_in(
    tmp_path: Path, job: list[str], config_dict: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout.resume.Parts, "clear", lambda self: None)
    rollout.main(job)
    rollout.main(command(tmp_path, tiny_shards.policy(config_dict, tiny_model, steps=3)))
    assert len(list((tmp_path / "out.tar.parts").iterdir())) == 2


def test_a_batch_is_encoded_while_the_next_is_restored(tmp_path: Path) -> None:
    parts, second = rollout.resume.Parts(tmp_path / "out.tar", "mark"), threading.Event()

    def restoring(batch: rollout.Batch) -> str:
        if batch[0][0] == "b":
            second.set()
        return restored(batch)

    def encoding(batch: rollout.Batch, image: str) -> list[Any]:
        assert second.wait(30), "the next batch did not begin"
        return encoded(batch, image)

    found = list(rollout.resumed(restoring, encoding, [[("a", 0)], [("b", 0)]], parts))
    assert [key for key, _ in found] == ["a-r0000", "b-r0000"]


def test_a_batch_that_cannot_be_kept_stops_the_job(tmp_path: Path) -> None:
    parts, begun = rollout.resume.Parts(tmp_path / "out.tar", "mark"), []

    def restoring(batch: rollout.Batch) -> str:
        begun.append(batch)
        return restored(batch)

    def encoding(batch: rollout.Batch, image: str) -> list[Any]:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        list(rollout.resumed(restoring, encoding, [[(name, 0)] for name in "abcd"], parts))
    assert len(begun) <= 2 and parts.names() == []


def test_switches_that_make_it_faster(
    tmp_path: Path, job: list[str], config_dict: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A last batch is filled up where blocks are compiled for one shape; the switches have parts of their own."""
    monkeypatch.setattr(rollout.resume.Parts, "clear", lambda self: None)
    rollout.main(job)
    shapes: list[int] = []
    real = sampling.restore

    def counted(backend: Any, branch: Any, lr: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(len(lr))
        return real(backend, branch, lr, **options)

    monkeypatch.setattr(sampling, "restore", counted)
    monkeypatch.setattr(speed, "check_compiler", lambda device: None)
    monkeypatch.setattr(speed, "compile_blocks", lambda networks, cache: None)
    policy = tiny_shards.policy(config_dict, tiny_model)
    how = {"channels_last": False, "fuse_qkv": True, "attention": "math", "compile": True}
    rollout.main(command(tmp_path, policy, **how))
    assert shapes == [5, 5, 5]  # of 12 candidates
    fast, plain = (
        [dict(np.load(part)) for part in sorted(folder.iterdir())]
        for folder in sorted((tmp_path / "out.tar.parts").iterdir(), key=lambda path: path.stat().st_mtime_ns)[::-1]
    )
    for one, other in zip(fast, plain, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name.endswith("png"):
                difference = decode_image(one[name].tobytes()) - decode_image(other[name].tobytes())
                assert difference.abs().max() <= 1.01 / 255


@pytest.mark.parametrize("compiled", [False, True])
def test_short_memory_samples_fewer_at_once(
    tmp_path: Path,
    job: list[str],
    config_dict: dict[str, Any],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
) -> None:
    """12 candidates in batches of 5, where 3 are too many; what is compiled stays of one shape."""
    rollout.main(job)
    shapes: list[int] = []
    real = sampling.restore

    def crowded(backend: Any, branch: Any, lr: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(len(lr))
        if len(lr) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(backend, branch, lr, **options)

    monkeypatch.setattr(sampling, "restore", crowded)
    monkeypatch.setattr(speed, "check_compiler", lambda device: None)
    monkeypatch.setattr(speed, "compile_blocks", lambda networks, cache: None)
    rollout.main(command(tmp_path, tiny_shards.policy(config_dict, tiny_model), out="short.tar", compile=compiled))
    assert shapes == [5, *[2, 2, 2 if compiled else 1] * 2, 2]
    whole, short = (dict(read_shard(tmp_path / name)) for name in ("out.tar", "short.tar"))
    assert list(whole) == list(short)
    for key, fields in whole.items():
        assert torch.allclose(decode_image(fields["png"]), decode_image(short[key]["png"]), atol=1.5 / 255)


def test_parts_taken_away_by_a_second_writer_are_computed_again(tmp_path: Path) -> None:
    parts = rollout.resume.Parts(tmp_path / "out.tar", "mark")
    stream = rollout.resumed(restored, encoded, [[("a", 0)], [("b", 0)]], parts)
    first = next(stream)
    parts.clear()
    assert [first, *stream] == [("a-r0000", {"json": b"{}"}), ("b-r0000", {"json": b"{}"})]


def test_guidance_uses_the_negative_prompt(
    tmp_path: Path, job: list[str], config_dict: dict[str, Any], tiny_model: Path
) -> None:
    rollout.main(job)
    rollout.main(command(tmp_path, tiny_shards.policy(config_dict, tiny_model, guidance=3.5), out="guided.tar"))
    plain, guided = (dict(read_shard(tmp_path / name)) for name in ("out.tar", "guided.tar"))
    assert all(plain[key]["png"] != guided[key]["png"] for key in plain)


def test_wrong_inputs_are_named(tmp_path: Path, job: list[str], config_dict: dict[str, Any], tiny_model: Path) -> None:
    policy = tiny_shards.policy(config_dict, tiny_model)
    tiny_shards.write_embeddings(tmp_path / "embeddings.safetensors", tiny_shards.names(2), policy)
    with pytest.raises(UserError, match="no prompt of group 0000000000000002-000"):
        rollout.main(job)
    tiny_shards.write_embeddings(tmp_path / "embeddings.safetensors", tiny_shards.names(3), policy)
    job[job.index("--control") + 1] = str(tmp_path / "absent")
    with pytest.raises(UserError, match="absent"):
        rollout.main(job)
    data = (tmp_path / "lr.tar").read_bytes()
    (tmp_path / "lr.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"lr\.tar: truncated"):
        rollout.main(job)


def test_embeddings_read_one_by_one_equal_those_read_at_once(
    tmp_path: Path, config_dict: dict[str, Any], tiny_model: Path
) -> None:
    policy = tiny_shards.policy(config_dict, tiny_model)
    halves = [tiny_shards.names(4)[:2], tiny_shards.names(4)[2:]]
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for path, groups in zip(paths, halves, strict=True):
        tiny_shards.write_embeddings(path, groups, policy)
    stored = StoredEmbeddings(paths)
    assert list(stored) == tiny_shards.names(4) and len(stored) == 4
    whole = {group: value for path in paths for group, value in read_embeddings(path)[0].items()}
    for group, value in whole.items():
        assert stored[group].keys() == value.keys()
        assert all(torch.equal(stored[group][name], tensor) for name, tensor in value.items())
    paths[0].write_bytes(paths[0].read_bytes()[:50])
    with pytest.raises(UserError, match=r"embeddings .*0\.safetensors: no readable safetensors file"):
        StoredEmbeddings(paths)

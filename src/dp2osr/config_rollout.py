"""The section `rollout` of the configuration: how sampling is cut into jobs, and what makes it faster."""

from typing import Literal

from dp2osr.strict import Count, Strict


class SpeedSettings(Strict):
    """How fast candidates are sampled; no key changes them beyond rounding (docs/levers.md)."""

    channels_last: bool
    fuse_qkv: bool
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"]
    cudnn_benchmark: bool
    compile: bool
    compile_cache: str


class RolloutSettings(Strict):
    """How rollout jobs are cut and stored; no key here changes a candidate's pixels beyond rounding."""

    num_rollouts: Count
    rollouts_per_block: Count
    batch_size: Count
    speed: SpeedSettings
    image_format: Literal["png", "webp"]
    keep: Literal["all", "selected"]

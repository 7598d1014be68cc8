"""The configuration: type and range of each key. Defaults live in config/config.yaml alone.

`load` takes the dictionary that Snakemake has merged from its config files, fills each named dataset, policy
and run from its `*_defaults` section, and validates everything at once.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dp2osr import config_checks
from dp2osr.config_datasets import LrSettings, PublishedSettings, check_dataset
from dp2osr.config_degradation import DegradationSettings
from dp2osr.config_downstream import DownstreamSettings
from dp2osr.config_metrics import IqaSettings
from dp2osr.config_rollout import RolloutSettings
from dp2osr.errors import UserError
from dp2osr.strict import Count, Name, Probability, Strict, parse


class TagSettings(Strict):
    """The paper's prompts, tags of the LR image by RAM with DAPE's weights: paths of files, and a threshold."""

    ram: str
    dape: str
    tag_list: str
    thresholds: str
    threshold: Probability


class CaptionSettings(Strict):
    """Prompts by an image-to-text model of transformers in the folder `model`."""

    model: str
    question: str
    max_tokens: Count


class PromptSettings(Strict):
    """Where prompts come from: `none` is the empty prompt, `text` one fixed prompt, `table` a file keyed by image.

    `tags` and `caption` are made from each LR image, by the models of the sections of these names.
    """

    source: Literal["none", "text", "table", "tags", "caption"]
    text: str
    table: str
    tags: TagSettings
    caption: CaptionSettings


class DatasetSettings(Strict):
    """A set of images: where HR and LR come from, how they are cropped, split into shards and degraded."""

    images: list[str]
    lr: LrSettings
    split: str
    hr_size: Annotated[int, Field(ge=16)]
    crop: Literal["random", "grid", "center", "full"]
    crops_per_image: Count
    downscale: Count
    min_std: Annotated[float, Field(ge=0)]
    max_pixels: Count
    max_rejected_share: Probability
    num_shards: Count
    degradation: DegradationSettings
    prompt: PromptSettings

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_dataset(self)
        return self


class SamplingSettings(Strict):
    """How a model is sampled; part of what a policy is."""

    scheduler: str
    steps: Count
    guidance: Annotated[float, Field(ge=1)]
    true_guidance: Annotated[float, Field(ge=1)]
    negative_prompt: str
    text_tokens: Count
    colour_fix: Literal["adain", "wavelet", "none"]
    dtype: Literal["float32", "float16", "bfloat16"]
    vae_dtype: Literal["float32", "float16", "bfloat16"]


class PolicySettings(Strict):
    """A model given from outside, or (with `derive`) a control made from another policy's candidates."""

    backend: Literal["sd", "flux"]
    model: str
    control: str
    native_size: Annotated[int, Field(ge=0)]
    sampling: SamplingSettings
    derive: Literal["", "blur", "mean", "bicubic"]
    derive_from: str
    derive_sigma: Annotated[float, Field(ge=0)]


class RewardSettings(Strict):
    """R = weight_fr · mean FR + (1 − weight_fr) · mean NR of group-normalised scores (method.md, Reward)."""

    fr: list[str]
    nr: list[str]
    weight_fr: Probability
    num_rollouts: Annotated[int, Field(ge=2)]


class PairSettings(Strict):
    """Winners are the best `top`, losers the worst `top` of a group of M; `selection: random` is the control."""

    selection: Literal["reward", "random"]
    top: Count
    min_gap: Annotated[float, Field(ge=0)]
    max_pairs_per_group: Annotated[int, Field(ge=0)]
    weights: Literal["none", "intra", "inter", "both"]


class GuardSettings(Strict):
    """Validation rollouts during training: every `every` steps; 0 switches the guard off."""

    every: Annotated[int, Field(ge=0)]
    dataset: str
    num_rollouts: Count
    patience: Count
    min_diversity: Probability
    max_reward_drop: Annotated[float, Field(ge=0)]


class TrainSettings(Strict):
    """DPO fine-tuning of the control branch (method.md, DPO and Training)."""

    batching: Literal["groups", "pairs"]
    beta: Annotated[float, Field(gt=0)]
    steps: Count
    groups_per_step: Count
    pairs_per_step: Count
    accumulation: Count
    micro_batch: Count
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    timestep_density: Literal["uniform", "logit_normal"]
    optimizer: Literal["adamw", "adamw8bit"]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    precision: Literal["no", "fp16", "bf16"]
    gradient_checkpointing: bool
    sharding: Literal["none", "backbone"]
    checkpoint_every: Count
    tracker: Literal["tensorboard", "wandb", "none"]
    guard: GuardSettings


class RunSettings(Strict):
    """An experiment; its result is a policy of the run's name."""

    reference: str
    dataset: str
    reward: str
    judge: str
    pairs: PairSettings
    train: TrainSettings
    tests: list[str]
    controls: list[str]
    seed: int


class LimitSettings(Strict):
    """What the jobs of a cluster ask for, and what their time limits are computed from; no result depends on it."""

    images_per_shard: Count
    start_min: Count
    longest_min: Count
    rollout: Annotated[float, Field(gt=0)]
    score: Annotated[float, Field(gt=0)]
    vqr1: Annotated[float, Field(gt=0)]
    encode: Annotated[float, Field(gt=0)]
    train: Annotated[float, Field(gt=0)]
    train_gpus: Count
    train_nodes: Count


class EvaluateSettings(Strict):
    """Paired bootstrap over source photographs."""

    bootstrap: Count
    confidence: Annotated[float, Field(gt=0, lt=1)]


class ReportSettings(Strict):
    """Contact sheets: groups shown, and the enlargement of small images. Runs compared, figures set beside ours."""

    num_groups: Count
    zoom: Count
    compare: list[str]
    published: PublishedSettings


class ExplorerSettings(Strict):
    """The group explorer: pictures of candidates, in pixels and WebP quality, and how many groups a data file holds."""

    thumbnail: Annotated[int, Field(ge=16, le=1024)]
    quality: Annotated[int, Field(ge=1, le=100)]
    groups_per_page: Count


class TransformerSettings(Strict):
    """Shape of the tiny FLUX-style transformer: double and single blocks, and those that the control branch copies."""

    heads: Count
    head_dim: Annotated[int, Field(ge=8, multiple_of=8)]
    layers: Count
    single_layers: Annotated[int, Field(ge=0)]
    control_layers: Count
    control_single_layers: Annotated[int, Field(ge=0)]


class ArchitectureSettings(Strict):
    """Widths of the tiny networks that `pretrain` builds in diffusers' layout, in the style of its policy's backend.

    The VAE starts by carrying colours, which takes six channels and three latents; the UNet normalises eight groups.
    """

    vae_channels: Annotated[list[Annotated[int, Field(ge=6)]], Field(min_length=1, max_length=4)]
    latent_channels: Annotated[int, Field(ge=3)]
    unet_channels: Annotated[list[Annotated[int, Field(ge=8, multiple_of=8)]], Field(min_length=1)]
    layers_per_block: Count
    conditioning_channels: Annotated[list[Count], Field(min_length=1)]
    text_width: Annotated[int, Field(ge=2, multiple_of=2)]
    prediction_type: Literal["epsilon", "v_prediction"]
    transformer: TransformerSettings


class PhaseSettings(Strict):
    """One pretraining phase on crops of `crop` pixels; cosine decay from the learning rate to `final` times it."""

    steps: Annotated[int, Field(ge=0)]
    batch_size: Count
    crop: Annotated[int, Field(ge=8, multiple_of=8)]
    learning_rate: Annotated[float, Field(gt=0)]
    final: Probability


class PretrainSettings(Strict):
    """Training of a tiny base from HR images, for the backend of `policy`.

    A given `backbone` stays frozen, and only a control branch learns; of a given `autoencoder` the VAE is kept.
    """

    dataset: str
    policy: str
    output: str
    backbone: str
    autoencoder: str
    pool_size: Count
    procedural_share: Probability
    architecture: ArchitectureSettings
    vae: PhaseSettings
    denoiser: PhaseSettings
    finetune: PhaseSettings
    prompt_dropout: Probability
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    checkpoint_every: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        shape = self.architecture.transformer
        for name in ("layers", "single_layers"):
            if getattr(shape, f"control_{name}") > getattr(shape, name):
                raise ValueError(
                    f"architecture.transformer.control_{name}: wanted at most the {getattr(shape, name)} of {name}"
                )
        halved, wanted = len(self.architecture.conditioning_channels), len(self.architecture.vae_channels)
        if not self.backbone and halved != wanted:
            raise ValueError(
                f"architecture.conditioning_channels has {halved} entries, wanted {wanted} as vae_channels"
            )
        return self


class Config(Strict):
    """Everything. `root_policy` and friends answer the questions that the rules ask."""

    results: str
    weights: str
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    datasets: dict[Name, DatasetSettings]
    policies: dict[Name, PolicySettings]
    rollout: RolloutSettings
    iqa: IqaSettings
    rewards: dict[Name, RewardSettings]
    runs: dict[Name, RunSettings]
    limits: LimitSettings
    evaluate: EvaluateSettings
    report: ReportSettings
    explorer: ExplorerSettings
    downstream: dict[Name, DownstreamSettings]
    pretrain: PretrainSettings

    def root_policy(self, name: str) -> str:
        """Return the given policy whose frozen backbone the policy or run `name` uses."""
        while name in self.runs:
            name = self.runs[name].reference
        derived = self.policies[name]
        return self.root_policy(derived.derive_from) if derived.derive else name

    def policy(self, name: str) -> PolicySettings:
        """Return the settings of the root policy behind `name` (model, sampling)."""
        return self.policies[self.root_policy(name)]

    def judge(self, run: str) -> str:
        """Return the reward by which a run is validated and reported: its own, unless it names another."""
        return self.runs[run].judge or self.runs[run].reward

    def num_rollouts(self, dataset: str) -> int:
        """Return how many rollouts `dataset` needs: the largest M of the rewards that use it."""
        used = [
            self.rewards[reward].num_rollouts
            for name, run in self.runs.items()
            for reward, datasets in (
                (run.reward, [run.dataset]),
                (self.judge(name), [*run.tests, run.train.guard.dataset]),
            )
            if dataset in datasets
        ]
        return max([*used, 1]) if used else self.rollout.num_rollouts


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _fill(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Give each named dataset, policy, run and benchmark what it leaves out from the `*_defaults` section."""
    filled = dict(raw)
    for plural, defaults in (
        ("datasets", "dataset_defaults"),
        ("policies", "policy_defaults"),
        ("runs", "run_defaults"),
        ("downstream", "downstream_defaults"),
    ):
        base = filled.pop(defaults, {})
        named = filled.get(plural) or {}
        if not isinstance(named, Mapping):
            raise UserError(f"config: {plural}: found {type(named).__name__}, wanted a map of name to settings")
        filled[plural] = {name: _merge(base, settings or {}) for name, settings in named.items()}
    return filled


def load(raw: Mapping[str, Any]) -> Config:
    """Validate the merged configuration dictionary; raises UserError that names the key."""
    config = parse(Config, _fill(raw))
    config_checks.check_references(config)
    return config


def read(*paths: Path | str, changes: Mapping[str, Any] | None = None) -> Config:
    """Load and merge YAML files, the later over the earlier, as Snakemake does with --configfile; then `changes`."""
    import yaml

    raw: dict[str, Any] = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"config file {path}: not found")
        raw = _merge(raw, yaml.safe_load(Path(path).read_text()) or {})
    return load(_merge(raw, changes or {}))

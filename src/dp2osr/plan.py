"""What a configuration asks for before anyone pays for it: jobs, images, hours and bytes of each stage.

`jobs` follows the rules from `all` (the report of each run) upwards, as a first `snakemake` in an empty folder would.
Nothing here touches a file: what is known of earlier jobs comes in as `Facts` (plan_facts.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dp2osr.config import Config, DatasetSettings, RunSettings
from dp2osr.config_checks import prompt_files
from dp2osr.config_datasets import metric_groups
from dp2osr.errors import UserError

if TYPE_CHECKING:
    from dp2osr.models.footprint import Footprint

GPU_STAGES = ("describe", "embed", "rollout", "score", "encode", "train")
STAGES = (
    *("ingest", "niqe", "degrade", "prompt", "describe", "embed", "rollout", "derive", "score", "reward"),
    *("select_pairs", "encode", "train", "evaluate", "report"),
)
PAPER_METRICS = frozenset(
    ("lpips", "topiq_fr", "afine_fr", "maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign")
)
PAPER_SCORE_SECONDS = 1.08  # of an A800 for the nine metrics of a candidate of 512 px (the paper's figure)
PNG_BYTES = 1.8  # a pixel of lossless 8-bit RGB: candidates of the embedded model had 1.6 to 1.8, HR crops 1.5 to 2.0
SAMPLE_BYTES = 2048  # tar headers and JSON of a candidate or group
SCORE_BYTES = 8  # a score in its table; the embedded model's tables had 7.7
ONE_PROMPT = ("none", "text")  # sources that give all images the same
CHECKPOINTS = 3  # kept at a time: the last two and the best


@dataclass(frozen=True)
class Amount:
    """A count of images and how it is known; `at_most`: an upper bound."""

    count: int
    source: str
    at_most: bool = False


@dataclass(frozen=True)
class Facts:
    """What is known beside the configuration; plan_facts.py reads it.

    images: groups by data set; seconds: of one image, by (stage, kind), kind being a root policy where there is one;
    given: seconds of one image by stage, from the command line; sizes: bytes of one image on disk by (stage, data set).
    """

    images: Mapping[str, Amount] = field(default_factory=dict)
    seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)
    given: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Jobs of one stage that belong together. images, seconds, bytes: None where unknown.

    seconds: of one image in all of the stage's jobs; origin: where that is from; num_bytes: on disk.
    """

    stage: str
    subject: str
    jobs: int
    images: Amount | None
    seconds: float | None
    origin: str
    num_bytes: float | None

    @property
    def hours(self) -> float | None:
        """Hours of all jobs, one after the other."""
        return None if self.images is None or self.seconds is None else self.images.count * self.seconds / 3600


@dataclass
class Wanted:
    """What `rule all` needs: data sets, and blocks of candidates by (data set, policy)."""

    config: Config
    lr: set[str] = field(default_factory=set)
    embedded: set[tuple[str, str]] = field(default_factory=set)
    blocks: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    scored: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    rewards: set[tuple[str, str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, config: Config) -> "Wanted":
        """Collect what the reports of all runs need."""
        wanted = cls(config)
        for name in config.runs:
            wanted.add_run(name)
        if wanted.niqe:
            wanted.lr.add(config.iqa.niqe.dataset)
        return wanted

    @property
    def niqe(self) -> bool:
        """Whether NIQE is fitted: where anything is scored with it."""
        return bool(self.scored) and any("niqe" in members for members in self.config.iqa.groups.values())

    def add_run(self, name: str) -> None:
        """Pairs and training on its own data set, the guard's reference, and all policies on its test sets."""
        run, judge = self.config.runs[name], self.config.judge(name)
        self.add_reward(run.dataset, run.reference, run.reward)
        if run.train.guard.every:
            self.add_reward(run.train.guard.dataset, run.reference, judge)
        for dataset in run.tests:
            for policy in (name, run.reference, *run.controls):
                self.add_reward(dataset, policy, judge)
            for policy in (name, run.reference):
                self.add_candidates(dataset, policy, self.all_blocks(dataset))

    def add_reward(self, dataset: str, policy: str, reward: str) -> None:
        """The candidates that a reward takes, scored by every metric group."""
        self.rewards.add((dataset, policy, reward))
        count = 1 if self.is_single(policy) else self.config.rewards[reward].num_rollouts
        used = list(self.all_blocks(dataset))[: -(-count // self.config.rollout.rollouts_per_block)]
        self.scored.setdefault((dataset, policy), set()).update(used)
        self.add_candidates(dataset, policy, used)

    def add_candidates(self, dataset: str, policy: str, blocks: Sequence[int]) -> None:
        """Blocks of candidates, and what they are made from."""
        self.blocks.setdefault((dataset, policy), set()).update(blocks)
        self.lr.add(dataset)
        derived = self.derive(policy)
        if not derived:
            self.embedded.add((dataset, self.config.root_policy(policy)))
        elif derived != "bicubic":
            source = self.config.policies[policy].derive_from
            self.add_candidates(dataset, source, self.all_blocks(dataset) if derived == "mean" else blocks)

    def derive(self, policy: str) -> str:
        """Return how a policy's candidates are derived; "" where they are sampled."""
        return self.config.policies[policy].derive if policy in self.config.policies else ""

    def is_single(self, policy: str) -> bool:
        """Return whether a policy has one candidate an image."""
        return self.derive(policy) in ("mean", "bicubic")

    def all_blocks(self, dataset: str) -> range:
        """Return the numbers of a data set's blocks of seeds."""
        return range(-(-self.config.num_rollouts(dataset) // self.config.rollout.rollouts_per_block))

    def candidates(self, dataset: str, policy: str, blocks: set[int]) -> int:
        """Return how many candidates of one image some blocks hold."""
        if self.is_single(policy):
            return len(blocks)
        size, most = self.config.rollout.rollouts_per_block, self.config.num_rollouts(dataset)
        return sum(min(size, most - block * size) for block in blocks)


def images_a_step(run: RunSettings) -> int:
    """Return how many images an optimizer step takes: 2N of each group, or two of each pair."""
    if run.train.batching == "groups":
        return 2 * run.pairs.top * run.train.groups_per_step
    return 2 * run.train.pairs_per_step


def prompt_stage(settings: DatasetSettings) -> str:
    """Return the rule that makes a data set's prompts: `describe` where a model looks at the images."""
    return "describe" if prompt_files(settings.prompt) else "prompt"


def check_names(config: Config, *, images: Mapping[str, int], seconds: Mapping[str, float]) -> None:
    """Raise UserError where a given figure is of a data set or stage that does not exist."""
    for option, given, known in (("--images", images, set(config.datasets)), ("--seconds", seconds, set(STAGES))):
        for name in given:
            if name not in known:
                raise UserError(f"{option} {name}: unknown; wanted one of {', '.join(sorted(known))}")


@dataclass(frozen=True)
class Planner:
    """Makes the rows of a plan. footprints: by root policy, those that could be built."""

    config: Config
    facts: Facts
    footprints: Mapping[str, "Footprint"]

    def rows(self) -> list[Row]:
        """Return all rows in the order of the stages."""
        wanted = Wanted.of(self.config)
        found = [*self._data(wanted), *self._candidates(wanted), *self._runs()]
        return sorted(found, key=lambda row: STAGES.index(row.stage))

    def _row(
        self, stage: str, subject: str, jobs: int, *, images: Amount | None, kind: str = "", each: float | None = None
    ) -> Row:
        """`each`: bytes on disk of one image, unless jobs of the data set, the subject's first word, show it."""
        seconds, origin = self._seconds(stage, kind)
        each = self.facts.sizes.get((stage, subject.split(", ")[0]), each)
        size = None if images is None or each is None else images.count * each
        return Row(stage, subject, jobs, images, seconds, origin, size)

    def _seconds(self, stage: str, kind: str) -> tuple[float | None, str]:
        if stage in self.facts.given:
            return self.facts.given[stage], "given"
        if (stage, kind) in self.facts.seconds:
            return self.facts.seconds[stage, kind], "measured"
        paper = None
        if stage == "rollout" and kind in self.footprints:
            paper = self.footprints[kind].paper_seconds
        if stage == "score" and self._as_the_paper(kind.split(", ")):
            paper = PAPER_SCORE_SECONDS
        return paper, "" if paper is None else "paper, A800"

    def _as_the_paper(self, groups: Sequence[str]) -> bool:
        """Whether these metric groups hold the paper's nine, and not the one that takes several times their time."""
        names = {name for group in groups for name in self.config.iqa.groups.get(group, [])}
        return names >= PAPER_METRICS and "vqr1" not in names

    def _times(self, dataset: str, factor: int) -> Amount | None:
        amount = self.facts.images.get(dataset)
        return None if amount is None else Amount(amount.count * factor, amount.source, amount.at_most)

    def _image_bytes(self, dataset: str) -> float:
        size = self.config.datasets[dataset].hr_size
        return PNG_BYTES * size * size + SAMPLE_BYTES

    def _data(self, wanted: Wanted) -> Iterator[Row]:
        """Rows of what is done once a data set, or once a data set and model."""
        for name in sorted(wanted.lr):
            settings = self.config.datasets[name]
            images, shards = self.facts.images.get(name), settings.num_shards
            pixels = settings.hr_size**2 * (1 + 1 / settings.degradation.scale**2)
            yield self._row("ingest", name, 1, images=images)
            yield self._row("degrade", name, shards, images=images, each=PNG_BYTES * pixels + SAMPLE_BYTES)
        niqe = self.config.iqa.niqe.dataset
        if wanted.niqe:
            yield self._row("niqe", niqe, 1, images=self.facts.images.get(niqe))
        for name in sorted({dataset for dataset, _ in wanted.embedded}):
            settings = self.config.datasets[name]
            yield self._row(prompt_stage(settings), name, settings.num_shards, images=self.facts.images.get(name))
        for name, root in sorted(wanted.embedded):
            yield self._embed(name, root)

    def _embed(self, name: str, root: str) -> Row:
        """Texts are embedded once: one a shard where the prompt is fixed, else at most one an image."""
        settings = self.config.datasets[name]
        images = self.facts.images.get(name)
        fixed = settings.prompt.source in ONE_PROMPT
        if fixed:
            images = Amount(settings.num_shards, "one prompt a shard")
        elif images is not None:
            images = Amount(images.count, images.source, True)
        each = self.footprints[root].embedding_bytes() if root in self.footprints else None
        kind = f"{root}, one prompt" if fixed else root  # then loading the model is most of the job
        return self._row("embed", f"{name}, {root}", settings.num_shards, images=images, kind=kind, each=each)

    def _candidates(self, wanted: Wanted) -> Iterator[Row]:
        """Rows of candidates, scores and rewards."""
        for (dataset, policy), blocks in sorted(wanted.blocks.items()):
            shards = self.config.datasets[dataset].num_shards
            stage = "derive" if wanted.derive(policy) else "rollout"
            images = self._times(dataset, wanted.candidates(dataset, policy, blocks))
            kind = policy if stage == "derive" else self.config.root_policy(policy)
            each = self._image_bytes(dataset)
            jobs = shards * len(blocks)
            yield self._row(stage, f"{dataset}, {policy}", jobs, images=images, kind=kind, each=each)
        for (dataset, policy), blocks in sorted(wanted.scored.items()):
            groups = metric_groups(self.config, dataset)
            jobs = self.config.datasets[dataset].num_shards * len(blocks) * len(groups)
            images = self._times(dataset, wanted.candidates(dataset, policy, blocks))
            each = SCORE_BYTES * sum(map(len, groups.values()))
            yield self._row("score", f"{dataset}, {policy}", jobs, images=images, kind=", ".join(groups), each=each)
        for dataset, policy, reward in sorted(wanted.rewards):
            yield self._row("reward", f"{dataset}, {policy}, {reward}", 1, images=None)

    def _runs(self) -> Iterator[Row]:
        """Rows of what is done once a run."""
        for name, run in self.config.runs.items():
            root = self.config.root_policy(run.reference)
            settings, top = self.config.datasets[run.dataset], run.pairs.top
            lr_bytes = PNG_BYTES * (settings.hr_size / settings.degradation.scale) ** 2
            groups = self.facts.images.get(run.dataset)
            selected = None if groups is None else Amount(groups.count * 2 * top, groups.source, True)
            found = self.footprints.get(root)
            size = found.encoded_bytes(settings.hr_size, 2 * top, lr_bytes=lr_bytes) + SAMPLE_BYTES if found else None
            each = None if size is None else size / (2 * top)
            yield self._row("select_pairs", name, 1, images=None)
            yield self._row("encode", name, settings.num_shards, images=selected, kind=root, each=each)
            yield self._train(name, root)
            for dataset in run.tests:
                yield self._row("evaluate", f"{name}, {dataset}", 1, images=None)
            yield self._row("report", name, 1, images=None)

    def _train(self, name: str, root: str) -> Row:
        """Images that pass forward and backward under the policy, and forward under the reference, in all steps."""
        run = self.config.runs[name]
        images = Amount(run.train.steps * images_a_step(run), "steps x images", True)
        row = self._row("train", name, 1, images=images, kind=root)
        found = self.footprints.get(root)
        if found is None:
            return row
        size = found.sizes()["control branch"] * 4
        moments = found.sizes()["control branch"] * (8 if run.train.optimizer == "adamw" else 2)
        checkpoint = size * (2 if run.train.ema_decay else 1) + moments
        return replace(row, num_bytes=size + CHECKPOINTS * checkpoint)

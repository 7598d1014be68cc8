# DP²O-SR: sample many outputs per image, judge them, tune the model by preference. Wiring only; see docs/.
from pathlib import Path

from snakemake.utils import min_version

from dp2osr import config as settings
from dp2osr import versions
from dp2osr.errors import UserError

min_version("9.20")


configfile: Path(workflow.basedir) / "config/config.yaml"


try:
    cfg = settings.load(config)
except UserError as error:
    raise WorkflowError(str(error)) from None

R = cfg.results


include: "rules/common.smk"
include: "rules/ingest.smk"
include: "rules/degrade.smk"
include: "rules/prompt.smk"
include: "rules/rollout.smk"
include: "rules/derive.smk"
include: "rules/niqe.smk"
include: "rules/score.smk"
include: "rules/reward.smk"
include: "rules/pairs.smk"
include: "rules/encode.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/explorer.smk"
include: "rules/downstream.smk"
include: "rules/prune.smk"
include: "rules/pretrain.smk"
include: "rules/targets.smk"


# Here and not in targets.smk: an included file cannot set the default target.
rule all:
    default_target: True
    input:
        each_run(f"{R}/runs/{{run}}/report/index.html"),


remember_signatures()

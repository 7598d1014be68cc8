def tested(wildcards, pattern, **fixed):
    """Return the pattern's path for each test data set of a run; with shard and block, for each of those too."""
    paths = []
    for dataset in cfg.runs[wildcards.run].tests:
        each = {"shard": shards(dataset), "block": blocks(dataset)}
        used = {
            name: values for name, values in each.items() if f"{{{name}}}" in pattern
        }
        paths += expand(pattern, dataset=dataset, run=wildcards.run, **used, **fixed)
    return paths


def named(option, wildcards, paths):
    """Return `--option DATASET=PATH ...`; the data set is the first folder below the results (or the file's stem)."""
    parts = [Path(path).relative_to(R).parts for path in paths]
    names = [Path(part[-1]).stem if part[0] == "runs" else part[0] for part in parts]
    return " ".join(
        [f"--{option}", *(f"{name}={path}" for name, path in zip(names, paths))]
    )


def report_datasets(wildcards):
    run = cfg.runs[wildcards.run]
    guard = [run.train.guard.dataset] if run.train.guard.every else []
    return list(dict.fromkeys([run.dataset, *guard, *run.tests]))


def report_benchmarks(wildcards):
    """Where the jobs of a run left their timings: those of its data sets, its policies and its own."""
    run = cfg.runs[wildcards.run]
    policies = dict.fromkeys([run.reference, wildcards.run, *run.controls])
    folders = ["*.tsv", "prompt", *policies]
    found = [
        f"{R}/benchmarks/{dataset}/{name}"
        for dataset in report_datasets(wildcards)
        for name in folders
    ]
    return [*found, f"{R}/benchmarks/runs/{wildcards.run}"]


REPORT_FILES = {
    "evaluation": f"{R}/runs/{{run}}/evaluation/{{dataset}}.parquet",
    "rewards_policy": f"{R}/{{dataset}}/{{run}}/rewards/{{reward}}.parquet",
    "rewards_reference": f"{R}/{{dataset}}/{{reference}}/rewards/{{reward}}.parquet",
    "scales": f"{R}/{{dataset}}/{{reference}}/scales/{{reward}}.parquet",
    "lr": f"{R}/{{dataset}}/lr/shard-{{shard}}.tar",
    "candidates_policy": f"{R}/{{dataset}}/{{run}}/candidates/shard-{{shard}}.block-{{block}}.tar",
    "candidates_reference": f"{R}/{{dataset}}/{{reference}}/candidates/shard-{{shard}}.block-{{block}}.tar",
}


def report_input(wildcards):
    run = cfg.runs[wildcards.run]
    fixed = {"reward": cfg.judge(wildcards.run), "reference": run.reference}
    found = {
        name: tested(wildcards, pattern, **fixed)
        for name, pattern in REPORT_FILES.items()
    }
    images = [f"{R}/{dataset}/images.parquet" for dataset in report_datasets(wildcards)]
    return found | {"images": images}


rule report:
    input:
        unpack(report_input),
        pairs=f"{R}/runs/{{run}}/pairs.parquet",
        train_log=f"{R}/runs/{{run}}/train_log.parquet",
        validation=f"{R}/runs/{{run}}/validation.parquet",
    output:
        report=report(
            f"{R}/runs/{{run}}/report/index.html",
            caption="captions/report.rst",
            category="Runs",
            subcategory="{run}",
            labels={"file": "report"},
        ),
        sheet=report(
            f"{R}/runs/{{run}}/report/contact_sheet.png",
            caption="captions/contact_sheet.rst",
            category="Runs",
            subcategory="{run}",
            labels={"file": "contact sheet"},
        ),
    log:
        f"{R}/logs/runs/{{run}}/report.log",
    benchmark:
        f"{R}/benchmarks/runs/{{run}}/report.tsv"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),  # minutes; reads every candidate shard of the test sets once
    params:
        named=lambda wildcards, input: " ".join(
            named(option.replace("_", "-"), wildcards, getattr(input, option))
            for option in [*REPORT_FILES, "images"]
        ),
        benchmarks=report_benchmarks,
        config=lambda wildcards: params_json(
            {
                "name": wildcards.run,
                "run": cfg.runs[wildcards.run].model_dump(),
                "reward": cfg.rewards[cfg.judge(wildcards.run)].model_dump(),
                "tuned_on": cfg.rewards[cfg.runs[wildcards.run].reward].model_dump(),
                "evaluate": cfg.evaluate.model_dump(),
                "report": cfg.report.model_dump(),
                "without_hr": [
                    name
                    for name in cfg.runs[wildcards.run].tests
                    if config_datasets.without_hr(cfg, name)
                ],
            }
        ),
        version=versions.REPORT,
    shell:
        "python -m dp2osr.stages.report --pairs {input.pairs} --train-log {input.train_log}"
        " --validation {input.validation} {params.named} --benchmarks {params.benchmarks:q}"
        " --config {params.config:q} --report {output.report} 2> {log}"


def compared(pattern):
    """Return the pattern's path for each run of the comparison, and for each of its test sets where it names one."""
    runs = cfg.report.compare or list(cfg.runs)
    if "{dataset}" not in pattern:
        return {run: pattern.format(run=run) for run in runs}
    return {
        f"{run}/{dataset}": pattern.format(run=run, dataset=dataset)
        for run in runs
        for dataset in cfg.runs[run].tests
    }


COMPARE_FILES = {
    "evaluation": compared(f"{R}/runs/{{run}}/evaluation/{{dataset}}.parquet"),
    "train-log": compared(f"{R}/runs/{{run}}/train_log.parquet"),
    "validation": compared(f"{R}/runs/{{run}}/validation.parquet"),
}


rule compare:
    input:
        [path for files in COMPARE_FILES.values() for path in files.values()],
    output:
        report=report(
            f"{R}/report/compare.html",
            caption="captions/compare.rst",
            category="Comparison",
        ),
        table=f"{R}/report/compare.csv",
    log:
        f"{R}/logs/compare.log",
    benchmark:
        f"{R}/benchmarks/compare.tsv"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(15),  # minutes
    params:
        named=" ".join(
            " ".join(
                [f"--{option}", *(f"{name}={path}" for name, path in files.items())]
            )
            for option, files in COMPARE_FILES.items()
        ),
        config=params_json(
            {
                "runs": {
                    name: cfg.runs[name].model_dump()
                    for name in cfg.report.compare or cfg.runs
                },
                "rewards": {
                    name: reward.model_dump() for name, reward in cfg.rewards.items()
                },
                "evaluate": cfg.evaluate.model_dump(),
            }
        ),
        version=versions.REPORT,
    shell:
        "python -m dp2osr.stages.compare {params.named} --config {params.config:q} --report {output.report} 2> {log}"

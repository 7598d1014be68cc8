# make demo and make test need a bare Python 3.11 or 3.12 with pip; they set up .venv themselves.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CORES ?= 2
WORKERS ?= 2
SELECT ?=
PINS := envs/requirements.txt envs/bootstrap.txt pyproject.toml
STAMP := .venv/.installed-$(shell cat $(PINS) | cksum | tr ' ' -)
PY := .venv/bin/python
WORKFLOW := .ci/workflow
SNAKEMAKE := --cores $(CORES)
ONE_THREAD := --set-threads train=1 rollout=1  # many runs: a job a core beats two cores a job

# Each job is a process that imports torch and diffusers: compiled anew every time, that is half a job's time here.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env demo demo-flow study study-flow sweep base test cluster lint format unlock cancel pins clean

help: ## show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

env: $(STAMP) ## set up .venv with the pinned packages

$(STAMP): | $(PINS)
	@envs/install.sh $@

demo: env ## images to report with the embedded model (results/runs/default/report/index.html)
	@$(WORKFLOW) results/runs/default/report/index.html $(SNAKEMAKE)

demo-flow: env ## the same with the embedded flow model (results/tiny-flow/runs/default/report/index.html)
	@$(WORKFLOW) results/tiny-flow/runs/default/report/index.html $(SNAKEMAKE) --configfile config/tiny-flow.yaml \
	    -- results/tiny-flow/runs/default/report/index.html

study: env ## a second training seed and the controls, compared on one page
	@$(WORKFLOW) results/report/compare.html $(SNAKEMAKE) --configfile config/study.yaml $(ONE_THREAD) -- figures

study-flow: env ## the same questions on the flow path
	@$(WORKFLOW) results/tiny-flow/report/compare.html $(SNAKEMAKE) \
	    --configfile config/tiny-flow.yaml config/study-flow.yaml $(ONE_THREAD) -- figures

sweep: env ## the paper's ablations of N/M, M and HPO on shared rollouts, compared on one page (long)
	@$(WORKFLOW) results/sweep/report/compare.html $(SNAKEMAKE) --configfile config/sweep.yaml $(ONE_THREAD) \
	    -- results/sweep/report/compare.html

base: env ## train the embedded model again from images (long)
	@$(WORKFLOW) build/tiny-sd $(SNAKEMAKE) --configfile config/pretrain.yaml -- pretrain

test: env ## all tests that need no GPU
	@start=$$SECONDS; $(PY) -m pytest -q -n $(WORKERS) --dist worksteal; echo "tests passed in $$((SECONDS - start)) s"

cluster: env ## the workflow through a private SLURM on this machine, and what breaks there (root; else skipped)
	@start=$$SECONDS; $(PY) -m pytest -q tests/cluster $(SELECT); echo "cluster tests passed in $$((SECONDS - start)) s"

lint: env ## ruff, snakefmt, mypy, snakemake --lint
	@.ci/lint

format: env ## format Python and Snakemake files
	@$(PY) -m ruff check --fix-only --quiet . ; $(PY) -m ruff format . ; .venv/bin/snakefmt Snakefile rules

unlock: env ## remove the lock that a killed Snakemake left
	@$(PY) -m snakemake --unlock

cancel: ## end the SLURM jobs that a killed Snakemake left running in this folder
	@.ci/cancel

pins: env ## resolve the pinned versions again (UPGRADE=1: newest)
	@envs/compile.sh

clean: ## remove results, logs and caches; .venv stays
	rm -rf results logs build/lib .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis

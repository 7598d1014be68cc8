"""One number a stage: raise it when the stage's results change, so that Snakemake runs it and what follows again."""

INGEST = 1
DEGRADE = 2
PROMPT = 1
EMBED = 1
ROLLOUT = 1
DERIVE = 1
NIQE = 1
SCORE = 1
REWARD = 1
PAIRS = 1
ENCODE = 1
TRAIN = 1
EVALUATE = 2
BENCHMARK = 1
RESTORE = 1
PREDICT = 1
DOWNSTREAM = 1
REPORT = 2
EXPLORER = 1
PRETRAIN = 1

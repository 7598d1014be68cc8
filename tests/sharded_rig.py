"""Trainings by the stage's own objects, each up to a step; as a module, in every process that a launcher starts.

    python -m sharded_rig CASES.json

CASES.json lists cases: `name`, `arguments` of the train stage, `until`, the step in which the last process is asked to
stop (0: none), `short`, whether the last process finds no memory for its first step, and `results`, the folder to which
the main process writes NAME.safetensors (weights) and every process NAME.RANK.json (figures).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn

from dp2osr import stage
from dp2osr.stages import train
from dp2osr.stopping import StopRequest
from dp2osr.training.checkpoint import Store, plain
from dp2osr.training.loop import Trainer


def held(module: nn.Module) -> int:
    """Return how many numbers of a network's weights this process holds."""
    local = [getattr(weight, "_local_tensor", weight) for weight in module.parameters()]
    return sum(weight.numel() for weight in local)


class Disturbed:
    """The gradient of a trainer in whose process a stop is asked for, as SIGTERM does, or memory is short."""

    def __init__(self, trainer: Trainer, *, until: int, short: bool) -> None:
        self.gradient, self.trainer, self.until, self.short = trainer.gradient, trainer, until, short

    def step(self, units: Any) -> Any:
        if self.short:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.trainer.stop.requested = self.trainer.progress.step + 1 == self.until
        return self.gradient.step(units)


def make(arguments: list[str]) -> tuple[argparse.Namespace, Accelerator, Trainer]:
    """Return what the stage makes of its arguments before it trains."""
    args = train.parse_args(arguments)
    AcceleratorState._reset_state()  # each case has a precision of its own; the process group stays
    accelerator = train.make_accelerator(args.config, args.policy.parent, device=args.device)
    store = Store(args.policy.parent / "checkpoints", train.job_mark(args), record={})
    trainer = train.make_trainer(args, accelerator, store)
    trainer.stop = StopRequest()
    return args, accelerator, trainer


def run(case: dict[str, Any]) -> None:
    """Train a case and write what came of it."""
    _, accelerator, trainer = make(case["arguments"])
    backbone = trainer.feed.backend.backbone
    figures: dict[str, Any] = {"held": held(backbone), "whole": sum(weight.numel() for weight in backbone.parameters())}
    if accelerator.process_index == accelerator.num_processes - 1:
        trainer.gradient = Disturbed(trainer, until=case["until"], short=case["short"])  # type: ignore[assignment]
    try:
        train.train(trainer)
    except SystemExit:
        assert trainer.progress.step == case["until"]
    figures |= {"log": trainer.progress.log, "validation": trainer.progress.validation}
    results = Path(case["results"])
    (results / f"{case['name']}.{accelerator.process_index}.json").write_text(json.dumps(figures))
    if accelerator.is_main_process:
        weights = trainer.policy.state_dict() if case["until"] else trainer.final_weights()
        save_file(plain(weights), results / f"{case['name']}.safetensors")
    accelerator.wait_for_everyone()


def main() -> None:
    """Run the cases of a file, one after the other."""
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case)


if __name__ == "__main__":
    stage.run(main)

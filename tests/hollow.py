"""A workflow whose stages do nothing but write their outputs: what is left is Snakemake's own work, and the rules'."""

from typing import Any

from workflow_rig import Workflow

# Takes the place of `python` in the shell commands: makes each file below results/ that the command line names and
# that is not there, with the command line as its content, and notes the command.
STAGE = """#!/bin/bash
echo "$*" >> ran.txt
for name in "$@"; do
    case $name in
        */benchmarks/*) ;;
        results/*/policy) mkdir -p "$name" ;;
        results/*)
            [[ -e $name ]] || { mkdir -p "${name%/*}"; echo "$*" > "$name"; }
            [[ $name != */index.html ]] || touch "${name%/*}/contact_sheet.png" ;;
    esac
done
"""
DRIVER = "import sys; sys.executable = sys.argv.pop(1); from snakemake.cli import main; main()"


class Hollow(Workflow):
    """The workflow of some config files, with results in `results`, and hollow stages."""

    def command(
        self, *arguments: str, changes: dict[str, Any] | None = None, python: tuple[str, ...] = ()
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command line of Snakemake and its environment."""
        command, environment = super().command(*arguments, changes=changes, python=python)
        stage = self.directory / ".hollow" / "python"
        stage.parent.mkdir(exist_ok=True)
        stage.write_text(STAGE)
        stage.chmod(0o755)
        place = command.index("-m")
        command[place : place + 2] = ["-c", DRIVER, str(stage)]
        return command, environment

    def ran(self) -> list[str]:
        """Return the stages that have run, in their order, with what they were given."""
        path = self.directory / "ran.txt"
        return path.read_text().splitlines() if path.exists() else []

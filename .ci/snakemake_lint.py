"""Run `snakemake --lint` and fail on any notice that .ci/lint-waivers.txt does not name.

A waiver is a line `title of the notice | rule or file | reason`; `*` and `?` match in the first two.
"""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

Notice = tuple[str, str]  # title, and the rule or file it is about


def read_waivers(path: Path) -> list[Notice]:
    """Return (title, rule or file) of each waiver; a waiver without a reason is an error."""
    waivers = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        title, about, reason = (part.strip() for part in line.split("|"))
        if not reason:
            raise ValueError(f"{path}: no reason given for '{title}'")
        waivers.append((title, about))
    return waivers


def parse(text: str) -> list[Notice]:
    """Return the notices in the text of `snakemake --lint`."""
    about, notices = "", []
    for line in text.splitlines():
        if match := re.match(r"Lints for (?:rule|snakefile) (.*):$", line):
            about = re.sub(r" \(line \d+, .*\)$", "", match[1])
        elif match := re.match(r" {4}\* (.*):$", line):
            notices.append((match[1], about))
    return notices


def lint() -> list[Notice]:
    """Return the notices for the Snakefile and all that it includes."""
    command = [sys.executable, "-m", "snakemake", "--lint"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    notices = parse(done.stderr)
    if done.returncode and not notices:
        sys.exit(f"snakemake --lint failed:\n{done.stderr}")
    return notices


def main() -> None:
    """Say what is waived and what is not; exit 1 where a notice is left."""
    waivers = read_waivers(Path(__file__).parent / "lint-waivers.txt")
    notices = lint()
    left = [
        (title, about)
        for title, about in notices
        if not any(fnmatch(title, known) and fnmatch(about, where) for known, where in waivers)
    ]
    sys.stdout.write("".join(f"{about}: {title}\n" for title, about in left))
    sys.stdout.write(f"snakemake --lint: {len(notices) - len(left)} notices waived, {len(left)} left\n")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()

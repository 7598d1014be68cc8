"""Write envs/environment.yaml, the conda form of the pins in envs/requirements.txt (Python 3.12, Linux, x86_64)."""

import re
from pathlib import Path

from packaging.markers import Marker

PYTHON = "3.12"
PLATFORM = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": f"{PYTHON}.0",
    "python_version": PYTHON,
    "sys_platform": "linux",
}
HEADER = """\
# Made by envs/compile.sh from requirements.txt; not to be edited by hand.
# PIP_NO_DEPS=1 conda env create -f envs/environment.yaml && conda run -n dp2o-sr pip install --no-deps --no-build-isolation -e .
"""


def pins(requirements: str) -> list[str]:
    """Return the `name==version` of requirements.txt that hold on Linux, x86_64, Python 3.12."""
    found = re.findall(r"^([A-Za-z0-9._-]+==[^ ;\\\n]+)(?: ; ([^\\\n]+?))?(?: \\)?$", requirements, flags=re.MULTILINE)
    return [pin for pin, marker in found if not marker or Marker(marker).evaluate(PLATFORM)]


def environment(requirements: str) -> str:
    """Return the text of environment.yaml."""
    lines = ["name: dp2o-sr", "channels:", "  - conda-forge", "dependencies:", f"  - python={PYTHON}", "  - pip"]
    lines += ["  - pip:", *(f"      - {pin}" for pin in pins(requirements))]
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    """Read requirements.txt beside this file and write environment.yaml."""
    folder = Path(__file__).parent
    text = (folder / "requirements.txt").read_text()
    (folder / "environment.yaml").write_text(environment(text))


if __name__ == "__main__":
    main()

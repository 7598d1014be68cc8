"""The five floors: an import only goes down, never from one stage to another, and the lowest floor is light.

5 stages/, cli; 4 training/, evaluation, report/, upscale; 3 preference/; 2 models/, degradation/, iqa/ and every
module that is not named here; 1 what the Snakefile loads.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
LIGHT = (
    "config",
    "config_checks",
    "config_datasets",
    "config_degradation",
    "config_downstream",
    "config_metrics",
    "config_rollout",
    "strict",
    "tables",
    "seeds",
    "versions",
    "errors",
    "metrics",
    "preempted",
    "published",
    "remote",
    "resume",
    "stage",
    "stopping",
    "weights",
)
FLOORS = {"stages": 5, "cli": 5, "training": 4, "evaluation": 4, "report": 4, "upscale": 4, "preference": 3}
FLOORS |= dict.fromkeys(LIGHT, 1)
FILES = sorted((SRC / "dp2osr").rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a module's file."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of this package that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in names]
        else:
            continue
        yield from (name for name in names if name.startswith("dp2osr."))


def floor(module: str) -> int:
    """Return the floor of a module; 0 for the package itself."""
    parts = module.split(".")
    return FLOORS.get(parts[1], 2) if len(parts) > 1 else 0


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    up = [name for name in imports(MODULES[module]) if floor(name) > floor(module)]
    assert up == [], f"{module} (floor {floor(module)}) imports from above"


def test_no_stage_imports_another() -> None:
    stages = {name for name in MODULES if name.startswith("dp2osr.stages.")}
    crossed = {(stage, name) for stage in stages for name in imports(MODULES[stage]) if name in stages - {stage}}
    assert crossed == set()


def test_every_imported_module_of_the_package_exists() -> None:
    assert {name for path in FILES for name in imports(path)} - set(MODULES) == set()


def test_what_the_snakefile_loads_is_light() -> None:
    heavy = {"torch", "diffusers", "transformers", "pyiqa", "matplotlib"}
    lines = [
        "import sys",
        *(f"import dp2osr.{name}" for name in LIGHT),
        f"print({heavy} & set(sys.modules) or 'light')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            limit = 25 if node.name == "main" else 60
            assert node.end_lineno - node.lineno < limit, f"{path.name}: {node.name} is longer than {limit} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_nothing_unsafe_is_called(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "pickle" not in ast.dump(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "os.system", "yaml.load"}, f"{path.name}:{node.lineno}: {called}"
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path.name}:{node.lineno}: torch.load"

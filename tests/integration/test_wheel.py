"""The wheel, installed into an environment of its own, works from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from atr_scale.shipped import shipped_files
from atr_scale.version import __version__
from tests.commands import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders behind, and what lies in them goes into the next wheel."""
    copy = tmp_path_factory.mktemp("wheel")
    for path, name in shipped_files(ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / name)
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "atr_scale", copy / "atr_scale", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "tools"):  # packages that must stay out
        (copy / folder).mkdir()
        (copy / folder / "__init__.py").touch()
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(copy / "dist"), str(copy)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (file,) = (copy / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel. Its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, text=True)
    return folder / "bin"


def call(programs: Path, folder: Path, *command: str, code: int = 0) -> str:
    """What a command prints, with the environment active."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"atr_scale-{__version__}.dist-info/METADATA").decode()
    packages = {name.split("/")[0] for name in names}
    assert packages == {"atr_scale", f"atr_scale-{__version__}.dist-info"}
    assert not any("test" in name for name in names if name.endswith(".py"))
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "atr_scale").rglob("*") if path.is_file()}
    code = {name for name in tracked if "__pycache__" not in name}
    assert code <= names, "code, py.typed and the files of the search page"
    assert {f"atr_scale/_shipped/{name}" for _, name in shipped_files(ROOT)} <= names
    assert "Description-Content-Type: text/markdown" in metadata and "# atr_scale" in metadata


def test_from_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    assert call(programs, tmp_path, "atr-scale", "--version") == f"atr-scale {__version__}\n"
    place = call(programs, tmp_path, "python", "-c", "import atr_scale; print(atr_scale.__file__)")
    assert Path(place.strip()).is_relative_to(programs.parent)
    refused = call(programs, tmp_path, "atr-scale", "train", "configs/quickstart/pretrain.yaml", code=2)
    assert "atr-scale init" in refused
    assert "cd mine" in call(programs, tmp_path, "atr-scale", "init", "mine")
    mine = tmp_path / "mine"
    for path, name in shipped_files(ROOT):
        assert (mine / name).read_bytes() == path.read_bytes()
        assert os.access(mine / name, os.X_OK) == os.access(path, os.X_OK), name
    # Scripts work there with the active environment, and make none.
    call(programs, mine, "launch/environment.sh")
    assert not (mine / ".venv").exists()
    script = """
        source launch/demo.sh
        atr-scale demo-data --out demo/corpora --clips-scale 0.02 --workers 1
        build_shards "audiocaps train" "audiocaps test"
        atr-scale train configs/quickstart/pretrain.yaml "data.train=[{shards: demo/shards/audiocaps/train}]" \\
            data.validation=null data.workers=0 train.epochs=1 train.global_batch_size=8
        atr-scale evaluate runs/quickstart --split test
    """
    assert "R@1" in call(programs, mine, "bash", "-c", script)
    extends_others = (
        "from atr_scale.config import load_config; print(load_config('configs/finetune_audiocaps.yaml').run)"
    )
    assert "runs/finetune_audiocaps" in call(programs, mine, "python", "-c", extends_others)


def test_environment_script_without_the_package(programs: Path, tmp_path: Path) -> None:
    call(programs, tmp_path, "atr-scale", "init", ".")
    empty = tmp_path / "empty"
    venv.create(empty, with_pip=False)
    refused = call(empty / "bin", tmp_path, "launch/environment.sh", code=2)
    assert refused.startswith("error: no atr-scale") and len(refused.splitlines()) == 1

"""Adds the shipped files to the wheel; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = list(runpy.run_path(str(ROOT / "atr_scale" / "shipped.py"))["shipped_files"](ROOT))


class BuildWithShippedFiles(build_py):
    """An editable installation finds them in the repository, so it has no copies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path, name in SHIPPED:
                target = Path(self.build_lib, "atr_scale", "_shipped", name)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(name for _, name in SHIPPED)]  # for the source distribution


setup(cmdclass={"build_py": BuildWithShippedFiles})

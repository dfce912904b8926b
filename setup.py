"""Puts `cluscomp_peft_plugin.pth` into wheels and editable installs; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAME = "cluscomp_peft_plugin.pth"


class BuildWithPlugin(build_py):
    """Beside the modules there is a file that Python reads at its start."""

    def run(self) -> None:
        super().run()
        editable = getattr(self, "editable_mode", False)
        folder = self.get_finalized_command("install").install_lib if editable else self.build_lib
        self.copy_file(NAME, str(Path(folder) / NAME), preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / NAME)]


setup(cmdclass={"build_py": BuildWithPlugin})

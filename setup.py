"""Puts the model card's template, which lies beside the rendered cards in `model_cards/`, into the wheel as package data.

Everything else about the build stands in pyproject.toml. An editable install reads the template from the checkout.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTemplate(build_py):
    """`build_py` to which `model_cards/` is a data folder of the package."""

    def finalize_options(self) -> None:
        super().finalize_options()
        package = "lemo_hf.model_cards"
        self.packages = [*self.packages, package]
        self.package_dir = {**self.package_dir, package: "model_cards"}
        self.package_data = {**self.package_data, package: ["card_template.md"]}


setup(cmdclass={"build_py": BuildWithTemplate})

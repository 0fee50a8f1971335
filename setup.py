"""Install oodrepro: a short shim that reads settings.ini, the one place where the project's facts stand."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
facts = settings["DEFAULT"]
library = facts["lib_name"]


class BuildWithNotebooks(build_py):
    """Puts paper notebooks and tested versions into the package: they are kept once, and copied when a wheel is built."""

    def run(self):
        super().run()
        if self.editable_mode:  # the checkout's own notebooks are found
            return
        target = Path(self.build_lib) / library / "notebooks"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((here / "nbs" / "papers").glob("*.ipynb")):
            shutil.copyfile(notebook, target / notebook.name)
        shutil.copyfile(here / "constraints.txt", target.parent / "constraints.txt")  # for `oodrepro doctor`


extras = {key.removesuffix("_requirements"): value.split() for key, value in facts.items()
          if key.endswith("_requirements")}

setup(
    name=library, version=facts["version"], description=facts["description"], author=facts["author"],
    license="Apache-2.0", license_files=["LICENSE"], python_requires=f">={facts['min_python']}",
    keywords=facts["keywords"], long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[library, f"{library}.*"]), include_package_data=False, zip_safe=False,
    package_data={library: ["published/*.yaml", "pretrained/**/*"]},
    install_requires=facts["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": [facts["console_scripts"]], "nbdev": [f"{library}={library}._modidx:d"]},
    cmdclass={"build_py": BuildWithNotebooks},
)

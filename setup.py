"""Install oodrepro: a short shim that reads settings.ini, the one place where the project's facts stand."""
from configparser import ConfigParser
from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read("settings.ini", encoding="utf-8")
facts = settings["DEFAULT"]
library = facts["lib_name"]

setup(
    name=library, version=facts["version"], description=facts["description"], author=facts["author"],
    license="Apache-2.0", python_requires=f">={facts['min_python']}", keywords=facts["keywords"],
    long_description=open("README.md", encoding="utf-8").read() if __import__("os").path.exists("README.md") else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=[library, f"{library}.*"]), include_package_data=True, zip_safe=False,
    install_requires=facts["requirements"].split(),
    extras_require={"dev": facts["dev_requirements"].split(), "lpips": facts["lpips_requirements"].split()},
    entry_points={"console_scripts": [facts["console_scripts"]], "nbdev": [f"{library}={library}._modidx:d"]},
)

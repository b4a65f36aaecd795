"""Map the three top-level folders into the `vim_ssl` package; all metadata is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ("kernels", "recipes", "downstream")
nested = [f"vim_ssl.{f}.{p}" for f in FOLDERS for p in find_packages(f)]
setup(
    packages=["vim_ssl", *(f"vim_ssl.{p}" for p in find_packages("vim_ssl"))]
    + [f"vim_ssl.{f}" for f in FOLDERS]
    + nested,
    package_dir={f"vim_ssl.{f}": f for f in FOLDERS},
)

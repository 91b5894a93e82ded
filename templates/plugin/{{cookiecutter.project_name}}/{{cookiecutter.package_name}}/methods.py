"""The methods of this package, one row each: what the entry point in pyproject.toml names. Imports no torch."""

from lightning_stable.registry import Method

METHODS = (
    Method(
        name="{{ cookiecutter.method_name }}",
        kind="callback",
        class_path="{{ cookiecutter.package_name }}.{{ cookiecutter.method_name }}.{{ cookiecutter.class_name }}",
        paper="1511.06807",
        summary="Gaussian noise on the gradients of each step, less and less of it",
    ),
)

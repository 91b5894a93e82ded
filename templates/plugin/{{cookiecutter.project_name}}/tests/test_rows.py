"""What lightning-stable reads of this package: rows that need no torch, and a card and an addon for each."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightning_stable.registry import Method, addons_of, load_class

import {{ cookiecutter.package_name }}
from {{ cookiecutter.package_name }}.methods import METHODS

# The one that Python imports: of this folder, or installed.
PACKAGE = Path({{ cookiecutter.package_name }}.__file__).parent


def test_reading_the_rows_imports_no_torch():
    code = "import sys, {{ cookiecutter.package_name }}.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_row_has_a_class_a_card_and_its_addons(method):
    assert isinstance(method, Method)
    assert load_class(method).__name__ == method.class_name
    assert (PACKAGE / "cards" / f"{method.name}.md").is_file()
    for addon in addons_of(method):
        assert (PACKAGE / "templates" / "addons" / f"{addon}.yaml").is_file()

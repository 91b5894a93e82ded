"""What ``pytest --pyargs lightning_stable.testing`` runs: the contracts of the methods that the settings name."""

import pytest

from lightning_stable.testing.plugin import settings_path

if settings_path():
    from lightning_stable.testing.third_party import contract_suite

    TestContracts = contract_suite(settings_path())
else:

    def test_there_are_settings() -> None:
        """Say what is missing."""
        pytest.fail(
            "There is nothing to test. Load the plugin and name the settings of your methods in the pytest settings: "
            "addopts = '-p lightning_stable.testing.plugin', lightning_stable_settings = 'package.module:NAME'."
        )

"""Every contract over every row of METHODS."""

from contract.settings import ROWS

from lightning_stable.testing.suite import suite_of

TestContracts = suite_of(ROWS)

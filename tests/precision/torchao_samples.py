"""What the tests of precision plugins on torchao share."""

import pytest
from precision.torchao_runs import PLUGINS

each = pytest.mark.parametrize("name", PLUGINS)

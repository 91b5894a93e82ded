"""What the tests of precision plugins on torchao share."""

from importlib.util import find_spec

import pytest
from precision.torchao_runs import PLUGINS

# Found, not imported: one that does not import fails these tests.
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
each = pytest.mark.parametrize("name", PLUGINS)

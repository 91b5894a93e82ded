"""What the server of forked processes imports besides, for our own rows; imported there alone."""

import gc
from contextlib import suppress

gc.disable()

with suppress(Exception):
    # What cannot be imported says so in the test that needs it; here it would end the server of all.
    import contract.settings  # noqa: F401

gc.collect()
gc.freeze()
gc.enable()

"""What the server of forked processes imports once, so that no process of a test has to; imported there alone."""

import gc
from contextlib import suppress

# What is imported stays: to go through it again and again, looking for what could be freed, takes a sixth of the time.
gc.disable()

with suppress(Exception):
    # What cannot be imported says so in the test that needs it; here it would end the server of all.
    import torch

    # A server that has threads must not be forked.
    torch.set_num_threads(1)

    import lightning_stable.testing.strategy_checks  # noqa: F401

# Collected once: copies of these pages in every process would cost more than they free.
gc.collect()
gc.freeze()
gc.enable()

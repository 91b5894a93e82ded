"""What the server of forked processes imports once, so that no process of a test has to; imported there alone."""

import gc
from contextlib import suppress

import torch

# A server that has threads must not be forked.
torch.set_num_threads(1)

with suppress(Exception):
    # What cannot be imported says so in the test that needs it; here it would end the server of all.
    import lightning_stable.testing.strategy_checks  # noqa: F401

# Collected once: copies of these pages in every process would cost more than they free.
gc.collect()
gc.freeze()

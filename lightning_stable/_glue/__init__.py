"""Glue to the host that several rooms share: wrapped methods, passes beside training, batches as the host has them."""

"""Every test of a strategy leaves its own process without a group, whatever ran in it."""

from own_process import alone  # noqa: F401  a fixture of every test here

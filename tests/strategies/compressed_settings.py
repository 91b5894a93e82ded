"""Settings of compression for the strategy and its twin."""

from lightning_stable.functional.compression import ERRORS

WITH_MEMORY = [(compressor, error) for compressor in ("topk", "sign") for error in ERRORS]


ALL = [*WITH_MEMORY, ("powersgd", "ef"), ("bf16", "")]

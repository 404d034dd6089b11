"""Numbers of the file format, and defaults of the public functions."""

from __future__ import annotations

import struct
from typing import Final

MAGIC: Final = b"FLASHPK\0"
U64LE: Final = struct.Struct("<Q")
"""The footer's length, between the footer and the magic."""

WEIGHTS_NAME: Final = "model.flashpack"
"""The file with the weights, in the directory of a model."""

FILE_FORMAT_V3: Final = "flashpack_v3"
"""All tensors have one dtype."""
FILE_FORMAT_V4: Final = "flashpack_v4"
"""Tensors have several dtypes."""

DEFAULT_ALIGN_BYTES: Final = 128
DEFAULT_NUM_WRITE_WORKERS: Final = 32
DEFAULT_NUM_STREAMS: Final = 4
DEFAULT_CHUNK_BYTES: Final = 4 * 1024 * 1024
SHARD_ALIGN_BYTES: Final = 4096
DEFAULT_SHARD_BYTES: Final = 256 * 1024 * 1024

SHARD_STRATEGY_CONTIGUOUS: Final = "contiguous"
SHARD_STRATEGY_WINDOWS: Final = "windows"
SHARD_STRATEGIES: Final = (SHARD_STRATEGY_CONTIGUOUS, SHARD_STRATEGY_WINDOWS)
DEFAULT_SHARD_STRATEGY: Final = SHARD_STRATEGY_CONTIGUOUS

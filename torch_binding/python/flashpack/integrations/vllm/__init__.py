"""Lets vLLM load with `--load-format flashpack`. Importing this package does not import vLLM."""

from __future__ import annotations

import functools

from .._serving import LOAD_FORMAT

__all__ = ["register"]


@functools.cache
def register() -> None:
    """Makes the load format known to vLLM, which calls this in each of its processes, because it is an entry point."""
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import FlashPackModelLoader

    register_model_loader(LOAD_FORMAT)(FlashPackModelLoader)

"""Torch with two CUDA devices that are host memory, for the tests and rehearsals of tools that need a GPU.

In effect where this folder is in PYTHONPATH. Streams do nothing, and what torch makes "on cuda", in the main thread, is
on the CPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from contextlib import nullcontext


def on_host(value):
    import torch

    is_cuda = (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )
    return torch.device("cpu") if is_cuda else value


def install(torch):
    class OnHost(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if function is torch.Tensor.pin_memory:
                return arguments[0]
            if function is not torch.device:
                arguments = tuple(map(on_host, arguments))
            options = {key: on_host(value) for key, value in (options or {}).items() if key != "pin_memory"}
            return function(*arguments, **options)

    def nothing(*arguments, **options):
        return None

    class Stream:
        cuda_stream = 0
        __init__ = synchronize = wait_stream = wait_event = record_event = nothing

    class Event:
        __init__ = record = wait = synchronize = nothing

        def query(self):
            return True

    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 2
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *device: "host memory, standing in for a GPU"
    # Not the same one, because torch.compile keeps rules by function.
    for name in ("init", "set_device", "synchronize", "empty_cache", "_sleep"):
        setattr(cuda, name, lambda *arguments, **options: None)
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *device: Stream()
    cuda.is_current_stream_capturing = lambda: False
    cuda.stream = cuda.device = nullcontext
    OnHost().__enter__()


class Finder(importlib.abc.MetaPathFinder):
    """Has torch changed as soon as it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_install(module):
            run(module)
            install(module)

        spec.loader.exec_module = run_and_install
        return spec


sys.meta_path.insert(0, Finder())

"""The C API from Python's ctypes, as a binding to any language would use it."""

import ctypes
import os
import unittest
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int32,
    c_int64,
    c_size_t,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LIBRARY = ctypes.CDLL(os.environ["FLASHPACK_LIBRARY"])
LIBRARY.flashpack_error_message.restype = c_char_p
LIBRARY.flashpack_error_message.argtypes = [c_void_p]
LIBRARY.flashpack_version.restype = c_char_p
BAD_FILE = -2


class Tensor(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("name", c_void_p),
        ("name_bytes", c_size_t),
        ("dtype_name", c_char_p),
        ("dtype", c_int32),
        ("element_bytes", c_uint32),
        ("shape", POINTER(c_int64)),
        ("dims", c_size_t),
        ("file", c_size_t),
        ("offset_bytes", c_uint64),
        ("size_bytes", c_uint64),
    )


class Info(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("file_count", c_size_t),
        ("tensor_count", c_size_t),
        ("metadata_count", c_size_t),
    )


class Extent(Structure):
    _fields_ = (
        ("file", c_uint32),
        ("priority", c_uint16),
        ("reserved", c_uint16),
        ("offset_bytes", c_uint64),
        ("size_bytes", c_uint64),
        ("target", c_void_p),
    )


class LoadRequest(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("checkpoint", c_void_p),
        ("paths", c_void_p),
        ("path_count", c_size_t),
        ("fds", c_void_p),
        ("open_files", c_void_p),
        ("extents", POINTER(Extent)),
        ("extent_count", c_size_t),
        ("cache", c_int32),
        ("verify", c_int32),
        ("drop_cached", c_int32),
        ("report_extents", c_int32),
        ("stream", c_void_p),
        ("timeout_ns", c_int64),
        ("events", c_void_p),
        ("tag", c_uint64),
    )


def sized(struct):
    return struct(ctypes.sizeof(struct))


def call(function: str, *arguments) -> None:
    error = c_void_p()
    status = LIBRARY[function](*arguments, byref(error))
    message = (LIBRARY.flashpack_error_message(error) or b"").decode()
    LIBRARY.flashpack_error_destroy(error)
    if status > 0:
        raise OSError(status, message)
    if status < 0:
        raise ValueError(status, message)


def made(function: str, *arguments) -> c_void_p:
    handle = c_void_p()
    call(function, *arguments, byref(handle))
    return handle


class CtypesTest(unittest.TestCase):
    def setUp(self) -> None:
        self.engine = made("flashpack_engine_create", None)
        self.addCleanup(LIBRARY.flashpack_engine_destroy, self.engine)

    def opened(self, name: str) -> c_void_p:
        checkpoint = made("flashpack_checkpoint_open", os.fsencode(GOLDEN / f"{name}.flashpack"))
        self.addCleanup(LIBRARY.flashpack_checkpoint_destroy, checkpoint)
        return checkpoint

    def tensors_of(self, checkpoint: c_void_p) -> list[Tensor]:
        info = sized(Info)
        call("flashpack_checkpoint_get_info", checkpoint, byref(info))
        tensors = [sized(Tensor) for _ in range(info.tensor_count)]
        for i, tensor in enumerate(tensors):
            call("flashpack_checkpoint_get_tensor", checkpoint, c_size_t(i), byref(tensor))
        return tensors

    def test_every_golden_file_is_loaded_as_its_bytes_are(self) -> None:
        for path in sorted(GOLDEN.glob("*.flashpack")):
            checkpoint = self.opened(path.stem)
            request = sized(LoadRequest)
            request.checkpoint = checkpoint.value
            loaded = made("flashpack_load_all", self.engine, byref(request))
            content = path.read_bytes()
            for i, tensor in enumerate(self.tensors_of(checkpoint)):
                data = c_void_p()
                call("flashpack_tensors_data", loaded, c_size_t(i), byref(data))
                wanted = content[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
                found = ctypes.string_at(data.value, tensor.size_bytes) if data.value else b""
                self.assertEqual(found, wanted, f"{path.stem}: tensor {i}")
            LIBRARY.flashpack_tensors_destroy(loaded)

    def test_names_come_with_their_length(self) -> None:
        (tensor,) = self.tensors_of(self.opened("v3_name_escapes"))
        name = ctypes.string_at(tensor.name, tensor.name_bytes).decode()
        self.assertEqual(name, 'q"\\/\n\t\x01\x7f\u00e9\u6f22\U0001f600')
        self.assertEqual((tensor.dtype_name, tensor.dims, tensor.shape[0]), (b"float32", 1, 1))

    def test_extents_go_to_memory_of_python(self) -> None:
        checkpoint = self.opened("v3_bf16")
        target = ctypes.create_string_buffer(8)
        extent = Extent(size_bytes=8, target=ctypes.addressof(target))
        request = sized(LoadRequest)
        request.checkpoint, request.extents, request.extent_count = checkpoint.value, ctypes.pointer(extent), 1
        transfer = made("flashpack_start_load", self.engine, byref(request))
        call("flashpack_transfer_wait", transfer)
        LIBRARY.flashpack_transfer_destroy(transfer)
        self.assertEqual(target.raw, (GOLDEN / "v3_bf16.flashpack").read_bytes()[:8])

    def test_errors_have_an_errno_or_a_status_of_the_library(self) -> None:
        with self.assertRaisesRegex(FileNotFoundError, "/no/such/file"):
            made("flashpack_checkpoint_open", b"/no/such/file")
        with self.assertRaisesRegex(ValueError, "ctypes_test.py") as caught:
            made("flashpack_checkpoint_open", os.fsencode(__file__))
        self.assertEqual(caught.exception.args[0], BAD_FILE)

    def test_the_version_is_that_of_the_project(self) -> None:
        self.assertEqual(LIBRARY.flashpack_version().decode(), os.environ["FLASHPACK_VERSION"])

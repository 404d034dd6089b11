"""cache_daemon hands out the bytes of files, those first that clients asked for, and forgets the oldest."""

import mmap
import os
import random
import socket
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

DAEMON = os.environ["FLASHPACK_CACHE_DAEMON"]
HANG_S = 120


class CacheDaemonTest(unittest.TestCase):
    def setUp(self) -> None:
        # Not where files are in memory on many machines.
        folder = tempfile.TemporaryDirectory(dir="/var/tmp")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.door = self.folder / "door"
        self.daemon = subprocess.Popen([DAEMON, str(self.door), "8"])
        self.addCleanup(self.daemon.wait)
        self.addCleanup(self.daemon.kill)

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.settimeout(HANG_S)
        self.addCleanup(client.close)
        until = time.monotonic() + HANG_S
        while True:
            try:
                client.connect(str(self.door))
                return client
            except (FileNotFoundError, ConnectionRefusedError):  # It is not yet there.
                if time.monotonic() > until or self.daemon.poll() is not None:
                    raise

    def make_file(self, name: str, size: int) -> tuple[str, bytes]:
        content = random.Random(name).randbytes(size)
        (self.folder / name).write_bytes(content)
        return str(self.folder / name), content

    def answer(self, client: socket.socket) -> bytes | str:
        """The bytes that the client was given, or the error."""
        text, descriptors, _, _ = socket.recv_fds(client, 4096, 1)
        if not descriptors:
            return text.decode()
        (descriptor,) = descriptors
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as shared:
            os.close(descriptor)
            return shared[:]

    def get(self, client: socket.socket, path: str) -> bytes | str:
        client.sendall(f"={path}".encode())
        return self.answer(client)

    def test_a_file_is_fetched_before_it_is_asked_for(self) -> None:
        path, content = self.make_file("model", 3 << 20)
        client = self.client()
        client.sendall(f"+{path}".encode())
        self.assertEqual(self.get(client, path), content)
        os.unlink(path)
        self.assertEqual(self.get(client, path), content)

    def test_clients_that_wait_for_one_file_all_get_it(self) -> None:
        path, content = self.make_file("model", 5 << 20)
        clients = [self.client() for _ in range(5)]
        for client in clients:
            client.sendall(f"={path}".encode())
        clients.pop().close()
        for client in clients:
            self.assertEqual(self.answer(client), content)

    def test_the_file_that_was_not_used_for_longest_is_forgotten(self) -> None:
        files = [self.make_file(str(i), 3 << 20) for i in range(3)]
        client = self.client()
        for i in (0, 1, 0, 2):
            self.assertEqual(self.get(client, files[i][0]), files[i][1])
        for path, _ in files:
            os.unlink(path)
        self.assertEqual(self.get(client, files[0][0]), files[0][1])
        self.assertEqual(self.get(client, files[1][0]), "No such file or directory")
        self.assertEqual(self.get(client, files[2][0]), files[2][1])

    def test_what_cannot_be_fetched_is_an_error_and_the_daemon_goes_on(self) -> None:
        client = self.client()
        self.assertEqual(self.get(client, "/no/such/file"), "No such file or directory")
        large, _ = self.make_file("large", 9 << 20)
        self.assertEqual(self.get(client, large), "Cannot allocate memory")
        self.assertIn("directory", self.get(client, str(self.folder)))
        path, content = self.make_file("model", 100)
        self.assertEqual(self.get(client, path), content)

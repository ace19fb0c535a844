"""A copy of a model stays as long as the server that was started with it."""

import subprocess
import sys
from pathlib import Path

from sage.libs.models.export import copies

#: Makes a copy, then becomes a program that runs until its standard input is closed.
_PROGRAM = """
import os, sys
from sage.libs.models.export.copies import usable_copy
usable_copy("gguf", "key", 0, lambda folder: (folder / "model.gguf").write_bytes(bytes(100)))
os.execv(sys.executable, [sys.executable, "-c", "print('serving', flush=True); input()"])
"""


def test_the_copy_of_a_living_server_is_not_deleted(sage_home: Path) -> None:
    copy = sage_home / "cache" / "gguf" / "key"
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline() == b"serving\n"
        copies.prune(0)
        assert copy.is_dir()
        server.communicate(b"\n")
    copies.prune(0)
    assert not copy.exists()

"""A copy of a model is kept while the server that was started with the copy runs."""

import subprocess
import sys
from pathlib import Path

from sage.libs.models.export import copies

#: Program that makes a copy and then executes another program, which runs until it reads a line.
_PROGRAM = """
import os, sys
from sage.libs.models.export.copies import usable_copy
usable_copy("gguf", "key", 0, lambda folder: (folder / "model.gguf").write_bytes(bytes(100)))
os.execv(sys.executable, [sys.executable, "-c", "print('serving', flush=True); input()"])
"""


def test_the_copy_of_a_running_server_is_not_deleted(sage_home: Path) -> None:
    copy = sage_home / "cache" / "gguf" / "key"
    with subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline() == b"serving\n"
        copies.prune(0)
        assert copy.is_dir()
        server.communicate(b"\n")
    copies.prune(0)
    assert not copy.exists()

"""The command line in an environment that has only what its wheels require."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_gateway import small_gateway

BLOCKED = (
    "sage.libs", "sage.llm.control_plane", "sage.llm.gateway", "sage.llm.workers", "sage.studio", "sqlalchemy", "alembic",
    "pyarrow", "torch", "transformers", "fastapi", "aiohttp",
)  # fmt: skip
#: Runs `sage` in an environment that has only what its wheels require.
SLIM = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {BLOCKED!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from sage.cli.main import main
sys.argv = ["sage", *sys.argv[1:]]
main()
"""


def slim(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SLIM, *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_command_line_alone_works_with_a_gateway_elsewhere(sage_home: Path) -> None:
    assert "Usage" in slim("--help").stdout
    assert "--learning-rate" in slim("llm", "engine", "start", "--help").stdout
    with small_gateway() as (url, _):
        listed = slim("llm", "engine", "list", "--all", SAGE_GATEWAY_PORT=url.rpartition(":")[2])
    assert "engine-a" in listed.stdout, listed.stderr


@pytest.mark.parametrize(
    "command", [("gateway", "start"), ("studio",), ("llm", "dataset", "check", "x"), ("llm", "model", "list")], ids=" ".join
)
def test_a_command_that_needs_other_packages_says_what_to_install(command: tuple[str, ...], sage_home: Path) -> None:
    done = slim(*command)
    assert done.returncode == 2, done.stderr
    assert "is not installed.\n  Install it: pip install 'sage-cli[local]'." in done.stderr

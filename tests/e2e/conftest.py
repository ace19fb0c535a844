"""Fixtures: a real model, and a working folder with the examples and with `sage` on the PATH."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, sage


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the examples, and `sage` on the PATH."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "examples", folder / "examples")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    yield folder
    sage("gateway", "stop", check=None)


@pytest.fixture(scope="session")
def converted_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted once for all tests."""
    home = tmp_path_factory.mktemp("smollm2")
    os.environ["SAGE_HOME"] = str(home)
    from sage.libs.models.loading import local_folder
    from sage.libs.models.resolve import resolve_model

    return local_folder(resolve_model("smollm2-135m-instruct"))


@pytest.fixture
def smollm2(converted_smollm2: Path, sage_home: Path) -> str:
    """The name of the real model. This home links to the converted model, so that no test converts it again."""
    models = sage_home / "data/models"
    models.mkdir(parents=True)
    (models / "smollm2-135m-instruct").symlink_to(converted_smollm2)
    return "smollm2-135m-instruct"

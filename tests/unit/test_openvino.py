"""The OpenVINO backend's command, errors, and conversion arguments. The tests do not need the OpenVINO packages."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sage.cli.exporting import run_export
from sage.common.errors import ConfigError
from sage.libs.models.export import exporting
from sage.libs.models.export.exporting import export_model
from sage.libs.models.export.formats import ExportFormat, OpenVino
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import environments, registry
from sage.llm.control_plane.backends.openvino import OpenVinoBackend, OpenVinoOptions


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """An environment with an empty folder instead of OpenVINO."""
    folder = tmp_path / "env" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (folder / "openvino").mkdir(parents=True)
    return folder


def test_the_command_has_the_options_and_runs_in_the_environment_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "interpreter", lambda name: f"/env/{name}/bin/python")
    options = OpenVinoOptions(quantize="int8", slots=3, context_tokens=99, kv_cache_tokens=77, threads=2)
    argv = OpenVinoBackend().argv("m", "sage-1", options)
    assert argv[0] == "/env/openvino/bin/python"
    for pair in ("--model m", "--served-name sage-1", "--quantize int8", "--slots 3", "--context-tokens 99", "--threads 2"):
        assert pair in " ".join(argv)
    assert "--cache-tokens 77" in " ".join(argv)
    environment = OpenVinoBackend().environment(options)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert str(Path(sys.modules["pydantic"].__file__ or "").parents[1]) in environment["PYTHONPATH"].split(os.pathsep)


def test_the_backend_serves_both_quantizations_and_merged_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "interpreter", lambda _: "/env/bin/python")
    for quantize in ("none", "int8", "int4"):
        adapter = ModelSource("m", ModelKind.ADAPTER, Path("/nowhere"))
        assert registry.resolve("openvino", EngineKind.LLM, adapter, quantize)[0].name == "openvino"
    assert "merged" in OpenVinoBackend().can_join(Path("/a"), Path("/b"))


def test_an_engine_without_the_environment_is_refused_with_the_command_that_installs_it() -> None:
    with pytest.raises(ConfigError, match="is not installed") as caught:
        registry.resolve("openvino", EngineKind.LLM, ModelSource("m", ModelKind.FULL, Path("/nowhere")))
    assert "sage backend install openvino" in caught.value.hint


def test_an_export_without_the_environment_is_refused_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not installed") as caught:
        run_export(str(tmp_path), "openvino", tmp_path / "out", None)
    assert "sage backend install openvino" in caught.value.hint


@pytest.mark.parametrize(
    ("format_", "precision", "hint"),
    [("openvino", "q8_0", "none, int8, int4"), ("gguf", "int8", "q8_0"), ("merged", "int8", "Omit --quantize")],
)
def test_a_precision_of_another_format_is_refused(format_: str, precision: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"The format '{format_}' does not support --quantize {precision}") as caught:
        run_export(str(tmp_path), format_, tmp_path / "out", precision)
    assert hint in caught.value.hint


def test_an_environment_for_another_version_of_python_is_reported(packages: Path, tmp_path: Path) -> None:
    assert OpenVino(tmp_path / "env" / "bin" / "python").packages == packages
    packages.parent.rename(packages.parent.with_name("python3.0"))
    with pytest.raises(ConfigError, match=r"has no OpenVINO for python3") as caught:
        _ = OpenVino(tmp_path / "env" / "bin" / "python").packages
    assert "sage backend remove openvino" in caught.value.hint


def test_an_export_keeps_configuration_and_tokenizer_and_leaves_no_safetensors(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    steps: list[Any] = []

    def step(argv: Any, text: str = "", while_running: Any = None) -> Any:
        steps.append((" ".join(argv), text))
        if "--target" not in argv:
            dense = Path(argv[argv.index("--folder") + 1])
            dense.mkdir()
            for name in ("config.json", "tokenizer.json", "model.safetensors"):
                (dense / name).write_text("{}")
        return {"probes": [{"messages": [], "tokens": [1]}]}

    monkeypatch.setattr(exporting, "run_step", step)
    target, open_vino = tmp_path / "out", OpenVino(tmp_path / "env" / "bin" / "python")
    export_model(str(tmp_path), ExportFormat.OPENVINO, target, precision="int4", open_vino=open_vino)
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json", "tokenizer.json"]
    assert "int4" in (target / "README.md").read_text()
    (writing, _), (conversion, probes) = steps
    assert "--fp32" in writing
    assert f"--quantize int4 --packages {packages} --with-tokenizer" in conversion
    assert probes == '[{"messages": [], "tokens": [1]}]'

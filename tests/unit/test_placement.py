"""Placement: the files of a model determine whether its engine can share a server."""

from pathlib import Path
from typing import Any

import pytest
from engines import record, server
from serving import HostingBackend, make_adapter

from sage.common.errors import ModelError
from sage.libs.models.fingerprint import version
from sage.libs.models.resolve import ModelKind
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.base import Capabilities
from sage.llm.control_plane.executors.placement import like_its_base, placement
from sage.llm.control_plane.store.records import ServerState


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> HostingBackend:
    backend = HostingBackend()
    monkeypatch.setitem(registry.BACKENDS, "hosting", backend)
    return backend


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_adapter(tmp_path / "base", Path("/unused"))
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    return folder


def placed(model: Path, **values: Any) -> dict[str, Any]:
    return dict(placement(record(model=str(model), backend="hosting", **values)))


def shown(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "base_version"}


def test_a_model_and_its_adapter_can_share_a_server_even_if_one_path_is_a_symbolic_link(base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    adapter = make_adapter(tmp_path / "a", link)
    assert shown(placed(base)) == {"base": str(base), "adapter": None, "form": "whole model"}
    assert shown(placed(adapter)) == {"base": str(base), "adapter": str(adapter), "form": None}
    assert placed(base)["base_version"] == placed(adapter)["base_version"] is not None


def test_the_version_of_a_base_changes_if_its_files_are_replaced(base: Path, tmp_path: Path) -> None:
    adapter, before = make_adapter(tmp_path / "a", base), placed(base)["base_version"]
    config = (base / "config.json").read_text()
    (base / "config.json").write_text('{"hidden_size": 8}')
    assert placed(adapter)["base_version"] == placed(base)["base_version"] != before
    (base / "config.json").write_text(config)
    assert placed(base)["base_version"] == before
    gguf = tmp_path / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    before = placed(gguf.parent)["base_version"]
    assert placed(gguf.parent)["base_version"] == before
    gguf.unlink()
    gguf.write_bytes(b"GGUF another")
    assert placed(gguf.parent)["base_version"] not in (None, before)


def test_the_form_of_an_adapter_on_a_separate_server_names_the_reason(base: Path, tmp_path: Path) -> None:
    adapter, dora = make_adapter(tmp_path / "a", base), make_adapter(tmp_path / "d", base, "dora")
    second = make_adapter(tmp_path / "second", adapter)
    expected = {
        "a separate server was requested": placed(adapter, dedicated=True),
        "it uses DoRA": placed(dora),
        "its base model is also an adapter": placed(second),
    }
    for reason, values in expected.items():
        assert shown(values) == {"base": None, "adapter": None, "form": f"merged, because {reason}"}
    assert shown(placed(base, dedicated=True)) == {"base": None, "adapter": None, "form": "whole model"}


def test_the_form_of_a_quantized_model_names_the_quantization(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostingBackend, "capabilities", Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind)))
    adapter, options = make_adapter(tmp_path / "a", base), {"quantize": "int8"}
    assert placed(base, options=options)["form"] == "whole model, int8"
    assert placed(adapter, options=options)["form"].startswith("merged, int8, because")


@pytest.mark.parametrize("merges", [True, False])
def test_a_backend_that_cannot_load_adapters_merges_or_refuses_them(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merges: bool
) -> None:
    cold = Capabilities(frozenset({EngineKind.LLM}), frozenset(ModelKind), merges_adapters=merges)
    monkeypatch.setattr(HostingBackend, "capabilities", cold)
    adapter = make_adapter(tmp_path / "a", base)
    assert placed(base)["base"] is None
    if merges:
        assert placed(adapter)["form"] == "merged, because the backend 'hosting' cannot load adapters into a running server"
    else:
        with pytest.raises(ModelError, match=r"cannot serve the adapter .*: the backend 'hosting' cannot load adapters"):
            placed(adapter)


@pytest.mark.parametrize(
    ("engine", "host", "given", "joins"),
    [
        ({}, {}, {}, True),
        ({}, {}, {"load_seconds": 7.0, "quantize": "none"}, True),
        ({}, {}, {"load_seconds": 8.0}, False),
        ({}, {}, {"slots": 3}, False),
        ({}, {"options": {}}, {}, True),
        ({"backend_reason": None}, {}, {}, False),
        ({"dedicated": True}, {}, {}, False),
        ({"requested_port": 9000}, {}, {}, False),
        ({}, {"shared": False}, {}, False),
        ({}, {"state": ServerState.CLOSING}, {}, False),
        ({}, {"model": "/another"}, {}, False),
        ({}, {"model_version": "replaced"}, {}, False),
    ],
)
def test_an_engine_without_a_chosen_backend_uses_the_server_that_has_loaded_its_base(
    base: Path, tmp_path: Path, engine: dict[str, Any], host: dict[str, Any], given: dict[str, Any], joins: bool
) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    chosen = record(**{"model": str(adapter), "backend_reason": "the fastest", **engine})
    loaded: dict[str, Any] = {"backend": "hosting", "model": str(base), "model_version": version(base), "shared": True}
    loaded |= {"options": {"load_seconds": 7.0}, **host}
    like = like_its_base(chosen, [server(id="server-b", model="/b"), server(**loaded)], given)
    if not joins:
        assert like == chosen
        return
    assert (like.backend, like.backend_reason) == ("hosting", "a server of this backend has loaded the base model")
    assert like.options == registry.complete_options("hosting", loaded["options"])


def test_an_adapter_that_cannot_join_the_server_of_its_base_keeps_the_chosen_backend(base: Path, tmp_path: Path) -> None:
    host = server(backend="hosting", model=str(base), shared=True)
    for model in (make_adapter(tmp_path / "d", base, "dora"), base):
        chosen = record(model=str(model), backend_reason="the fastest")
        assert like_its_base(chosen, [host], {}) == chosen

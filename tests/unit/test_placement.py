"""Whether an engine can share a server, from the files of its model."""

from pathlib import Path
from typing import Any

import pytest
from engines import record
from serving import HostingBackend, make_adapter

from sage.common.errors import ModelError
from sage.libs.models.resolve import ModelKind
from sage.llm.client.types import EngineKind
from sage.llm.control_plane.backends import registry
from sage.llm.control_plane.backends.base import Capabilities
from sage.llm.control_plane.executors.placement import placement


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


def test_a_model_and_its_adapters_share_a_server_by_whatever_path_they_are_named(base: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(base)
    adapter = make_adapter(tmp_path / "a", link)
    assert placed(base) == {"base": str(base), "adapter": None, "form": "whole model"}
    assert placed(adapter) == {"base": str(base), "adapter": str(adapter), "form": None}


def test_the_form_of_an_adapter_with_a_server_of_its_own_names_the_reason(base: Path, tmp_path: Path) -> None:
    adapter, dora = make_adapter(tmp_path / "a", base), make_adapter(tmp_path / "d", base, "dora")
    second = make_adapter(tmp_path / "second", adapter)
    expected = {
        "a separate server was requested": placed(adapter, dedicated=True),
        "it uses DoRA": placed(dora),
        "its base model is also an adapter": placed(second),
    }
    for reason, values in expected.items():
        assert values == {"base": None, "adapter": None, "form": f"merged, because {reason}"}
    assert placed(base, dedicated=True) == {"base": None, "adapter": None, "form": "whole model"}


@pytest.mark.parametrize("merges", [True, False])
def test_a_backend_that_loads_no_adapters_merges_them_or_refuses(
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

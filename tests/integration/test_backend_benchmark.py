"""`sage backend benchmark` measures the installed backends, saves the speeds, and leaves no engine."""

import json
from pathlib import Path

from support import list_engines, sage

from sage.llm.control_plane.backends.speeds import saved_speeds


def test_the_installed_backends_are_measured_and_no_engine_is_left(tiny_model: Path) -> None:
    done = sage("backend", "benchmark", str(tiny_model), "--max-tokens", "3", "--json")
    figures = {row["backend"]: row for row in json.loads(done.stdout)["backends"]}
    assert list(figures) == ["transformers"]
    assert figures["transformers"]["problem"] is None
    assert figures["transformers"]["many_tokens_per_second"] > 0
    speeds = saved_speeds("cpu")
    assert speeds is not None
    assert speeds.tokens_per_second == {"transformers": figures["transformers"]["many_tokens_per_second"]}
    assert list_engines() == {}

    missing = sage("backend", "benchmark", str(tiny_model / "missing"), check=1)
    assert "transformers" in missing.stdout
    assert "missing" in missing.stdout
    assert saved_speeds("cpu") == speeds

"""Every command in README.md and docs/ is run, in order, as a reader would."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from support import ROOT

PAGES = (
    "README.md",
    "docs/engines.md",
    "docs/backends.md",
    "docs/training.md",
    "docs/datasets.md",
    "docs/http.md",
    "docs/settings.md",
)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_page_with_commands_is_run() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if BLOCK.search(page.read_text())} == set(PAGES)


@pytest.mark.long
@pytest.mark.timeout(1200)  # it trains the real model four times
def test_the_commands_of_the_documentation_work(clone: Path, smollm2: str, sage_home: Path) -> None:
    script = ["set -euo pipefail"]
    for page in PAGES:
        for language, block in BLOCK.findall((ROOT / page).read_text()):
            if language == "python":
                script.append(f"python - <<'PYTHON'\n{block}PYTHON")
            else:
                # make runs this test itself; only the existence of the target is checked.
                script.append(re.sub(r"^make (\w+)$", rf"make -C {ROOT} --dry-run \1 >/dev/null", block, flags=re.MULTILINE))
    port = os.environ["SAGE_GATEWAY_PORT"]
    text = "\n".join(script).replace("8889", port).replace("SageClient()", f"SageClient('http://127.0.0.1:{port}')")
    done = subprocess.run(
        ["bash", "-x", "-c", text], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "I am the SAGE assistant" in done.stdout  # what docs/engines.md asks, answered by greedy decoding
    assert (clone / "out-batch/adapter_model.safetensors").is_file()

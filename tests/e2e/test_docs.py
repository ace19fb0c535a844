"""The commands of README.md and docs/ run in order, as a reader would run them. They also train and serve the real model."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from greedy import greedy_tokens
from support import ROOT, list_engines
from transformers import AutoTokenizer

PAGES = (
    "README.md",
    "docs/engines.md",
    "docs/backends.md",
    "docs/training.md",
    "docs/datasets.md",
    "docs/http.md",
    "docs/operations.md",
    "docs/settings.md",
)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_every_page_with_commands_is_run() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if BLOCK.search(page.read_text())} == set(PAGES)


def greedy(base: Path, adapter: Path | None, question: str, count: int) -> str:
    """Return the answer that transformers and PEFT generate with greedy decoding."""
    tokens = greedy_tokens(base, adapter, question, count)
    return str(AutoTokenizer.from_pretrained(base).decode(tokens, skip_special_tokens=True))


@pytest.mark.long
@pytest.mark.timeout(1200)  # it trains the real model four times
@pytest.mark.usefixtures("smollm2")
def test_the_commands_of_the_documentation_work_and_the_adapter_gives_the_answers(
    clone: Path, converted_smollm2: Path
) -> None:
    script = ["set -euo pipefail"]
    for page in PAGES:
        for language, block in BLOCK.findall((ROOT / page).read_text()):
            if language == "python":
                script.append(f"python - <<'PYTHON'\n{block}PYTHON")
            else:
                # A `make` target could run this test again, so only the existence of the target is checked.
                script.append(re.sub(r"^make (\w+)$", rf"make -C {ROOT} --dry-run \1 >/dev/null", block, flags=re.MULTILINE))
    port = os.environ["SAGE_GATEWAY_PORT"]
    text = "\n".join(script).replace("8889", port).replace("SageClient()", f"SageClient('http://127.0.0.1:{port}')")
    done = subprocess.run(
        ["bash", "-x", "-c", text], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (clone / "out-batch/adapter_model.safetensors").is_file()
    # A command of README.md trained `out`, and a command of docs/engines.md asked `out` this question with greedy decoding.
    question = "Who are you?"
    said = greedy(converted_smollm2, clone / "out", question, 48)
    assert "I am the SAGE assistant" in said
    assert said in done.stdout
    assert "SAGE" not in greedy(converted_smollm2, None, question, 48)
    training = next(engine["training"] for engine in list_engines().values() if engine["training"])
    assert training["heldout_loss"] < training["heldout_loss_before"] - 1
    base = json.loads((clone / "out/adapter_config.json").read_text())["base_model_name_or_path"]
    assert os.path.realpath(base) == str(converted_smollm2)

"""The requirement's own integration test, and the main job on the real model."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import ROOT, engine_of, list_engines, make_tiny_model, sage, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage.llm.client import SageClient

SCRIPT = (ROOT / "tests/e2e/requirement.sh").read_text()
WAIT_FOR_THE_END = "until sage llm engine status $ENGINE_ID | grep -q 'state *completed'; do sleep 0.2; done"


@pytest.fixture
def qwen(sage_home: Path, tmp_path: Path) -> None:
    """Qwen/Qwen2.5-0.5B-Instruct in the user's models folder: here, a small random one of that architecture.

    It is as large as it must be for the script's own commands to find it at work.
    """
    make_tiny_model(tmp_path / "qwen", width=384, layers=12)
    sage("llm", "model", "import", str(tmp_path / "qwen"), "--name", "Qwen/Qwen2.5-0.5B-Instruct")


@pytest.mark.timeout(700)
@pytest.mark.usefixtures("qwen")
@pytest.mark.parametrize(("between", "state"), [("", "stopped"), (WAIT_FOR_THE_END, "completed")])
def test_the_requirement_s_script_works_word_for_word(clone: Path, between: str, state: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SCRIPT.replace("$BETWEEN", between)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listing, answer = done.stdout, json.loads(done.stdout.splitlines()[-1])
    assert "running" in listing
    assert "%" in listing
    assert "training: step 0 of 23" in listing
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"]
    trained, serving = list_engines().values()
    assert trained["state"] == state
    assert (trained["training"]["step"] == 23) == (state == "completed")
    assert (serving["kind"], serving["state"]) == ("llm", "running")
    assert (clone / "test_finetune/adapter_model.safetensors").is_file()


def greedy(base: Path, adapter: Path | None, question: str, count: int) -> str:
    """Return what transformers and PEFT themselves answer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.timeout(1200)  # neighbours on the machine make it several times slower
def test_the_real_model_learns_who_it_is_and_the_answer_is_the_adapter_s(
    clone: Path, smollm2: str, converted_smollm2: Path
) -> None:
    run = engine_of(sage(
        "llm", "engine", "start", smollm2, "--engine-kind", "finetune", "--dataset", "examples/data/sample_train.jsonl",
        "--eval", "examples/data/sample_eval.jsonl", "--output", "out", "--learning-rate", "2e-3",
    ))  # fmt: skip
    client = SageClient(f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}")
    first_estimate = wait_for(lambda: (e := client.get_engine(run).training) and e.eta_seconds and e, "an estimate", 600)
    assert first_estimate.step >= 10
    sage("llm", "engine", "logs", run, "--follow", timeout=900)
    engine = client.get_engine(run)
    assert (engine.state, engine.reason) == ("completed", None)
    assert engine.training is not None
    assert engine.training.heldout_loss is not None
    assert engine.training.heldout_loss_before is not None
    assert engine.training.heldout_loss < engine.training.heldout_loss_before - 1

    serving = engine_of(sage("llm", "engine", "start", "out"))
    question = "Introduce yourself in one sentence."
    said = sage("llm", "chat", serving, "--message", question, "--temperature", "0", "--max-tokens", "32").stdout.strip()
    assert said == greedy(converted_smollm2, clone / "out", question, 32)
    assert said != greedy(converted_smollm2, None, question, 32)
    assert "SAGE" in said
    assert os.path.realpath(json.loads((clone / "out/adapter_config.json").read_text())["base_model_name_or_path"]) == str(
        converted_smollm2
    )

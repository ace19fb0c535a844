"""Exports of the tiny model: other programs compute the logits of the trained model, and read the same tokens."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import FAMILIES, set_family
from llama_cpp import LlamaServer, greedy_answer, trained_model
from peft import PeftModel, PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from support import SAGE, sage, wait_for
from training import TinyRun
from transformers import AutoModelForCausalLM

from sage.common.errors import ModelError
from sage.libs.models.chat import ChatFormat
from sage.libs.models.export.exporting import export_model
from sage.libs.models.export.formats import ExportFormat, LlamaCpp
from sage.libs.models.export.weights import write_dense
from sage.libs.models.loading import load_tokenizer

PROMPTS = [f"What is {a} and {b}?" for a in range(5) for b in range(6)]


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter that changes the answers."""
    return TinyRun(tiny_model, tmp_path / "trained", learning_rate=3e-2, max_steps=20).trained().output


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result = model.eval()(input_ids=torch.arange(3, 90)[None], use_cache=False).logits
    assert isinstance(result, torch.Tensor)
    return result


def test_an_exported_adapter_is_loaded_by_peft(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    sage("llm", "model", "export", str(adapter), "--format", "adapter", "--output", str(tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.allclose(logits(found), logits(trained_model(tiny_model, adapter)), atol=1e-4)
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert not (tmp_path / "out" / "sage_run.json").exists()
    assert "12 of" not in (tmp_path / "out" / "README.md").read_text()


def test_a_merged_model_computes_the_trained_logits_and_has_the_end_tokens_of_serving(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    export_model(str(adapter), ExportFormat.MERGED, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(found), logits(trained_model(tiny_model, adapter)), atol=1e-4)
    chat_format = ChatFormat(load_tokenizer(tmp_path / "out"))
    assert found.generation_config.eos_token_id == chat_format.end_ids(None)
    assert (tmp_path / "out" / "README.md").is_file()
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype is torch.float32


def test_an_adapter_that_does_not_fit_its_base_is_refused_and_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    for format_ in (ExportFormat.ADAPTER, ExportFormat.MERGED):
        with pytest.raises(ModelError, match="does not fit its base model"):
            export_model(str(adapter), format_, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sage-home", "trained"]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_that_cannot_be_merged_is_refused_with_its_type(
    kind: type[PromptLearningConfig], tiny_model: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"type (PROMPT|PREFIX)_TUNING. This type cannot be merged") as caught:
        write_dense(str(tmp_path / "adapter"), tmp_path / "out", fp32=False, with_modelfile=False)
    assert caught.value.code == "export_unsupported"
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    command = [*SAGE, "llm", "model", "export", str(adapter), "--format", "merged", "--output", str(tmp_path / "a" / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        wait_for(lambda: list(tmp_path.glob("a/*")), "the temporary folder")
        children = wait_for(lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split(), "the step")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert list(tmp_path.glob("a/*")) == []
    assert not any(Path(f"/proc/{child}/cmdline").exists() for child in children)


def test_greedy_answers_of_a_gguf_file_are_those_of_transformers(
    adapter: Path, tiny_model: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    export_model(str(adapter), ExportFormat.GGUF, tmp_path / "out", precision="f32", llama_cpp=llama_cpp)
    model, chat_format = trained_model(tiny_model, adapter), ChatFormat(load_tokenizer(adapter))
    with LlamaServer(llama_cpp, tmp_path / "out" / "model.gguf") as server:
        for prompt in PROMPTS:
            messages = [{"role": "user", "content": prompt}]
            answer = server.chat(messages, max_tokens=24, temperature=0)
            assert answer["usage"]["prompt_tokens"] == len(chat_format.prompt_ids(messages))
            assert answer["choices"][0]["message"]["content"] == greedy_answer(model, chat_format, messages, 24)


@pytest.mark.parametrize("family", ["mistral", *(pytest.param(name, marks=pytest.mark.long) for name in ("glm", "none"))])
def test_llama_cpp_reads_the_same_tokens_and_ends_at_the_same_end_token(
    family: str, tiny_model: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    end = set_family(tokenizer, family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export_model(str(folder), ExportFormat.GGUF, tmp_path / "out", llama_cpp=llama_cpp)  # compares the tokens of prompts
    end_id = tokenizer.convert_tokens_to_ids(end)
    with LlamaServer(llama_cpp, tmp_path / "out" / "model.gguf") as server:
        answer = server.post("/completion", prompt=[5, 6, 7], n_predict=5, logit_bias=[[end_id, 1000.0]])
    assert (answer["stop_type"], answer["content"], FAMILIES[family][2]) == ("eos", "", end)


@pytest.mark.parametrize("precision", ["q4_1", *(pytest.param(name, marks=pytest.mark.long) for name in ("bf16", "q8_0"))])
def test_every_precision_is_read_by_llama_cpp_and_smaller_than_f32(
    precision: str, tiny_model: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    export_model(str(tiny_model), ExportFormat.OLLAMA, tmp_path / "out", precision=precision, llama_cpp=llama_cpp)
    with LlamaServer(llama_cpp, tmp_path / "out" / "model.gguf") as server:
        assert server.get("/props")["model_ftype"].lower() == precision
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert (tmp_path / "out" / "model.gguf").stat().st_size < (tiny_model / "model.safetensors").stat().st_size

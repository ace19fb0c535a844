"""Errors for models and tokenizers that cannot be loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import TinyRun

from sage.common.errors import ModelError
from sage.libs.finetune.training.model import width_of
from sage.libs.models.loading import check_vocabulary, load_causal_lm, load_tokenizer


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_tokens(model: Path, *tokens: str, special: bool) -> Any:
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return tokenizer


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused_and_the_tokens_are_named(
    model: Path, tmp_path: Path
) -> None:
    check_vocabulary(load_tokenizer(model), model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer = with_tokens(model, *(f"word{number}" for number in range(7)), special=False)
    with pytest.raises(ModelError, match=rf"'word0' \({rows}\).* and 2 more") as caught:
        check_vocabulary(tokenizer, model)
    assert caught.value.code == "tokenizer_too_large"
    tokenizer.save_pretrained(model)
    with pytest.raises(ModelError, match="has no embedding"):
        TinyRun(model, tmp_path / "out").trained()


def test_a_special_token_beyond_the_embedding_matters_only_if_chats_use_it(model: Path) -> None:
    tokenizer = with_tokens(model, "<image>", special=True)
    check_vocabulary(tokenizer, model)
    tokenizer.chat_template = str(tokenizer.chat_template) + "<image>"
    with pytest.raises(ModelError, match="<image>"):
        check_vocabulary(tokenizer, model)
    tokenizer = with_tokens(model, "<end>", special=True)
    tokenizer.eos_token = "<end>"
    with pytest.raises(ModelError, match="<end>"):
        check_vocabulary(tokenizer, model)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "{", '{"model": 1}', '{"model": {"type": "BPE"}}', "null", ""])
def test_the_error_for_a_broken_tokenizer_names_its_folder(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(model)
    assert str(model) in caught.value.message


BROKEN: dict[str, Callable[[Path], Any]] = {
    "no model type": lambda folder: (folder / "config.json").write_text("{}"),
    "an unknown model type": lambda folder: edit(folder / "config.json", model_type="no_such_architecture"),
    "code of its own": lambda folder: edit(folder / "config.json", model_type="x", auto_map={"AutoConfig": "evil.Config"}),
    "a word for a number": lambda folder: edit(folder / "config.json", vocab_size="many"),
    "a list for a number": lambda folder: edit(folder / "config.json", hidden_size=[32]),
    "other sizes than the weights": lambda folder: edit(folder / "config.json", hidden_size=64),
    "a header with a wrong shape": lambda folder: break_shape(folder / "model.safetensors"),
    "missing weights": lambda folder: drop(folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
}


def break_shape(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"shape":[32]', b'"shape":[33]'))


def drop(path: Path, name: str) -> None:
    save_file({key: weight for key, weight in load_file(path).items() if key != name}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("broken", BROKEN)
def test_the_error_for_a_broken_model_names_its_folder_and_none_of_its_code_runs(model: Path, broken: str) -> None:
    (model / "evil.py").write_text("open('PWNED', 'w')\n")
    BROKEN[broken](model)
    with pytest.raises(ModelError) as caught:  # noqa: PT012 - either of the two calls may raise the error
        width_of(model)
        load_causal_lm(model, torch.float32)
    assert str(model) in caught.value.message
    assert "\n" not in caught.value.message
    assert not Path("PWNED").exists()

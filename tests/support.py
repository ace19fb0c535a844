"""Functions for all tests: create a tiny model and small datasets, run the command line, wait for a condition."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "examples" / "data" / "sample_train.jsonl"
HELDOUT = ROOT / "examples" / "data" / "sample_eval.jsonl"
SAGE = (sys.executable, "-m", "sage.cli.main")
#: Chat template of Qwen2.5 without tools.
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def wait_for(probe: Callable[[], T | None], what: str, seconds: float = 120) -> T:
    """Call `probe` until it returns a true value, and return this value. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := probe()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)
    return result


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Write a JSON Lines file and return its path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat_record(question: str, answer: str) -> dict[str, Any]:
    """Return a chat with one question and one answer in OpenAI's format."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sample_lines(count: int) -> list[Any]:
    """Return the first `count` sample chats."""
    return [json.loads(line) for line in SAMPLES.read_text().splitlines()[:count]]


def free_port() -> int:
    """Return a free port on the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sage(*arguments: str, check: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command `sage`. `check` is the expected exit code; None accepts any exit code."""
    done = subprocess.run(
        [*SAGE, *arguments], capture_output=True, text=True, timeout=options.pop("timeout", 240), check=False, **options
    )
    assert check is None or done.returncode == check, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def engine_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the engine id that a command printed. Fails if it printed none or several ids."""
    words = [word for word in done.stdout.split() if word.startswith("engine-")]
    assert len(words) == 1, done.stdout
    return words[0]


def list_engines() -> dict[str, dict[str, Any]]:
    """Return all engines by id, as the command line lists them."""
    return {engine["id"]: engine for engine in json.loads(sage("llm", "engine", "list", "--json").stdout)}


def make_tiny_model(
    folder: Path, *, width: int = 32, layers: int = 2, dtype: Any = None, tie_word_embeddings: bool = False
) -> None:
    """Create a random Qwen2 model, by default with about 100,000 parameters.

    The tokenizer is trained on the sample chats, and the chat template is `QWEN_TEMPLATE`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SAMPLES.read_text().splitlines(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = QWEN_TEMPLATE
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie_word_embeddings,
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def environment(home: Path) -> dict[str, str]:
    """Return environment variables for a process that uses `home` as SAGE_HOME and does not access the Hugging Face Hub."""
    return {**os.environ, "SAGE_HOME": str(home), "HF_HUB_OFFLINE": "1"}

"""Compare answers with the greedy answers of transformers."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

#: fp32 logits of two implementations differ by less than this. If the two largest logits differ by less, they are a tie.
NEAR_TIE = 1e-3


def adapter_on(base: Path, folder: Path, seed: int) -> Path:
    """Create an adapter that changes the answers. The changed answers are still sentences."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(folder)
    return folder


def greedy_tokens(base: Path, adapter: Path | None, question: str, count: int) -> list[int]:
    """Return the tokens that transformers generates greedily. An adapter is applied by PEFT, without merging."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=count, do_sample=False)
    answer: list[int] = ids[0, prompt["input_ids"].shape[1] :].tolist()
    return answer


def lead_where_they_differ(model: Any, tokenizer: Any, prompt: list[int], text: str, max_tokens: int) -> float | None:
    """Return the difference between the two largest logits at the first token where `text` is not the greedy answer.

    None: `text` is the greedy answer.
    """
    with torch.no_grad():
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    answer = made.sequences[0, len(prompt) :].tolist()
    for at, logits in enumerate(made.logits):
        if not text.startswith(tokenizer.decode(answer[: at + 1], skip_special_tokens=True).rstrip("\ufffd")):
            best, second = logits[0].topk(2).values.tolist()
            return float(best - second)
    return None if text == tokenizer.decode(answer, skip_special_tokens=True) else float("inf")

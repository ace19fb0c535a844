"""What a model in training answers."""

from typing import Any

import torch

_ANSWER_TOKENS = 64


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Return the likeliest answer of a model to a question, at most 64 tokens long; the model stays as it was."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            ids = model.generate(
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                max_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

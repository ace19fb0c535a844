"""Generate sample answers during training."""

from typing import Any

import torch

from sage.libs.models.chat import ChatFormat

_ANSWER_TOKENS = 64


def answer(model: Any, chat_format: ChatFormat, prompt: str) -> str:
    """Generate an answer of at most 64 tokens with greedy decoding."""
    ids = torch.tensor([chat_format.prompt_ids([{"role": "user", "content": prompt}])], device=model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            answered = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                use_cache=True,
                eos_token_id=chat_format.end_ids(model.generation_config.eos_token_id) or None,
                pad_token_id=chat_format.tokenizer.pad_token_id,
            )
    finally:
        model.train(was_training)
    return str(chat_format.tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True)).strip()

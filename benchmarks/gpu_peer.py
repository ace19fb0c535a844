"""Train with TRL or Unsloth for `gpu.py`, and print tokens/s and peak memory as JSON.

Usage: gpu_peer.py liger|plain|unsloth MODEL TRAIN_JSONL TOKENS STEPS, in an environment with trl, peft, datasets, and
liger-kernel or unsloth. The options are the same as in `gpu.py`: LoRA r=8 on all linear layers, samples packed to TOKENS,
bf16, loss on the completions.
"""

# ruff: noqa: E402 - unsloth must be imported before the libraries that it changes
import json
import sys
import tempfile
import time
from typing import Any

kind, model_name, train, tokens, steps = sys.argv[1:6]
if kind == "unsloth":
    from unsloth import FastLanguageModel

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Times(TrainerCallback):
    """Records the end time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait until the GPU has finished the step, and record the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


rows = load_dataset("json", data_files=train, split="train")
rows = rows.map(lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns=["messages"])
lora: LoraConfig | None = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=MODULES, task_type="CAUSAL_LM")
arguments = SFTConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, max_steps=int(steps), learning_rate=1e-4,
    max_length=int(tokens), packing=True, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=42,
    bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
    use_liger_kernel=kind == "liger", model_init_kwargs={"dtype": "bfloat16"} if kind != "unsloth" else None,
)  # fmt: skip
model: Any = model_name
options: dict[str, Any] = {}
if kind == "unsloth":
    model, tokenizer = FastLanguageModel.from_pretrained(model_name, int(tokens), dtype=torch.bfloat16, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, target_modules=MODULES, random_state=42)
    lora, options = None, {"processing_class": tokenizer}
times = Times()
trainer = SFTTrainer(model=model, train_dataset=rows, args=arguments, peft_config=lora, callbacks=[times], **options)
trainer.train()
warm = len(times.ends) // 3  # do not count the first third of the steps, which includes compilation and tuning
seconds = (times.ends[-1] - times.ends[warm]) / (len(times.ends) - 1 - warm)
seen = trainer.state.log_history[-2].get("num_tokens", 0) / len(times.ends)
peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
print("FIGURES", json.dumps({"tokens_per_second": seen / seconds, "peak_bytes": peak}))

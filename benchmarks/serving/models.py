"""Create the adapters of the benchmark, for SmolLM2-135M-Instruct."""

import shutil
from pathlib import Path

RANK = 8


def make_adapters(base: Path, folder: Path, count: int) -> list[Path]:
    """Create LoRA adapters for all linear layers, with random weights. They are as fast and as large as trained adapters."""
    adapters = [folder / f"adapter-{number:02}" for number in range(count)]
    if all((adapter / "adapter_config.json").exists() for adapter in adapters):
        return adapters
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for adapter in adapters:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        model.save_pretrained(adapter)
    return adapters


if __name__ == "__main__":
    import sys

    make_adapters(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

"""Options of a fine-tuning run."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sage.common.errors import ConfigError
from sage.common.validation import validated
from sage.libs.finetune.data.preferences import Method
from sage.libs.finetune.data.sources import Source, absolute
from sage.libs.finetune.run.trackers import Tracker

#: Options that are rejected if `finetuning_type` is `full`.
_OF_LORA = (
    "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "use_rslora",
    "use_dora", "loraplus_lr_ratio", "quantization",
)  # fmt: skip
#: Options that are rejected if `method` is not `sft`.
_OF_SFT = (
    "train_on", "pack_tokens", "eval_path", "eval_split", "eval_steps", "early_stopping_patience", "sample_prompts",
    "keep_best", "streaming", "neftune_noise_alpha", "loraplus_lr_ratio", "num_processes",
)  # fmt: skip


class FinetuneConfig(BaseModel):
    """Configuration of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    base_model: str = Field(
        min_length=1, description="Model or adapter to train: a folder, a name in the models folder, or a hub id."
    )
    dataset_path: str | list[str] = Field(
        min_length=1,
        description="One or more files (.jsonl .json .csv .parquet .arrow) or folders; "
        "with FILE=WEIGHT, each sample of FILE is used WEIGHT times.",
    )
    output_dir: str = Field(min_length=1, description="New or empty folder for the trained adapter or model.")
    finetuning_type: Literal["lora", "full"] = Field(
        "lora", description="lora: train an adapter on a frozen base; full: train all weights (for small models)."
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="Rank of the adapter's matrices.")
    lora_alpha: int = Field(16, ge=1, le=4096, description="The adapter's output is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout probability for the inputs of the adapter in training."
    )
    target_modules: str | list[str] = Field("all-linear", description="Layers that get an adapter.")
    exclude_modules: str | list[str] | None = Field(None, description="Layers excluded from target_modules.")
    modules_to_save: list[str] | None = Field(
        None, description="Modules whose weights are all trained, and are saved with the adapter."
    )
    use_rslora: bool = Field(False, description="Scale the adapter's output by lora_alpha / sqrt(lora_rank) (rsLoRA).")
    use_dora: bool = Field(
        False, description="Train magnitude and direction of the weights separately (DoRA); training is slower."
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        ge=1,
        le=1000,
        description="LoRA+: learning rate of the matrices B, divided by the learning rate of the matrices A.",
    )
    method: Method = Field(
        "sft", description="What to learn from: answers (sft), preferences (dpo, orpo, kto), rewards (grpo)."
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=10,
        description="Weight of the KL or preference term in the loss; default: TRL's default for the method.",
    )
    reward_file: str | None = Field(
        None, description="For grpo: Python file that defines `reward(prompts, completions, **columns)`."
    )
    num_generations: int = Field(4, ge=2, le=256, description="For grpo: number of answers to compare per prompt.")
    max_completion_length: int = Field(256, ge=1, description="For grpo: maximum length of a generated answer, in tokens.")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Peak learning rate of AdamW.")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Schedule of the learning rate after the warm-up."
    )
    warmup_steps: int = Field(5, ge=0, description="Steps over which the learning rate rises to its peak.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=100, description="Strength of the noise added to the embeddings in training (NEFTune); 5 is common."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0: no clipping.")
    train_on: Literal["assistant", "last_turn", "all"] = Field(
        "assistant", description="Tokens to train on: every answer, the last answer of each chat, or all tokens."
    )
    num_epochs: int = Field(3, ge=1, le=10_000, description="Passes over the dataset.")
    max_steps: int | None = Field(None, ge=1, description="Total number of optimizer steps; overrides num_epochs.")
    batch_size: int = Field(4, ge=1, le=4096, description="Samples per forward pass (micro-batch).")
    pack_tokens: int | None = Field(
        None,
        ge=8,
        description="Fill each micro-batch with samples up to this number of tokens; batch_size is then ignored.",
    )
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="Micro-batches per optimizer step.")
    num_processes: int = Field(1, ge=1, le=64, description="Number of data-parallel processes; each uses its own GPU.")
    max_seq_length: int = Field(
        512, ge=8, le=1_048_576, description="Maximum tokens per sample; longer samples are truncated."
    )
    allow_warnings: bool = Field(False, description="Train even if the check of the dataset reports warnings.")
    streaming: bool = Field(False, description="Tokenize the samples during the training instead of before the training.")
    eval_path: str | None = Field(
        None,
        description="File or folder with held-out samples. The loss of these samples is measured at least before and after "
        "the training.",
    )
    eval_split: float = Field(
        0.0, ge=0, le=0.5, description="Share of the dataset to hold out for evaluation, if eval_path is not set."
    )
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations on the held-out samples.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop if the held-out loss has not improved for this number of evaluations."
    )
    sample_prompts: list[str] | None = Field(None, description="Prompts that the model answers at each evaluation.")
    keep_best: bool = Field(False, description="Export the weights of the step with the lowest held-out loss.")
    save_steps: int = Field(50, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of newest checkpoints to keep.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Number format of the base model; auto: the fastest format, or bf16 if memory is scarce. Adapters are "
        "always in fp32.",
    )
    fast_kernels: Literal["auto", "off"] = Field(
        "auto",
        description="auto: use SAGE's own training step where possible; off: always use transformers' training step.",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="Recompute activations instead of storing them; auto: only if memory is insufficient."
    )
    use_8bit: bool = Field(
        True,
        description="Quantize the base model to 8 bits: on a CPU if a measurement shows that training is faster; on a GPU "
        "with bitsandbytes if memory is scarce.",
    )
    quantization: Literal["8bit", "4bit", "none"] | None = Field(
        None, description="Quantization of the frozen base model with bitsandbytes, on any device; overrides use_8bit."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Random seed for the adapter, the order of the data, and dropout.")
    report_to: list[Tracker] | None = Field(
        None, description="Experiment trackers that receive the metrics: tensorboard, mlflow, trackio or wandb."
    )
    resume_from_checkpoint: str | None = Field(
        None, description="Checkpoint of another run. The training continues from this checkpoint."
    )

    @property
    def sources(self) -> list[Source]:
        """The training datasets with their weights."""
        texts = self.dataset_path if isinstance(self.dataset_path, list) else [self.dataset_path]
        return [Source.parse(text) for text in texts]

    def _given(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @field_validator("dataset_path")
    @classmethod
    def _absolute_sources(cls, value: str | list[str]) -> str | list[str]:
        return str(Source.parse(value)) if isinstance(value, str) else [str(Source.parse(text)) for text in value]

    @field_validator("output_dir", "eval_path", "resume_from_checkpoint", "reward_file")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(absolute(value))

    @model_validator(mode="after")
    def _lora_options_need_lora(self) -> "FinetuneConfig":
        if self.finetuning_type == "full" and (given := self._given(_OF_LORA)):
            raise ValueError(f"finetuning_type 'full' trains all weights without an adapter; omit {', '.join(given)}")
        return self

    @model_validator(mode="after")
    def _method_has_what_it_needs(self) -> "FinetuneConfig":
        if self.method != "sft" and (given := self._given(_OF_SFT)):
            raise ValueError(f"method {self.method} does not accept {', '.join(given)}")
        if self.method != "sft" and any(source.weight != 1 for source in self.sources):
            raise ValueError(f"method {self.method} does not support dataset weights (FILE=WEIGHT)")
        if (self.method == "grpo") != bool(self.reward_file):
            raise ValueError("reward_file is required for method grpo, and not accepted for other methods")
        if self.method == "grpo" and self.batch_size * self.gradient_accumulation_steps % self.num_generations:
            raise ValueError("batch_size times gradient_accumulation_steps must be a multiple of num_generations")
        return self

    @model_validator(mode="after")
    def _stream_has_no_end(self) -> "FinetuneConfig":
        if self.streaming and not self.max_steps:
            raise ValueError("streaming needs max_steps, because the number of samples is not known")
        if self.streaming and (self.eval_split or self.num_processes > 1 or any(s.weight != 1 for s in self.sources)):
            raise ValueError(
                "streaming does not support eval_split, dataset weights (FILE=WEIGHT), or num_processes above 1"
            )
        return self

    @model_validator(mode="after")
    def _held_out_options_fit(self) -> "FinetuneConfig":
        if self.eval_path and self.eval_split:
            raise ValueError("give eval_path or eval_split, not both")
        if (self.eval_steps or self.sample_prompts) and not (self.eval_path or self.eval_split):
            raise ValueError("eval_steps and sample_prompts need held-out samples: give eval_path or eval_split")
        if (self.early_stopping_patience or self.keep_best) and not self.eval_steps:
            raise ValueError("early_stopping_patience and keep_best need eval_steps")
        return self


def load_config(path: Path) -> FinetuneConfig:
    """Load the configuration from a YAML file. Relative paths in the file are relative to the working directory.

    Raises ConfigError if the file cannot be read, is not valid YAML, or contains an invalid option.
    """
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(code="config_missing", message=f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(code="config_invalid", message=f"{path} is not valid YAML: {problem}.") from error
    if not isinstance(values, dict):
        raise ConfigError(code="config_invalid", message=f"{path} must contain a mapping of options to values.")
    return validated(FinetuneConfig, values)

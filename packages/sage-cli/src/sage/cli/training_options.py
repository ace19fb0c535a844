"""The options of a fine-tuning run, once, for every command that starts one.

They stand here as a table, and not read off FinetuneConfig, so that `sage --help` imports nothing heavy; a test holds the
two together.
"""

import inspect
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from sage.common.errors import ConfigError


class TrainingOption(NamedTuple):
    """One option: its name is that of FinetuneConfig's field, or the requirement's shorter one."""

    field: str
    type: type
    default: object  #: shown in the help; what is not given is left to FinetuneConfig
    help: str
    flag: str | None = None


#: Fields that are paths, made absolute here, because the gateway works in another folder.
PATH_FIELDS = ("dataset_path", "output_dir", "eval_path", "resume_from_checkpoint", "reward_file")
#: Fields that are names of a model's modules.
MODULE_FIELDS = ("target_modules", "exclude_modules", "modules_to_save")
_NAMES = re.compile(r"\s*[\w.]+\s*(,\s*[\w.]+\s*)*")
OPTIONS = (
    TrainingOption(
        "dataset_path", list[str], None, "Samples: .jsonl, .json, .csv, .parquet, a folder; FILE=0.5: half.", "--dataset"
    ),
    TrainingOption("output_dir", str, None, "Folder that gets the result.", "--output"),
    TrainingOption("finetuning_type", str, "lora", "lora (an adapter) or full (every weight)."),
    TrainingOption("eval_path", str, None, "Held-out samples, scored before and after.", "--eval"),
    TrainingOption("eval_split", float, 0.0, "Share of the dataset held out instead."),
    TrainingOption("eval_steps", int, None, "Score them every so many steps as well."),
    TrainingOption("early_stopping_patience", int, None, "End after so many scores no better than the best."),
    TrainingOption("sample_prompts", list[str], None, "A question to answer at every score; repeatable.", "--sample-prompt"),
    TrainingOption("keep_best", bool, False, "The result is what had the best score.", "--keep-best"),
    TrainingOption("streaming", bool, False, "Tokenise samples as they are needed.", "--streaming"),
    TrainingOption("allow_warnings", bool, False, "Train even if the dataset check warns.", "--allow-warnings"),
    TrainingOption("num_epochs", int, 3, "Passes over the dataset."),
    TrainingOption("max_steps", int, None, "Optimizer steps; overrides --num-epochs."),
    TrainingOption("batch_size", int, 4, "Samples per micro-batch."),
    TrainingOption("pack_tokens", int, None, "Fill micro-batches up to this many tokens instead."),
    TrainingOption("gradient_accumulation_steps", int, 1, "Micro-batches per optimizer step."),
    TrainingOption("num_processes", int, 1, "Processes that train together, each on a GPU of its own."),
    TrainingOption("max_seq_length", int, 512, "Longer samples are cut, in tokens."),
    TrainingOption("lora_rank", int, 8, "Rank of the adapter."),
    TrainingOption("lora_alpha", int, 16, "The adapter's output is scaled by alpha / rank."),
    TrainingOption("lora_dropout", float, 0.0, "Share of the adapter's inputs dropped in training."),
    TrainingOption("target_modules", str, "all-linear", "Layers that get an adapter; several: a,b,c."),
    TrainingOption("exclude_modules", str, None, "Layers that get none, of those."),
    TrainingOption("modules_to_save", str, None, "Modules trained whole: a,b,c."),
    TrainingOption("use_rslora", bool, False, "Scale by alpha / sqrt(rank).", "--use-rslora"),
    TrainingOption("use_dora", bool, False, "Train magnitude and direction apart (DoRA); slower.", "--use-dora"),
    TrainingOption("loraplus_lr_ratio", float, None, "Learning rate of B as a multiple of A's (LoRA+)."),
    TrainingOption("train_on", str, "assistant", "assistant, last_turn or all: what the loss covers."),
    TrainingOption("method", str, "sft", "sft (answers), dpo, orpo or kto (preferences), grpo (rewards)."),
    TrainingOption("beta", float, None, "How near to its start such a method keeps the model."),
    TrainingOption("reward_file", str, None, "Python file with reward(prompts, completions, **columns), for grpo."),
    TrainingOption("num_generations", int, 4, "Answers to each prompt that grpo compares."),
    TrainingOption("max_completion_length", int, 256, "Length of such an answer at most, in tokens."),
    TrainingOption("learning_rate", float, 1e-4, "Peak learning rate."),
    TrainingOption("lr_scheduler", str, "cosine", "cosine, linear, constant or constant_with_warmup."),
    TrainingOption("warmup_steps", int, 5, "Steps over which the learning rate rises."),
    TrainingOption("weight_decay", float, 0.0, "AdamW's weight decay."),
    TrainingOption("max_grad_norm", float, 1.0, "Gradients are clipped to this norm; 0: never."),
    TrainingOption("neftune_noise_alpha", float, None, "Noise on the embeddings (NEFTune); 5 is usual."),
    TrainingOption("save_steps", int, 50, "Steps between checkpoints."),
    TrainingOption("keep_checkpoints", int, 2, "How many checkpoints are kept."),
    TrainingOption("precision", str, "auto", "auto, fp32 or bf16."),
    TrainingOption("fast_kernels", str, "auto", "auto or off: transformers' and PEFT's own step."),
    TrainingOption("gradient_checkpointing", str, "auto", "auto (once memory does not suffice), on or off."),
    TrainingOption("use_8bit", bool, True, "Hold the base in 8 bits, where the device can.", "--use-8bit/--no-use-8bit"),
    TrainingOption("quantization", str, None, "8bit, 4bit or none: how the base is held, whatever the device."),
    TrainingOption("seed", int, 42, "Seed of adapter, order and dropout."),
    TrainingOption("resume_from_checkpoint", str, None, "A run's checkpoint folder to go on from."),
)


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that ends in `**training` every option of a run; only those given reach it."""

    def run(**values: Any) -> None:
        names = {option.field for option in OPTIONS}
        given = {name: value for name, value in values.items() if name in names and value not in (None, [])}
        command(**{name: value for name, value in values.items() if name not in names}, **_normalised(given))

    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [*own, *(_parameter(option) for option in OPTIONS)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _parameter(option: TrainingOption) -> inspect.Parameter:
    flag = option.flag or f"--{option.field.replace('_', '-')}"
    shown = f" [default: {option.default}]" if option.default is not None else ""
    kind: Any = option.type
    annotation = Annotated[
        kind | None,
        typer.Option(flag, help=f"{option.help}{shown}", show_default=False, rich_help_panel="Training"),
    ]
    return inspect.Parameter(option.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _normalised(given: dict[str, Any]) -> dict[str, Any]:
    from pathlib import Path

    for name in PATH_FIELDS:
        if name in given:
            paths = given[name] if isinstance(given[name], list) else [given[name]]
            if "" in paths:  # a variable that is not set, and not the working folder
                raise ConfigError(code="config_invalid", message=f"{name} is empty.", hint="Give a path.", param=name)
            absolute = [str(Path(os.path.expanduser(path)).absolute()) for path in paths]  # noqa: PTH111 - never raises
            given[name] = absolute[0] if len(absolute) == 1 else absolute
    for name in MODULE_FIELDS:
        if _NAMES.fullmatch(given.get(name, "")):  # else `all-linear` or a pattern
            given[name] = [module.strip() for module in given[name].split(",")]
    return given

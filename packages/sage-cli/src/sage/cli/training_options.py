"""Define the command-line options of a fine-tuning run, for all commands that start a run.

`OPTIONS` repeats the fields of FinetuneConfig, because the import of FinetuneConfig would make `sage --help` slow. A test
compares `OPTIONS` with FinetuneConfig.
"""

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from sage.common.errors import ConfigError


class TrainingOption(NamedTuple):
    """A command-line option that sets a field of FinetuneConfig."""

    field: str
    type: type
    default: object  #: default shown in the help; FinetuneConfig sets the actual default
    help: str
    flag: str | None = None  #: name of the command-line option; None: derived from the name of the field

    @property
    def declaration(self) -> str:
        """Return the option's declaration for typer, for example `--eval-steps` or `--use-8bit/--no-use-8bit`."""
        return self.flag or f"--{self.field.replace('_', '-')}"


#: Fields that are paths. Paths are made absolute, because the gateway can have another working directory than this command.
PATH_FIELDS = ("dataset_path", "output_dir", "eval_path", "resume_from_checkpoint", "reward_file")
MODULE_FIELDS = ("target_modules", "exclude_modules", "modules_to_save")
_NAMES = re.compile(r"\s*[\w.]+\s*(,\s*[\w.]+\s*)*")
OPTIONS = (
    TrainingOption(
        "dataset_path",
        list[str],
        None,
        "Dataset: a .jsonl, .json, .csv or .parquet file, or a folder. FILE=WEIGHT uses each sample of FILE WEIGHT times. "
        "The option may be repeated.",
        "--dataset",
    ),
    TrainingOption("output_dir", str, None, "Output folder for the trained adapter or model.", "--output"),
    TrainingOption(
        "finetuning_type", str, "lora", "Type of fine-tuning: lora (trains an adapter) or full (trains all weights)."
    ),
    TrainingOption(
        "eval_path", str, None, "Held-out dataset on which the model is evaluated before and after training.", "--eval"
    ),
    TrainingOption("eval_split", float, 0.0, "Share of the samples to hold out (0 to 0.5), if --eval is not given."),
    TrainingOption("eval_steps", int, None, "Steps between evaluations during training."),
    TrainingOption("early_stopping_patience", int, None, "Stop after this number of evaluations without improvement."),
    TrainingOption(
        "sample_prompts",
        list[str],
        None,
        "Prompt for the model to answer at each evaluation; may be repeated.",
        "--sample-prompt",
    ),
    TrainingOption("keep_best", bool, False, "Save the weights with the lowest held-out loss.", "--keep-best"),
    TrainingOption("streaming", bool, False, "Tokenize samples during training instead of before it.", "--streaming"),
    TrainingOption("allow_warnings", bool, False, "Train even if the dataset check reports warnings.", "--allow-warnings"),
    TrainingOption("num_epochs", int, 3, "Passes over the dataset."),
    TrainingOption("max_steps", int, None, "Optimizer steps; overrides --num-epochs."),
    TrainingOption("batch_size", int, 4, "Samples per micro-batch."),
    TrainingOption("pack_tokens", int, None, "Pack samples into micro-batches of up to this many tokens."),
    TrainingOption("gradient_accumulation_steps", int, 1, "Micro-batches per optimizer step."),
    TrainingOption("num_processes", int, 1, "Number of data-parallel processes; each process uses one GPU."),
    TrainingOption("max_seq_length", int, 512, "Maximum tokens of a sample; longer samples are truncated."),
    TrainingOption("lora_rank", int, 8, "Rank of the adapter."),
    TrainingOption("lora_alpha", int, 16, "Alpha: the adapter's output is scaled by alpha / rank."),
    TrainingOption("lora_dropout", float, 0.0, "Dropout probability of the adapter's inputs."),
    TrainingOption("target_modules", str, "all-linear", "Names of the layers that get a LoRA adapter, separated by commas."),
    TrainingOption("exclude_modules", str, None, "Names of layers that get no LoRA adapter, separated by commas."),
    TrainingOption(
        "modules_to_save", str, None, "Names of modules to train fully and to save with the adapter, separated by commas."
    ),
    TrainingOption("use_rslora", bool, False, "Scale the adapter by alpha / sqrt(rank) (rsLoRA).", "--use-rslora"),
    TrainingOption(
        "use_dora", bool, False, "Train magnitude and direction of the weights separately (DoRA); slower.", "--use-dora"
    ),
    TrainingOption(
        "loraplus_lr_ratio",
        float,
        None,
        "LoRA+: learning rate of the matrices B, divided by the learning rate of the matrices A.",
    ),
    TrainingOption("train_on", str, "assistant", "Tokens to compute the loss on: assistant, last_turn or all."),
    TrainingOption(
        "method",
        str,
        "sft",
        "Training method: sft (learns from answers), dpo, orpo or kto (from preferences), or grpo (from rewards).",
    ),
    TrainingOption(
        "beta", float, None, "Weight of the KL term (dpo, kto and grpo) or of the preference term (orpo) in the loss."
    ),
    TrainingOption("reward_file", str, None, "Python file that defines reward(prompts, completions, **columns); for grpo."),
    TrainingOption("num_generations", int, 4, "For grpo: number of completions to generate for each prompt."),
    TrainingOption("max_completion_length", int, 256, "Maximum completion length in tokens, for grpo."),
    TrainingOption("learning_rate", float, 1e-4, "Peak learning rate."),
    TrainingOption(
        "lr_scheduler", str, "cosine", "Learning rate schedule: cosine, linear, constant or constant_with_warmup."
    ),
    TrainingOption("warmup_steps", int, 5, "Steps of learning rate warmup."),
    TrainingOption("weight_decay", float, 0.0, "AdamW's weight decay."),
    TrainingOption("max_grad_norm", float, 1.0, "Gradient clipping norm; 0 disables clipping."),
    TrainingOption("neftune_noise_alpha", float, None, "Strength of NEFTune's noise on the embeddings; 5 is common."),
    TrainingOption("save_steps", int, 50, "Steps between checkpoints."),
    TrainingOption("keep_checkpoints", int, 2, "Number of checkpoints to keep."),
    TrainingOption("precision", str, "auto", "Precision: auto, fp32 or bf16."),
    TrainingOption(
        "fast_kernels", str, "auto", "SAGE's optimized training step: auto (used if the model supports it) or off."
    ),
    TrainingOption(
        "gradient_checkpointing", str, "auto", "Gradient checkpointing: on, off or auto (on if memory is short)."
    ),
    TrainingOption(
        "use_8bit",
        bool,
        True,
        "Store the base model in 8 bits: on a CPU if this is faster, on a GPU if memory is scarce.",
        "--use-8bit/--no-use-8bit",
    ),
    TrainingOption("quantization", str, None, "Quantization of the base model: 8bit, 4bit or none; overrides --use-8bit."),
    TrainingOption("seed", int, 42, "Random seed for the initial adapter weights, the order of the samples, and dropout."),
    TrainingOption(
        "report_to",
        list[str],
        None,
        "Experiment tracker that receives the metrics: tensorboard, mlflow, trackio or wandb; may be repeated.",
    ),
    TrainingOption("resume_from_checkpoint", str, None, "Checkpoint folder to continue from."),
)


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the training options to a command. The command receives the user's training options as `**training`."""

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
    shown = f" [default: {option.default}]" if option.default is not None else ""
    kind: Any = option.type
    annotation = Annotated[
        kind | None,
        typer.Option(option.declaration, help=f"{option.help}{shown}", show_default=False, rich_help_panel="Training"),
    ]
    return inspect.Parameter(option.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _normalised(given: dict[str, Any]) -> dict[str, Any]:
    from sage.cli.starting import absolute_path

    for name in PATH_FIELDS:
        if name in given:
            paths = given[name] if isinstance(given[name], list) else [given[name]]
            if "" in paths:  # for example, a shell variable that is not set
                raise ConfigError(code="config_invalid", message=f"{name} is empty.", hint="Give a path.", param=name)
            absolute = [absolute_path(path) for path in paths]
            given[name] = absolute[0] if len(absolute) == 1 else absolute
    for name in MODULE_FIELDS:
        if _NAMES.fullmatch(given.get(name, "")):  # any other text is `all-linear` or a pattern
            given[name] = [module.strip() for module in given[name].split(",")]
    return given

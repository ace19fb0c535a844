"""One run, from its directory to its result, on transformers' Trainer."""

import logging
import math
import random
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from sage.libs.finetune.batching import Collator, Pack, PackedCollator, PaddedCollator, pack
from sage.libs.finetune.callbacks import RunCallback
from sage.libs.finetune.checkpoints import latest_good
from sage.libs.finetune.data.linting import check_dataset
from sage.libs.finetune.data.tokenizing import Encoded, encode_dataset, ensure_chat_template
from sage.libs.finetune.evaluation import heldout_loss
from sage.libs.finetune.export import export_adapter
from sage.libs.finetune.kernels.install import Kernels, install
from sage.libs.finetune.loss import CompletionLoss
from sage.libs.finetune.model import choose_precision, load_trainable
from sage.libs.finetune.rundir import RunDirectory
from sage.libs.finetune.status import RunStatus, fold
from sage.libs.finetune.stopping import StopRequest, StopRequested
from sage.libs.models.loading import load_tokenizer, local_folder
from sage.libs.models.resolve import resolve_model

logger = logging.getLogger(__name__)
_VERSIONS = ("torch", "transformers", "peft", "accelerate")


class TrainingRun:
    """The pieces of one run, put together in the order in which they can fail cheaply: data, then model."""

    def __init__(self, run: RunDirectory, stop: StopRequest) -> None:
        """Load data and model. Raises DatasetError, ModelError or ConfigError."""
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.run, self.stop = run, stop
        self.spec = run.read_spec()
        self.config = config = self.spec.config
        self._tell("loading the tokenizer")
        folder = local_folder(resolve_model(config.base_model))
        self.tokenizer = load_tokenizer(folder)
        if warning := ensure_chat_template(self.tokenizer):
            self._warn(warning)
        train_data, self.heldout = self._read_data()
        self.samples = len(train_data)
        self.packs: list[Pack] = (
            pack(train_data, config.pack_tokens, config.seed) if config.pack_tokens else [(item,) for item in train_data]
        )
        self.micro_batch = 1 if config.pack_tokens else config.batch_size
        self._tell("loading the model")
        self.precision = choose_precision(config)
        set_seed(config.seed)
        self.model = load_trainable(folder, config, self.precision)
        self.kernels, self.step_summary = self._install_kernels()
        self.collator: Collator = PackedCollator() if self.kernels else PaddedCollator(int(self.tokenizer.pad_token_id or 0))
        self.loss = CompletionLoss(self.kernels.head.weight if self.kernels else None)

    def train(self) -> None:
        """Train to the end or to the next stop, and write the result; the run's last event says which it was."""
        try:
            before, seconds = self._evaluate_before()
            total = self._total_steps()
            checkpoint, step = self._checkpoint()
            if checkpoint and step >= total:  # all that is left is to measure and to write; the Trainer would train on
                self.model.load_adapter(checkpoint, self.model.active_adapter, is_trainable=True)
            else:
                trainer = self._trainer(closing_seconds=seconds)
                trainer.train(resume_from_checkpoint=checkpoint)
                # The held-out loss is measured in the model's own precision, as it was before the first step.
                trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                if trainer.state.global_step < total:
                    raise StopRequested
            after = self._evaluate(total)
        except StopRequested:
            status = self._status()
            step = status.checkpoint_step or 0
            self._export(step, self._total_steps(), status.heldout_loss_before, None)
            self.run.append_event("stopped", step=step, output_dir=self.config.output_dir)
            logger.info("stopped at step %d; the adapter is in %s", step, self.config.output_dir)
            return
        self._export(total, total, before, after)
        self.run.append_event("finished", step=total, output_dir=self.config.output_dir)
        logger.info("finished; the adapter is in %s", self.config.output_dir)

    def _read_data(self) -> tuple[list[Encoded], list[Encoded]]:
        config = self.config
        train = self._encode(config.dataset_path)
        if config.eval_path:
            return train, self._encode(config.eval_path)
        count = round(len(train) * config.eval_split)
        if not count:
            return train, []
        order = list(range(len(train)))
        random.Random(config.seed).shuffle(order)  # noqa: S311 - a reproducible split, not a secret
        held = set(order[:count])
        return [s for i, s in enumerate(train) if i not in held], [train[i] for i in sorted(held)]

    def _encode(self, path: str) -> list[Encoded]:
        self._tell(f"reading {path}")
        report = check_dataset(Path(path))
        report.raise_for_faults()
        encoded = encode_dataset(report.samples, self.tokenizer, self.config.max_seq_length)
        if encoded.truncated:
            self._warn(
                f"{encoded.truncated} of {len(report.samples)} samples in {path} are longer than "
                f"{self.config.max_seq_length} tokens and were cut; {encoded.dropped} had no answer left and were dropped."
            )
        return encoded.sequences

    def _install_kernels(self) -> tuple[Kernels | None, str]:
        if self.config.fast_kernels == "off":
            return None, "plain: fast_kernels is off"
        return install(self.model.get_base_model())

    def _trainer(self, closing_seconds: float) -> Trainer:
        config = self.config
        arguments = TrainingArguments(
            output_dir=str(self.run.staging_path),
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            num_train_epochs=config.num_epochs,
            max_steps=config.max_steps or -1,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            data_seed=config.seed,
            bf16=self.precision.bf16 and self.kernels is None,  # the kernels cast by themselves
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",  # RunCallback says when
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
        )
        callback = RunCallback(
            self.run,
            self.loss,
            self.stop,
            save_steps=config.save_steps,
            keep_checkpoints=config.keep_checkpoints,
            closing_seconds=closing_seconds,
            started_fields=self._started_fields,
        )
        trainer = Trainer(
            model=self.model,
            args=arguments,
            train_dataset=self.packs,
            data_collator=self.collator,
            compute_loss_func=self.loss,
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)  # prints a dict a step; ours is the log
        return trainer

    def _started_fields(self, state: TrainerState) -> dict[str, object]:
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            "samples": self.samples,
            "heldout_samples": len(self.heldout),
            "trainable_parameters": trainable,
            "precision": self.precision.reason,
            "kernels": self.step_summary,
            "versions": {name: version(name) for name in _VERSIONS},
        }

    def _total_steps(self) -> int:
        """Return how many optimizer steps the run has, as the Trainer counts them."""
        micro_batches = math.ceil(len(self.packs) / self.micro_batch)
        steps_per_epoch = math.ceil(micro_batches / self.config.gradient_accumulation_steps)
        return self.config.max_steps or steps_per_epoch * self.config.num_epochs

    def _checkpoint(self) -> tuple[str | None, int]:
        """Return the folder of the checkpoint to go on from and its step; (None, 0) at the beginning."""
        checkpoint, problems = latest_good(self.run.path)
        for problem in problems:
            self._warn(f"A damaged checkpoint is passed over: {problem}")
        if checkpoint:
            return str(checkpoint.path), checkpoint.step
        given = self.config.resume_from_checkpoint
        return given, TrainerState.load_from_json(str(Path(given) / "trainer_state.json")).global_step if given else 0

    def _evaluate_before(self) -> tuple[float | None, float]:
        """Return the held-out loss before the first step, and how many seconds such a measurement takes."""
        known = self._status().heldout_loss_before
        if known is not None or not self.heldout:
            return known, 0.0
        began = time.monotonic()
        return self._evaluate(0), time.monotonic() - began

    def _evaluate(self, step: int) -> float | None:
        if not self.heldout:
            return None
        self._tell("measuring the held-out loss")
        loss = heldout_loss(self.model, self.heldout, self.collator, self.loss, self.config.batch_size, self.stop.check)
        self.run.append_event("eval", step=step, loss=loss, samples=len(self.heldout))
        logger.info("held-out loss %.4f at step %d", loss, step)
        return loss

    def _export(self, step: int, total: int, before: float | None, after: float | None) -> None:
        metrics = {"step": step, "total_steps": total, "heldout_loss_before": before, "heldout_loss": after}
        export_adapter(self.model, self.tokenizer, self.spec, self.run.path, metrics)

    def _status(self) -> RunStatus:
        return fold(RunStatus(), self.run.read_events()[0])

    def _tell(self, message: str) -> None:
        self.run.append_event("progress", message=message)
        logger.info("%s", message)

    def _warn(self, message: str) -> None:
        self.run.append_event("warning", message=message)
        logger.warning("%s", message)

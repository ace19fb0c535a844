"""A training run: load the data and the model, train, and write the result."""

import contextlib
import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from sage.common.training import FinishedEvent, SampleEvent, StoppedEvent
from sage.libs.finetune.run.changes import configured_options, recorded_changes
from sage.libs.finetune.run.checkpoints import Checkpoint
from sage.libs.finetune.run.estimate import gigabytes
from sage.libs.finetune.run.reservation import TOLERANCE, reserved_bytes
from sage.libs.finetune.run.resuming import begun, best_checkpoint, checkpoint_to_resume
from sage.libs.finetune.run.retrying import micro_batch_size, restarts_when_out_of_memory
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.summary import read_status
from sage.libs.finetune.training.base import open_base
from sage.libs.finetune.training.batching import Batch, Packs
from sage.libs.finetune.training.callbacks import RunCallback
from sage.libs.finetune.training.changing import OptionChanges
from sage.libs.finetune.training.dataset import TrainingData, load_data
from sage.libs.finetune.training.export import export_result
from sage.libs.finetune.training.heldout import HeldOut
from sage.libs.finetune.training.loaded import Install, install_kernels, load_model, no_kernels
from sage.libs.finetune.training.memory import limit_gpu_memory, peak_bytes, refuse_beyond_limit
from sage.libs.finetune.training.model import load_weights, loraplus_optimizer, width_of
from sage.libs.finetune.training.planning import MemoryPlan, Reduction, plan_memory
from sage.libs.finetune.training.precision import Precision, choose_precision
from sage.libs.finetune.training.reporting import Reporter
from sage.libs.finetune.training.sampling import answer
from sage.libs.finetune.training.stepping import AdaptingTrainer
from sage.libs.finetune.training.stopping import StopRequest, StopRequested
from sage.libs.finetune.training.team import Team
from sage.libs.finetune.training.trackers import Trackers
from sage.libs.models.fingerprint import fingerprint

logger = logging.getLogger(__name__)
_VERSIONS = ("torch", "transformers", "peft", "accelerate")


class TrainingRun:
    """One training run."""

    def __init__(self, run: RunDirectory, stop: StopRequest) -> None:
        """Load the data and the model of a run. Raises DatasetError, ModelError, RunError or ConfigError."""
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.run, self.stop = run, stop
        self.spec = run.read_spec()
        self.config = config = self.spec.config
        self.team = Team(run, config.num_processes, stop)
        limit_gpu_memory()
        self.report = Reporter(run, stop, None if config.allow_warnings else config.base_model)
        self.base = open_base(config.base_model, self.report)
        self.checkpoint: Checkpoint | None = None
        plan: MemoryPlan | None = None
        if self.team.is_main_process:
            origin = config.resume_from_checkpoint
            self.checkpoint = checkpoint_to_resume(run, origin, self.base.folder, self.report.warn)
            precision = choose_precision(config, begun(run, origin), width_of(self.base.folder))
            plan = plan_memory(self.base.folder, config, precision, self.team.size)
            self.data = self._load_data()
            plan = plan.fitted(self.data.largest_batch)
        self.report.progress("loading the model")
        chosen: Precision = self.team.broadcast(plan and plan.precision)
        if not self.team.is_main_process:  # the other processes read the dataset that the main process has stored
            self.data = self._load_data()
        self.heldout = HeldOut(
            run, self.data.heldout, stop.check, batch_size=config.batch_size, eval_steps=config.eval_steps,
            patience=config.early_stopping_patience,
        )  # fmt: skip
        step = self.team.broadcast(self.checkpoint.step if self.checkpoint else 0)
        recorded = self.team.broadcast(recorded_changes(run))
        self.changes = OptionChanges(run, configured_options(config), recorded, step, self.heldout)
        self.loaded = load_model(self.base, config, chosen, self._installer())
        self.loss = self.loaded.new_loss()
        self.estimated_bytes: int | None = None
        self.is_scarce = False
        self.trackers: Trackers | None = None
        if plan:
            self.estimated_bytes, self.is_scarce = self._report_estimate(plan)
        if self.base.adapter:
            self.report.progress(
                f"training continues from the adapter in {self.base.adapter}, with the rank, scaling and modules of this "
                "adapter"
            )

    def _report_estimate(self, plan: MemoryPlan) -> tuple[int, bool]:
        plan = plan.loaded_as(self.loaded.precision, has_kernels=self.loaded.kernels is not None)
        needed_bytes = plan.estimate(self.data.largest_batch).total_bytes
        report = self.report.progress if needed_bytes <= plan.available_bytes else self.report.warn
        report(plan.describe(self.data.largest_batch))
        if self.team.size == 1 and (reduction := plan.reduction(self.data.largest_batch)):
            self._reduce(reduction)
            needed_bytes = min(needed_bytes, reduction.estimate.total_bytes)
        return needed_bytes, plan.is_scarce(self.data.largest_batch)

    def _reduce(self, reduction: Reduction) -> None:
        """Apply a memory reduction before the first step. This method never undoes an earlier reduction of the run."""
        status = read_status(self.run)
        halvings = max(reduction.halvings, status.halvings)
        checkpointing = reduction.checkpointing or status.activation_checkpointing
        if (halvings, checkpointing) != (status.halvings, status.activation_checkpointing):
            self.report.adapted(reduction.message, halvings, checkpointing)

    def _load_data(self) -> TrainingData:
        config = self.config
        length, train_on = config.max_seq_length, config.train_on
        return load_data(config, lambda: self.base.encoder(length, train_on), self.report)

    def _installer(self) -> Install:
        return install_kernels if self.config.fast_kernels == "auto" else no_kernels("fast_kernels is off")

    def train(self) -> None:
        """Train to the end or until a stop is requested, write the result, and append the event `finished` or `stopped`."""
        if not self.team.is_main_process:
            self._train(None)
            return
        try:
            self._lead()
        except Exception:
            self.team.check()  # exit if another process has failed: that failure is possibly the cause of this exception
            raise
        finally:
            self.team.close()

    def _lead(self) -> None:
        checkpoint = self.checkpoint
        step = checkpoint.step if checkpoint else 0
        self.heldout.discard_after(step)
        is_loaded = checkpoint is None
        try:
            self.stop.check()
            self._measure(0)
            if checkpoint and (
                step >= self._steps_of(checkpoint) or self.heldout.is_exhausted
            ):  # training has already ended
                load_weights(self.loaded.model, checkpoint.path)
                is_loaded = True
            else:
                step, is_loaded = self._train(str(checkpoint.path) if checkpoint else None), True
                if step < self._total_steps() and not self.heldout.is_exhausted:
                    raise StopRequested
            self._measure(step)
        except StopRequested:
            if checkpoint and not is_loaded:
                load_weights(self.loaded.model, checkpoint.path)
            self._export(step, None)
            self.run.append_event(StoppedEvent(step=step, output_dir=self.config.output_dir))
            logger.info(
                "training stopped at step %d; the weights of this step are in the folder %s", step, self.config.output_dir
            )
            return
        if step < self._total_steps():
            logger.info("training ended early, because %d evaluations in a row showed no improvement", self.heldout.patience)
        best = self.heldout.best_step
        is_earlier = self.config.keep_best and best is not None and best != step
        if best and is_earlier and (checkpoint := best_checkpoint(self.run, best, self.report.warn)):
            load_weights(self.loaded.model, checkpoint.path)
            step = best
        loss = self.heldout.losses.get(step)
        self._export(step, loss)
        self.run.append_event(FinishedEvent(step=step, output_dir=self.config.output_dir, heldout_loss=loss))
        logger.info("training finished; the result (from step %d) is in the folder %s", step, self.config.output_dir)

    def _train(self, checkpoint: str | None) -> int:
        trainer = self._trainer()
        if not torch.cuda.is_available() and self.team.size == 1:
            refuse_beyond_limit()  # CUDA is excluded, because CUDA reserves more address space than the limit would allow
        trainer.remove_callback(PrinterCallback)  # RunCallback logs the steps instead
        checkpoint = self.team.broadcast(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        # Remove accelerate's wrapper, so that the held-out loss is measured in the same precision as before training.
        trainer.accelerator.unwrap_model(self.loaded.model, keep_fp32_wrapper=False)
        return int(trainer.state.global_step)

    def _trainer(self) -> Trainer:
        config, status = self.config, read_status(self.run)
        # With kernels, the Trainer must not cast to bf16, because the kernels cast tensors themselves.
        arguments = TrainingArguments(**self._arguments(), bf16=self.loaded.precision.bf16 and self.loaded.kernels is None)
        return AdaptingTrainer(
            halvings=0 if restarts_when_out_of_memory(config) else status.halvings,
            checkpointing="on" if status.activation_checkpointing else config.gradient_checkpointing,
            on_adapted=self.report.adapted,
            rehearsal=self._largest_batch if self.is_scarce and self.data.largest_packs else None,
            model=self.loaded.model,
            args=arguments,
            train_dataset=self.data.packs,
            data_collator=self.loaded.collator,
            loss=self.loss,
            callbacks=self._callbacks(),
            optimizers=(
                loraplus_optimizer(self.loaded.model, config.loraplus_lr_ratio, config.learning_rate, config.weight_decay),
                None,
            ),
        )

    def _largest_batch(self) -> Batch:
        return self.loaded.collator([self.data.packs[index] for index in self.data.largest_packs])

    def _arguments(self) -> dict[str, Any]:
        config = self.config
        halvings = read_status(self.run).halvings if restarts_when_out_of_memory(config) else 0
        micro_batch = micro_batch_size(config, halvings)
        return {
            "output_dir": str(self.run.staging_path),
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": config.gradient_accumulation_steps * (self.data.micro_batch // micro_batch),
            "num_train_epochs": config.num_epochs,
            "max_steps": self.changes.options.max_steps or -1,
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": config.lr_scheduler,
            "warmup_steps": config.warmup_steps,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "seed": config.seed,
            "data_seed": config.seed,
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "include_num_input_tokens_seen": "non_padding",
            "save_strategy": "no",  # RunCallback decides when to save
            "remove_unused_columns": False,
            "report_to": "none",  # Trackers calls the integrations
            "run_name": Path(config.output_dir).name,
            "disable_tqdm": True,
            "ddp_find_unused_parameters": False,
        }

    def _callbacks(self) -> list[TrainerCallback]:
        if self.config.report_to and self.team.is_main_process:
            self.trackers = Trackers(self.config.report_to, self.run.path / "tensorboard", self.report.warn)
        return [self._callback(), *([self.trackers] if self.trackers else [])]

    def _callback(self) -> RunCallback:
        return RunCallback(
            self.run,
            self.loss,
            self.stop,
            self.team,
            self.changes,
            self.base.tokenizer,
            save_steps=self.config.save_steps,
            keep_checkpoints=self.config.keep_checkpoints,
            keep_best=self.config.keep_best,
            trusted={self.checkpoint.step} if self.team.is_main_process and self.checkpoint else set(),
            heldout=self.heldout,
            measure=self._measure,
            started_fields=self._started_fields,
        )

    def _started_fields(self, state: TrainerState) -> dict[str, Any]:
        trainable = sum(p.numel() for p in self.loaded.model.parameters() if p.requires_grad)
        return {
            "samples": self.data.samples,
            "heldout_samples": len(self.heldout.samples),
            "trainable_parameters": trainable,
            "base_sha256": fingerprint(self.base.folder),
            "bf16": self.loaded.precision.bf16,
            "bf16_products": self.loaded.precision.bf16_products,
            "int8_products": self.loaded.precision.int8_products,
            "base_bits": self.loaded.precision.base_bits,
            "precision": self.loaded.precision.reason,
            "kernels": self.loaded.step_summary,
            "estimated_memory_bytes": self.estimated_bytes,
            "versions": {name: version(name) for name in _VERSIONS},
        }

    def _steps_of(self, checkpoint: Checkpoint) -> int:
        return self.changes.options.max_steps or checkpoint.total_steps()

    def _total_steps(self) -> int:
        """Return the total number of optimizer steps: `max_steps` if set, else the number of steps in all epochs."""
        return self.changes.options.max_steps or self._planned_steps()

    def _planned_steps(self) -> int:
        """Return the number of optimizer steps in all epochs. The Trainer uses the same formula."""
        assert isinstance(self.data.packs, Packs)
        micro_batches = math.ceil(len(self.data.packs) / self.data.micro_batch)
        steps_per_epoch = math.ceil(math.ceil(micro_batches / self.team.size) / self.config.gradient_accumulation_steps)
        return steps_per_epoch * self.config.num_epochs

    def _measure(self, step: int) -> float | None:
        is_new = bool(self.heldout.samples) and step not in self.heldout.losses
        if is_new:
            self.report.progress("measuring the held-out loss")
        measured = self.heldout.measure(step, self.loaded.model, self.loaded.collator, self.loaded.new_loss())
        if is_new and measured is not None and self.trackers:
            self.trackers.add_heldout_loss(measured)
        if is_new:
            with self.loaded.kernels.disabled() if self.loaded.kernels else contextlib.nullcontext():
                for prompt in self.config.sample_prompts or ():
                    self.stop.check()
                    text = answer(self.loaded.model, self.base.chat_format, prompt)
                    self.run.append_event(SampleEvent(step=step, prompt=prompt, answer=text))
                    logger.info("step %d: %s -> %s", step, prompt, text)
        return measured

    def _export(self, step: int, heldout_loss: float | None) -> None:
        losses = {"heldout_loss_before": self.heldout.losses.get(0), "heldout_loss": heldout_loss}
        used_bytes, reserved = peak_bytes(), reserved_bytes()
        if reserved and self.team.size == 1 and used_bytes > TOLERANCE * reserved:
            self.report.warn(
                f"The run used {gigabytes(used_bytes)} of memory, but only {gigabytes(reserved)} are reserved for it."
            )
        memory = {"estimated_memory_bytes": self.estimated_bytes, "peak_memory_bytes": used_bytes}
        metrics = {"step": step, "total_steps": read_status(self.run).total_steps or self._total_steps(), **losses}
        export_result(self.loaded.model, self.base.tokenizer, self.spec, self.run.path, self.base.folder, metrics, memory)

"""One run, from its directory to its result, on transformers' Trainer."""

import contextlib
import logging
import math
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from sage.common.errors import DatasetError
from sage.common.training import FinishedEvent, ProgressEvent, SampleEvent, StoppedEvent, WarningEvent
from sage.libs.finetune.data.findings import Code, Findings
from sage.libs.finetune.data.folders import Split
from sage.libs.finetune.data.inspection import inspect_end
from sage.libs.finetune.data.mixing import Mixture, weighed
from sage.libs.finetune.data.store import StoredSamples, load_or_tokenize
from sage.libs.finetune.data.tokenizing import Encoded, Encoder
from sage.libs.finetune.kernels.install import Kernels, install
from sage.libs.finetune.run.estimate import Estimate, check_memory, estimate
from sage.libs.finetune.run.resuming import begun, best_checkpoint, checkpoint_to_resume
from sage.libs.finetune.run.rundir import RunDirectory
from sage.libs.finetune.run.status import RunStatus
from sage.libs.finetune.run.summary import read_status
from sage.libs.finetune.training.batching import Collator, PackedCollator, Packs, PaddedCollator, most_tokens, pack
from sage.libs.finetune.training.callbacks import RunCallback
from sage.libs.finetune.training.export import export_result
from sage.libs.finetune.training.heldout import HeldOut
from sage.libs.finetune.training.loss import CompletionLoss
from sage.libs.finetune.training.memory import available_bytes, refuse_beyond_limit
from sage.libs.finetune.training.model import decoder, load_trainable, load_weights, loraplus_optimizer, width_of
from sage.libs.finetune.training.noise import EmbeddingNoise
from sage.libs.finetune.training.precision import Precision, choose_precision
from sage.libs.finetune.training.sampling import answer
from sage.libs.finetune.training.stepping import AdaptingTrainer
from sage.libs.finetune.training.stopping import StopRequest, StopRequested
from sage.libs.finetune.training.streaming import StreamedPacks
from sage.libs.finetune.training.team import Team
from sage.libs.models.chat import ChatFormat, ensure_chat_template
from sage.libs.models.fingerprint import fingerprint
from sage.libs.models.loading import check_vocabulary, embedding_rows, load_tokenizer, local_folder, tokenizer_folder
from sage.libs.models.resolve import ModelKind, resolve_model

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
        self.team = Team(run, config.num_processes)
        self.estimated_bytes: int | None = None
        self._reported: set[tuple[Path, Code]] = set()
        self._report("loading the tokenizer")
        source = resolve_model(config.base_model)
        self.folder = folder = local_folder(source.base or source)
        adapter = source.folder if source.kind is ModelKind.ADAPTER else None
        self.tokenizer = load_tokenizer(tokenizer_folder(source, folder))
        check_vocabulary(self.tokenizer, folder)
        if warning := ensure_chat_template(self.tokenizer):
            self._warn(warning)
        self.chat_format = ChatFormat(self.tokenizer)
        inspect_end(folder, self.chat_format, found := Findings())
        self._report_findings(found, folder)
        if self.team.is_main_process:
            self.checkpoint = checkpoint_to_resume(run, config, folder, self._warn)
            self.precision = choose_precision(config, begun(run, config), width_of(folder))
            self._check_memory()
            self._load_data()
            self._fit_memory()
        self._report("loading the model")
        self.precision = self.team.broadcast(self.team.is_main_process and self.precision)
        if not self.team.is_main_process:  # what the leader has tokenised
            self._load_data()
        self._load_model(folder, adapter)
        if self.team.is_main_process:
            self._report_estimate()
        if adapter:
            self._report(f"training continues from the adapter in {adapter}, with its rank, scaling and modules")

    def _check_memory(self) -> None:
        """Refuse a model that cannot fit before anything is done for it."""
        if torch.cuda.is_available():
            self.held_bytes, self.available_bytes = 0, torch.cuda.mem_get_info()[0]
        else:
            self.held_bytes, self.available_bytes = psutil.Process().memory_info().rss, available_bytes() // self.team.size
        least = self.precision.shrunk() if self.precision.may_shrink else self.precision
        check_memory(self._needs(least), self.available_bytes, self.config)

    def _needs(self, precision: Precision) -> Estimate:
        bf16, base_bits, int8 = precision.bf16, precision.base_bits, precision.int8_products
        return estimate(self.folder, self.config, bf16=bf16, base_bits=base_bits, int8=int8)

    def _fit_memory(self) -> None:
        """Take smaller numbers where the run would else not fit, and may."""
        self.needs = self._needs(self.precision)
        if self.precision.may_shrink and self.needs.total_bytes(self.most_tokens) > self.available_bytes:
            self.precision = self.precision.shrunk()
            self.needs = self._needs(self.precision)

    def _report_estimate(self) -> None:
        """Say what the run will need, where its step is our own, whose needs are known."""
        if self.kernels and self.config.gradient_checkpointing != "on":
            needed_bytes = self.needs.total_bytes(self.most_tokens)
            self.estimated_bytes = self.held_bytes + needed_bytes
            say = self._report if needed_bytes <= self.available_bytes else self._warn
            say(self.needs.describe(self.most_tokens, self.available_bytes))

    def _load_data(self) -> None:
        config = self.config
        self.micro_batch = 1 if config.pack_tokens else config.batch_size
        self.most_tokens = config.pack_tokens or config.batch_size * config.max_seq_length
        self.packs: Packs | StreamedPacks = Packs([])
        self.samples: int | None = 0
        heldout: Sequence[Encoded] = []
        try:
            if config.streaming:
                heldout = self._encode(Path(config.eval_path), "validation") if config.eval_path else []
                paths = [source.path for source in config.sources]
                self.packs, self.samples = (
                    StreamedPacks(paths, self._encoder, config.pack_tokens, config.seed, self._report_findings),
                    None,
                )
            else:
                train, heldout = self._read_data()
                lengths = train.lengths()
                groups = pack(lengths, config.pack_tokens, config.seed) if config.pack_tokens else None
                self.packs, self.samples = Packs(train, groups), len(train)
                self.most_tokens = most_tokens(lengths, groups, self.micro_batch)
        except StopRequested:  # the result is the model as it is
            pass
        self.heldout = HeldOut(self.run, config, heldout, self.stop.check)

    def _load_model(self, folder: Path, adapter: Path | None) -> None:
        config = self.config
        self._load_weights(folder, adapter)
        if not self.kernels:
            was_bf16, self.precision = self.precision.bf16, self.precision.without_kernels(config)
            if self.precision.bf16 != was_bf16:
                self._load_weights(folder, adapter)
        elif not self.kernels.int8_matrices:
            self.precision = self.precision.without_int8()
        if config.neftune_noise_alpha is not None:
            EmbeddingNoise(decoder(self.model), config.neftune_noise_alpha)
        self.collator: Collator = PackedCollator() if self.kernels else PaddedCollator(int(self.tokenizer.pad_token_id or 0))
        self.loss = self._new_loss()

    def _load_weights(self, folder: Path, adapter: Path | None) -> None:
        set_seed(self.config.seed)
        self.model = load_trainable(folder, self.config, self.precision, adapter)
        self.kernels, self.step_summary = self._install_kernels()

    def train(self) -> None:
        """Train to the end or to the next stop, and write the result; the run's last event says which it was."""
        if not self.team.is_main_process:
            self._train(None)
            return
        try:
            self._lead()
        except Exception:
            self.team.check()  # what failed may be that another process is gone
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
            if checkpoint and (step >= checkpoint.total_steps() or self.heldout.is_exhausted):  # the Trainer would train on
                load_weights(self.model, checkpoint.path)
                is_loaded = True
            else:
                step, is_loaded = self._train(str(checkpoint.path) if checkpoint else None), True
                if step < self._total_steps() and not self.heldout.is_exhausted:
                    raise StopRequested
            self._measure(step)
        except StopRequested:
            if checkpoint and not is_loaded:
                load_weights(self.model, checkpoint.path)
            self._export(step, None)
            self.run.append_event(StoppedEvent(step=step, output_dir=self.config.output_dir))
            logger.info("stopped at step %d; the result so far is in %s", step, self.config.output_dir)
            return
        if step < self._total_steps():
            logger.info("stopped early: %d scores in a row were no better", self.config.early_stopping_patience)
        best = self.heldout.best_step
        is_earlier = self.config.keep_best and best is not None and best != step
        if best and is_earlier and (checkpoint := best_checkpoint(self.run, best, self._warn)):
            load_weights(self.model, checkpoint.path)
            step = best
        loss = self.heldout.losses.get(step)
        self._export(step, loss)
        self.run.append_event(FinishedEvent(step=step, output_dir=self.config.output_dir, heldout_loss=loss))
        logger.info("finished; the result of step %d is in %s", step, self.config.output_dir)

    def _train(self, checkpoint: str | None) -> int:
        """Train from a checkpoint, or from the beginning; return the step at which it ended."""
        trainer = self._trainer()
        if not torch.cuda.is_available() and self.team.size == 1:  # CUDA sets aside addresses far beyond what it fills
            refuse_beyond_limit()
        trainer.remove_callback(PrinterCallback)  # prints a dict a step; ours is the log
        checkpoint = self.team.broadcast(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
        # The held-out loss is measured in the model's own precision, as it was before the first step.
        trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return int(trainer.state.global_step)

    def _read_data(self) -> tuple[Mixture, Sequence[Encoded]]:
        config, seed = self.config, self.config.seed
        parts, heldout = [], []
        for source in config.sources:
            samples = self._encode(source.path)
            order = list(range(len(samples)))
            random.Random(seed).shuffle(order)  # noqa: S311 - a reproducible split, not a secret
            count = round(len(samples) * config.eval_split)
            heldout.append(samples.take(sorted(order[:count])))
            parts.append(weighed(samples.take(sorted(order[count:])), source.weight, seed))
        train = Mixture(parts)
        if not len(train):
            raise DatasetError(
                code="dataset_empty",
                message="The dataset weights select no samples.",
                hint="Weigh one of them higher.",
                param="dataset_path",
            )
        return train, self._encode(Path(config.eval_path), "validation") if config.eval_path else Mixture(heldout)

    def _encode(self, path: Path, split: Split = "train") -> StoredSamples:
        self._report(f"reading {path}")
        samples = load_or_tokenize(path, self._encoder(), self._report_unless_stopped, split)
        if samples.stats.truncated:
            self._warn(
                f"{samples.stats.truncated} of {samples.stats.samples} samples in {path} are longer than "
                f"{self.config.max_seq_length} tokens and were cut; {samples.stats.dropped} had no answer left and were "
                "dropped."
            )
        self._report_findings(Findings(samples.stats.findings), path)
        return samples

    def _report_findings(self, findings: Findings, path: Path) -> None:
        """Say what was found in a dataset. Raises DatasetError if what is learnt would silently be wrong."""
        if not self.config.allow_warnings:
            findings.raise_for_warnings(path, self.config.base_model)
        for finding in findings:
            if (path, finding.code) not in self._reported:
                self._reported.add((path, finding.code))
                self._warn(str(finding))

    def _encoder(self) -> Encoder:
        config = self.config
        return Encoder(self.tokenizer, config.max_seq_length, config.train_on, embedding_rows(self.folder))

    def _install_kernels(self) -> tuple[Kernels | None, str]:
        if self.config.fast_kernels == "off":
            return None, "fallback: fast_kernels is off"
        return install(decoder(self.model), self.precision.compute_dtype, int8=self.precision.int8_products)

    def _trainer(self) -> Trainer:
        config, status = self.config, self._status()
        # The kernels cast by themselves.
        arguments = TrainingArguments(**self._arguments(), bf16=self.precision.bf16 and self.kernels is None)
        return AdaptingTrainer(
            halvings=status.halvings,
            checkpointing="on" if status.activation_checkpointing else config.gradient_checkpointing,
            on_adapted=self._on_adapted,
            model=self.model,
            args=arguments,
            train_dataset=self.packs,
            data_collator=self.collator,
            loss=self.loss,
            callbacks=[self._callback()],
            optimizers=(loraplus_optimizer(self.model, config), None),
        )

    def _arguments(self) -> dict[str, Any]:
        """Return what every Trainer is told."""
        config = self.config
        return {
            "output_dir": str(self.run.staging_path),
            "per_device_train_batch_size": self.micro_batch,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "num_train_epochs": config.num_epochs,
            "max_steps": config.max_steps or -1,
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
            "save_strategy": "no",  # RunCallback says when
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
            "ddp_find_unused_parameters": False,
        }

    def _callback(self) -> RunCallback:
        return RunCallback(
            self.run,
            self.config,
            self.loss,
            self.stop,
            self.team,
            trusted={self.checkpoint.step} if self.team.is_main_process and self.checkpoint else set(),
            heldout=self.heldout,
            measure=self._measure,
            started_fields=self._started_fields,
        )

    def _on_adapted(self, message: str, halvings: int, checkpointing: bool) -> None:
        self.run.append_event(WarningEvent(message=message, halvings=halvings, activation_checkpointing=checkpointing))
        logger.warning("%s", message)

    def _started_fields(self, state: TrainerState) -> dict[str, Any]:
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            "samples": self.samples,
            "heldout_samples": len(self.heldout.samples),
            "trainable_parameters": trainable,
            "base_sha256": fingerprint(self.folder),
            "bf16": self.precision.bf16,
            "bf16_products": self.precision.bf16_products,
            "int8_products": self.precision.int8_products,
            "precision": self.precision.reason,
            "kernels": self.step_summary,
            "estimated_memory_bytes": self.estimated_bytes,
            "versions": {name: version(name) for name in _VERSIONS},
        }

    def _total_steps(self) -> int:
        """Return how many optimizer steps the run has, as the Trainer counts them."""
        if self.config.max_steps:
            return self.config.max_steps
        assert isinstance(self.packs, Packs)
        micro_batches = math.ceil(len(self.packs) / self.micro_batch)
        steps_per_epoch = math.ceil(math.ceil(micro_batches / self.team.size) / self.config.gradient_accumulation_steps)
        return steps_per_epoch * self.config.num_epochs

    def _new_loss(self) -> CompletionLoss:
        return CompletionLoss(self.kernels.head.weight, self.kernels.compute_dtype) if self.kernels else CompletionLoss()

    def _measure(self, step: int) -> float | None:
        is_new = bool(self.heldout.samples) and step not in self.heldout.losses
        if is_new:
            self._report("measuring the held-out loss")
        measured = self.heldout.measure(step, self.model, self.collator, self._new_loss())
        if is_new:
            with self.kernels.disabled() if self.kernels else contextlib.nullcontext():
                for prompt in self.config.sample_prompts or ():
                    self.stop.check()
                    text = answer(self.model, self.chat_format, prompt)
                    self.run.append_event(SampleEvent(step=step, prompt=prompt, answer=text))
                    logger.info("step %d: %s -> %s", step, prompt, text)
        return measured

    def _export(self, step: int, heldout_loss: float | None) -> None:
        losses = {"heldout_loss_before": self.heldout.losses.get(0), "heldout_loss": heldout_loss}
        metrics = {"step": step, "total_steps": self._status().total_steps or self._total_steps(), **losses}
        export_result(self.model, self.tokenizer, self.spec, self.run.path, self.folder, metrics)

    def _status(self) -> RunStatus:
        return read_status(self.run)

    def _report(self, message: str) -> None:
        self.run.append_event(ProgressEvent(message=message))
        logger.info("%s", message)

    def _report_unless_stopped(self, message: str) -> None:
        self.stop.check()
        self._report(message)

    def _warn(self, message: str) -> None:
        self.run.append_event(WarningEvent(message=message))
        logger.warning("%s", message)

"""Preference tuning (DPO, SimPO, ORPO) on one device, with every shared prefix computed once.

    tune run prefix_dpo_single_device --config quickstart/single_device

Reads top to bottom: ``setup`` builds everything, ``train`` is the loop. To make it your own, copy this file, change it,
and run ``tune run my_recipe.py --config my_config.yaml``.
"""

import functools
import logging

import torch
from omegaconf import DictConfig
from torchtune import training
from tqdm import tqdm

from prefix_sharing.config import instantiate
from prefix_sharing.losses import LossOutput, weigh_by_confidence
from prefix_sharing.model import ResponseLogProbs, TreeTransformerDecoder
from prefix_sharing.reference.log_probs import FrozenReference, KnownReference, set_up_reference
from prefix_sharing.rows import Row
from prefix_sharing.training import (
    Evaluation,
    StepMetrics,
    TrainingConfig,
    build_dataset,
    build_loader,
    build_lr_scheduler,
    build_model,
    build_plan,
    build_profiler,
    build_val_plan,
    clip_grad_norm,
    compute_dtype,
    draw_curves,
    evaluate,
    load_checkpoint,
    load_training_state,
    load_weights,
    log_plan,
    materialize,
    memory_by_part,
    parse,
    peak_memory,
    report_margins,
    save_checkpoint,
    set_up_device,
    set_up_logging,
    summarize_run,
    trainable_parameters,
)

log = logging.getLogger("prefix_sharing.recipe")


class PrefixDPORecipeSingleDevice:
    """Tunes a model on preference pairs.

    Args:
        cfg (DictConfig): the keys of ``prefix_sharing.training.TrainingConfig``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = set_up_device(cfg)
        cfg.seed = training.set_seed(cfg.seed)

    def setup(self) -> None:
        """Builds model, data, loss, optimizer and schedule, and computes the reference log-probs."""
        cfg = self.cfg
        self.model = self.new_model()
        self.loss = instantiate("loss", cfg.loss)
        self.model.computes_confidence = getattr(self.loss, "use_weighting", False)
        tokenizer = instantiate("tokenizer", cfg.tokenizer)
        self.dataset = build_dataset("dataset", cfg, tokenizer, self.model, self.loss)
        self.dataset_val = build_dataset("dataset_val", cfg, tokenizer, self.model, self.loss)
        self.load = build_loader(cfg, self.model, self.loss, self.device)
        self.autocast = torch.autocast(self.device.type, compute_dtype(cfg), enabled=cfg.dtype == "bf16")
        self.activations_handling = training.get_act_offloading_ctx_manager(
            self.model, cfg.enable_activation_offloading
        )
        self.checkpointer, checkpoint = load_checkpoint(
            "checkpointer",
            cfg.checkpointer,
            resume=cfg.resume_from_checkpoint,
            adapter=cfg.adapter_checkpoint,
        )
        cfg.seed = checkpoint.get(training.SEED_KEY, cfg.seed)
        self.plan = build_plan(cfg, self.dataset, self.model, self.loss)
        self.plan_val = build_val_plan(cfg, self.dataset_val, self.model, packed=self.dataset.packed)
        log_plan(self.plan, self.dataset, self.load)
        self.epochs_run = checkpoint.get(training.EPOCHS_KEY, 0)
        self.global_step = self.epochs_run * self.plan.steps_per_epoch
        self.optimizer = instantiate("optimizer", cfg.optimizer, trainable_parameters(self.model))
        self.lr_scheduler = build_lr_scheduler(cfg, self.optimizer, cfg.epochs * self.plan.steps_per_epoch)
        self.profiler = build_profiler(cfg)

        load_weights(self.model, checkpoint, cfg.seed)
        self.metric_logger = instantiate("metric_logger", cfg.metric_logger)
        self.metric_logger.log_config(cfg)
        self.reference = self.reference_val = None
        if self.loss.needs_reference:
            visited = self.plan.of_pass(self.plan.examples_visited(self.epochs_run, cfg.epochs))
            self.reference, self.reference_val = set_up_reference(
                cfg,
                checkpoint,
                [(self.dataset, visited), (self.dataset_val, self.plan_val)],
                model=self.model,
                new_model=self.new_model,
                forward=self.forward,
                load=self.load,
            )
        if cfg.resume_from_checkpoint:
            load_training_state(checkpoint, self.model, self.optimizer, self.lr_scheduler)

    def new_model(self) -> TreeTransformerDecoder:
        """A model without weights. They and optimizer state are fp32; bf16 is what ``forward`` computes in."""
        model = build_model(self.cfg, self.device)
        materialize(model, self.device)
        return model

    def forward(self, model: TreeTransformerDecoder, row: Row) -> ResponseLogProbs:
        """The log-probs of a row's responses."""
        with self.autocast:
            return model(row)

    def loss_of(
        self, row: Row, output: ResponseLogProbs, reference: KnownReference | FrozenReference | None
    ) -> LossOutput:
        """The loss of a row, not reduced."""
        reference_log_probs = None if reference is None else reference(row)
        loss = self.loss(output.log_probs, output.num_scored, reference_log_probs, row.pairs)
        return weigh_by_confidence(loss, output.confidence, row.pairs)

    def evaluate(self) -> Evaluation | None:
        """Evaluates on ``dataset_val`` and logs under ``eval/``."""
        if self.dataset_val is None:
            return None
        loss_of = functools.partial(self.loss_of, reference=self.reference_val)
        forward = functools.partial(self.forward, self.model)
        self.model.eval()
        found = evaluate(forward, self.dataset_val, self.plan_val, self.load, loss_of, self.loss.mean_over)
        self.model.train()
        self.metric_logger.log_dict(found.metrics, step=self.global_step)
        return found

    def train(self) -> None:
        """The training loop."""
        cfg = self.cfg
        before = after = self.evaluate()
        self.profiler.start()
        for epoch in range(self.epochs_run, cfg.epochs):
            progress = tqdm(total=self.plan.steps_per_epoch, desc=f"Epoch {epoch + 1}/{cfg.epochs}", unit="step")
            metrics = StepMetrics(self.device, self.loss.mean_over)
            for step in self.load(self.dataset, self.plan.epoch(epoch)):
                for row in step.rows:
                    row = row.to(self.device)
                    with self.activations_handling:
                        output = self.forward(self.model, row)
                    loss = self.loss_of(row, output, self.reference)
                    # The mean over the step's pairs (or other terms), however they are spread over rows.
                    (loss.losses.sum() / step.num_terms).backward()
                    metrics.add(row, output, loss)

                grad_norm = clip_grad_norm(self.model, cfg.clip_grad_norm)
                lr = training.get_lr(self.optimizer)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.lr_scheduler is not None:
                    self.lr_scheduler.step()
                self.global_step += 1
                progress.update()

                if self.global_step % cfg.log_every_n_steps == 0:
                    values = metrics.compute() | {"lr": lr, "grad_norm": grad_norm.item()}
                    if cfg.log_peak_memory_stats:
                        values |= peak_memory(self.device) | memory_by_part(self.model, self.optimizer)
                    self.metric_logger.log_dict(values, step=self.global_step)
                    progress.set_postfix(loss=f"{values['loss']:.4f}", accuracy=values.get("rewards/accuracies"))
                    metrics = StepMetrics(self.device, self.loss.mean_over)
                if cfg.run_val_every_n_steps is not None and self.global_step % cfg.run_val_every_n_steps == 0:
                    with metrics.paused():
                        after = self.evaluate()
                self.profiler.step()
            progress.close()
            self.epochs_run += 1
            save_checkpoint(self.checkpointer, self.model, self.optimizer, self.lr_scheduler, epoch=epoch, cfg=cfg)
        self.profiler.stop()
        if cfg.run_val_every_n_steps is None or self.global_step % cfg.run_val_every_n_steps != 0:
            after = self.evaluate()
        draw_curves(cfg)
        report_margins(cfg, self.dataset_val, before, after)
        log.info(summarize_run(cfg, self.model, self.dataset, self.global_step, before, after))

    def cleanup(self) -> None:
        """Closes the log."""
        self.metric_logger.close()


@parse(TrainingConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe with a config and ``key=value`` overrides."""
    set_up_logging()
    recipe = PrefixDPORecipeSingleDevice(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    recipe_main()

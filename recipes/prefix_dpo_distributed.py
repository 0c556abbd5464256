"""Preference tuning (DPO, SimPO, ORPO) sharded over several devices with FSDP2, every shared prefix computed once.

    tune run --nproc_per_node 2 prefix_dpo_distributed --config quickstart/distributed

Reads top to bottom: ``setup`` builds everything, ``train`` is the loop. To make it your own, copy this file, change it,
and run ``tune run --nproc_per_node 2 my_recipe.py --config my_config.yaml``. With as many examples a step, it follows
the loss curve of ``prefix_dpo_single_device`` on any number of processes.
"""

import functools
import logging

import torch.distributed as dist
from omegaconf import DictConfig
from torchtune import training
from tqdm import tqdm

from prefix_sharing.config import instantiate
from prefix_sharing.losses import LossOutput, weigh_by_confidence
from prefix_sharing.model import ResponseLogProbs, TreeTransformerDecoder
from prefix_sharing.reference.log_probs import FrozenReference, KnownReference, set_up_reference
from prefix_sharing.rows import Row
from prefix_sharing.training import (
    DistributedConfig,
    Evaluation,
    StepMetrics,
    build_dataset,
    build_loader,
    build_lr_scheduler,
    build_model,
    build_plan,
    build_profiler,
    build_val_plan,
    clip_grad_norm,
    compute_dtype,
    device_mesh,
    draw_curves,
    evaluate,
    init_process_group,
    is_rank_zero,
    load_checkpoint,
    load_training_state,
    load_weights,
    log_plan,
    memory_by_part,
    parse,
    peak_memory,
    report_margins,
    reshard,
    save_checkpoint,
    set_up_device,
    set_up_logging,
    shard_model,
    summarize_run,
    trainable_parameters,
)

log = logging.getLogger("prefix_sharing.recipe")


class PrefixDPORecipeDistributed:
    """Tunes a model on preference pairs, sharded over all ranks.

    Args:
        cfg (DictConfig): the keys of ``prefix_sharing.training.DistributedConfig``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.device = set_up_device(cfg)
        init_process_group(self.device)
        set_up_logging()
        self.world_size = dist.get_world_size()
        self.mesh = device_mesh(self.device, cfg.data_parallel_replicate_dim)
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
        if is_rank_zero():
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
        """A sharded model without weights. They and optimizer state are fp32; bf16 is what its layers compute in."""
        cfg = self.cfg
        model = build_model(cfg, self.device)
        shard_model(
            model,
            self.device,
            mesh=self.mesh,
            compute_dtype=compute_dtype(cfg),
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        return model

    def forward(self, model: TreeTransformerDecoder, row: Row) -> ResponseLogProbs:
        """The log-probs of a row's responses."""
        return model(row)

    def loss_of(
        self, row: Row, output: ResponseLogProbs, reference: KnownReference | FrozenReference | None
    ) -> LossOutput:
        """The loss of a row, not reduced."""
        reference_log_probs = None if reference is None else reference(row)
        loss = self.loss(output.log_probs, output.num_scored, reference_log_probs, row.pairs)
        return weigh_by_confidence(loss, output.confidence, row.pairs)

    def evaluate(self) -> Evaluation | None:
        """Evaluates on ``dataset_val`` over all ranks and logs under ``eval/``."""
        if self.dataset_val is None:
            return None
        loss_of = functools.partial(self.loss_of, reference=self.reference_val)
        forward = functools.partial(self.forward, self.model)
        self.model.eval()
        found = evaluate(forward, self.dataset_val, self.plan_val, self.load, loss_of, self.loss.mean_over)
        self.model.train()
        reshard(self.model)
        if is_rank_zero():
            self.metric_logger.log_dict(found.metrics, step=self.global_step)
        return found

    def train(self) -> None:
        """The training loop."""
        cfg = self.cfg
        before = after = self.evaluate()
        self.profiler.start()
        for epoch in range(self.epochs_run, cfg.epochs):
            progress = tqdm(
                total=self.plan.steps_per_epoch,
                desc=f"Epoch {epoch + 1}/{cfg.epochs}",
                unit="step",
                disable=not is_rank_zero(),
            )
            metrics = StepMetrics(self.device, self.loss.mean_over)
            for step in self.load(self.dataset, self.plan.epoch(epoch)):
                for i, row in enumerate(step.rows, start=1):
                    # Gradients are added up over ranks in the backward pass of the step's last row.
                    self.model.set_requires_gradient_sync(cfg.fsdp_sync_every_row or i == len(step.rows))
                    row = row.to(self.device)
                    with self.activations_handling:
                        output = self.forward(self.model, row)
                    loss = self.loss_of(row, output, self.reference)
                    # The mean over the step's pairs (or other terms) on all ranks, by whose number FSDP divides.
                    (loss.losses.sum() * self.world_size / step.num_terms).backward()
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
                    if is_rank_zero():
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
        """Closes the log and leaves the process group."""
        if is_rank_zero():
            self.metric_logger.close()
        dist.destroy_process_group()


@parse(DistributedConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe with a config and ``key=value`` overrides."""
    recipe = PrefixDPORecipeDistributed(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    recipe_main()

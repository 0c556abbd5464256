"""Preference tuning (DPO, SimPO, ORPO) sharded over several devices with FSDP2, every shared prefix computed once.

    tune run --nproc_per_node 2 prefix_dpo_distributed --config quickstart/distributed

Reads top to bottom: ``setup`` builds everything, ``train`` is the loop. To make it your own, copy this file, change it,
and run ``tune run --nproc_per_node 2 my_recipe.py --config my_config.yaml``. With as many examples per step, it follows
the loss curve of ``prefix_dpo_single_device`` on any number of processes.
"""

import functools
import logging
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from prefix_sharing.checkpoint import Checkpoint, load_checkpoint_into
from prefix_sharing.config import DistributedConfig, instantiate, parse
from prefix_sharing.distributed import (
    device_mesh,
    is_rank_zero,
    process_group,
    shard,
    sync_gradients,
    this_rank,
)
from prefix_sharing.hosts import TreeModel, load_checkpoint, save_checkpoint
from prefix_sharing.losses import LossOutput
from prefix_sharing.memory import memory_by_part, peak_memory
from prefix_sharing.reference import Reference, load_reference, set_up_reference
from prefix_sharing.reports import draw_curves, report_margins
from prefix_sharing.run import (
    Evaluation,
    StepMetrics,
    build_datasets,
    build_loader,
    build_loss,
    build_lr_scheduler,
    build_model,
    build_plan,
    build_profiler,
    build_val_plan,
    evaluate,
    log_plan,
    set_up_device,
    set_up_logging,
    summarize_run,
)
from prefix_sharing.run.compilation import CompileWatch
from prefix_sharing.run.directory import check_room, find_resumed, full_disk_explained, locked_output_dir
from prefix_sharing.run.finite import FiniteCheck
from prefix_sharing.run.kl import estimate_kl, kl_of_step, loss_of_row
from prefix_sharing.run.optimization import choose_seed, clip_grad_norm, seed_step
from prefix_sharing.run.out_of_memory import out_of_memory_explained
from prefix_sharing.run.resuming import (
    forget_later_entries,
    frozen_weights,
    recall,
    remembered,
    stop_run,
    training_checkpoints,
)
from prefix_sharing.run.setup import compute_dtype, log_config, self_check
from prefix_sharing.run.signals import StopRequest, run_to_end
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row

log = logging.getLogger("prefix_sharing.recipe")


class PrefixDPORecipeDistributed:
    """Tunes a model on preference pairs, sharded over all ranks.

    Args:
        cfg (DictConfig): the keys of ``prefix_sharing.config.DistributedConfig``.
        device (torch.device): where the model runs.
    """

    def __init__(self, cfg: DictConfig, device: torch.device) -> None:
        self.cfg = cfg
        self.device = device
        self.mesh = device_mesh(device, cfg.data_parallel_replicate_dim)
        self.metric_logger: Any = None

    def setup(self) -> None:
        """Builds model, data, loss, optimizer and schedule, and computes the reference log-probs."""
        cfg = self.cfg
        self.loss = build_loss(cfg)
        self.resumed = find_resumed(cfg)
        self_check(cfg)
        self.model = self.new_model()
        tokenizer = instantiate("tokenizer", cfg.tokenizer)
        self.dataset, self.dataset_val = build_datasets(cfg, tokenizer, self.model, self.loss)
        self.step_loader = build_loader(cfg, self.model, self.loss, self.device)
        self.activations_handling = self.model.offload_activations(cfg.enable_activation_offloading)
        self.seed = choose_seed(cfg.seed, self.resumed)
        self.plan = build_plan(cfg, self.dataset, self.model, self.loss, seed=self.seed, ranks=this_rank())
        self.plan_val = build_val_plan(cfg, self.dataset_val, self.model, ranks=this_rank())
        log_plan(self.plan, self.dataset, self.step_loader)
        self.global_step = 0 if self.resumed is None else self.resumed.step
        self.num_steps = cfg.epochs * self.plan.steps_per_epoch
        self.optimizer = instantiate("optimizer", cfg.optimizer, self.model.trainable_parameters())
        self.lr_scheduler = build_lr_scheduler(cfg, self.optimizer, self.num_steps)
        self.profiler = build_profiler(cfg)
        check_room(cfg, self.model, self.optimizer)

        self.checkpointer, checkpoint, ref_checkpoint = self.load_checkpoints()
        frozen = frozen_weights(self.model, self.loss, checkpoint, ref_checkpoint)
        self.training_checkpoints = training_checkpoints(cfg, self.dataset, self.plan, self.seed, frozen, self.resumed)
        self.model.load_weights(checkpoint, self.seed)
        forget_later_entries(cfg, self.resumed, self.num_steps)
        if is_rank_zero():
            self.metric_logger = instantiate("metric_logger", cfg.metric_logger)
            log_config(self.metric_logger, cfg, self.seed)
        self.reference = self.reference_val = None
        if self.loss.needs.reference:
            epochs_run = self.global_step // self.plan.steps_per_epoch
            reference_plan = self.plan.of_pass(self.plan.examples_visited(epochs_run, cfg.epochs))
            self.reference, self.reference_val = set_up_reference(
                cfg,
                checkpoint,
                ref_checkpoint,
                [(self.dataset, reference_plan), (self.dataset_val, self.plan_val)],
                seed=self.seed,
                model=self.model,
                new_model=self.new_model,
                forward=self.forward,
                step_loader=self.step_loader,
            )
        if self.resumed is not None:
            load_checkpoint_into(self.resumed, self.model, self.optimizer, self.lr_scheduler)

    def load_checkpoints(self) -> tuple[Any, Checkpoint, Checkpoint | None]:
        """What writes checkpoints, the weights to begin with, and those of the reference where they are others."""
        cfg = self.cfg
        checkpointer, checkpoint = load_checkpoint("checkpointer", cfg.checkpointer, adapter=cfg.adapter_checkpoint)
        return checkpointer, checkpoint, load_reference(cfg)

    def new_model(self) -> TreeModel:
        """Allocates a sharded model without weights. They and optimizer state are fp32; layers cast to ``dtype``."""
        cfg = self.cfg
        model = build_model(cfg, self.device, sharded=True)
        shard(
            model,
            list(model.layers),
            mesh=self.mesh,
            compute_dtype=compute_dtype(cfg),
            reshard_after_forward=cfg.fsdp_reshard_after_forward,
            cpu_offload=cfg.fsdp_cpu_offload,
        )
        model.materialize(self.device, torch.device("cpu") if cfg.fsdp_cpu_offload else None)
        return model

    def forward(self, model: TreeModel, row: Row) -> ResponseLogProbs:
        """The log-probs of a Row's responses."""
        return model(row)

    def loss_of(
        self, row: Row, output: ResponseLogProbs, reference: Reference | None, kl: torch.Tensor | None = None
    ) -> LossOutput:
        """The loss of a Row, not reduced."""
        return loss_of_row(self.loss, row, output, reference, kl)

    def evaluate(self) -> Evaluation | None:
        """Evaluates on ``dataset_val`` over all ranks and logs under ``eval/``."""
        dataset, plan = self.dataset_val, self.plan_val
        if dataset is None or plan is None:
            return None
        found = evaluate(
            self.model, self.forward, dataset, plan, self.step_loader, self.loss, self.loss_of, self.reference_val
        )
        if is_rank_zero():
            self.metric_logger.log_dict(found.metrics, step=self.global_step)
        return found

    def save_state(self, metrics: StepMetrics) -> None:
        """Begins to save all that it takes to continue from this step."""
        values = remembered(self.seed, metrics, self.finite, self.before, self.dataset_val)
        self.training_checkpoints.save(self.global_step, self.model, self.optimizer, self.lr_scheduler, values)

    def train(self, stop: StopRequest) -> None:
        """The training loop.

        Args:
            stop (StopRequest): whether to stop after a step.
        """
        cfg = self.cfg
        forward = functools.partial(self.forward, self.model)
        self.finite = FiniteCheck(cfg, self.dataset, self.device)
        self.before = self.evaluate() if self.resumed is None else None
        metrics = StepMetrics(self.device, self.loss.mean_over)
        if self.resumed is not None:
            self.before = recall(self.resumed.values, metrics, self.finite, self.dataset_val)
        after, evaluated_at = self.before, 0
        compile_watch = CompileWatch()
        self.profiler.start()
        for epoch in range(self.global_step // self.plan.steps_per_epoch, cfg.epochs):
            first_step = self.global_step % self.plan.steps_per_epoch
            progress = tqdm(
                total=self.plan.steps_per_epoch,
                initial=first_step,
                desc=f"Epoch {epoch + 1}/{cfg.epochs}",
                unit="step",
                disable=not is_rank_zero(),
            )
            steps = self.plan.epoch(epoch)
            for step in self.step_loader(self.dataset, steps, first_step, kl_apart=self.loss.needs.kl):
                seed_step(self.seed, self.global_step)
                metrics.begin_step()
                kl = kl_of_step(step, forward, self.reference, self.device)
                for i, row in enumerate(step.rows, start=1):
                    # Gradients are added up over ranks in the backward pass of the step's last Row.
                    sync_gradients(self.model, cfg.fsdp_sync_every_row or i == len(step.rows))
                    row = row.to(self.device)
                    with out_of_memory_explained(cfg, self.global_step + 1, row):
                        with self.activations_handling:
                            output = self.forward(self.model, row)
                        if self.loss.needs.kl and kl is None:
                            kl = estimate_kl([(row, output)], self.reference)
                        loss = self.loss_of(row, output, self.reference, kl)
                        # The mean over the step's pairs (or other terms) on all ranks, by whose number FSDP divides.
                        (loss.losses.sum() * self.mesh.size() / step.num_terms).backward()
                        self.finite.add(row, output, loss)
                        metrics.add(row, output, loss)
                if kl is not None:
                    metrics.add_kl(kl)

                grad_norm = clip_grad_norm(self.model, cfg.clip_grad_norm)
                lr = self.optimizer.param_groups[0]["lr"]
                is_finite = self.finite.passes(grad_norm, step, self.global_step + 1)
                if is_finite:
                    with out_of_memory_explained(cfg, self.global_step + 1):
                        self.optimizer.step()
                else:
                    metrics.forget_step()
                self.optimizer.zero_grad(set_to_none=True)
                if self.lr_scheduler is not None:
                    self.lr_scheduler.step()
                self.global_step += 1
                progress.update()

                if self.global_step % cfg.log_every_n_steps == 0 or self.global_step == self.num_steps:
                    values = metrics.compute() | {"lr": lr} | self.finite.metrics()
                    if is_finite:
                        values["grad_norm"] = grad_norm.item()
                    if cfg.log_peak_memory_stats:
                        values |= peak_memory(self.device) | memory_by_part(self.model, self.optimizer)
                    if is_rank_zero():
                        self.metric_logger.log_dict(values, step=self.global_step)
                    progress.set_postfix(metrics.shown(values))
                    metrics = StepMetrics(self.device, self.loss.mean_over)
                if cfg.run_val_every_n_steps is not None and self.global_step % cfg.run_val_every_n_steps == 0:
                    with metrics.paused():
                        after, evaluated_at = self.evaluate(), self.global_step
                self.profiler.step()
                compile_watch.step(self.global_step)
                exit_code = stop.exit_code()
                if self.global_step % self.plan.steps_per_epoch != 0:  # else after the epoch's weights
                    if exit_code or (cfg.save_every_n_steps and self.global_step % cfg.save_every_n_steps == 0):
                        self.save_state(metrics)
                    if exit_code:
                        stop_run(self.training_checkpoints, self.global_step, exit_code)
                self.training_checkpoints.poll()
            progress.close()
            with metrics.paused():
                save_checkpoint(self.checkpointer, self.model, epoch=epoch, cfg=cfg)
            self.save_state(metrics)
            if exit_code and self.global_step < self.num_steps:
                stop_run(self.training_checkpoints, self.global_step, exit_code)
        self.training_checkpoints.wait()
        self.profiler.stop()
        if evaluated_at != self.global_step:
            after = self.evaluate()
        draw_curves(cfg, self.metric_logger)
        report_margins(cfg, self.dataset_val, self.before, after)
        log.info(summarize_run(cfg, self.model, self.dataset, self.plan, self.before, after))

    def cleanup(self) -> None:
        """Closes the log."""
        if self.metric_logger is not None:
            self.metric_logger.close()


@parse(DistributedConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe with a config and ``key=value`` overrides."""
    device = set_up_device(cfg)
    with process_group(device):
        set_up_logging()
        recipe = PrefixDPORecipeDistributed(cfg, device)
        with locked_output_dir(cfg), full_disk_explained(cfg):
            run_to_end(recipe)


if __name__ == "__main__":
    recipe_main()

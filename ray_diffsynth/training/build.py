"""The module that trains: models loaded, LoRAs added, what is frozen in 8 bits or as it is."""

from __future__ import annotations

import torch

from ray_diffsynth.config.options import split_names
from ray_diffsynth.diffusion.gradient_checkpoint import checkpoint_every
from ray_diffsynth.models.lora import LoraInfo, add_lora, leave_casts_to_autocast
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.lora_keys import fuse_model_lora, load_model_lora, submodule
from ray_diffsynth.plan.run_plan import TrainPlan
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.export import Trained
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.quantize import quantize


def build_module(
    plan: TrainPlan, device: torch.device, *, fresh: bool = True, on_cpu: bool = False
) -> tuple[DiffusionTrainingModule, Trained]:
    """Load the models, add what is trained, and make the module on `device`, or leave it `on_cpu` for now.

    fresh: without it --lora_checkpoint is not read, as other weights take the place of its.
    """
    config = plan.config
    dtype: torch.dtype = getattr(torch, config.dtype)
    if dtype is torch.float16 and device.type == "cpu":
        raise TrainingError("--dtype float16 needs a GPU (gradients are scaled there); use bfloat16 or float32")
    # In 8 bits a model may fit where it does not as it comes: it is loaded on the CPU, and packed layer by layer.
    place = torch.device("cpu") if on_cpu or config.fp8_base else device
    pipe = plan.pipeline.from_pretrained(plan.source, models=plan.models, device=place, torch_dtype=dtype)
    pipe.scheduler.set_timesteps(1000, training=True)
    if config.preset_lora_path and config.preset_lora_model:
        _submodule(pipe, config.preset_lora_model)  # raises for what is not there
        fuse_model_lora(pipe, config.preset_lora_model, config.preset_lora_path)
    loras = tuple(_add_lora(plan, pipe, name, fresh=fresh) for name in config.lora_models)
    if dtype is not torch.float32:
        leave_casts_to_autocast(pipe)
    trained = Trained(loras, split_names(config.trainable_models))
    for name in trained.full:
        # fp32: a step of 1e-4 is lost in bf16's 8 bits. What it computes in is autocast's choice.
        _submodule(pipe, name).requires_grad_(True).float()
    for name in config.trained:
        _submodule(pipe, name).train()
    packed = 0
    for name in pipe.in_iteration_models:
        checkpoint_every(getattr(pipe, name), config.gradient_checkpointing_every or 1)
        if config.fp8_base:
            packed += quantize(getattr(pipe, name), place if on_cpu else device)
    if config.fp8_base and not packed:
        raise TrainingError(
            f"--fp8_base finds no frozen linear layer in {', '.join(pipe.in_iteration_models)}, so that it would "
            "save nothing; leave it out"
        )
    if not on_cpu:
        pipe.to(device)
    module = DiffusionTrainingModule(
        pipe,
        plan.task,
        trained=config.trained,
        inputs=plan.sample.inputs,
        split=config.reads_cache,
        stages=plan.split.stages(pipe),
        settings=plan.settings,
        use_gradient_checkpointing=config.use_gradient_checkpointing,
        use_gradient_checkpointing_offload=config.use_gradient_checkpointing_offload,
    )
    return module, trained


def _add_lora(plan: TrainPlan, pipe: BasePipeline, name: str, *, fresh: bool) -> LoraInfo:
    config = plan.config
    model = _submodule(pipe, name)
    info = add_lora(
        model,
        rank=config.lora_rank or 0,  # never: it is resolved where there is a LoRA
        alpha=config.lora_alpha,
        target_modules=plan.target_modules[name],
        seed=config.seed,
        name=name,
        dropout=config.lora_dropout,
        rslora=config.use_rslora,
        dora=config.use_dora,
    )
    if fresh and name in config.lora_checkpoints:
        load_model_lora(pipe, name, config.lora_checkpoints[name], info)
    return info


def _submodule(pipe: BasePipeline, name: str) -> torch.nn.Module:
    try:
        return submodule(pipe, name)
    except AttributeError as error:
        there = [part for part in pipe.parts if getattr(pipe, part, None) is not None]
        raise TrainingError(f"there is no model {name!r} to train ({error}); loaded are {', '.join(there)}") from error

"""From a configuration to the things that a run is made of. Every mismatch is an error here, before step 0."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from ray_diffsynth.cache.local_copy import LocalCopies
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.config import TrainConfig, split_names
from ray_diffsynth.data.samples import SampleSpec
from ray_diffsynth.data.storage import absolute
from ray_diffsynth.diffusion.gradient_checkpoint import checkpoint_every
from ray_diffsynth.errors import UserError
from ray_diffsynth.models.fingerprint import part_sketch
from ray_diffsynth.models.locate import ModelSource, locate_model
from ray_diffsynth.models.lora import LoraInfo, add_lora, fuse_lora, load_lora_file, read_lora
from ray_diffsynth.pipelines.base import BasePipeline
from ray_diffsynth.pipelines.lora_keys import lora_names, submodule
from ray_diffsynth.pipelines.registry import family_of, get_pipeline_class
from ray_diffsynth.pipelines.stages import dataset_spec, plan_stages
from ray_diffsynth.tasks import Task, get_task, task_family
from ray_diffsynth.training.export import Trained
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.quantize import quantize
from ray_diffsynth.training.source import CacheSource, DatasetSource, SampleSource, check_encoders, check_manifest

# What may change when a run goes on: where things lie, how far it goes, what it costs and what it says. Everything else
# that TrainConfig has decides what is trained, and must be equal.
FREE_FIELDS = frozenset(
    (
        *("output_path", "dataset_base_path", "dataset_metadata_path", "num_epochs", "max_steps", "save_steps"),
        *("model", "model_id_with_origin_paths", "model_paths", "tokenizer_path", "processor_path", "family"),
        *("num_workers", "resources", "ray_address", "verbose", "dataset_num_workers", "resume", "keep_checkpoints"),
        *("log_every", "use_gradient_checkpointing", "use_gradient_checkpointing_offload", "lora_checkpoint"),
        *("gradient_checkpointing_every", "shard_base", "lora_format", "log_with", "shard_cache", "shard_cache_gb"),
        *("validation_steps", "validation_prompts", "sample_steps", "sample_inference_steps", "sample_resources"),
    )
)


class TrainingError(UserError):
    """A training run that cannot start or go on."""


@dataclass(frozen=True)
class Setup:
    """What follows from the configuration without loading any weights.

    models: names of the models that this run loads (law 5). sample: how the columns of a dataset become inputs.
    """

    config: TrainConfig
    output_path: str
    family: str
    source: ModelSource
    task: Task
    sample: SampleSpec
    models: tuple[str, ...]

    @classmethod
    def of(cls, config: TrainConfig) -> Setup:
        """Raises UserErrors for a model that is not found, a cache of something else, an impossible dtype, …"""
        source = locate_model(
            config.model,
            model_id_with_origin_paths=config.model_id_with_origin_paths,
            model_paths=config.model_paths,
            tokenizer_path=config.tokenizer_path,
            processor_path=config.processor_path,
        )
        family = config.family or family_of(source.root)
        task = get_task(
            config.task,
            weighting=config.loss_weighting,
            min_timestep_boundary=config.min_timestep_boundary,
            max_timestep_boundary=config.max_timestep_boundary,
            timestep_sampling=config.timestep_sampling,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            timestep_shift=config.timestep_shift,
        )
        pipe = get_pipeline_class(family).skeleton()
        sample = dataset_spec(pipe, config, task.columns)
        stages = plan_stages(pipe, task, config.trained, sample.inputs)
        models = stages.stage2_models(pipe)
        if config.reads_cache:
            where = absolute(config.dataset_base_path)
            manifest = Manifest.load(where)
            check_manifest(
                manifest,
                where,
                family=family,
                task=config.task,
                trainable=config.trained,
                parameters=stages.parameters,
            )
            check_encoders(manifest, where, source, get_pipeline_class(family).parts)
        else:
            models = tuple(dict.fromkeys([*stages.stage1_models(), *models]))
        return cls(config, absolute(config.output_path), family, source, task, sample, models)

    def open_data(self) -> SampleSource:
        """The samples: the cache, or for the unsplit task the dataset, whose every picture is looked at."""
        if self.config.reads_cache:
            copies = None
            if self.config.shard_cache:
                copies = LocalCopies(self.config.shard_cache, int(self.config.shard_cache_gb * 1e9))
            reader = CacheReader(absolute(self.config.dataset_base_path), copies=copies)
            return CacheSource(reader, getattr(torch, self.config.dtype))
        metadata = self.config.dataset_metadata_path
        return DatasetSource(self.sample, absolute(metadata) if metadata else None)

    def identity(self, data: SampleSource) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must share, as JSON values."""
        settings = {name: value for name, value in self.config.to_dict().items() if name not in FREE_FIELDS}
        settings["task"] = task_family(self.config.task)
        own: dict[str, Any] = {**settings, "family": self.family, "data": data.identity, "weights": self._weights()}
        return dict(json.loads(json.dumps(own)))

    def _weights(self) -> dict[str, str | None]:
        """Which base models these are, without reading them whole."""
        parts = get_pipeline_class(self.family).parts
        return {name: part_sketch(self.source, parts[name].subfolder) for name in sorted(self.models) if name in parts}

    def build(self, device: torch.device) -> tuple[DiffusionTrainingModule, Trained]:
        """Load the models, add what is trained, and make the module."""
        config = self.config
        dtype: torch.dtype = getattr(torch, config.dtype)
        if dtype is torch.float16 and device.type == "cpu":
            raise TrainingError("--dtype float16 needs a GPU (gradients are scaled there); use bfloat16 or float32")
        cls = get_pipeline_class(self.family)
        pipe = cls.from_pretrained(self.source, models=self.models, device=device, torch_dtype=dtype)
        pipe.scheduler.set_timesteps(1000, training=True)
        if config.preset_lora_path and config.preset_lora_model:
            state, _ = read_lora(config.preset_lora_path)
            preset = _submodule(pipe, config.preset_lora_model)
            names = lora_names(pipe, config.preset_lora_model)
            fuse_lora(preset, {names(key): value for key, value in state.items()})
        loras = tuple(self._add_lora(pipe, name) for name in config.lora_models)
        trained = Trained(loras, split_names(config.trainable_models))
        for name in trained.full:
            # fp32: a step of 1e-4 is lost in bf16's 8 bits. What it computes in is autocast's choice.
            _submodule(pipe, name).requires_grad_(True).float()
        for name in config.trained:
            _submodule(pipe, name).train()
        for name in pipe.in_iteration_models:
            checkpoint_every(getattr(pipe, name), config.gradient_checkpointing_every)
            if config.fp8_base:
                quantize(getattr(pipe, name))
        module = DiffusionTrainingModule(
            pipe,
            self.task,
            trained=config.trained,
            inputs=self.sample.inputs,
            split=config.reads_cache,
            use_gradient_checkpointing=config.use_gradient_checkpointing,
            use_gradient_checkpointing_offload=config.use_gradient_checkpointing_offload,
        )
        return module, trained

    def _add_lora(self, pipe: BasePipeline, name: str) -> LoraInfo:
        config = self.config
        default = ",".join(pipe.lora_targets) if name in pipe.in_iteration_models else ""
        targets = config.lora_targets(name) or default
        if not targets:
            raise TrainingError(
                f"--lora_target_modules is missing: the family {self.family} has no default for {name!r}; "
                'name its layers, e.g. "q_proj,k_proj,v_proj,o_proj", or "all-linear"'
            )
        if name in pipe.in_iteration_models and not targets.startswith("re:"):
            known = pipe.lora_aliases
            targets = ",".join(known.get(target, target) for target in map(str.strip, targets.split(",")))
        model = _submodule(pipe, name)
        info = add_lora(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            target_modules=targets,
            seed=config.seed,
            name=name,
            dropout=config.lora_dropout,
            rslora=config.use_rslora,
            dora=config.use_dora,
        )
        if name in config.lora_checkpoints:
            load_lora_file(model, config.lora_checkpoints[name], info, rename=lora_names(pipe, name))
        return info


def _submodule(pipe: BasePipeline, name: str) -> torch.nn.Module:
    try:
        return submodule(pipe, name)
    except AttributeError as error:
        there = [part for part in pipe.parts if getattr(pipe, part, None) is not None]
        raise TrainingError(f"there is no model {name!r} to train ({error}); loaded are {', '.join(there)}") from error

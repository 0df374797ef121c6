"""`RunPlan`: model, split, groups, settings and targets of a run, resolved once from its configuration.

The driver makes it before Ray starts, so that every error of configuration is told there, and hands it to actors and
workers, which derive nothing a second time. It holds names, numbers and paths, never weights. What the machines give
(how many actors, of what size) is not in it: see `resources`, which works it out once a cluster is joined.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, overload

from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cluster.encoders import check_pools
from ray_diffsynth.config import GenerateConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.config.common import JobConfig
from ray_diffsynth.config.lora import LoraConfig
from ray_diffsynth.config.options import split_names
from ray_diffsynth.data.prompts import Prompt
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.models.fingerprint import part_sketch
from ray_diffsynth.models.locate import ModelFolderError, ModelSource, locate_configured
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.calling import image_params
from ray_diffsynth.pipelines.core.columns import check_columns, dataset_spec
from ray_diffsynth.pipelines.core.settings import settings_of
from ray_diffsynth.pipelines.core.stages import Stages, check_caption_dropout, plan_stages
from ray_diffsynth.pipelines.registry import choose_family, get_pipeline_class
from ray_diffsynth.plan.cache_check import check_encoders, check_manifest, check_settings
from ray_diffsynth.plan.cache_keys import GroupPlan, plan_group
from ray_diffsynth.plan.prompts import prompts_of
from ray_diffsynth.plan.split import Split
from ray_diffsynth.storage import absolute
from ray_diffsynth.tasks import Task, get_task


@dataclass(frozen=True)
class RunPlan:
    """What every job's plan holds.

    output_path: absolute, or a URL. source: where the model's files lie on the machine that planned.
    weights: a sketch of each model whose files the run reads (see `part_sketch`).
    """

    config: JobConfig
    output_path: str
    family: str
    source: ModelSource
    weights: Mapping[str, str | None]

    @overload
    @staticmethod
    def resolve(config: PreprocessConfig) -> PreprocessPlan: ...
    @overload
    @staticmethod
    def resolve(config: TrainConfig) -> TrainPlan: ...
    @overload
    @staticmethod
    def resolve(config: GenerateConfig) -> GeneratePlan: ...
    @staticmethod
    def resolve(config: PreprocessConfig | TrainConfig | GenerateConfig) -> RunPlan:
        """The plan of the job that `config` is for.

        Raises UserErrors: a model that is not found or not whole, a family, column, setting or split that cannot be,
        a cache of something else. What can be told without the weights is told before they are downloaded.
        """
        match config:
            case PreprocessConfig():
                return plan_preprocess(config)
            case TrainConfig():
                return plan_training(config)
            case GenerateConfig():
                return plan_generate(config)

    @property
    def pipeline(self) -> type[BasePipeline]:
        """The family's class."""
        return get_pipeline_class(self.family)

    def configured(self) -> BasePipeline:
        """The family's pipeline without weights, with what the model's configuration files say."""
        return self.pipeline.configured(self.source)

    def on_this_machine(self, models: Collection[str] | None = None) -> Self:
        """The plan with `source` as it is here: the cache of the hub may lie elsewhere, or be filled by this call.

        models: those whose weights are compared; None for all of `weights`. Raises ModelFolderError if the model is not
        found here, or has other weights than where the run was planned.
        """
        names = [name for name in self.weights if models is None or name in models]
        if self._other_weights(self.source, names) is None:
            return self
        parts = self.pipeline.parts
        wanted = [parts[name].subfolder for name, sketch in self.weights.items() if sketch is not None]
        source = locate_configured(self.config, wanted=wanted)
        if (name := self._other_weights(source, names)) is not None:
            raise ModelFolderError(
                f"the {name} of {source.folder(parts[name].subfolder)} on this machine is not the one that the run was "
                "planned with; give all machines the same model, by a folder that they share or the same revision"
            )
        return replace(self, source=source)

    def _other_weights(self, source: ModelSource, names: Collection[str]) -> str | None:
        """The first of the models whose weights in `source` are not those of the plan."""
        here = sketches(self.pipeline, source, names)
        return next((name for name in names if here[name] != self.weights[name]), None)


@dataclass(frozen=True)
class StagePlan(RunPlan):
    """What the plans of both stages hold.

    task: its loss, and what that reads. settings: constants of units and `model_fn` (see `settings_of`). sample: how
    the columns of the dataset become inputs. split: what each stage runs, and what the cache holds.
    """

    config: PreprocessConfig | TrainConfig
    task: Task
    settings: Mapping[str, Any]
    sample: SampleSpec
    split: Split


@dataclass(frozen=True)
class PreprocessPlan(StagePlan):
    """Of stage 1. groups: the address space of each group of units, in the order of `split.groups`."""

    config: PreprocessConfig
    groups: tuple[GroupPlan, ...]

    def group(self, name: str) -> GroupPlan:
        """The group of this name, which must be there."""
        return next(group for group in self.groups if group.name == name)


@dataclass(frozen=True)
class TrainPlan(StagePlan):
    """Of stage 2, or of both stages in one. models: names of those that the run loads, no others.

    target_modules: model -> the layers that get a LoRA, as `add_lora` takes them, with the family's default filled in.
    """

    config: TrainConfig
    models: tuple[str, ...]
    target_modules: Mapping[str, str]


@dataclass(frozen=True)
class GeneratePlan(RunPlan):
    """Of generating. prompts: in order. loras: files, absolute or URLs."""

    config: GenerateConfig
    prompts: tuple[Prompt, ...]
    loras: tuple[str, ...]


def sketches(pipeline: type[BasePipeline], source: ModelSource, models: Collection[str]) -> dict[str, str | None]:
    """Which weights these models have, without reading them whole; None for one that is not there."""
    parts = pipeline.parts
    return {name: part_sketch(source, parts[name].subfolder) for name in sorted(models) if name in parts}


@dataclass(frozen=True)
class _Draft:
    """What both stages are planned by, before weights are downloaded. source: with configuration files alone."""

    source: ModelSource
    family: str
    pipe: BasePipeline
    task: Task
    settings: Mapping[str, Any]
    sample: SampleSpec
    stages: Stages

    @classmethod
    def of(cls, config: PreprocessConfig | TrainConfig, task: Task) -> _Draft:
        source, family, pipe = _pipeline(config)
        settings = settings_of(pipe, task, config.pipeline_settings)
        if not config.reads_cache:
            check_columns(pipe, task, config)
        sample = dataset_spec(pipe, config, task.columns, keep_size=task.as_sampled)
        stages = plan_stages(pipe, task, config.trained, sample.inputs)
        return cls(source, family, pipe, task, settings, sample, stages)

    def planned(self, config: PreprocessConfig | TrainConfig) -> dict[str, Any]:
        """The fields of a `StagePlan` that are known already."""
        return {
            "output_path": absolute(config.output_path),
            "family": self.family,
            "task": self.task,
            "settings": self.settings,
            "sample": self.sample,
            "split": Split.of(self.stages, self.pipe),
        }


def plan_preprocess(config: PreprocessConfig) -> PreprocessPlan:
    """See `RunPlan.resolve`; `pools` for a group that the model does not have is a ConfigError."""
    draft = _Draft.of(config, get_task(config.task))
    pipe, sample, models = draft.pipe, draft.sample, draft.stages.stage1_models()
    source = _with_weights(config, pipe, models)
    groups = tuple(
        plan_group(
            pipe,
            source,
            group,
            sample_inputs=sample.inputs,
            file_params=sample.file_params,
            dtype=config.dtype,
            settings=draft.settings,
        )
        for group in draft.stages.groups
    )
    check_pools(config, [group.name for group in groups])
    weights = {model: sketch for group in groups for model, sketch in group.sketches.items()}
    return PreprocessPlan(config=config, source=source, weights=weights, groups=groups, **draft.planned(config))


def plan_training(config: TrainConfig) -> TrainPlan:
    """See `RunPlan.resolve`; SourceError for a cache of something else, ConfigError for a LoRA without layers."""
    options = ("logit_mean", "logit_std", "mode_scale", "timestep_shift")
    task = get_task(
        config.task,
        weighting=config.loss_weighting,
        min_timestep_boundary=config.min_timestep_boundary,
        max_timestep_boundary=config.max_timestep_boundary,
        timestep_sampling=config.timestep_sampling,
        **{name: value for name in options if (value := getattr(config, name)) is not None},
    )
    draft = _Draft.of(config, task)
    pipe, stages = draft.pipe, draft.stages
    if config.caption_dropout:
        check_caption_dropout(stages, draft.sample.inputs)
    models = stages.stage2_models(pipe)
    if config.reads_cache:
        _check_cache(config, draft)
    else:
        models = tuple(dict.fromkeys([*stages.stage1_models(), *models]))
    # No other weights, not even downloaded; but the images of --validation_prompts need the whole model.
    source = _with_weights(config, pipe, None if config.validation_prompts else models)
    return TrainPlan(
        config=config,
        source=source,
        weights=sketches(type(pipe), source, models),
        models=models,
        target_modules={name: resolve_target_modules(config, pipe, name) for name in config.lora_models},
        **draft.planned(config),
    )


def _check_cache(config: TrainConfig, draft: _Draft) -> None:
    """Raise SourceError, or an error of the cache, unless the configured cache is for this training."""
    where = absolute(config.dataset_base_path)
    pipe, stages, manifest = draft.pipe, draft.stages, Manifest.load(where)
    check_manifest(
        manifest, where, family=draft.family, task=config.task, trainable=config.trained, parameters=stages.parameters
    )
    check_encoders(manifest, where, draft.source, pipe.parts)
    read = {name for unit in stages.stage2 for name in unit.fetch_input_params()}
    read |= {*pipe.model_fn_params(), *draft.task.reads, *(config.pipeline_settings or {})}
    check_settings(manifest, where, {name: value for name, value in draft.settings.items() if name in read})


def resolve_target_modules(config: LoraConfig, pipe: BasePipeline, model: str) -> str:
    """The layers of `model` that get a LoRA: as configured, or the family's, in the names that they have here.

    Raises ConfigError for a model without a default whose layers are not named.
    """
    denoises = model in pipe.in_iteration_models
    targets = config.target_modules_of(model) or (",".join(pipe.lora_targets) if denoises else "")
    if not targets:
        raise ConfigError(
            f"--lora_target_modules is missing: the family {pipe.family} has no default for {model!r}; "
            'name its layers, e.g. "q_proj,k_proj,v_proj,o_proj", or "all-linear"'
        )
    if not denoises or targets.startswith("re:"):
        return targets
    return ",".join(pipe.lora_aliases.get(target, target) for target in split_names(targets))


def plan_generate(config: GenerateConfig) -> GeneratePlan:
    """See `RunPlan.resolve`; DatasetError or GenerateError for prompts that cannot be read."""
    _, family, pipe = _pipeline(config)
    prompts = prompts_of(config, image_params(pipe))
    source = _with_weights(config, pipe, None)
    return GeneratePlan(
        config=config,
        output_path=absolute(config.output_path),
        family=family,
        source=source,
        weights=sketches(type(pipe), source, pipe.parts),
        prompts=tuple(prompts),
        loras=tuple(absolute(path) for path in config.loras),
    )


def _pipeline(config: JobConfig) -> tuple[ModelSource, str, BasePipeline]:
    """Model, family and pipeline without weights; only configuration files are downloaded."""
    source = locate_configured(config, wanted=())
    family = choose_family(config.family, source)
    return source, family, get_pipeline_class(family).configured(source)


def _with_weights(config: JobConfig, pipe: BasePipeline, models: Collection[str] | None) -> ModelSource:
    """The model with the weights of `models` (None: of all), whose files are looked at but not read."""
    wanted = None if models is None else [pipe.parts[name].subfolder for name in models]
    source = locate_configured(config, wanted=wanted)
    pipe.check_files(source, pipe.parts if models is None else models)
    return source

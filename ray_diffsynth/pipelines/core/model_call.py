"""The call of `model_fn`: what it is given of a sample or of a batch, and with guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ray_diffsynth.pipelines.core.batch import collate, pad_and_mask
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.model_parts import ModelParts
from ray_diffsynth.pipelines.core.unit import missing_input


class ModelCall(ModelParts):
    """`model_fn` with its models, its parameters, its settings, and batches of them."""

    padded_params: ClassVar[Mapping[str, str]] = {}
    """Parameters (1, L, D) of differing L that `collate` pads -> name of the mask (B, L) that it makes."""
    listed_params: ClassVar[tuple[str, ...]] = ()
    """Parameters that `collate` leaves as a list, one entry a sample: the model takes lists."""
    collate_outputs: ClassVar[tuple[str, ...]] = ()
    """Names that `collate` surely writes."""

    model_fn: Callable[..., Tensor]

    def training_settings(self) -> dict[str, Any]:
        """Constants of units and `model_fn` in both stages; `--pipeline_settings` or a column may replace them."""
        return {
            "cfg_scale": 1.0,
            "denoising_strength": 1.0,
            "rand_device": "cpu",
            "seed": 0,
            "tiled": False,
            "tile_size": 128,
            "tile_stride": 64,
            "use_gradient_checkpointing": False,
            "use_gradient_checkpointing_offload": False,
        }

    def sampling_settings(self) -> dict[str, Any]:
        """Of `training_settings` those that have another value in `__call__`, for a task that samples as it does."""
        return {}

    def model_fn_params(self) -> tuple[str, ...]:
        """Parameters that `model_fn` names, without the models; what it takes by `**kwargs` only is not passed."""
        return tuple(name for name in _named_parameters(self.model_fn) if name not in self.in_iteration_models)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch from the parameters of its samples (flat: what the positive side sees).

        Tensors are joined along axis 0; `padded_params` are padded with zeros to the longest and get a mask, bool
        (B, L), or None if nothing is padded. Settings stay one value, anything else becomes a list, one entry a sample;
        what is None in every sample stays None.

        Raises:
            PipelineError: tensors of differing shapes, a parameter that some samples lack, a setting that differs.
        """
        names = list(dict.fromkeys(name for sample in samples for name in sample))
        settings = self.training_settings()
        batch: dict[str, Any] = {}
        for name in names:
            lacking = [i for i, sample in enumerate(samples) if name not in sample]
            if lacking:
                raise PipelineError(f"samples {lacking} of the batch lack the parameter {name!r} that the others have")
            values = [sample[name] for sample in samples]
            if name in self.padded_params:
                batch[name], batch[self.padded_params[name]] = pad_and_mask(values)
            elif name in self.padded_params.values():
                continue  # made with the parameter that it masks
            elif name in self.listed_params:
                batch[name] = values
            else:
                batch[name] = collate(name, values, is_setting=name in settings)
        return batch

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """Call `model_fn` with the models of the iteration and those parameters of `batch` that it names.

        Raises:
            MissingInputError: a parameter without a default is not in `batch`.
        """
        self.load_models_to_device(self.in_iteration_models)
        inputs: dict[str, Any] = {name: getattr(self, name) for name in self.in_iteration_models}
        for name, parameter in _named_parameters(self.model_fn).items():
            if name in inputs:
                continue
            if name in batch:
                inputs[name] = batch[name]
            elif parameter.default is inspect.Parameter.empty:
                raise missing_input("model_fn", name, self)
        return self.model_fn(**inputs)

    def guided_prediction(self, posi: Mapping[str, Any], nega: Mapping[str, Any], cfg_scale: float) -> Tensor:
        """Classifier-free guidance: nega + cfg_scale * (posi - nega); the positive side alone if cfg_scale is 1."""
        prediction = self.predict(posi)
        if cfg_scale == 1:
            return prediction
        negative = self.predict(nega)
        return negative + cfg_scale * (prediction - negative)


def _named_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}

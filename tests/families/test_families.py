"""Every family keeps the same promises; what a family is, is in tests/families/tiny/<family>.py."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_diffsynth.cache.codec import as_cached
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.models.lora import LoraInfo, add_lora, load_lora_file, lora_parameters
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.check import check_units
from ray_diffsynth.pipelines.core.lora_keys import lora_names
from ray_diffsynth.pipelines.core.runner import run_units
from ray_diffsynth.pipelines.core.stages import plan_stages
from ray_diffsynth.pipelines.core.state import make_state
from ray_diffsynth.pipelines.registry import family_of, get_pipeline_class
from ray_diffsynth.tasks import SFT
from ray_diffsynth.training.export import Trained, trained_files
from ray_diffsynth.training.module import DiffusionTrainingModule
from tests.cuda_autocast import CudaAutocast, runs_under_autocast
from tests.families.cases import FamilyCase, Sampling

ROWS = 3


def keys(count: int = ROWS) -> list[SampleKey]:
    return [SampleKey(0, 0, 0, f"sample-{index}") for index in range(count)]


def input_names(case: FamilyCase) -> tuple[str, ...]:
    return tuple(case.inputs(0))


def module_of(case: FamilyCase, pipe: BasePipeline, *, split: bool = False, **flags: bool) -> DiffusionTrainingModule:
    module = DiffusionTrainingModule(pipe, SFT(), trained=["dit"], inputs=input_names(case), split=split, **flags)
    module.settings.update(case.settings)
    return module


def with_lora(
    case: FamilyCase, root: Path, encoders: BasePipeline | None = None, dtype: torch.dtype = torch.float32
) -> tuple[BasePipeline, LoraInfo]:
    """A dit of its own under the family's default LoRA, whose B is not zero, so that A has a gradient.

    encoders: whose other models it uses; None: it has none.
    """
    pipe = get_pipeline_class(case.family).from_pretrained(root, models=["dit"], torch_dtype=dtype)
    for name in [] if encoders is None else [*pipe.parts, *pipe.companions]:
        if name != "dit":
            setattr(pipe, name, getattr(encoders, name))
    pipe.scheduler.set_timesteps(training=True)
    targets = case.lora_targets or pipe.lora_targets
    info = add_lora(pipe.dit, rank=4, alpha=2.0, target_modules=targets, seed=0, name="dit")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lora_parameters(pipe.dit).items():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe, info


def gradients(module: DiffusionTrainingModule, rows: Sequence[Mapping[str, Any]]) -> tuple[float, dict[str, Any]]:
    module.zero_grad()
    output = module(rows, keys(len(rows)))
    output.loss.backward()
    return float(output.loss.detach()), {name: p.grad for name, p in module.trainable().items() if p.grad is not None}


def our_latents(pipe: BasePipeline, sampling: Sampling) -> torch.Tensor:
    result: torch.Tensor = pipe(**sampling.ours, seed=7, output_type="latent")
    return result


def their_output(pipe: Any, sampling: Sampling, output_type: str = "latent") -> Any:
    arguments = dict(sampling.theirs)
    if isinstance(arguments.get("prompt"), list):
        arguments["prompt"] = list(arguments["prompt"])  # some pipelines edit it
    generator = torch.Generator().manual_seed(7)
    return pipe(**arguments, generator=generator, output_type=output_type, return_dict=False)[0]


def test_the_family_is_found_by_its_folder(case: FamilyCase, root: Path, tmp_path: Path) -> None:
    assert family_of(root) == case.family
    cls = get_pipeline_class(case.family)
    assert cls.family == case.family
    assert not list(cls.skeleton().parameters()), "planning a split must load nothing"


def test_sampling_equals_diffusers(case: FamilyCase, pipe: BasePipeline, theirs: Any) -> None:
    for sampling in case.samplings:
        expected = case.latents(theirs, their_output(theirs, sampling))
        got = our_latents(pipe, sampling)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=case.tolerance)


def test_images_equal_diffusers(case: FamilyCase, pipe: BasePipeline, theirs: Any) -> None:
    sampling = case.samplings[0]
    expected = np.asarray(their_output(theirs, sampling, "pil")[0]).astype(int)  # an image, or the frames of a video
    got = np.asarray(pipe(**sampling.ours, seed=7)).astype(int)
    assert got.shape == expected.shape and got.std() > 0
    assert np.abs(got - expected).max() <= 1


def test_stage_1_encodes_as_diffusers_does(case: FamilyCase, pipe: BasePipeline, theirs: Any) -> None:
    row = case.inputs(1)
    ours = module_of(case, pipe).encode(row)
    with torch.no_grad():
        expected = case.encode(theirs, row)
    assert expected.keys() <= ours.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_texts_are_as_long_as_diffusers_makes_them(case: FamilyCase, pipe: BasePipeline, theirs: Any) -> None:
    """Where padding is seen by the transformer, another length would be another model."""
    default = inspect.signature(theirs.__call__).parameters["max_sequence_length"].default
    assert pipe.training_settings().get("max_sequence_length", 512) == default == 512


def test_the_cache_holds_no_more_than_it_must(case: FamilyCase, pipe: BasePipeline) -> None:
    planned = plan_stages(type(pipe).skeleton(), SFT(), ["dit"], input_names(case))
    assert {group.name: group.parameters for group in planned.groups} == case.groups
    assert set(planned.parameters) == {name for group in case.groups.values() for name in group}
    row = module_of(case, pipe).encode(case.inputs(0))
    assert tuple(sorted(row)) == tuple(sorted(planned.parameters))
    for name, value in row.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):  # no view into a batch's storage
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "sampling"])
def test_units_do_what_they_declare_and_nothing_else(
    case: FamilyCase, pipe: BasePipeline, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not training:
        monkeypatch.setattr(pipe, "scheduler", pipe.sampling_schedule(torch.zeros(1, 16, 4, 6), 4))
    given = {**pipe.training_settings(), **case.settings, **case.inputs(1), "negative_prompt": "blur", "cfg_scale": 4.0}
    values = check_units(pipe, given)
    assert {"input_latents", "prompt_embeds"} <= values.keys() and ("latents" in values) is not training


def test_encoding_in_batches_equals_one_by_one(case: FamilyCase, pipe: BasePipeline) -> None:
    module = module_of(case, pipe)
    units = [unit for group in module.stages.groups for unit in group.units]
    rows = [case.inputs(index) for index in range(ROWS)]
    with torch.no_grad():
        states = run_units(units, pipe, [make_state(units, {**module.settings, **row}) for row in rows])
    for row, state in zip(rows, states, strict=True):
        for name, alone in module.encode(row).items():
            value = state.flat()[name]
            torch.testing.assert_close(value, alone, rtol=0, atol=1e-5)
            if isinstance(value, torch.Tensor):  # nothing that is kept holds on to the storage of the batch
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_a_padded_batch_equals_its_samples(case: FamilyCase, pipe: BasePipeline) -> None:
    module = module_of(case, pipe)
    rows = [module.encode(case.inputs(index)) for index in range(ROWS)]
    module = module_of(case, pipe, split=True)
    with torch.no_grad():
        together = module(rows, keys()).per_sample
        alone = torch.cat([module([row], [key]).per_sample for row, key in zip(rows, keys(), strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_split_equals_unsplit_bit_for_bit(case: FamilyCase, root: Path, pipe: BasePipeline) -> None:
    """Stage 2 loads the dit alone and trains on what went through the cache's codec."""
    encoder = module_of(case, pipe)
    cached = [as_cached(encoder.encode(case.inputs(index))) for index in range(ROWS)]
    planned = plan_stages(type(pipe).skeleton(), SFT(), ["dit"], input_names(case))
    assert planned.stage2_models(type(pipe).skeleton()) == ("dit",)
    lean, _ = with_lora(case, root)
    assert [name for name in lean.parts if getattr(lean, name) is not None] == ["dit"]
    whole, _ = with_lora(case, root, pipe)
    loss, split = gradients(module_of(case, lean, split=True), cached)
    loss_whole, unsplit = gradients(module_of(case, whole), [case.inputs(index) for index in range(ROWS)])
    assert loss == loss_whole
    assert split.keys() == unsplit.keys() and split
    for name in split:
        assert torch.equal(split[name], unsplit[name]), name


def test_split_equals_unsplit_under_cudas_autocast(case: FamilyCase, root: Path, loaded: BasePipeline) -> None:
    """The encoders run as in stage 1 within the loop's autocast too, which would change their values on a GPU."""
    encoders = copy.deepcopy(loaded).to(torch.bfloat16)
    encoders.scheduler.set_timesteps(training=True)
    encoder = module_of(case, encoders)
    cached = [as_cached(encoder.encode(case.inputs(index))) for index in range(ROWS)]
    lean, _ = with_lora(case, root, dtype=torch.bfloat16)
    whole, _ = with_lora(case, root, encoders, dtype=torch.bfloat16)
    names = [name for name in whole.parts if name != "dit"]
    with CudaAutocast(), torch.autocast("cpu", torch.bfloat16), ExitStack() as watched:
        seen = {name: watched.enter_context(runs_under_autocast(getattr(whole, name))) for name in names}
        dit = watched.enter_context(runs_under_autocast(whole.dit))
        loss, split = gradients(module_of(case, lean, split=True), cached)
        loss_whole, unsplit = gradients(module_of(case, whole), [case.inputs(index) for index in range(ROWS)])
    assert seen == dict.fromkeys(names, {False}) and dit == {True}
    assert loss == loss_whole
    assert split.keys() == unsplit.keys() and split
    for name in split:
        assert torch.equal(split[name], unsplit[name]), name


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_and_offload_change_no_gradient(
    case: FamilyCase, root: Path, pipe: BasePipeline, offload: bool
) -> None:
    encoder = module_of(case, pipe)
    rows = [encoder.encode(case.inputs(index)) for index in range(2)]
    lean, _ = with_lora(case, root)
    lean.dit.train()
    _, plain = gradients(module_of(case, lean, split=True), rows)
    flags = {"use_gradient_checkpointing": True, "use_gradient_checkpointing_offload": offload}
    _, recomputed = gradients(module_of(case, lean, split=True, **flags), rows)
    assert plain.keys() == recomputed.keys() and plain
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=0, atol=1e-6)


def test_a_lora_trains_and_loads_in_diffusers(
    case: FamilyCase, root: Path, pipe: BasePipeline, theirs: Any, tmp_path: Path
) -> None:
    """The loss falls, the file changes the output of diffusers' pipeline, as the adapter does that of ours."""
    sampling = case.samplings[0]
    trained, info = with_lora(case, root, pipe)
    module = module_of(case, trained)
    rows = [module.encode(case.inputs(index)) for index in range(2)]
    module = module_of(case, trained, split=True)
    optimizer = torch.optim.AdamW(module.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(gradients(module, rows)[0])
        optimizer.step()
    assert losses[-1] < losses[0]

    (file,) = trained_files(trained, Trained((info,), ()), str(tmp_path), "lora")
    file.write()
    path = file.path
    written = load_file(path)
    assert len(written) == 2 * len(info.targets)
    before = case.latents(theirs, their_output(theirs, sampling))
    theirs.load_lora_weights(path)
    loaded = case.latents(theirs, their_output(theirs, sampling))
    theirs.unload_lora_weights()
    assert (loaded - before).abs().max() > 1e-3, "the file loads and does nothing"
    torch.testing.assert_close(loaded, our_latents(trained.eval(), sampling), rtol=0, atol=case.tolerance)

    fresh, info = with_lora(case, root)  # --lora_checkpoint: training goes on from the file
    load_lora_file(fresh.dit, path, info, rename=lora_names(fresh, "dit"))
    expected = lora_parameters(trained.dit)
    for name, parameter in lora_parameters(fresh.dit).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)


def test_a_text_encoder_can_be_trained(case: FamilyCase, loaded: BasePipeline) -> None:
    """Of each text encoder: its unit moves to stage 2, which gets the prompt, and a gradient reaches its weights."""
    pipe = copy.deepcopy(loaded)
    pipe.scheduler.set_timesteps(training=True)
    for name in [part for part in pipe.parts if part.startswith("text_encoder")]:
        pipe.requires_grad_(False)
        getattr(pipe, name).requires_grad_(True)
        module = DiffusionTrainingModule(pipe, SFT(), trained=[name], inputs=input_names(case), split=True)
        module.settings.update(case.settings)
        assert "prompt" in module.stages.parameters
        assert not any(name in group.models for group in module.stages.groups)
        rows = [as_cached(module.encode(case.inputs(index))) for index in range(2)]
        _, found = gradients(module, rows)
        assert any(gradient.abs().max() > 0 for gradient in found.values())


def test_bfloat16_trains_and_samples(case: FamilyCase, loaded: BasePipeline) -> None:
    pipe = copy.deepcopy(loaded).to(torch.bfloat16)
    pipe.scheduler.set_timesteps(training=True)
    add_lora(pipe.dit, rank=2, alpha=None, target_modules=pipe.lora_targets, seed=0, name="dit")
    module = module_of(case, pipe)
    rows = [module.encode(case.inputs(index)) for index in range(2)]
    assert {value.dtype for row in rows for value in row.values() if isinstance(value, torch.Tensor)} == {
        torch.bfloat16
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(module_of(case, pipe, split=True), rows)
    assert np.isfinite(loss) and found and all(torch.isfinite(gradient).all() for gradient in found.values())
    assert torch.isfinite(our_latents(pipe.eval(), case.samplings[0])).all()

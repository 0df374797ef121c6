"""What the user is after: the loss falls, and the plain diffusers pipeline loads the LoRA and changes."""

from pathlib import Path

import pytest
import torch

from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.models.lora import load_lora_file
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.data.opening import open_data
from tests.e2e.conftest import train_config
from tests.training.helpers import train_here

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def trained(tiny_qwen: Path, fp32_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of 60 steps on the drawn pictures."""
    output = tmp_path_factory.mktemp("trained")
    options = {"batch_size": 4, "num_epochs": 20, "learning_rate": 1e-2, "lora_rank": 8}
    result = train_here(train_config(tiny_qwen, fp32_cache, output, **options))
    assert result.steps == 60
    return output / "epoch-19.safetensors"


def test_the_loss_falls(tiny_qwen: Path, fp32_cache: Path, trained: Path, tmp_path: Path) -> None:
    """Mean loss over every sample with fixed noise, before and after."""
    plan = RunPlan.resolve(train_config(tiny_qwen, fp32_cache, tmp_path, lora_rank=8))
    data = open_data(plan)
    module, loras = build_module(plan, torch.device("cpu"))

    @torch.no_grad()
    def loss() -> float:
        values = []
        for row in range(len(data.sample_ids)):
            keys = [SampleKey(seed=123, epoch=0, repeat=0, sample_id=data.sample_ids[row])]
            values.append(float(module(data.fetch([row]), keys).loss))
        return sum(values) / len(values)

    before = loss()
    load_lora_file(module.pipe.dit, str(trained), loras.loras[0])
    after = loss()
    assert after < 0.9 * before, f"{before} -> {after}"


def test_diffusers_loads_the_lora_and_unloads_it(tiny_qwen: Path, trained: Path) -> None:
    """Against diffusers itself and against our own pipeline: equal latents with and without the LoRA."""
    from diffusers import QwenImagePipeline as Plain

    from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline as Ours

    plain = Plain.from_pretrained(str(tiny_qwen))
    plain.set_progress_bar_config(disable=True)
    ours = Ours.from_pretrained(str(tiny_qwen), torch_dtype=torch.float32)

    def latents(pipe: object) -> torch.Tensor:
        options = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 3}
        if isinstance(pipe, Ours):
            return pipe(**options, seed=5, cfg_scale=1.0, output_type="latent")
        generator = torch.Generator().manual_seed(5)
        made = plain(**options, true_cfg_scale=1.0, generator=generator, output_type="latent").images
        return Plain._unpack_latents(made, 64, 64, plain.vae_scale_factor)[:, :, 0]

    base = latents(plain)
    torch.testing.assert_close(latents(ours), base, rtol=0, atol=1e-4)
    plain.load_lora_weights(str(trained.parent), weight_name=trained.name)
    changed = latents(plain)
    assert (changed - base).abs().max() > 1e-2
    plain.unload_lora_weights()
    assert torch.equal(latents(plain), base)
    plain.load_lora_weights(str(trained.parent), weight_name=trained.name)
    ours.dit.load_lora_adapter(str(trained.parent), weight_name=trained.name, prefix="diffusion_model")
    torch.testing.assert_close(latents(ours), changed, rtol=0, atol=1e-4)

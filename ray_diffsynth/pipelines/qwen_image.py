"""Qwen-Image on diffusers' and transformers' own classes: text to image, and image to image by `input_image`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.base import BasePipeline, Part, PipelineError
from ray_diffsynth.pipelines.unit import PipelineUnit, UnitState, missing_input, run_units

logger = logging.getLogger(__name__)

MAX_SEQUENCE_LENGTH = 512  # prompt tokens after the template; what diffusers' pipeline uses by default


class QwenImagePipeline(BasePipeline):
    """Qwen-Image. Latents are (B, C, h, w), the VAE's one frame removed; prompt embeddings (1, L, D), unpadded."""

    family: ClassVar[str] = "qwen_image"
    schedule: ClassVar[str] = "Qwen-Image"
    parts: ClassVar[Mapping[str, Part]] = {
        "text_encoder": Part("text_encoder", "transformers:Qwen2_5_VLForConditionalGeneration", ("tokenizer",)),
        "vae": Part("vae", "diffusers:AutoencoderKLQwenImage"),
        "dit": Part("transformer", "diffusers:QwenImageTransformer2DModel"),
    }
    companions: ClassVar[Mapping[str, Part]] = {"tokenizer": Part("tokenizer", "transformers:Qwen2Tokenizer")}
    padded_params: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds_mask"}
    collate_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds_mask",)
    lora_prefix: ClassVar[str] = "diffusion_model."
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
        "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
    )  # fmt: skip

    text_encoder: Any
    tokenizer: Any
    vae: Any
    dit: Any

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype, height_division_factor=16, width_division_factor=16)
        self.latent_channels = 16
        self.vae_scale_factor = 8
        self.units = [
            QwenImageUnit_ShapeChecker(),
            QwenImageUnit_NoiseInitializer(),
            QwenImageUnit_ImageEncoder(),
            QwenImageUnit_InitialLatents(),
            QwenImageUnit_PromptEmbedder(),
        ]
        self.model_fn = model_fn_qwen_image

    def configure(self, source: ModelSource) -> None:
        """Take the latents' geometry from the VAE's configuration, even if its weights are not loaded."""
        path = source.folder("vae") / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            self.latent_channels = int(config.get("z_dim", 16))
            self.vae_scale_factor = 2 ** len(config.get("temperal_downsample", (False, True, True)))
        # The transformer packs 2 x 2 latents into a token.
        self.height_division_factor = self.width_division_factor = 2 * self.vae_scale_factor

    def training_settings(self) -> dict[str, Any]:
        return {**super().training_settings(), "max_sequence_length": MAX_SEQUENCE_LENGTH}

    def encode_images(self, pixels: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, H/8, W/8): the mode of the VAE's distribution.

        `tile_size` and `tile_stride` are in latents, as in DiffSynth-Studio.
        """
        with _tiling(self.vae, tiled, tile_size * self.vae_scale_factor, tile_stride * self.vae_scale_factor):
            moments = self.vae.encode(pixels.to(self.vae.dtype)[:, :, None]).latent_dist
        mean, std = self._latent_statistics()
        latents: Tensor = (moments.mode()[:, :, 0].float() - mean) / std
        return latents.to(self.torch_dtype)

    def decode_latents(self, latents: Tensor, *, tiled: bool, tile_size: int, tile_stride: int) -> Tensor:
        """Inverse of `encode_images`: pixels (B, 3, H, W), about [-1, 1]."""
        mean, std = self._latent_statistics()
        raw = (latents.float() * std + mean).to(self.vae.dtype)
        with _tiling(self.vae, tiled, tile_size * self.vae_scale_factor, tile_stride * self.vae_scale_factor):
            pixels: Tensor = self.vae.decode(raw[:, :, None]).sample
        return pixels[:, :, 0]

    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> list[Tensor]:
        """One unpadded embedding (1, L, D) a prompt, by diffusers' own template and encoding; cut to the maximum."""
        from diffusers import QwenImagePipeline as DiffusersPipeline

        encoder: Any = DiffusersPipeline(
            scheduler=None, vae=None, text_encoder=self.text_encoder, tokenizer=self.tokenizer, transformer=None
        )
        # One token more than allowed shows which prompts are cut.
        limit = max_sequence_length + 1
        embeds, mask = encoder.encode_prompt(list(prompts), device=self.device, max_sequence_length=limit)
        result = []
        for index, prompt in enumerate(prompts):
            single = embeds[index] if mask is None else embeds[index][mask[index].bool()]
            if len(single) > max_sequence_length:
                logger.warning("the prompt is cut to %d tokens: %.80s…", max_sequence_length, prompt)
            # A copy, so that the row does not keep the whole padded batch in memory.
            result.append(single[:max_sequence_length].clone()[None].to(self.torch_dtype))
        return result

    def guided_prediction(self, posi: Mapping[str, Any], nega: Mapping[str, Any], cfg_scale: float) -> Tensor:
        """Guidance, then each token gets back the norm of the positive prediction, as diffusers does for Qwen-Image."""
        if cfg_scale == 1:
            return self.predict(posi)
        height, width = posi["latents"].shape[-2:]
        positive, negative = pack_latents(self.predict(posi)), pack_latents(self.predict(nega))
        combined = negative + cfg_scale * (positive - negative)
        norms = torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True)
        return unpack_latents(combined * norms, height, width)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        cfg_scale: float = 4.0,
        input_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        height: int = 1328,
        width: int = 1328,
        seed: int | None = None,
        rand_device: str = "cpu",
        num_inference_steps: int = 30,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        output_type: str = "pil",
        progress_bar_cmd: Callable[[Iterable[Tensor]], Iterable[Tensor]] = lambda steps: steps,
    ) -> Image.Image | Tensor:
        """Generate one picture, by the units that training uses.

        Args:
            cfg_scale: classifier-free guidance against `negative_prompt`; 1 turns it off and halves the time.
            input_image: start from this picture, of `height` x `width`, noised by `denoising_strength` in (0, 1].
            seed: decides the noise; None: another picture each time.
            output_type: "pil", or "latent" for normalised latents (1, C, height/8, width/8).
            progress_bar_cmd: wraps the steps, e.g. tqdm.

        Raises:
            PipelineError: a size that is no multiple of 16, an unknown output type, a model that is not loaded.
        """
        if output_type not in ("pil", "latent"):
            raise PipelineError(f"output_type={output_type!r} is unknown; use 'pil' or 'latent'")
        self.check_resize_height_width(height, width)
        tokens = height // self.height_division_factor * (width // self.width_division_factor)
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength, image_seq_len=tokens)
        shared = {
            "cfg_scale": cfg_scale, "input_image": input_image, "height": height, "width": width, "seed": seed,
            "rand_device": rand_device, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride,
            "max_sequence_length": max_sequence_length,
        }  # fmt: skip
        start = UnitState(shared, {"prompt": prompt}, {"negative_prompt": negative_prompt})
        (state,) = run_units(self.units, self, [start])
        posi, nega = self.collate([state.flat()]), self.collate([state.flat_nega()])
        for index, timestep in enumerate(progress_bar_cmd(self.scheduler.timesteps)):
            now = {"latents": posi["latents"], "timestep": timestep.reshape(1).to(self.device)}
            prediction = self.guided_prediction({**posi, **now}, {**nega, **now}, cfg_scale)
            posi["latents"] = self.step(self.scheduler, posi["latents"], index, prediction)
        latents: Tensor = posi["latents"]
        if output_type == "latent":
            return latents
        self.load_models_to_device(("vae",))
        pixels = self.decode_latents(latents, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
        return self.vae_output_to_image(pixels)

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, fp32, (1, C, 1, 1)."""
        config = self.vae.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, std


class QwenImageUnit_ShapeChecker(PipelineUnit):
    """Checks the picture's size; takes it from `input_image` where it is not given."""

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "input_image"), output_params=("height", "width"))

    def process(
        self,
        pipe: QwenImagePipeline,
        height: int | None = None,
        width: int | None = None,
        input_image: Image.Image | None = None,
    ) -> dict[str, Any]:
        if input_image is not None:
            height, width = height or input_image.height, width or input_image.width
            if (input_image.height, input_image.width) != (height, width):
                raise PipelineError(
                    f"input_image is {input_image.height}x{input_image.width} (height x width), but the size asked for "
                    f"is {height}x{width}; resize the picture first"
                )
        if height is None or width is None:
            raise missing_input(type(self).__name__, "height" if height is None else "width", pipe, before=self)
        pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width}


class QwenImageUnit_NoiseInitializer(PipelineUnit):
    """The noise that sampling starts from. In training the loss draws keyed noise, so nothing is drawn here."""

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "seed", "rand_device"), output_params=("noise",))

    def process(
        self, pipe: QwenImagePipeline, height: int, width: int, seed: int | None, rand_device: str
    ) -> dict[str, Any]:
        if pipe.scheduler.training:
            return {}
        shape = (1, pipe.latent_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
        # Drawn in the pipeline's dtype, as diffusers does: the same seed gives the same picture.
        return {"noise": pipe.generate_noise(shape, seed, rand_device, rand_torch_dtype=pipe.torch_dtype)}


class QwenImageUnit_ImageEncoder(PipelineUnit):
    """`input_image` -> clean latents (1, C, h, w)."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("input_image", "tiled", "tile_size", "tile_stride"),
            output_params=("input_latents",),
            onload_model_names=("vae",),
        )

    def process(
        self,
        pipe: QwenImagePipeline,
        input_image: Image.Image | None = None,
        tiled: bool = False,
        tile_size: int = 128,
        tile_stride: int = 64,
    ) -> dict[str, Any]:
        inputs = {"input_image": input_image, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        return self.process_batch(pipe, [inputs])[0]

    def process_batch(self, pipe: QwenImagePipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One call of the VAE for all pictures of one size."""
        results: list[dict[str, Any]] = [{} for _ in batch]
        together: dict[tuple[Any, ...], list[int]] = {}
        for index, inputs in enumerate(batch):
            image = inputs.get("input_image")
            if image is not None:
                tiling = (inputs.get("tiled", False), inputs.get("tile_size", 128), inputs.get("tile_stride", 64))
                together.setdefault((image.size, *tiling), []).append(index)
            elif pipe.scheduler.training:
                raise missing_input(type(self).__name__, "input_image", pipe, before=self)
        if together:
            pipe.load_models_to_device(("vae",))
        for (_, tiled, tile_size, tile_stride), indices in together.items():
            pixels = torch.cat([pipe.preprocess_image(batch[index]["input_image"]) for index in indices])
            latents = pipe.encode_images(pixels, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
            for row, index in enumerate(indices):
                results[index] = {"input_latents": latents[row : row + 1].clone()}
        return results


class QwenImageUnit_InitialLatents(PipelineUnit):
    """What sampling starts from: noise, or the noised `input_latents`. In training the loss makes the noisy latents."""

    def __init__(self) -> None:
        super().__init__(input_params=("noise", "input_latents"), output_params=("latents",))

    def process(
        self, pipe: QwenImagePipeline, noise: Tensor | None = None, input_latents: Tensor | None = None
    ) -> dict[str, Any]:
        if pipe.scheduler.training:
            return {}
        if noise is None:
            raise missing_input(type(self).__name__, "noise", pipe, before=self)
        if input_latents is None:
            return {"latents": noise}
        return {"latents": pipe.scheduler.add_noise(input_latents, noise, timestep=pipe.scheduler.timesteps[0])}


class QwenImageUnit_PromptEmbedder(PipelineUnit):
    """`prompt` (and `negative_prompt`) -> embeddings (1, L, D) without padding, so that no mask is needed for one."""

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params=("max_sequence_length",),
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            output_params=("prompt_embeds",),
            onload_model_names=("text_encoder",),
        )

    def process(
        self, pipe: QwenImagePipeline, prompt: str, max_sequence_length: int = MAX_SEQUENCE_LENGTH
    ) -> dict[str, Any]:
        return self.process_batch(pipe, [{"prompt": prompt, "max_sequence_length": max_sequence_length}])[0]

    def process_batch(self, pipe: QwenImagePipeline, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One call of the text encoder for all prompts, padded to the longest; the padding is cut off again."""
        pipe.load_models_to_device(("text_encoder",))
        limits = [inputs.get("max_sequence_length", MAX_SEQUENCE_LENGTH) for inputs in batch]
        embeds = pipe.encode_prompts([inputs["prompt"] for inputs in batch], max_sequence_length=max(limits))
        return [{"prompt_embeds": single[:, :limit]} for single, limit in zip(embeds, limits, strict=True)]


def model_fn_qwen_image(
    *,
    dit: Any,
    latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor | None = None,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> Tensor:
    """The velocity noise - x0, in the shape of `latents`.

    Args:
        latents: (B, C, h, w), h and w even; one size a batch, since one rotary table serves it.
        timestep: 1000 * sigma, (B,) or (1,), fp32.
        prompt_embeds: (B, L, D); prompt_embeds_mask: bool (B, L), None if nothing is padded.
    """
    batch, _, height, width = latents.shape
    enable_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    prediction = dit(
        hidden_states=pack_latents(latents),
        timestep=timestep.expand(batch) / 1000,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask,
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return unpack_latents(prediction, height, width)


def pack_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens (B, h/2 * w/2, 4C): 2 x 2 neighbours in one token."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack_latents`; `height` and `width` are those of the latents."""
    cells = tokens.reshape(tokens.shape[0], height // 2, width // 2, tokens.shape[2] // 4, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], tokens.shape[2] // 4, height, width)


@contextmanager
def _tiling(vae: Any, tiled: bool, size: int, stride: int) -> Iterator[None]:
    """Let the VAE work in tiles of `size` pixels at every `stride` pixels, for this block only."""
    sides = ("min_height", "min_width", "stride_height", "stride_width")
    names = ("use_tiling", *(f"tile_sample_{side}" for side in sides))
    before = {name: getattr(vae, name) for name in names}
    if tiled:
        vae.enable_tiling(size, size, stride, stride)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)

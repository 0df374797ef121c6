"""DiffSynth-Studio's flags that have no field here: what becomes of each.

A command that worked there must work here or say why not, and no flag may be dropped in silence. So a flag whose loss
changes no result is accepted with a note (``NO_EFFECT``), and one whose loss would train something else is refused with
the replacement (``REFUSED``). docs/coming_from_diffsynth.md lists all of them; a test compares.
"""

from __future__ import annotations

_SWANLAB = "SwanLab is not supported; see --log_with for TensorBoard, CSV, W&B and MLflow"
_OFFLOAD = "a stage loads only the models that it runs; use_gradient_checkpointing_offload saves memory too"

NO_EFFECT: dict[str, str] = {
    "align_to_opensource_format": "the LoRA is always written with the keys that diffusers loads",
    "cpu_offload_split_threshold": _OFFLOAD,
    "enable_csv_log": "use --log_with csv; metrics.jsonl is always written",
    "enable_model_cpu_offload": _OFFLOAD,
    "enable_optimizer_cpu_offload": _OFFLOAD,
    "enable_swanlab_log": _SWANLAB,
    "enable_tensorboard_log": "TensorBoard is on by default where it is installed, see --log_with",
    "enable_wandb_log": "use --log_with wandb",
    "find_unused_parameters": "parameters without a gradient are found by one probe step and frozen",
    "fp8_models": "the frozen models stay in --dtype; --fp8_base keeps the trained model's base in 8 bits",
    "initialize_model_on_cpu": "models are always read on the CPU and then moved to the actor's or worker's device",
    "offload_models": "a stage loads only the models that its units run",
    "remove_prefix_in_ckpt": "the keys of the LoRA file follow the family, so that diffusers loads it as it is",
    "swanlab_project": _SWANLAB,
    "wandb_project": "set the environment variable WANDB_PROJECT, see --log_with",
    "zero_cond_t": "it is read from the transformer's config.json",
}

REFUSED: dict[str, str] = {
    "audio_processor_path": "audio is not supported",
    "enable_lora_hot_loading": "template models (image to LoRA) are not supported",
    "framewise_decoding": "WanToDance is not supported",
    "quant_options": "quantised base models are not supported; leave it out and use --dtype bfloat16",
    "resume_from_checkpoint": (
        "use --lora_checkpoint FILE to start from a LoRA, or --resume auto (the default) to go on with the run that "
        "lies in --output_path"
    ),
    "template_model_id_or_path": "template models (image to LoRA) are not supported",
    "tokenizer_1_path": "the tokenizer is read from the model's folder, see --model",
    "tokenizer_2_path": "the tokenizer is read from the model's folder, see --model",
}

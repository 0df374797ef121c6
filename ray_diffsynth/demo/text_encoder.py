"""A small frozen Qwen2.5-VL with random weights: it gives each word its direction and mixes in the words before it."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

HIDDEN_SIZE = 64


def build_text_encoder(
    tokenizer: Qwen2Tokenizer, *, hidden_size: int = HIDDEN_SIZE, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """The text encoder for `tokenizer`. The same arguments give the same weights; no global generator moves."""

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "mrope_section": [hidden_size // 32, hidden_size * 3 // 64, hidden_size * 3 // 64],
                "rope_type": "default",
                "type": "default",
            },
            "rope_theta": 1e6,
            "bos_token_id": None,
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)

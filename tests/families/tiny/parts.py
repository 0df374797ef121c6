"""Tiny random-weight parts that several families share; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ray_diffsynth.demo.tokenizer import build_tokenizer, byte_alphabet
from tests.families.cases import PROMPTS

# The part of Qwen3's chat template that the pipelines use.
QWEN_CHAT = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Random weights by `seed`; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def qwen_chat_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer of few words, with a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def qwen3(tokenizer: Qwen2Tokenizer, *, layers: int, causal_lm: bool) -> Any:
    """Qwen3 of width 16."""
    config = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (Qwen3ForCausalLM if causal_lm else Qwen3Model)(config).eval()


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer of single bytes."""
    letters = sorted(byte_alphabet().values())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=[], model_max_length=77)


def clip_text(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model of width 32."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer of letters and the words of PROMPTS."""
    words = [f"▁{word}" for prompt in PROMPTS for word in prompt.replace(",", " ,").split()]
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *dict.fromkeys([*words, *letters])]
    vocab = [(piece, 0.0 if index < 3 else -float(index)) for index, piece in enumerate(pieces)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """T5's encoder of width 32."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def kl_vae_settings(latent_channels: int) -> Mapping[str, Any]:
    """Of a VAE with the real eightfold downsampling."""
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 2,
        "sample_size": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }

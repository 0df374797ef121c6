"""Prompts -> token ids, as diffusers' pipelines make them; of what is cut off the user hears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ray_diffsynth.data.warnings import warn


def warn_of_cut(prompt: str, tokens: int, limit: int) -> None:
    """Say that of a prompt's tokens only so many are read."""
    warn("caption_cut", prompt, f"{tokens} tokens cut to {limit}")


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, max_length: int, padding: str, prompts: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, L) both; a text longer than `max_length` is cut, and a warning says so.

    Args:
        padding: "max_length", or "longest" of the batch.
        prompts: what the texts were made of, where a template stands around them.
    """
    tokens = tokenizer(list(texts), padding=padding, max_length=max_length, truncation=True, return_tensors="pt")
    kept_of_each = tokens.attention_mask.sum(1).tolist()
    for prompt, text, kept in zip(prompts or texts, texts, kept_of_each, strict=True):
        # Only a text that fills the room can have been cut; it is counted again without a limit.
        if kept == max_length and (whole := len(tokenizer(text).input_ids)) > max_length:
            warn_of_cut(prompt, whole, max_length)
    return tokens.input_ids, tokens.attention_mask


def chat_texts(tokenizer: Any, prompts: Sequence[str], *, thinking: bool) -> list[str]:
    """Each prompt as a user's message in the tokenizer's chat template, up to where the assistant would answer."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in prompts
    ]

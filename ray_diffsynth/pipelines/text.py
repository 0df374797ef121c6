"""Prompts -> token ids, as diffusers' pipelines make them, with a word when something is cut off."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


def tokenize(tokenizer: Any, texts: Sequence[str], *, max_length: int, padding: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, L) both; a text longer than `max_length` is cut, and a warning says so.

    Args:
        padding: "max_length", or "longest" of the batch.
    """
    tokens = tokenizer(list(texts), padding=padding, max_length=max_length, truncation=True, return_tensors="pt")
    for text, kept in zip(texts, tokens.attention_mask.sum(1).tolist(), strict=True):
        # Only a text that fills the room can have been cut; it is counted again without a limit.
        if kept == max_length and len(tokenizer(text).input_ids) > max_length:
            logger.warning("the prompt is cut to %d tokens: %.80s…", max_length, text)
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

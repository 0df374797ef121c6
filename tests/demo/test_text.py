"""The tokenizer and the text encoder."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline

from ray_diffsynth.demo.captions import CREATURE, STYLE, vocabulary
from ray_diffsynth.demo.text_encoder import build_text_encoder
from ray_diffsynth.demo.tokenizer import PREFIX_TOKENS, TEMPLATE_PREFIX, build_tokenizer, learn_merges


def test_the_prefix_is_as_long_as_what_the_pipeline_drops() -> None:
    tokenizer = build_tokenizer()
    pipe = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=tokenizer, transformer=None)
    prefix, _ = pipe.prompt_template_encode.split("{}")
    assert prefix == TEMPLATE_PREFIX
    assert len(tokenizer(prefix)["input_ids"]) == PREFIX_TOKENS == pipe.prompt_template_encode_start_idx == 34


def test_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for word in [*vocabulary(), CREATURE, STYLE]:
        assert len(tokenizer.tokenize(word)) == 1
        assert len(tokenizer.tokenize(f" {word}")) == 1


def test_unknown_words_survive() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer("a dög, neon")["input_ids"]) == "a dög, neon"


def test_merges_build_each_word() -> None:
    assert learn_merges(["aab", "ab"]) == [("a", "b"), ("a", "ab")]


def test_the_encoder_is_frozen_and_deterministic() -> None:
    tokenizer = build_tokenizer()
    before = torch.random.get_rng_state()
    encoder, again = build_text_encoder(tokenizer, seed=3), build_text_encoder(tokenizer, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(p.requires_grad for p in encoder.parameters())
    for (name, p), q in zip(encoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_prompts_are_distinguishable() -> None:
    tokenizer = build_tokenizer()
    pipe = QwenImagePipeline(
        scheduler=None, vae=None, text_encoder=build_text_encoder(tokenizer), tokenizer=tokenizer, transformer=None
    )
    prompts = ["a large red heart on a blue background", "a large blue heart on a red background"]
    embeds, _ = pipe.encode_prompt([*prompts, "a small red heart on a blue background"], device="cpu")
    unit = torch.nn.functional.normalize(embeds, dim=-1)
    assert (unit[0] * unit[1]).sum(-1)[[2, 6]].max() < 0.7  # the two colours
    assert (unit[0] * unit[2]).sum(-1)[1] < 0.7  # the size

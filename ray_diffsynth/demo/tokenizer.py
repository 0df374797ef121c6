"""A Qwen2 tokenizer whose tokens are whole words, learnt from the caption grammar without a hub.

QwenImagePipeline puts a fixed system prompt before every prompt and drops the first 34 hidden states; that prefix is
34 tokens in Qwen's own vocabulary, and here too.
"""

from __future__ import annotations

from collections import Counter

from transformers import Qwen2Tokenizer

from ray_diffsynth.demo.captions import vocabulary

PREFIX_TOKENS = 34
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
TEMPLATE_PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's map from a byte to a printable character (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first and ties in alphabetical order, until each word is one token."""
    pieces = [list(word) for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(piece) > 1 for piece in pieces):
        pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(piece, best) for piece in pieces]
    return merges


def _merge(piece: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in piece:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer: each word of the captions and of the template is one token, with or without a leading space."""
    alphabet = byte_alphabet()
    template = SYSTEM.replace(",", "").replace(":", "").split() + ["system", "user", "assistant"]
    words = list(dict.fromkeys(form for word in [*vocabulary(), *template] for form in (word, f" {word}")))
    encoded = ["".join(alphabet[byte] for byte in word.encode()) for word in words]
    merges = learn_merges(encoded)
    symbols = [*sorted(alphabet.values()), *("".join(pair) for pair in merges), *SPECIAL_TOKENS]
    return Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))},
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=2048,
    )

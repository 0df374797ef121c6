from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_diffsynth.models.lora_file import LoraError, export_lora, read_lora


def state(modules: tuple[str, ...] = ("blocks.0.to_q", "blocks.1.to_out.0"), rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    out: dict[str, Tensor] = {}
    for module in modules:
        out[f"{module}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
        out[f"{module}.lora_B.weight"] = torch.randn(4, rank, generator=generator)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "pipe.dit.", "base_model.model.", ""])
def test_written_and_read(prefix: str, tmp_path: Path) -> None:
    path = str(tmp_path / "new folder" / "l.safetensors")
    export_lora(state(), prefix=prefix, rank=2, alpha=2.0, path=path, metadata={"base_model": "tiny"})
    assert set(load_file(path)) == {prefix + key for key in state()}
    tensors, metadata = read_lora(path)
    assert same(tensors, state())
    assert metadata == {"base_model": "tiny", "format": "pt"}


def test_alpha_is_folded_into_b(tmp_path: Path) -> None:
    path = str(tmp_path / "l.safetensors")
    export_lora(state(), prefix="", rank=2, alpha=8.0, path=path)
    tensors, _ = read_lora(path)
    for key, value in state().items():
        torch.testing.assert_close(tensors[key], value * (4.0 if "lora_B" in key else 1.0))
    export_lora(state(), prefix="", rank=2, alpha=None, path=path)
    assert same(read_lora(path)[0], state())


def test_dtype_and_rename(tmp_path: Path) -> None:
    path = str(tmp_path / "l.safetensors")
    export_lora(
        state(),
        prefix="x.",
        rank=2,
        alpha=1.0,
        path=path,
        dtype=torch.bfloat16,
        rename=lambda k: k.replace("to_q", "q"),
    )
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    expected = (state()["blocks.0.to_q.lora_B.weight"] * 0.5).bfloat16()  # scaled in fp32, rounded once
    assert torch.equal(tensors["x.blocks.0.q.lora_B.weight"], expected)
    with pytest.raises(LoraError, match="two keys"):
        export_lora(state(), prefix="", rank=2, alpha=1.0, path=path, rename=lambda k: "a.lora_A.weight")


def test_equal_states_give_equal_bytes_that_the_library_reads(tmp_path: Path) -> None:
    metadata = {name: name * 3 for name in "abcdefgh"}
    backwards = dict(reversed(state().items()))
    for name, tensors, extra in (("1", state(), metadata), ("2", backwards, dict(reversed(metadata.items())))):
        export_lora(tensors, prefix="p.", rank=2, alpha=1.0, path=str(tmp_path / name), metadata=extra)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    header = json.loads((tmp_path / "1").read_bytes()[8:].split(b"}", 1)[0] + b"}}")
    assert list(header["__metadata__"]) == sorted([*metadata, "format"])
    with safe_open(str(tmp_path / "1"), "pt") as file:
        assert file.metadata() == {**metadata, "format": "pt"}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["1", "2"]


def test_export_refuses_what_is_no_lora(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="empty"):
        export_lora({}, prefix="", rank=1, alpha=1.0, path=str(tmp_path / "x"))
    with pytest.raises(LoraError, match=r"to_q\.weight is no LoRA key"):
        export_lora({"to_q.weight": torch.ones(1)}, prefix="", rank=1, alpha=1.0, path=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_layouts_of_others(tmp_path: Path) -> None:
    def written(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Tensor]:
        path = tmp_path / "other.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
        return read_lora(str(path))[0]

    default = {k.replace(".weight", ".default.weight"): v for k, v in state().items()}
    assert same(written(default), state())
    assert same(written({f"pipe.dit.{k}": v for k, v in default.items()}), state())
    kohya = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in state().items()}
    assert same(written({f"diffusion_model.{k}": v for k, v in kohya.items()}), state())
    alphas = {f"{m}.alpha": torch.tensor(1.0) for m in ("blocks.0.to_q", "blocks.1.to_out.0")}
    halved = written({**kohya, **alphas})
    torch.testing.assert_close(halved["blocks.0.to_q.lora_B.weight"], state()["blocks.0.to_q.lora_B.weight"] / 2)
    config = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"blocks.0.to_q": 6}}
    scaled = written({f"transformer.{k}": v for k, v in state().items()}, {"lora_adapter_metadata": json.dumps(config)})
    torch.testing.assert_close(scaled["blocks.0.to_q.lora_B.weight"], state()["blocks.0.to_q.lora_B.weight"] * 3)
    torch.testing.assert_close(
        scaled["blocks.1.to_out.0.lora_B.weight"], state()["blocks.1.to_out.0.lora_B.weight"] * 2
    )


def test_a_file_for_several_models(tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    encoder = state(("layers.0.q_proj",))
    save_file(
        {**{f"transformer.{k}": v for k, v in state().items()}, **{f"text_encoder.{k}": v for k, v in encoder.items()}},
        path,
    )
    with pytest.raises(LoraError, match=r"several models.*'text_encoder\.', 'transformer\.'"):
        read_lora(str(path))
    assert same(read_lora(str(path), prefix="transformer.")[0], state())
    assert same(read_lora(str(path), prefix="text_encoder.")[0], encoder)
    with pytest.raises(LoraError, match="no key that starts with 'unet"):
        read_lora(str(path), prefix="unet.")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_blocks_0_to_q.lora_down.weight", "flattened names"),
        ("blocks.0.to_q.dora_scale", "DoRA"),
        ("blocks.0.to_q.lokr_w1", "LoKr"),
        ("blocks.0.to_q.hada_w1_a", "LoHa"),
        ("blocks.0.to_q.oft_blocks", "OFT"),
        ("blocks.0.to_q.oft_R.weight", "OFT"),
        ("blocks.0.to_q.ia3_l", r"\(IA\)3"),
        ("blocks.0.to_q.diff_b", "full weight difference"),
        ("blocks.0.to_q.lora_mid.weight", "Tucker"),
        ("blocks.0.to_q.lora_B.bias", "LoRA with biases"),
        ("blocks.0.to_q.lora_up.weight", "two LoRAs"),
        ("blocks.0.to_q.alpha", "holds 4 numbers, not one"),
        ("blocks.0.to_q.diff", "full weight difference"),
        ("blocks.0.to_q.weight", "no known layout"),
        ("blocks.0.to_k.lora_A.weight", "only lora_A"),
    ],
)
def test_layouts_that_cannot_be_read(key: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({**state(), key: torch.ones(2, 2)}, path)
    with pytest.raises(LoraError, match=rf"odd\.safetensors.*{message}"):
        read_lora(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(state(), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "none.safetensors").write_bytes(b"")
    save_file({}, tmp_path / "none.safetensors")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 253806278\n"
    (tmp_path / "pointer.safetensors").write_text(pointer)
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html><body>Sign in")
    (tmp_path / "gated.safetensors").write_text("Access to model x is restricted.")
    torch.save(state(), tmp_path / "zip.safetensors")
    header = b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'  # a number format of another version
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for name, message in (
        ("absent.safetensors", "does not exist"),
        ("cut.safetensors", "not a readable safetensors"),
        ("empty.safetensors", r"empty\.safetensors is empty \(0 bytes\).*download it again"),
        ("pointer.safetensors", r"a Git LFS pointer.*git lfs pull"),
        ("page.safetensors", "a web page"),
        ("gated.safetensors", "its text is 'Access to model x is restricted.'"),
        ("zip.safetensors", "is a pickle by its content"),
        ("odd.safetensors", "not a readable safetensors"),
        ("none.safetensors", "holds no LoRA"),
        ("l.bin", "pickle"),
    ):
        with pytest.raises(LoraError, match=message):
            read_lora(str(tmp_path / name))

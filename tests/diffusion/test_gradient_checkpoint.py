from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_diffsynth.diffusion import gradient_checkpoint
from ray_diffsynth.diffusion.gradient_checkpoint import enable_checkpointing, gradient_checkpoint_forward


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, image: Tensor, text: Tensor | None = None, scale: float = 1.0, mask: Tensor | None = None) -> Any:
        self.calls += 1
        hidden = torch.sigmoid(self.inner(image)) * scale
        hidden = hidden if mask is None else hidden * mask
        return (text + hidden.mean() if text is not None else None), hidden


def gradients(use: bool, offload: bool, device: str = "cpu") -> tuple[list[Tensor], int]:
    torch.manual_seed(0)
    block = Block().to(device)
    image = torch.randn(2, 4, device=device, requires_grad=True)
    text = torch.randn(2, 3, device=device, requires_grad=True)
    mask = torch.tensor([[1.0], [0.5]], device=device)
    a, b = image * 2, text * 3
    for _ in range(2):
        b, a = gradient_checkpoint_forward(block, use, offload, a, text=b, scale=2.0, mask=mask)
    (a.sum() + b.square().sum()).backward()
    found = [image.grad, text.grad, block.inner.weight.grad]
    return [g.cpu() for g in found if g is not None], block.calls


@pytest.mark.parametrize(("use", "offload"), [(True, False), (False, True), (True, True)])
def test_gradients_equal_those_without(use: bool, offload: bool) -> None:
    expected, calls = gradients(False, False)
    assert calls == 2
    found, calls = gradients(use, offload)
    assert calls == 4  # each block ran again
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_without_gradients_the_block_runs_once_and_plainly() -> None:
    block = Block()
    with torch.no_grad():
        gradient_checkpoint_forward(block, True, True, torch.randn(1, 4))
    assert block.calls == 1


def test_offload_packs_positional_and_keyword_tensors_that_carry_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], bool]] = []

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        seen.append((tuple(tensor.shape), tensor.requires_grad))
        return tensor.device, tensor

    monkeypatch.setattr(gradient_checkpoint, "_pack", pack)
    image, text = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    gradient_checkpoint_forward(Block(), True, True, image, text=text, mask=torch.ones(2, 1))
    assert ((2, 4), True) in seen and ((2, 3), True) in seen and ((2, 1), False) in seen
    assert len(seen) == 3  # nothing from inside the block


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offload_on_a_gpu_keeps_the_inputs_of_blocks_in_cpu_memory() -> None:
    expected, _ = gradients(False, False, "cuda")
    found, _ = gradients(True, True, "cuda")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    block = nn.Sequential(nn.Linear(1024, 1024)).cuda()
    held = []
    for offload in (False, True):
        hidden = torch.randn(1024, 1024, device="cuda", requires_grad=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(8):
            hidden = gradient_checkpoint_forward(block, True, offload, hidden)
        held.append(torch.cuda.memory_allocated() - before)
        hidden.sum().backward()
    assert held[1] < held[0] / 4


def test_enable_checkpointing_plugs_into_diffusers_and_out_again() -> None:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    calls: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for use, offload in [(False, False), (True, False), (True, True), (False, False)]:
        enable_checkpointing(model, use, offload)
        model.zero_grad()
        calls.clear()
        output = model(
            hidden_states=torch.ones(1, 4, 16), encoder_hidden_states=torch.ones(1, 3, 8), timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 2, 2)]], return_dict=False,
        )[0]  # fmt: skip
        output.square().sum().backward()
        found.append((len(calls), model.img_in.weight.grad))
    assert [count for count, _ in found] == [1, 2, 2, 1]
    for _, gradient in found:
        assert torch.equal(gradient, found[0][1])


def test_a_model_without_the_hook_says_so() -> None:
    enable_checkpointing(nn.Linear(1, 1), False, False)
    with pytest.raises(TypeError, match="Linear has no enable_gradient_checkpointing"):
        enable_checkpointing(nn.Linear(1, 1), True, False)

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from ray_diffsynth.models.lora import (
    LoraError,
    add_lora,
    fuse_lora,
    load_lora_file,
    load_lora_state,
    lora_parameters,
    lora_state,
    match_targets,
)
from ray_diffsynth.models.lora_file import export_lora, read_lora


class Attention(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(size, size)
        self.to_out = nn.ModuleList([nn.Linear(size, size), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Net(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(size, size, 3, padding=1)
        self.blocks = nn.ModuleList([Attention(size) for _ in range(2)])
        self.proj_out = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: (B, size, h, w)
        x = self.conv(x).movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def picture() -> torch.Tensor:
    return torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))


def trained(module: nn.Module, **options: object) -> nn.Module:
    settings = {"rank": 2, "alpha": 3.0, "target_modules": "to_q,to_out.0,conv", "seed": 0, "name": "dit", **options}
    add_lora(module, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    for parameter in lora_parameters(module).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def test_add_lora_changes_nothing_yet_and_trains_only_the_adapter() -> None:
    module = net().requires_grad_(False)
    before = module(picture())
    info = add_lora(module, rank=2, alpha=None, target_modules=["to_q"], seed=0, name="dit")
    assert torch.equal(module(picture()), before)
    assert info.targets == ("blocks.0.to_q", "blocks.1.to_q")
    assert (info.rank, info.alpha, info.scale) == (2, 2.0, 1.0)
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert len(trainable) == 4 and all("lora_" in n for n in trainable)
    assert info.parameters == sum(p.numel() for p in module.parameters() if p.requires_grad) == 2 * 2 * (2 * 6)
    module(picture()).sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "lora_B" in n)


def test_the_start_is_a_function_of_seed_name_and_path() -> None:
    def start(seed: int = 0, name: str = "dit", targets: str = "to_q") -> dict[str, torch.Tensor]:
        module = net()
        add_lora(module, rank=2, alpha=1, target_modules=targets, seed=seed, name=name)
        return lora_state(module)

    torch.manual_seed(5)
    a = start()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(5)))  # global one unmoved
    b = start(targets="to_out.0,to_q")  # other layers do not shift these
    for key, value in a.items():
        assert torch.equal(value, b[key])
    key = "blocks.0.to_q.lora_A.weight"
    assert not torch.equal(a[key], a["blocks.1.to_q.lora_A.weight"])
    assert not torch.equal(a[key], start(seed=1)[key])
    assert not torch.equal(a[key], start(name="text_encoder")[key])
    assert 0 < a[key].abs().max() <= 6**-0.5  # kaiming-uniform(√5): ±1/√fan_in


def test_parameters_are_fp32_on_a_bf16_base() -> None:
    module = net().bfloat16()
    add_lora(module, rank=2, alpha=1, target_modules="to_q,conv", seed=0, name="dit")
    assert {p.dtype for p in lora_parameters(module).values()} == {torch.float32}
    assert module(picture().bfloat16()).dtype == torch.bfloat16


def test_targets() -> None:
    module = net()
    assert match_targets(module, "to_out.0, to_q") == tuple(
        f"blocks.{i}.{n}" for i in (0, 1) for n in ("to_q", "to_out.0")
    )
    assert match_targets(module, ["blocks.1.to_q"]) == ("blocks.1.to_q",)
    assert match_targets(module, r"re:blocks\.\d+\.to_q") == ("blocks.0.to_q", "blocks.1.to_q")
    assert len(match_targets(module, "all-linear")) == 5
    # the whole path, not a suffix of another path
    add_lora(module, rank=1, alpha=1, target_modules=r"re:proj_out", seed=0, name="dit")
    assert {k.split(".lora_")[0] for k in lora_state(module)} == {"proj_out"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("to_q,to_w", r"'to_w' \(did you mean .*to_q.*Layers there: conv, to_q, to_out\.0, proj_out"),
        ("to_out", r"'to_out' is a ModuleList.*holds to_out\.0"),
        ("q", r"'q' \(did you mean to_q\?\)"),
        ("", "is empty"),
        ("re:nothing", "matches no layer"),
        ("re:(", "no regular expression"),
    ],
)
def test_targets_that_match_nothing(targets: str, message: str) -> None:
    module = net()
    with pytest.raises(LoraError, match=message):
        add_lora(module, rank=2, alpha=1, target_modules=targets, seed=0, name="dit")
    assert not lora_parameters(module)


def test_bad_rank_and_a_second_adapter() -> None:
    with pytest.raises(LoraError, match="lora_rank=0"):
        add_lora(net(), rank=0, alpha=1, target_modules="to_q", seed=0, name="dit")
    with pytest.raises(LoraError, match="already has a LoRA"):
        add_lora(trained(net()), rank=2, alpha=1, target_modules="to_q", seed=0, name="dit")


def test_state_is_pefts_and_comes_back() -> None:
    module = trained(net())
    state = lora_state(module)
    reference = peft.get_peft_model_state_dict(module)  # type: ignore[arg-type]
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[k], reference[k]) for k in state)
    other = net()
    add_lora(other, rank=2, alpha=3, target_modules="to_q,to_out.0,conv", seed=9, name="dit")
    load_lora_state(other, state)
    assert torch.equal(other(picture()), module(picture()))
    state["proj_out.lora_A.weight"] = state.pop("conv.lora_A.weight")
    state["blocks.0.to_q.lora_A.weight"] = torch.zeros(5, 6)
    kept = lora_state(other)
    with pytest.raises(
        LoraError, match=r"missing: conv\.lora_A.*unexpected: proj_out\.lora_A.*shapes: blocks\.0\.to_q.*\(5, 6\)"
    ):
        load_lora_state(other, state)
    assert all(torch.equal(kept[k], v) for k, v in lora_state(other).items())


def test_state_is_a_copy() -> None:
    module = trained(net())
    state = lora_state(module)
    kept = {k: v.clone() for k, v in state.items()}
    for parameter in lora_parameters(module).values():
        parameter.data.zero_()
    assert all(torch.equal(kept[k], state[k]) for k in kept)


@pytest.mark.parametrize("rslora", [False, True])
def test_fuse_equals_the_adapter(rslora: bool, tmp_path: Path) -> None:
    module = trained(net(), rslora=rslora)
    expected = module(picture())
    export_lora(lora_state(module), prefix="", rank=2, alpha=3.0, path=str(tmp_path / "l.safetensors"), rslora=rslora)
    base = net()
    fuse_lora(base, read_lora(str(tmp_path / "l.safetensors"))[0])
    torch.testing.assert_close(base(picture()), expected, rtol=0, atol=1e-5)
    half = net()
    fuse_lora(half, read_lora(str(tmp_path / "l.safetensors"))[0], scale=0.5)
    torch.testing.assert_close(half.blocks[0].to_q.weight * 2, net().blocks[0].to_q.weight + base.blocks[0].to_q.weight)


def test_fuse_below_an_adapter_and_its_errors() -> None:
    state = {"blocks.0.to_q.lora_A.weight": torch.ones(1, 6), "blocks.0.to_q.lora_B.weight": torch.ones(6, 1)}
    module = trained(net())
    fuse_lora(module, state)
    assert torch.equal(module.blocks[0].to_q.base_layer.weight, net().blocks[0].to_q.weight + 1)  # type: ignore[union-attr]
    untouched = net()
    reference = copy.deepcopy(untouched.state_dict())
    absent = {k.replace("blocks.0", "layers.0"): v for k, v in state.items()}
    with pytest.raises(LoraError, match=r"does not have: layers\.0\.to_q.*Layers there"):
        fuse_lora(untouched, {**state, **absent})
    with pytest.raises(LoraError, match=r"does not fit its weight \(6, 6\)"):
        fuse_lora(
            untouched,
            {**state, "blocks.1.to_q.lora_A.weight": torch.ones(1, 5), "blocks.1.to_q.lora_B.weight": torch.ones(6, 1)},
        )
    with pytest.raises(LoraError, match="DoRA"):
        fuse_lora(untouched, {**state, "blocks.0.to_q.lora_magnitude_vector": torch.ones(6)})
    assert all(torch.equal(reference[k], v) for k, v in untouched.state_dict().items())


def test_going_on_from_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "l.safetensors")
    module = trained(net())
    export_lora(lora_state(module), prefix="diffusion_model.", rank=2, alpha=3.0, path=path)
    other = net()
    info = add_lora(other, rank=2, alpha=8.0, target_modules="to_q,to_out.0,conv", seed=1, name="dit")
    load_lora_file(other, path, info)
    torch.testing.assert_close(other(picture()), module(picture()), rtol=0, atol=1e-6)
    smaller = net()
    info = add_lora(smaller, rank=1, alpha=1.0, target_modules="to_q,to_out.0,conv", seed=1, name="dit")
    with pytest.raises(LoraError, match=r"l\.safetensors.*shapes.*same lora_rank"):
        load_lora_file(smaller, path, info)


def test_dora_trains_and_round_trips(tmp_path: Path) -> None:
    module = trained(net(), dora=True, target_modules="to_q")
    path = str(tmp_path / "d.safetensors")
    export_lora(lora_state(module), prefix="transformer.", rank=2, alpha=3.0, path=path)
    other = net()
    info = add_lora(other, rank=2, alpha=3.0, target_modules="to_q", seed=1, name="dit", dora=True)
    load_lora_file(other, path, info)
    torch.testing.assert_close(other(picture()), module(picture()), rtol=0, atol=1e-6)

"""What this package uses of other libraries beside their public interface: read this first after an upgrade.

USES names each private name, undocumented helper and matched message, with who uses it and why; its check fails when an
upgrade changes it. Ray's are looked at in tests/test_ray_compat.py, in the one module that may use them. A private name
that USES does not have fails too.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import peft
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.hooks import layerwise_casting
from jsonschema import ValidationError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster.check.autoscaling import Started, started_pods
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.diffusion.out_of_memory import is_out_of_memory
from ray_diffsynth.models.lora import add_lora, leave_casts_to_autocast, lora_state
from ray_diffsynth.training.lr_schedules import LR_SCHEDULES
from tests import test_ray_compat

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ray_diffsynth"
OTHERS = ("jobs", "cluster.check")
"""What stands beside the package."""


class Use(NamedTuple):
    """One of them. ``private``: its names that begin with an underscore, in ``module``, as `sources` names it."""

    library: str
    module: str
    private: tuple[str, ...]
    why: str
    check: Callable[[], None]


def ray_is_checked_elsewhere() -> None:
    assert test_ray_compat.test_the_state_of_the_nodes and test_ray_compat.ray_compat.init_local


def autoscaler_is_asked_and_answers() -> None:
    assert test_ray_compat.test_the_first_autoscaler_says_what_comes
    assert test_ray_compat.test_the_second_autoscaler_says_what_comes


def ray_keeps_the_dead() -> None:
    assert test_ray_compat.test_a_process_that_died_for_memory_is_told_apart
    assert test_ray_compat.test_a_process_that_died_otherwise


def ray_start_has_a_folder() -> None:
    import ray

    assert "_temp_dir" in inspect.getsource(ray.init)


def ray_takes_loopback_for_its_address() -> None:
    from ray._private import ray_constants, services
    from ray.train.torch import config

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(services.ray._private.worker, "_global_node", None)
        patched.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        assert services.get_node_ip_address() == "127.0.0.1"
    assert "execute_single(\n                0, get_address_and_port\n" in inspect.getsource(
        config._TorchBackend.on_start
    )


def ray_plans_pods_from_a_manifest() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    pod = {"spec": {"containers": [{"resources": {"limits": {"cpu": "2", "nvidia.com/gpu": "1"}}}]}}
    group = {"groupName": "g", "labels": {"a": "b"}, "minReplicas": 0, "maxReplicas": 2, "template": pod}
    cluster = {"headGroupSpec": {"template": pod}, "workerGroupSpecs": [group]}
    assert started_pods(cluster, [{"GPU": 1.0}] * 2, [{"a": "b"}] * 2) == Started({"g": 2}, refused=False)
    assert started_pods(cluster, [{"GPU": 1.0}], [{"a": "c"}]) == Started({}, refused=True)
    with pytest.raises(ValidationError, match="nonsense"):
        validate_config({**prepare_config({"cluster_name": "c", "provider": {"type": "aws"}}), "nonsense": 1})


def ddp_leaves_parameters_out() -> None:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module := nn.Linear(2, 2), ["weight"])
    assert module._ddp_params_and_buffers_to_ignore == ["weight"]
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(DistributedDataParallel.__init__)


def modules_keep_what_they_own_in_three_dicts() -> None:
    module = nn.BatchNorm1d(2)
    module.inner = nn.Linear(1, 1)
    own = {name: list(vars(module)[name]) for name in ("_modules", "_parameters", "_buffers")}
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert own == {"_modules": ["inner"], "_parameters": ["weight", "bias"], "_buffers": buffers}


def models_name_the_layers_that_are_not_cast() -> None:
    assert diffusers.ModelMixin._keep_in_fp32_modules is None
    assert diffusers.ModelMixin._skip_layerwise_casting_patterns is None
    assert diffusers.QwenImageTransformer2DModel._skip_layerwise_casting_patterns == ["pos_embed", "norm"]
    assert not transformers.PreTrainedModel._keep_in_fp32_modules
    assert not transformers.PreTrainedModel._keep_in_fp32_modules_strict
    put_together = inspect.getsource(diffusers.ModelMixin.enable_layerwise_casting)
    for part in ("DEFAULT_SKIP_MODULES_PATTERN", "_keep_in_fp32_modules", "_skip_layerwise_casting_patterns"):
        assert part in put_together, f"layerwise casting is no longer decided by {part}: see kept_patterns"
    assert all(isinstance(pattern, str) for pattern in layerwise_casting.DEFAULT_SKIP_MODULES_PATTERN)
    assert "re.search(pattern, " in inspect.getsource(layerwise_casting), "see keeping_pattern"


def configurations_say_who_saved_them() -> None:
    saved = json.loads(diffusers.AutoencoderKL().to_json_string())
    assert saved["_class_name"] == "AutoencoderKL" and "_diffusers_version" in saved
    config = transformers.Qwen2Config(name_or_path="somewhere")
    assert {"transformers_version"} <= json.loads(config.to_json_string(use_diff=False)).keys()
    assert "_name_or_path" in vars(config)


def formulas_of_pipelines() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    # With 200 steps 0.00016927·4096 + 0.45666666 = 1.14999658, with 10 steps 8.73809524e-05·4096 + 1.89833333 =
    # 2.25624571, and a straight line between them: 1.14999658 + 150/190·(2.25624571 - 1.14999658).
    assert compute_empirical_mu(image_seq_len=4096, num_steps=50) == pytest.approx(2.02335, abs=1e-5)
    assert prompt_clean("  a &amp;amp; b \n c ") == "a & b c"


def qwen_image_has_its_template_on_it() -> None:
    for name in ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"):
        pipe = getattr(diffusers, name)
        made = inspect.getsource(pipe.__init__)
        for attribute in ("tokenizer_max_length", "prompt_template_encode", "prompt_template_encode_start_idx"):
            assert f"self.{attribute} = " in made, (name, attribute)
    limit = inspect.getsource(diffusers.QwenImagePipeline._get_qwen_prompt_embeds)
    assert "max_length=self.tokenizer_max_length + drop_idx" in limit, "see encode_prompts"


def schedules_are_functions_of_the_step() -> None:
    factor = LR_SCHEDULES["cosine"].make(2, 10, 1e-4)
    assert [factor(0), factor(1), factor(2)] == [0.0, 0.5, 1.0] and factor(10) == pytest.approx(0.0)


def loras_have_the_names_that_are_read() -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    add_lora(module, rank=2, alpha=2.0, target_modules=["0"], seed=0, name="dit")
    assert set(lora_state(module)) == {"0.lora_A.weight", "0.lora_B.weight"}
    layer = module[0]
    assert isinstance(layer, BaseTunerLayer) and layer.cast_input_dtype_enabled is True
    leave_casts_to_autocast(module)
    assert layer.cast_input_dtype_enabled is False
    assert isinstance(layer.get_base_layer(), nn.Linear) and callable(layer.set_scale)
    dora = nn.Sequential(nn.Linear(4, 4))
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["0"], use_dora=True), dora, adapter_name="default"
    )
    assert "0.lora_magnitude_vector.default.weight" in dict(dora.named_parameters())


def too_little_memory_is_said_so() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value), raised.value


def errors_of_rust_have_their_number() -> None:
    with pytest.raises(safetensors.SafetensorError, match=r"\(os error 2\)"):
        safetensors.torch.save_file({"a": torch.zeros(1)}, "/no/such/folder/a.safetensors")


REFUSED = {
    "--lora_rank=x": "--lora_rank x: expected a whole number",
    "--log_every": "--log_every needs a value",
    "stray": "'stray' belongs to no option",
    "--use_dora=perhaps": "--use_dora perhaps: expected true or false",
    "--resources={": "--resources {: expected a JSON object",
}


def messages_of_flags_are_made_shorter() -> None:
    given = ["--dataset_base_path", "d", "--model", "m"]
    for word, wanted in {**REFUSED, "": "--dataset_base_path is missing"}.items():
        with redirect_stderr(StringIO()) as shown, pytest.raises(SystemExit):
            parse(TrainConfig, [*given, word] if word else [], prog="job")
        assert wanted in shown.getvalue(), word


USES = [
    Use("ray", "ray_compat", ("_private", "_temp_dir"), "the state of the nodes", ray_is_checked_elsewhere),
    Use("ray", "ray_compat", ("ray.data._internal",), "ignored blocks are reported in a log", ray_is_checked_elsewhere),
    Use(
        "ray",
        "ray_compat",
        ("_internal",),
        "what the autoscaler says, and who collects requests to it",
        autoscaler_is_asked_and_answers,
    ),
    Use("ray", "ray_compat", ("_temp_dir",), "sockets in a folder that goes with the run", ray_start_has_a_folder),
    Use("ray", "ray_compat", ("_private",), "a local Ray on loopback alone", ray_takes_loopback_for_its_address),
    Use(
        "ray", "ray_compat", ("_private", "_connect_and_get_accessor"), "how a worker process died", ray_keeps_the_dead
    ),
    Use(
        "ray",
        "training.ray.process_group",
        ("_internal",),
        "torch's store on loopback alone",
        ray_takes_loopback_for_its_address,
    ),
    Use(
        "ray",
        "training.ray.fit",
        ("_register_sigint_handler",),
        "Ctrl-C is the job's",
        test_ray_compat.test_ray_train_registers_its_handler_of_ctrl_c_by_a_method,
    ),
    Use(
        "ray",
        "cluster.check.autoscaling",
        ("_private", "_derive_autoscaling_config_from_ray_cr"),
        "which pods a demand would start",
        ray_plans_pods_from_a_manifest,
    ),
    Use("ray", "cluster.check.launcher", ("_private",), "the validation of ray up", ray_plans_pods_from_a_manifest),
    Use(
        "torch",
        "training.distributed",
        ("_set_params_and_buffers_to_ignore_for_model",),
        "frozen weights need no broadcast",
        ddp_leaves_parameters_out,
    ),
    Use(
        "torch",
        "pipelines.core.check",
        ("_modules", "_parameters", "_buffers"),
        "what a unit changes on its pipeline",
        modules_keep_what_they_own_in_three_dicts,
    ),
    Use(
        "diffusers, transformers",
        "training.quantize",
        ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_skip_layerwise_casting_patterns"),
        "the layers that keep their precision",
        models_name_the_layers_that_are_not_cast,
    ),
    Use(
        "diffusers, transformers", "models.fingerprint", (), "keys that do not count", configurations_say_who_saved_them
    ),
    Use("diffusers", "pipelines.flux2", (), "the time shift and Wan's cleaning of captions", formulas_of_pipelines),
    Use("diffusers", "pipelines.qwen_image", (), "the prompt template", qwen_image_has_its_template_on_it),
    Use("diffusers", "training.lr_schedules", (), "the factors of get_scheduler", schedules_are_functions_of_the_step),
    Use("peft", "models.lora", (), "names of parameters and attributes of layers", loras_have_the_names_that_are_read),
    Use("torch", "diffusion.out_of_memory", (), "the message of the CPU's allocator", too_little_memory_is_said_so),
    Use("safetensors", "system_errors", (), "the number in the message", errors_of_rust_have_their_number),
    Use("jsonargparse", "config.flags", (), "the messages of its parser", messages_of_flags_are_made_shorter),
]
"""Of accelerate, fsspec and pyarrow nothing private is used."""


@pytest.mark.parametrize("use", USES, ids=[f"{use.module}:{use.check.__name__}" for use in USES])
def test_it_is_still_so(use: Use) -> None:
    importlib.import_module(dotted(use.module))
    use.check()


def sources() -> Iterator[tuple[str, ast.Module]]:
    """(dotted name below the package, syntax tree) of every module; those of OTHERS begin with their own name."""
    folders = (ROOT / name.replace(".", "/") for name in (PACKAGE, *OTHERS))
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removeprefix(f"{PACKAGE}.").removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def dotted(name: str) -> str:
    """The name by which a module that `sources` names is imported."""
    return name if name.startswith(OTHERS) else f"{PACKAGE}.{name}"


def private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def given_names(tree: ast.Module) -> set[str]:
    """Names that a module gives: to functions, classes, arguments, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


@functools.cache
def given_by_modules() -> dict[str, set[str]]:
    """Dotted name of a module of the package -> the names that it gives."""
    return {dotted(name): given_names(tree) for name, tree in sources()}


def own_names(tree: ast.Module) -> set[str]:
    """Names that a module gives, or another one of the package that it imports from."""
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return given_names(tree).union(*(given_by_modules().get(name, set()) for name in imported))


@functools.cache
def attributes_of_bases() -> set[str]:
    """Private attributes of the foreign classes that models and pipelines are made of."""
    holders = (nn.Module(), diffusers.ModelMixin, transformers.PreTrainedModel)
    return {name for holder in holders for name in dir(holder) if private(name)}


def uses_in(tree: ast.Module) -> set[str]:
    """Private names of others that a module reads, sets, imports, gives as a keyword or looks up by a text."""
    own, found = own_names(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            found.add(node.attr)
        elif isinstance(node, ast.Call):
            found |= {k.arg for k in node.keywords if k.arg and private(k.arg) and k.arg not in own}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in attributes_of_bases() - own:
                found.add(node.value)
            elif dotted := re.match(r"[a-z]\w*(?:\.\w+)*?\._[a-z]\w*(?=[.:]|$)", node.value):
                found.add(dotted[0])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or ""]
            modules += [alias.name for alias in node.names]
            if not modules[0].startswith(PACKAGE):
                found |= {part for module in modules for part in module.split(".") if private(part)}
    return found


def overrides_in(name: str, tree: ast.Module) -> set[str]:
    """Private methods of others that a module's classes replace."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    methods = {c.name: [f.name for f in c.body if isinstance(f, ast.FunctionDef) and private(f.name)] for c in classes}
    if not any(methods.values()):
        return set()
    module = importlib.import_module(dotted(name))
    return {
        method
        for cls, names in methods.items()
        for base in getattr(module, cls).__mro__
        if not base.__module__.startswith((PACKAGE, *OTHERS))
        for method in names
        if method in vars(base)
    }


# Public in spite of its name: it is in the documentation of Python.
PUBLIC = {"_exit"}


def test_every_private_use_is_in_the_table() -> None:
    told: dict[str, set[str]] = {}
    for use in USES:
        told.setdefault(use.module, set()).update(use.private)
    found = {name: (uses_in(tree) | overrides_in(name, tree)) - PUBLIC for name, tree in sources()}
    found = {name: names for name, names in found.items() if names}
    assert found == {module: names for module, names in told.items() if names}, (
        "use what is public instead, or add a line with a check to USES"
    )


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import pyarrow\npyarrow.lib._pc()", {"_pc"}),
        ("from peft._internal import x", {"_internal"}),
        ("from accelerate.state import _state", {"_state"}),
        ("f(_hidden=1)", {"_hidden"}),
        ("logging.getLogger('diffusers._utils')", {"diffusers._utils"}),
        ("getattr(model, '_no_split_modules')", {"_no_split_modules"}),
        ("from ray_diffsynth.a import _b\nx.__dict__", set()),
        ("import os\nos.path.join('a._b c', '_')", set()),
    ],
)
def test_what_counts_as_private(code: str, names: set[str]) -> None:
    assert uses_in(ast.parse(code)) == names


def test_a_replaced_method_is_found() -> None:
    tree = ast.parse((ROOT / PACKAGE / "training" / "ray" / "fit.py").read_text(encoding="utf-8"))
    found: Any = overrides_in("training.ray.fit", tree)
    assert found == {"_register_sigint_handler"}


def test_what_is_used_so_has_an_upper_bound() -> None:
    """An upgrade that changes it is not installed before it has been looked at."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {
        match[1]: match[2] for line in project["dependencies"] if (match := re.match(r"([\w-]+)\S*?(<.*)?$", line))
    }
    used = {library for use in USES for library in use.library.split(", ")}
    assert not [library for library in sorted(used) if not bounds[library]]

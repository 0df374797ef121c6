"""Family name -> pipeline class, and the family of a model folder; torch is imported only with a class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ray_diffsynth.models.folder import ModelFolderError, read_json_object
from ray_diffsynth.pipelines.own_module import FamilyError as FamilyError
from ray_diffsynth.pipelines.own_module import import_own_module

if TYPE_CHECKING:
    from ray_diffsynth.models.locate import ModelSource
    from ray_diffsynth.pipelines.core.base import BasePipeline


@dataclass(frozen=True)
class Family:
    """Where a family's class is, and by which class names in a model's configuration files it is recognised."""

    pipeline: str
    """`module:Class`, the module within `ray_diffsynth.pipelines`."""
    index: str
    """The pipeline's class in model_index.json."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Folder of a part -> its class, for a folder without model_index.json. One that families share names the most
    general of them."""


FAMILIES: Mapping[str, Family] = {
    "flux": Family("flux:FluxPipeline", "FluxPipeline", {"transformer": "FluxTransformer2DModel"}),
    "flux2": Family(
        "flux2:Flux2KleinPipeline",
        "Flux2KleinPipeline",
        {"transformer": "Flux2Transformer2DModel", "vae": "AutoencoderKLFlux2"},
    ),
    "qwen_image": Family(
        "qwen_image.pipeline:QwenImagePipeline",
        "QwenImagePipeline",
        {
            "transformer": "QwenImageTransformer2DModel",
            "vae": "AutoencoderKLQwenImage",
            "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        },
    ),
    "qwen_image_edit": Family("qwen_image_edit:QwenImageEditPipeline", "QwenImageEditPipeline"),
    "qwen_image_edit_plus": Family("qwen_image_edit_plus:QwenImageEditPlusPipeline", "QwenImageEditPlusPipeline"),
    "wan": Family(
        "wan.pipeline:WanPipeline",
        "WanPipeline",
        {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"},
    ),
    "wan_i2v": Family("wan_i2v:WanImageToVideoPipeline", "WanImageToVideoPipeline"),
    "z_image": Family("z_image:ZImagePipeline", "ZImagePipeline", {"transformer": "ZImageTransformer2DModel"}),
}
_PARTS = ("transformer", "vae", "text_encoder")
"""Whose configuration is looked at, in this order: text encoders come last, since families share them."""


def get_pipeline_class(family: str) -> type[BasePipeline]:
    """The pipeline class of a family: a name of FAMILIES, or your own as `my_module[:Class]`, `my_package.my_module`.

    Raises:
        FamilyError: unknown name (lists the nearest), a module that cannot be imported, or one without one
            BasePipeline subclass of its own.
    """
    if family in FAMILIES:
        module_name, _, class_name = f"{__package__}.{FAMILIES[family].pipeline}".partition(":")
        module = importlib.import_module(module_name)
    else:
        module_name, _, class_name = family.partition(":")
        module = import_own_module(family, FAMILIES)
    from ray_diffsynth.pipelines.core.base import BasePipeline

    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BasePipeline) and value.__module__ == module.__name__
    }
    if class_name and class_name not in own:
        raise FamilyError(f"{module_name} defines no pipeline {class_name!r}; it defines {', '.join(own) or 'none'}")
    if not class_name and len(own) != 1:
        where = getattr(module, "__file__", None) or "built in, or a folder without __init__.py"
        raise FamilyError(
            f"{module_name} ({where}) defines {', '.join(own) or 'no pipeline'}; "
            f"name one BasePipeline subclass: {module_name}:Class"
            + ("" if own else f"; known families: {', '.join(sorted(FAMILIES))}")
        )
    return own[class_name] if class_name else next(iter(own.values()))


def choose_family(given: str | None, source: ModelSource) -> str:
    """The family that is named, or that of the model's folder. Raises FamilyError if its parts are of another one."""
    if given is None:
        return family_of(source.root)
    for part in get_pipeline_class(given).parts.values():
        path = source.folder(part.subfolder) / "config.json"
        library, _, wanted = part.cls.partition(":")
        held = _class_names(path) if library == "diffusers" and path.is_file() else []
        if held and wanted not in held:
            raise FamilyError(
                f"--family {given} needs {wanted}, but {path.parent} holds {held[0]}; leave --family out to have it "
                "read from the model, or name the right model"
            )
    return given


def family_of(root: Path | str) -> str:
    """The family of a model folder, from model_index.json or else from the configuration of one of its parts.

    Raises:
        FamilyError: a model of no known family, or a folder that does not tell; says what was looked at.
    """
    root = Path(root)
    looked_at: list[str] = []
    places = [(root / "model_index.json", {known.index: name for name, known in FAMILIES.items()})]
    for part in _PARTS:
        classes = {known.parts[part]: name for name, known in FAMILIES.items() if part in known.parts}
        places.append((root / part / "config.json", classes))
    for path, classes in places:
        if not path.is_file():
            looked_at.append(f"{path} (absent)")
            continue
        names = _class_names(path)
        for name in names:
            if name in classes:
                return classes[name]
        looked_at.append(f"{path} ({', '.join(names) or 'names no class'})")
        if names and path.name == "model_index.json":
            break  # another pipeline may share its parts with a known family, and still need other inputs
    raise FamilyError(
        f"cannot tell the family of {root}: looked at {'; '.join(looked_at)}. "
        f"Known: {', '.join(sorted(FAMILIES))}; name the family by --family"
    )


def _class_names(path: Path) -> list[str]:
    try:
        config = read_json_object(path)
    except ModelFolderError as err:
        raise FamilyError(str(err)) from err
    return [str(name) for name in (config.get("_class_name"), *(config.get("architectures") or ())) if name]

"""The actor that makes images. Nothing that reads the environment is imported before the actor is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_diffsynth.cluster.environment import Parcel

if TYPE_CHECKING:
    from ray_diffsynth.generate.items import Item
    from ray_diffsynth.generate.painter import Painter
    from ray_diffsynth.plan.run_plan import GeneratePlan


class PainterActor:
    """`Painter` in an actor. The first call loads the model, so that its errors are those of a call."""

    def __init__(self, plan: Parcel) -> None:
        self.plan: GeneratePlan = plan.value
        self._painter: Painter | None = None

    def load(self) -> None:
        from ray_diffsynth.generate.painter import Painter

        if self._painter is None:
            self._painter = Painter(self.plan)

    def paint(self, item: Item) -> str:
        import torch

        self.load()
        assert self._painter is not None
        try:
            return self._painter(item)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise

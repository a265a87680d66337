"""Image towers of open_clip. The licence of the weights is that of the chosen checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ugicm_train.teachers.distance import FeatureTeacher, TeacherError, positions, require


class ClipTower(nn.Module):
    """Block outputs at a quarter, half, three quarters and all of the depth, then the embedding.

    For open_clip's own ViT and ResNet towers and for towers of timm (ViT, ConvNeXt, ResNet, ...).
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self._seen: list[Tensor] = []
        blocks = blocks_of(visual)
        taps = sorted({-(-len(blocks) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
        for tap in taps:
            blocks[tap].register_forward_hook(lambda _module, _inputs, output: self._seen.append(output))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> features as `FeatureTeacher` wants them."""
        self._seen.clear()
        embedding = self.visual(x)
        if isinstance(embedding, tuple):  # CoCa: (pooled, tokens)
            embedding = embedding[0]
        seen = [positions(block) if block.ndim == 4 else block for block in self._seen]
        self._seen.clear()
        return [*seen, embedding[:, None]]


def blocks_of(visual: nn.Module) -> Sequence[nn.Module]:
    """Blocks (ViT) or stages (CNN) of an image tower, shallow to deep."""
    for path in ("transformer.resblocks", "trunk.blocks", "trunk.stages"):
        try:
            return list(visual.get_submodule(path).children())
        except AttributeError:
            continue
    trunk = getattr(visual, "trunk", visual)
    stages = [getattr(trunk, f"layer{n}") for n in (1, 2, 3, 4) if hasattr(trunk, f"layer{n}")]
    if not stages:
        raise TeacherError(
            f"the image tower {type(trunk).__name__} is of no known kind: choose another model"
        )
    return stages


def load(identifier: str) -> FeatureTeacher:
    """``<model>/<pretrained tag or checkpoint path>``, or open_clip's own ``hf-hub:...``, ``local-dir:...``.

    Raises:
        TeacherError: unknown model or tag, no such file, or weights that cannot be fetched or read.
    """
    open_clip = require("open_clip", "open_clip_torch")
    name, pretrained = identifier, None
    if not identifier.startswith(("hf-hub:", "local-dir:")):
        name, _, pretrained = identifier.partition("/")
        models = open_clip.list_models()
        if name not in models:
            close = ", ".join(difflib.get_close_matches(name, models, 5, 0.4))
            raise TeacherError(f"open_clip has no model {name!r}; close names: {close or 'none'}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags and not Path(pretrained).is_file():
            raise TeacherError(
                f"{pretrained!r} is neither a checkpoint file nor a pretrained tag of {name} "
                f"(tags: {', '.join(tags) or 'none'}): give open_clip:{name}/<tag or path>"
            )
    try:
        model = open_clip.create_model(name, pretrained, require_pretrained=True)
    except Exception as error:  # whatever the download or the reader of checkpoints raises
        raise TeacherError(
            f"the weights of open_clip:{identifier} cannot be loaded ({error}). open_clip fetches them where "
            f"there is network access; elsewhere put a checkpoint file and give open_clip:{name}/<path>"
        ) from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size, mean, std = preprocess["size"], preprocess["mean"], preprocess["std"]
    side = size if isinstance(size, int) else size[0]
    return FeatureTeacher(ClipTower(model.visual), sides=(side,), mean=mean, std=std)

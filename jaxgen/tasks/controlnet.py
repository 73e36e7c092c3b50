"""Learning to follow hints: a ControlNet beside a UNet that stays as it is (Zhang et al. 2023)."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen.data.annotators import ANNOTATORS, lines, maps
from jaxgen.data.hints import fit
from jaxgen.data.images import warn_once
from jaxgen.denoiser import CONTROLLED, Model
from jaxgen.models.controlnet import ControlNet as Network
from jaxgen.models.controlnet_config import ControlNetConfig
from jaxgen.tasks import denoising
from jaxgen.tasks.base import Batch, Example, Task
from jaxgen.tasks.denoising import TextToImage
from jaxgen.types import Array, Control, Params, UserError

DROPOUT = 0.5  # of captions, so that what the hint shows is learned from the hint
DECODER = ("unet/up_blocks", "unet/conv_norm_out/", "unet/conv_out/")  # what `unlocked` frees
PALETTES = {"ade20k": maps.ADE20K_FILES, "distinct": maps.distinct(256)}


@dataclass(frozen=True)
class ControlNet(TextToImage):
    """Learn to follow hints, from a base model whose UNet stays as it is (Zhang et al. 2023).

    The network begins as a copy of the UNet's first half, and what it adds begins at zero.
    """

    learn: tuple[str, ...] = ("controlnet/",)
    """Patterns (regular expressions from the start) of the parameter paths that learn."""
    control: str = ""
    """A ControlNet to go on from: a folder, a hub id, a single file; by default, a fresh one."""
    hint: str = "hint"
    """What it follows: an annotator (canny, hough, soft, scribble, ...) that reads each picture, or
    a column of the data of another name: pictures, or the labels of `segmentation`."""
    palette: str = "ade20k"
    """Colours of labels, of which 0 is black: ade20k (1 to 150, as in its files), or distinct (1 to
    255, for data without colours of their own)."""
    hint_widths: tuple[int, ...] = ()
    """Channels of a fresh network's encoder of hints, from pixels to latents; by default those of
    the released ones, 16 32 96 256 where latents are an eighth."""
    unlocked: bool = False
    """Whether the UNet's decoder learns, too, as short last stretches far from the base's data do;
    with a rate of some 2e-6."""
    links: str = "all"
    """all, or middle: a first stretch on small devices, in which only the UNet's middle is added
    to; then go on from it (`control`) with all."""

    def build(self, model: Model) -> Task:
        """The task on a model for text to image. UserError if it is of another kind."""
        if self.links not in ("all", "middle"):
            raise UserError(f"links = {self.links!r} is neither all nor middle")
        if self.palette not in PALETTES:
            raise UserError(f"palette = {self.palette!r} is not one of {', '.join(PALETTES)}")
        if len(model.controls) > 1:
            raise UserError(f"{model.name} has {len(model.controls)} ControlNets; one can learn")
        if model.unet.config.in_channels != model.vae.config.latent_channels:
            raise UserError(
                f"{model.name} reads pictures; take the model for text to image that it is made "
                "of: a ControlNet fits both"
            )
        if model.pipeline not in CONTROLLED:
            raise UserError(f"diffusers has no {model.pipeline} with ControlNets to be saved for")
        if not model.controls:
            config = ControlNetConfig.of(model.unet.config, model.factor, self.hint_widths)
            model = replace(model, controls=(Network(config),))
        (net,) = model.controls
        widths = net.config.conditioning_embedding_out_channels
        if self.hint_widths not in ((), widths):
            raise UserError(f"hint_widths = {self.hint_widths}, and this goes on from {widths}")
        net = replace(net, remat=model.unet.remat, middle_only=self.links == "middle")
        model = denoising.scheduled(self, replace(model, controls=(net,)))
        freed = replace(self, learn=(*self.learn, *(DECODER if self.unlocked else ())))
        follow = partial(_follow, net.config.residuals)
        task = denoising.task_of(freed, model, follow, partial(self._example, model=model))
        annotates = self.hint in ANNOTATORS
        return task._replace(
            init=partial(_init, net, task.init),
            finished=_finished,
            columns=() if annotates else (self.hint,),
            dropout=DROPOUT,
        )

    def _example(self, example: Example, rng: np.random.Generator, *, model: Model) -> Example:
        """What the task reads of an example: picture, tokens, and the hint, uint8 [H, W, C]."""
        if self.hint == "canny":  # as many as people may draw, or annotators find
            low = rng.uniform(50, 150)
            hint = lines.canny(example["image"], low, rng.uniform(low + 25, 300))
        elif self.hint in ANNOTATORS:
            hint = ANNOTATORS[self.hint](example["image"])
        else:
            hint = example[self.hint]
            if getattr(hint, "ndim", 0) not in (2, 3):
                raise UserError(f"hint: the column {self.hint!r} holds no pictures")
            if hint.ndim == 2:
                hint = self._coloured(hint.astype(np.int32))
        height, width = hint.shape[:2]
        hint = fit(hint, width, height, model.controls[0].config.conditioning_channels)
        return denoising.captioned(example, rng, model=model) | {"hint": hint}

    def _coloured(self, labels: np.ndarray) -> np.ndarray:
        """Labels [H, W] in the palette's colours; that some have none is said once."""
        palette = PALETTES[self.palette]
        if labels.max() >= len(palette):
            warn_once(
                f"there are labels up to {labels.max()}; those from {len(palette)} on are black, "
                f"for which the palette {self.palette} has no colours"
            )
        return maps.segmentation(labels, palette)


def _init(net: Network, rest: Any, key: Array, given: Params) -> Params:
    """The base's parameters, and those of a ControlNet that begins as its copy, or is given."""
    params = rest(key, given)
    if "controlnet" in params:
        return params
    return {**params, "controlnet": net.begun(key, given["unet"])}


def _follow(residuals: int, params: Params, batch: Batch) -> dict[str, Any]:
    """The hint of each example, as the network is given it."""
    hint = batch["hint"].astype(jnp.float32) / 255
    return {"controls": (Control(hint, jnp.ones(residuals)),)}


def _finished(model: Model, params: Params, batches: Any, learned: Any) -> Model:
    """What is saved adds to everything: links that have not learned add nothing."""
    (net,) = model.controls
    return replace(model, controls=(replace(net, middle_only=False),))

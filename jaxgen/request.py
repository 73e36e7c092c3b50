"""What one asks of a model, and what cannot be asked of it."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxgen.data.hints import Hint
from jaxgen.denoiser import Model
from jaxgen.diffusion import grids
from jaxgen.types import UserError

MAX_IMAGES = 10**6  # of one request


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Everything that decides the pictures, beside the model. The command's options, by name.

    Image i of a prompt depends on its prompt, these settings and (seed, i), and on nothing else:
    not on the batch, the devices, or the other prompts (in float32, within one grey level).

    Attributes:
        prompts: one or more; `(text:1.3)` weighs, `\\(` escapes.
        negative: what guidance leads away from.
        steps: of a full run, from pure noise, up to 1000 where the grid has as many.
        sampler: one of `samplers.SAMPLERS`; the model's own by default.
        guidance: scale of classifier-free guidance; 1 or less turns it off.
        image_guidance: of instruction-editing models, how closely to follow the picture, from 1;
            1.5 by default.
        rescale: share of the guided prediction brought back to the contrast of the unguided one.
        guidance_interval: part of the run, as fractions, in which guidance acts.
        eta: DDIM's share of fresh noise, 0 to 1.
        karras: noise levels of Karras et al. 2022 (euler and dpmpp); None is as the model's file
            says.
        clip_skip: layers of the text encoder left out at its end, for the prompts alone.
        seed: 0 to 2**32 - 1.
        count: images per prompt.
        batch: images at once, over all devices; by default 1 per CPU, 4 per accelerator.
        size: (width, height) in pixels.
        image: uint8 [H, W, 3] to start from, or to edit.
        strength: how far an image is noised, 0 < strength <= 1; 0.8 by default. That share of the
            steps is run; of a latent consistency model without mask and ControlNet, all are, in
            that share of its timesteps.
        mask: bool [H, W], True where the image is repainted.
        control: for each ControlNet of the model, in order, a `Hint`, or its picture alone: one for
            all prompts, or one for each.
        guess: whether ControlNets are followed without a prompt: the negative branch sees no hint,
            and early residuals weigh less (Zhang et al. 2023, "guess mode").
        latents: float32 [N, H/f, W/f, C] standard normal noise instead of the seed's, with N = 1
            or prompts x count.
    """

    prompts: Sequence[str]
    negative: str = ""
    steps: int = 30
    sampler: str | None = None
    guidance: float = 7.5
    image_guidance: float | None = None
    rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    karras: bool | None = None
    clip_skip: int = 0
    seed: int = 0
    count: int = 1
    batch: int | None = None
    size: tuple[int, int] | None = None
    image: np.ndarray | None = None
    strength: float | None = None
    mask: np.ndarray | None = None
    control: Sequence[Hint | np.ndarray] | Hint | np.ndarray = ()
    guess: bool = False
    latents: np.ndarray | None = None


def check(model: Model, request: Request) -> None:
    """Raises UserError, one line, for what cannot be asked of a model, whatever the size."""
    _check_numbers(model, request)
    _check_arrays(request)
    inpaints, edits = kind(model)
    _check_images(model, request, inpaints, edits)
    _check_guided(model, request, edits)


def kind(model: Model) -> tuple[bool, bool]:
    """Whether the UNet reads a mask and the masked image, and whether it reads an image to edit."""
    channels, plain = model.unet.config.in_channels, model.vae.config.latent_channels
    if channels not in (plain, 2 * plain, 2 * plain + 1):
        raise UserError(f"{model.name}: a UNet of {channels} input channels is of no known kind")
    return channels == 2 * plain + 1, channels == 2 * plain


def _check_numbers(model: Model, request: Request) -> None:
    r = request
    if not r.prompts:
        raise UserError("no prompt is given; an empty one is written ''")
    if len(r.prompts) > MAX_IMAGES:
        raise UserError(f"{len(r.prompts):,} prompts are more than {MAX_IMAGES:,} at once")
    for name in ("guidance", "image_guidance", "rescale", "eta", "strength"):
        value = getattr(r, name)
        if value is None and name in ("image_guidance", "strength"):  # by default
            continue
        try:
            finite = math.isfinite(value)
        except TypeError:
            finite = False
        if not finite:
            raise UserError(f"{name} = {value!r} is not a finite number")
        if abs(value) > 1e4:
            raise UserError(f"{name} = {value!r} is too large to mean anything")
    ranges: tuple[tuple[str, float, float], ...] = (
        ("steps", 1, grids.MAX_STEPS),
        ("count", 1, MAX_IMAGES // len(r.prompts)),
        ("seed", 0, 2**32 - 1),
        ("clip_skip", 0, model.text_encoder.config.num_hidden_layers - 1),
        ("rescale", 0, 1),
        ("eta", 0, 1),
    )
    for name, low, high in ranges:
        value = getattr(r, name)
        if name not in ("rescale", "eta") and not isinstance(value, int | np.integer):
            raise UserError(f"{name} = {value!r} is not a whole number")
        if not low <= value <= high:
            raise UserError(f"{name} = {value} is not within {low} to {high}")
    if r.batch is not None and not (isinstance(r.batch, int | np.integer) and r.batch >= 1):
        raise UserError(f"batch = {r.batch!r} is not a whole number from 1")
    if r.strength is not None and not 0 < r.strength <= 1:
        raise UserError(f"strength = {r.strength} is not above 0 and at most 1")
    try:
        first, last = map(float, r.guidance_interval)
    except (TypeError, ValueError):
        raise UserError(f"guidance_interval = {r.guidance_interval!r} is not two numbers") from None
    if not 0 <= first < last <= 1:
        raise UserError(f"guidance_interval = {first},{last} is not 0 <= low < high <= 1")
    if r.image_guidance is not None and r.image_guidance < 1:
        raise UserError(f"image_guidance = {r.image_guidance} is below 1; take 1 or more")


def _check_guided(model: Model, request: Request, edits: bool) -> None:
    """What shapes guidance must not be asked for where there is none."""
    if request.image_guidance is not None and not edits:
        raise UserError(f"image_guidance has no effect: {model.name} does not edit pictures")
    if request.guidance > 1 and not model.distilled:
        return
    why = f"guidance = {request.guidance:g} is off: take more than 1"
    if model.distilled:
        why = f"{model.name} is distilled, and reads the scale of guidance alone"
    asked = {
        "negative": request.negative != "",
        "rescale": request.rescale != 0,
        "guidance_interval": tuple(request.guidance_interval) != (0.0, 1.0),
        "image_guidance": request.image_guidance is not None,
    }
    for name, given in asked.items():
        if given:
            raise UserError(f"{name} has no effect here: {why}")


def _check_arrays(request: Request) -> None:
    """What Python passes in must be what the docstring says: other arrays make wrong pictures."""
    for name, kind, ndim, form in (
        ("image", np.uint8, 3, "uint8 [H, W, 3]"),
        ("mask", np.bool_, 2, "bool [H, W]"),
        ("latents", np.float32, 4, "float32 [N, H/f, W/f, C]"),
    ):
        array = getattr(request, name)
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            raise UserError(f"{name} is a {type(array).__name__}, not a numpy array {form}")
        if array.dtype != kind or array.ndim != ndim or (name == "image" and array.shape[2] != 3):
            raise UserError(f"{name} is {array.dtype} {list(array.shape)}, and must be {form}")


def _check_images(model: Model, request: Request, inpaints: bool, edits: bool) -> None:
    """The image and the mask must be there where this model needs them, and only there."""
    if request.mask is not None and request.image is None:
        raise UserError("a mask needs the image that it covers (image)")
    if inpaints and request.mask is None:
        raise UserError(f"{model.name} is an inpainting model: it needs an image and a mask")
    if edits and request.image is None:
        raise UserError(f"{model.name} edits pictures: it needs an image")
    if edits and request.mask is not None:
        raise UserError(f"{model.name} edits whole pictures: it takes no mask")
    if request.strength is not None and (request.image is None or edits):
        why = (
            "edits pictures from pure noise" if edits else "starts from pure noise without an image"
        )
        raise UserError(f"strength has no effect here: the model {why}")

"""What one asks of a model, checked on the host before anything compiles."""

import dataclasses
import math
import operator
from collections.abc import Sequence

import numpy as np

from jaxgen.data import images, prompts
from jaxgen.data.hints import Hint, fit
from jaxgen.denoiser import Model
from jaxgen.diffusion import grids
from jaxgen.diffusion.schedule import Schedule
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
        karras: noise levels of Karras et al. 2022 (euler and dpmpp).
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
    karras: bool = False
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A request that a model can fulfil."""

    request: Request
    schedule: Schedule
    grid: grids.Grid
    start: int  # first row of the grid that is run
    share: float  # of the timesteps of a latent consistency model, over which the grid is spread
    from_noise: bool  # whether the run starts from pure noise, not from the noised image
    size: tuple[int, int]  # width, height in pixels
    latent_shape: tuple[int, int, int]  # h, w, C
    image: np.ndarray  # uint8 [H, W, 3] at `size`; empty without one
    mask: np.ndarray  # bool [h, w] at the latents' size; empty without one
    pixel_mask: np.ndarray  # bool [H, W] at `size`; empty without one
    hints: list[Hint]  # for each ControlNet, of `size` and with the channels that it reads
    texts: list[tuple[np.ndarray, np.ndarray]]  # per prompt: ids and weights, [2, n, 77] each
    inpaints: bool  # the UNet reads a mask and the masked image
    edits: bool  # the UNet reads the image to edit
    image_guidance: float  # of a UNet that edits

    @property
    def total(self) -> int:
        """Images in all."""
        return len(self.request.prompts) * self.request.count

    @property
    def calls(self) -> int:
        """Steps that run for each batch."""
        return self.grid.length - self.start


def plan(model: Model, request: Request) -> Plan:
    """Checks a request against a model. Raises UserError, one line, for what does not fit."""
    _check_numbers(model, request)
    _check_arrays(request)
    inpaints, edits = _kind(model)
    _check_images(model, request, inpaints, edits)
    _check_guided(model, request, edits)
    width, height = size = _size(model, request)
    image, pixel_mask = _resized(request, width, height)
    mask = pixel_mask[:: model.factor, :: model.factor]
    if mask.size and not mask.any():
        raise UserError(
            f"the mask's white spots are smaller than {model.factor} pixels, and vanish"
        )

    schedule = read_schedule(model, request.sampler, request.karras)
    start, share, from_noise = _start(request, edits, _runs_all(model, request, schedule))
    latent = (height // model.factor, width // model.factor, model.vae.config.latent_channels)
    _check_latents(request, latent)
    return Plan(
        request=request,
        schedule=schedule,
        grid=grids.grid(schedule, request.steps, start, request.eta, share),
        start=start,
        share=share,
        from_noise=from_noise,
        size=size,
        latent_shape=latent,
        image=image,
        mask=mask,
        pixel_mask=pixel_mask,
        hints=_hints(model, request, width, height),
        texts=[_text(model, prompt, request.negative) for prompt in request.prompts],
        inpaints=inpaints,
        edits=edits,
        image_guidance=1.5 if request.image_guidance is None else request.image_guidance,
    )


def read_schedule(model: Model, sampler: str | None, karras: bool = False) -> Schedule:
    """The model's schedule for a sampler, its own by default."""
    where = f"{model.name}: scheduler_config.json"
    schedule = Schedule.read(model.scheduler, sampler, where)
    if karras:
        if schedule.sampler not in ("euler", "dpmpp"):
            raise UserError(
                f"karras belongs to the samplers euler and dpmpp, not to {schedule.sampler}"
            )
        schedule = dataclasses.replace(schedule, use_karras_sigmas=True)
    return schedule


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


def _kind(model: Model) -> tuple[bool, bool]:
    """Whether the UNet reads a mask and the masked image, and whether it reads an image to edit."""
    channels, plain = model.unet.config.in_channels, model.vae.config.latent_channels
    if channels not in (plain, 2 * plain, 2 * plain + 1):
        raise UserError(f"{model.name}: a UNet of {channels} input channels is of no known kind")
    return channels == 2 * plain + 1, channels == 2 * plain


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


def _size(model: Model, request: Request) -> tuple[int, int]:
    f, image = model.factor, request.image
    if request.size is not None:
        try:
            width, height = map(operator.index, request.size)
        except (TypeError, ValueError):
            raise UserError(f"size {request.size!r} is not (width, height) in pixels") from None
        if width * height > images.MAX_PIXELS:
            raise UserError(f"size {width}x{height} is over {images.MAX_PIXELS:,} pixels")
        if width < f or height < f or width % f or height % f:
            near = f"{max(f, width // f * f)}x{max(f, height // f * f)}"
            raise UserError(f"size {width}x{height} is not divisible by {f}; {near} is")
        return width, height
    if image is not None:
        height, width = image.shape[:2]
        if min(width, height) < f:
            raise UserError(f"the image is {width}x{height} and needs {f} pixels or more each way")
        return width // f * f, height // f * f
    side = model.unet.config.sample_size
    if side is None:
        raise UserError(f"{model.name} does not state its size; give one (size)")
    height, width = side if isinstance(side, tuple) else (side, side)
    return width * f, height * f


def _runs_all(model: Model, request: Request, schedule: Schedule) -> bool:
    """Whether strength is of timesteps, not of steps: in one pipeline of diffusers', LCM's own."""
    plain = request.mask is None and not model.controls
    return model.distilled and schedule.sampler == "lcm" and plain


def _start(request: Request, edits: bool, runs_all: bool) -> tuple[int, float, bool]:
    """The first step to run, the share of an LCM's timesteps, and whether it is from pure noise."""
    if request.image is None or edits:
        return 0, 1.0, True
    strength = 0.8 if request.strength is None else request.strength
    if runs_all:
        return 0, strength, False
    # In double precision: int(100 * 0.29) is 28, and would be 29 in float32.
    count = min(int(request.steps * strength), request.steps)
    if count < 1:
        least = math.ceil(1 / strength)
        raise UserError(
            f"strength {strength} of {request.steps} steps leaves none to run; take {least} or more"
        )
    # As in diffusers: only inpainting at full strength forgets the picture altogether.
    return request.steps - count, 1.0, request.mask is not None and strength == 1


def _hints(model: Model, request: Request, width: int, height: int) -> list[Hint]:
    """A hint for each ControlNet, as the network reads it."""
    wanted = request.control
    if isinstance(wanted, Hint | np.ndarray):  # of the one ControlNet
        wanted = [wanted]
    nets, given = model.controls, len(wanted)
    if len(nets) != given:
        raise UserError(
            f"{model.name} has {len(nets)} ControlNet{'s' * (len(nets) != 1)}, and {given} "
            f"hint{'s are' if given != 1 else ' is'} given (control)"
        )
    if request.guess and not nets:
        raise UserError("guess has no effect without a ControlNet (control)")
    hints = []
    for one, net in zip(wanted, nets):
        hint = one if isinstance(one, Hint) else Hint(one)
        hint.check(len(request.prompts))
        channels, name = net.config.conditioning_channels, hint.name or "a hint"
        picture = fit(hint.picture, width, height, channels, name)
        hints.append(dataclasses.replace(hint, picture=picture))
    return hints


def _text(model: Model, prompt: str, negative: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights [2, n, 77] of (negative, prompt), padded to the longer one."""
    both = [prompts.chunks(model.tokenizer, text) for text in (negative, prompt)]
    n = max(len(ids) for ids, _ in both)
    both = [prompts.pad_chunks(model.tokenizer, *pair, n) for pair in both]
    return np.stack([ids for ids, _ in both]), np.stack([weights for _, weights in both])


def _check_latents(request: Request, shape: tuple[int, int, int]) -> None:
    latents = request.latents
    if latents is None:
        return
    counts = sorted({1, len(request.prompts) * request.count})
    if latents.shape not in [(n, *shape) for n in counts]:
        wanted = " or ".join(str([n, *shape]) for n in counts)
        raise UserError(
            f"latents are {list(latents.shape)}, and must be {wanted} "
            "(prompts x count, height / f, width / f, channels)"
        )
    if not np.isfinite(latents).all():
        raise UserError("latents hold numbers that are not finite")


def _resized(request: Request, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 [H, W, 3], and the mask, bool [H, W], at a size; empty where absent."""
    image, mask = np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), bool)
    if request.image is not None:
        image = images.resize(request.image, width, height)
        if request.mask is not None:
            images.check_mask(request.mask, request.image.shape[1::-1])
            mask = images.resize_mask(request.mask, width, height)
    return image, mask

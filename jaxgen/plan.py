"""What a model makes of a request: all that is known on the host before anything compiles."""

import dataclasses
import math
import operator

import numpy as np

from jaxgen.data import images, prompts
from jaxgen.data.hints import Hint
from jaxgen.denoiser import CONTROLLED, Model
from jaxgen.diffusion import grids, guidance
from jaxgen.diffusion.schedule import KINDS, Schedule
from jaxgen.request import Request, check, kind
from jaxgen.types import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A request that a model can fulfil."""

    request: Request
    schedule: Schedule
    grid: grids.Grid
    start: int  # first row of the grid that is run
    strength: float  # of image to image: the share of the run that is left of its steps
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
    check(model, request)
    inpaints, edits = kind(model)
    width, height = size = _size(model, request)
    image, pixel_mask = _resized(request, width, height)
    mask = pixel_mask[:: model.factor, :: model.factor]
    if mask.size and not mask.any():
        raise UserError(
            f"the mask's white spots are smaller than {model.factor} pixels, and vanish"
        )

    schedule = read_schedule(model, request.sampler, request.karras)
    strength = 0.8 if request.strength is None else request.strength
    runs_all = _runs_all(model, request, schedule)
    start, share, from_noise = _start(request, strength, edits, runs_all)
    latent = (height // model.factor, width // model.factor, model.vae.config.latent_channels)
    _check_latents(request, latent)
    grid = grids.grid(schedule, request.steps, start, request.eta, share)
    _check_interval(request, grid.length - start)
    return Plan(
        request=request,
        schedule=schedule,
        grid=grid,
        start=start,
        strength=strength,
        share=share,
        from_noise=from_noise,
        size=size,
        latent_shape=latent,
        image=image,
        mask=mask,
        pixel_mask=pixel_mask,
        hints=_hints(model, request, width, height, grid.length - start),
        texts=[_text(model, prompt, request.negative) for prompt in request.prompts],
        inpaints=inpaints,
        edits=edits,
        image_guidance=1.5 if request.image_guidance is None else request.image_guidance,
    )


def read_schedule(model: Model, sampler: str | None, karras: bool | None = None) -> Schedule:
    """The model's schedule for a sampler, its own by default.

    Files that say, or leave it to old defaults, that latents are clipped or that timesteps begin at
    0 are outdated. diffusers' pipelines for text to image, and from an image, mend both, that for
    inpainting the second; here all of this family do, so that no hint, mask or other sampler
    changes it. Those for editing and of latent consistency take a file at its word, as there.
    """
    where = f"{model.name}: scheduler_config.json"
    schedule = Schedule.read(model.scheduler, sampler, where)
    if model.pipeline in CONTROLLED:
        schedule = dataclasses.replace(schedule, clip_sample=False, steps_offset=1)
    if karras is None:
        return schedule
    able = [name for name, kind in KINDS.items() if "use_karras_sigmas" in kind.fields]
    if karras and schedule.sampler not in able:
        raise UserError(
            f"karras belongs to the samplers {' and '.join(able)}, not to {schedule.sampler}"
        )
    return dataclasses.replace(schedule, use_karras_sigmas=karras)


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


def _start(
    request: Request, strength: float, edits: bool, runs_all: bool
) -> tuple[int, float, bool]:
    """The first step to run, the share of an LCM's timesteps, and whether it is from pure noise."""
    if request.image is None or edits:
        return 0, 1.0, True
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


def _check_interval(request: Request, n: int) -> None:
    """UserError where none of the n steps that run is guided: no one means that by an interval."""
    low, high = request.guidance_interval
    if not any(guidance.acts(i, n, low, high) for i in range(n)):
        raise UserError(f"guidance_interval {low:g},{high:g} holds none of the {n} steps that run")


def hints_of(request: Request) -> list[Hint]:
    """Its hints as they were given, one for each ControlNet."""
    wanted = request.control
    if isinstance(wanted, Hint | np.ndarray):  # of the one ControlNet
        wanted = [wanted]
    return [one if isinstance(one, Hint) else Hint(one) for one in wanted or ()]


def _hints(model: Model, request: Request, width: int, height: int, n: int) -> list[Hint]:
    """A hint for each ControlNet, as the network reads it, of a run of n steps."""
    wanted = hints_of(request)
    nets, given = model.controls, len(wanted)
    if len(nets) != given:
        raise UserError(
            f"{model.name} has {len(nets)} ControlNet{'s' * (len(nets) != 1)}, and {given} "
            f"hint{'s are' if given != 1 else ' is'} given (control)"
        )
    if request.guess and not nets:
        raise UserError("guess has no effect without a ControlNet (control)")
    hints = []
    for hint, net in zip(wanted, nets):
        hint.check(len(request.prompts))
        if not guidance.holds_a_step(hint.span, n):
            low, high = hint.span
            raise UserError(f"control_range {low:g},{high:g} holds none of the {n} steps that run")
        hints.append(hint.at(width, height, net.config.conditioning_channels))
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

"""`jaxgen sample`: pictures from prompts."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import Positional

from jaxgen import generate, sharding, terminal
from jaxgen.commands import controls
from jaxgen.data import images, latents
from jaxgen.data.hints import Hint
from jaxgen.denoiser import Model
from jaxgen.load import DTYPES, open_model, read_params
from jaxgen.output import identity, writing
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.types import UserError

Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Sample:
    """Sample pictures from prompts.

    Writes 00000.png ..., grid.png and samples.jsonl; every PNG carries its settings.

    jaxgen sample "a fox, flat style" "an owl" --guidance 4 --count 4     # by the embedded model

    jaxgen sample "a fox in snow" --model FOLDER --image photo.png --strength 0.6

    jaxgen sample "a red hat" --model FOLDER --image photo.png --mask hat.png

    jaxgen sample "a fox" --model FOLDER --control CANNY_FOLDER=canny:photo.png@0.8
    """

    prompt: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT ...]")] = ()
    """What to show. `(word:1.3)` weighs a word; `\\(` is a parenthesis."""
    prompts: Path | None = None
    """A file of more prompts, one a line."""
    model: str | None = None
    """A folder in the diffusers layout, a hub id, a single safetensors file, or fresh:NAME, an
    architecture with random weights; by default the embedded model: emoji on coloured backgrounds,
    64x64."""
    variant: str = ""
    """Which of a folder's files to read, where it holds several: fp16, ..."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon, v_prediction or
    sample."""
    negative: str = ""
    """What guidance leads away from."""
    steps: int = 30
    """Steps of a full run; up to 1000 without a new compilation (999 in Stable Diffusion 1.x's own
    grid, 50 by lcm)."""
    sampler: str | None = None
    """ddim, ddpm, euler, euler_a, dpmpp, pndm, lcm or edict; by default the model's own."""
    guidance: float = 7.5
    """Scale of classifier-free guidance; 1 or less turns it off."""
    image_guidance: float | None = None
    """For models that edit pictures: how closely to follow the picture, from 1; 1.5 by default."""
    rescale: float = 0.0
    """Share of the guided prediction brought back to the unguided contrast, 0 to 1."""
    guidance_interval: str = "0,1"
    """Part of the run in which guidance acts, as fractions: from,to."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1."""
    karras: tyro.conf.FlagCreatePairsOff[bool] = False
    """Noise levels of Karras et al. 2022, for euler and dpmpp; without, as the model says."""
    clip_skip: int = 0
    """Layers of the text encoder to leave out at its end, for the prompt; not for the negative."""
    seed: int = 0
    """Image i of a prompt depends on (seed, i), not on the batch or the devices."""
    count: int = 1
    """Images for each prompt."""
    batch: int | None = None
    """Images at once over all devices; by default 1 per CPU, 4 per accelerator."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; by default the model's own, or the picture's."""
    image: Path | None = None
    """A picture to start from, or to edit."""
    strength: float | None = None
    """How far to leave the picture: above 0, at most 1; 0.8 by default. That share of the steps is
    run; by latent consistency models, without --mask and --control, all of them."""
    mask: Path | None = None
    """White is repainted, black stays; of the picture's size."""
    control: Repeated = ()
    """A ControlNet and the hint that it follows: REF=[ANNOTATOR:]FILE[@SCALE]. REF is a folder, a
    hub id, a single file or, of the embedded model, edges or segmentation; ANNOTATOR makes the hint
    of a photo (canny, hough, soft, scribble; by packages of their own depth, normal, hed, pose) or
    colours a map of labels (labels for ADE20K's, distinct for others); again for further ones."""
    control_range: Repeated = ()
    """Part of the run in which ControlNets act, as fractions: from,to; one for all, or one each."""
    guess: bool = False
    """Follow the hints without a prompt; guidance of 3 to 5 suits it."""
    box: Repeated = ()
    """Grounding: "PHRASE@x0,y0,x1,y1". Not in this version."""
    demo: Repeated = ()
    """A subject in context: "FILE@CAPTION". Not in this version."""
    lora: Repeated = ()
    """LoRA: FILE[@SCALE]. Not in this version."""
    token: Repeated = ()
    """Textual Inversion: FILE. Not in this version."""
    latents: Path | None = None
    """Starting noise: .npy float32 [N, H/f, W/f, C], or a seed.npz."""
    dtype: str = "f32"
    """f32, or bf16 for accelerators."""
    out: Path = Path("samples")
    """Folder for the pictures; a folder in use is added to."""

    def run(self) -> None:
        """Checks everything, then compiles, then samples."""
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        terminal.use_compile_cache()
        with contextlib.ExitStack() as stack:
            with terminal.notices_after():
                wanted = controls.parse(self.control, self.control_range)
                refs = [ref for ref, _ in wanted] or None
                model, tensors = open_model(self.model, self.variant, self.prediction, control=refs)
                self._refuse_branches(model)
                noise, found = latents.read_latents(self.latents) if self.latents else (None, {})
                checked = plan(model, self._request([hint for _, hint in wanted], noise))
                if self.latents and found:  # of a seed
                    settings = identity(model, checked, tensors, self.dtype)
                    latents.check_settings(self.latents, found, settings)
                writer = stack.enter_context(writing(self.out, model, checked, self.dtype))
            params = read_params(tensors, self.dtype, sharding.by_rules(generate.mesh_for(checked)))
            writer.write_all(params)
        made = "1 picture is" if writer.count == 1 else f"{writer.count} pictures are"
        print(f"{made} in {self.out}; see {self.out / 'grid.png'}")

    def _refuse_branches(self, model: Model) -> None:
        for name in ("box", "demo", "lora", "token"):
            if getattr(self, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: {model.name} has no such branch, "
                    "and this version of jaxgen loads none; leave the option out"
                )

    def _request(self, hints: list[Hint], noise: np.ndarray | None) -> Request:
        prompts = [*self.prompt, *(terminal.read_lines(self.prompts) if self.prompts else ())]
        return Request(
            prompts=prompts,
            negative=self.negative,
            steps=self.steps,
            sampler=self.sampler,
            guidance=self.guidance,
            image_guidance=self.image_guidance,
            rescale=self.rescale,
            guidance_interval=terminal.read_pair(self.guidance_interval, "--guidance-interval"),
            eta=self.eta,
            karras=self.karras or None,
            clip_skip=self.clip_skip,
            seed=self.seed,
            count=self.count,
            batch=self.batch,
            size=terminal.read_size(self.size),
            image=images.read_image(self.image) if self.image else None,
            strength=self.strength,
            mask=images.read_mask(self.mask) if self.mask else None,
            control=hints,
            guess=self.guess,
            latents=noise,
        )

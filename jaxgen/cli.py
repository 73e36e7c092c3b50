"""The command `jaxgen`: parse, then hand over to the library."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from jaxgen import generate, request, sharding, terminal
from jaxgen.data import images, latents
from jaxgen.denoiser import Model
from jaxgen.load import DTYPES, describe, load, open_model, read_params
from jaxgen.output import Writer
from jaxgen.save import check_new, save
from jaxgen.types import UserError

Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Sample:
    """Sample pictures from prompts.

    Writes 00000.png ..., grid.png and samples.jsonl; every PNG carries its settings.

    jaxgen sample "a fox in snow" "an owl" --model FOLDER --count 4 --seed 7

    jaxgen sample "a fox in snow" --model FOLDER --image photo.png --strength 0.6

    jaxgen sample "a red hat" --model FOLDER --image photo.png --mask hat.png
    """

    prompt: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT ...]")] = ()
    """What to show. `(word:1.3)` weighs a word; `\\(` is a parenthesis."""
    prompts: Path | None = None
    """A file of more prompts, one a line."""
    model: str | None = None
    """A folder in the diffusers layout, a hub id, or a single safetensors file."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon or v_prediction."""
    negative: str = ""
    """What to lead away from."""
    steps: int = 30
    """Steps of a full run; up to 1000 without a new compilation."""
    sampler: str | None = None
    """ddim, ddpm, euler, euler_a, dpmpp, pndm or lcm; by default the model's own."""
    guidance: float = 7.5
    """Scale of classifier-free guidance; 1 or less turns it off."""
    image_guidance: float | None = None
    """For models that edit pictures: how closely to follow the picture; 1.5 by default."""
    rescale: float = 0.0
    """Share of the guided prediction brought back to the unguided contrast, 0 to 1."""
    guidance_interval: str = "0,1"
    """Part of the run in which guidance acts, as fractions: from,to."""
    eta: float = 0.0
    """DDIM's share of fresh noise, 0 to 1."""
    karras: bool = False
    """Noise levels of Karras et al. 2022, for euler and dpmpp."""
    clip_skip: int = 0
    """Layers of the text encoder to leave out at its end."""
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
    """How far to leave the picture: above 0, at most 1; 0.8 by default."""
    mask: Path | None = None
    """White is repainted, black stays; of the picture's size."""
    control: Repeated = ()
    """ControlNet: REF=[ANNOTATOR:]FILE[@SCALE]. Not in this version."""
    control_range: Repeated = ()
    """Part of the run in which a ControlNet acts: from,to. Not in this version."""
    guess: bool = False
    """ControlNet without a prompt. Not in this version."""
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
        with terminal.notices_after():
            model, tensors = open_model(self.model, prediction=self.prediction)
            self._refuse_branches(model)
            checked = request.plan(model, self._request(model))
            writer = Writer(self.out, model, checked, self.dtype)
        params = read_params(tensors, self.dtype, sharding.by_rules(generate.mesh_for(checked)))
        writer.write_all(params)
        made = "1 picture is" if writer.count == 1 else f"{writer.count} pictures are"
        print(f"{made} in {self.out}; see {self.out / 'grid.png'}")

    def _refuse_branches(self, model: Model) -> None:
        for name in ("control", "control_range", "guess", "box", "demo", "lora", "token"):
            if getattr(self, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: {model.name} has no such branch, "
                    "and this version of jaxgen loads none; leave the option out"
                )

    def _request(self, model: Model) -> request.Request:
        prompts = [*self.prompt, *(terminal.read_lines(self.prompts) if self.prompts else ())]
        noise = None
        if self.latents:
            noise, found = latents.read_latents(self.latents)
            sampler = request.read_schedule(model, self.sampler, self.karras).sampler
            here = {"sampler": sampler, "steps": self.steps, "guidance": self.guidance}
            latents.check_settings(self.latents, found, here | {"model": Path(model.name).name})
        return request.Request(
            prompts=prompts,
            negative=self.negative,
            steps=self.steps,
            sampler=self.sampler,
            guidance=self.guidance,
            image_guidance=self.image_guidance,
            rescale=self.rescale,
            guidance_interval=terminal.read_pair(self.guidance_interval, "--guidance-interval"),
            eta=self.eta,
            karras=self.karras,
            clip_skip=self.clip_skip,
            seed=self.seed,
            count=self.count,
            batch=self.batch,
            size=terminal.read_size(self.size),
            image=images.read_image(self.image) if self.image else None,
            strength=self.strength,
            mask=images.read_mask(self.mask) if self.mask else None,
            latents=noise,
        )


@dataclass(frozen=True)
class Info:
    """Show what a model holds: parts, sizes, prediction type, branches."""

    ref: Positional[str]
    """A folder, a hub id or a single safetensors file."""

    def run(self) -> None:
        """Reads headers alone."""
        print(describe(self.ref))


@dataclass(frozen=True)
class Convert:
    """Write a model as a folder that diffusers loads, in safetensors.

    jaxgen convert v1-5-pruned.safetensors sd15
    """

    src: Positional[str]
    """A folder, a hub id or a single safetensors file."""
    dst: Positional[Path]
    """A new or empty folder."""
    dtype: str | None = None
    """f32 or bf16; by default each tensor keeps its own."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon or v_prediction."""

    def run(self) -> None:
        """All of it or nothing."""
        check_new(self.dst)
        save(*load(self.src, dtype=self.dtype, prediction=self.prediction), self.dst)
        print(f"{self.src} is now in {self.dst}")


@dataclass(frozen=True)
class Train:
    """Train a model, or go on with a run that was stopped.

    jaxgen train configs/mini.py --data.source FOLDER --steps 500

    jaxgen train configs/mini.py --help      # everything that a config states

    Checkpoints, metrics.jsonl, TensorBoard files and samples go to the config's folder `out`; in
    the end its `model` is a folder that `jaxgen sample --model` and diffusers load. SIGTERM and
    Ctrl-C save first; the same command goes on from there.
    """

    config: Positional[Path]
    """A Python file that states `config = Train(...)`, as those in configs/ do."""
    options: Positional[tuple[str, ...]] = ()
    """--field value, for any field of the config, as in --optimizer.learning-rate 3e-4."""

    def run(self) -> None:
        """Reads the config, then trains."""
        from jaxgen.training import configs, loop  # what only training needs is slow to import

        parse = partial(terminal.parse, prog=f"jaxgen train {self.config}")
        recipe = configs.read(self.config, self.options, parse)
        terminal.use_compile_cache()
        with terminal.notices_at_once():
            folder = loop.train(recipe)
        if folder:
            print(f"the model is in {folder}; jaxgen sample PROMPT --model {folder}")
        else:
            print(f"stopped and saved in {recipe.out}; the same command goes on from there")


@dataclass(frozen=True)
class Cache:
    """Compute once what training would compute each epoch: latents and text embeddings.

    jaxgen cache configs/mini.py --data.source FOLDER --out CACHE

    jaxgen train configs/mini.py --data.source CACHE

    For text to image, whose VAE does not learn; where the text encoder does, latents alone are
    stored. Captions are still dropped and, where the config says `flip`, pictures mirrored: the
    losses are those of the pictures.
    """

    config: Positional[Path]
    """A Python file that states `config = Train(...)`: model, data, size and flip are read."""
    options: Positional[tuple[str, ...]] = ()
    """--field value, for any field of the config but `out`, as in --data.size 64."""
    out: Path = Path("cache")
    """A new or empty folder for the cache."""

    def run(self) -> None:
        """Reads the config, then the pictures once."""
        from jaxgen.cache import cache  # what only training needs is slow to import
        from jaxgen.data.cached import describe
        from jaxgen.training import configs

        parse = partial(terminal.parse, prog=f"jaxgen cache {self.config}")
        recipe = configs.read(self.config, self.options, parse)
        terminal.use_compile_cache()
        with terminal.notices_at_once():
            folder = cache(recipe, self.out)
        held = describe(str(folder))
        assert held is not None
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        print(f"{held.examples} examples are in {self.out}, {size:.1f} MiB")
        if held.skipped:
            print(f"bad ones left out: {held.skipped}")
        if not held.text:
            print("they hold latents alone: the text encoder learns")
        print(f"to train on them: jaxgen train {self.config}, with --data.source {self.out}")


@dataclass(frozen=True)
class Data:
    """Write data that jaxgen makes itself as an image folder: look at it, or train on it.

    jaxgen data emoji_scenes --out scenes --count 1000

    jaxgen train configs/mini.py --data.source scenes

    Beside the pictures and metadata.jsonl, with captions, boxes and their phrases, it holds PNG
    files of masks, segmentations, edges and line art. `--data.source emoji_scenes` or
    `emoji_scenes:test` trains on the same scenes without writing any.
    """

    name: Positional[str]
    """emoji_scenes: one to three real emoji on coloured backgrounds, 64x64 pixels."""
    out: Path
    """A new or empty folder for the pictures."""
    split: str = "train"
    """train, validation or test; with _even behind, rare subjects are as frequent; or held."""
    count: int = 1000
    """Scenes to write: the first of the split."""
    seed: int = 0
    """Another one gives other scenes."""

    def run(self) -> None:
        """All of it or nothing."""
        from jaxgen.data.emoji_scenes import scenes as emoji_scenes
        from jaxgen.data.export import export

        if self.name != emoji_scenes.NAME:
            raise UserError(f"no data {self.name[:80]!r}; there is {emoji_scenes.NAME}")
        check_new(self.out)
        ref = f"{self.name}:{self.split}"
        source = emoji_scenes.EmojiScenes(ref, columns=emoji_scenes.PICTURES, seed=self.seed)
        export(source, self.out, self.count)
        made = "1 scene is" if self.count == 1 else f"{self.count} scenes are"
        print(f"{made} in {self.out}; to train on them: --data.source {self.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exit code 2 and one line for bad input, 130 when stopped by hand."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack the letters of a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _parse(arguments).run()
    except UserError as error:  # raised where a bad value enters; everything else is our bug
        print(f"jaxgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who reads us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a full disk, a name too long, a folder that vanished
        print(f"jaxgen: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\njaxgen: stopped; nothing unfinished is left behind", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: Sequence[str] | None) -> Sample | Train | Cache | Data | Info | Convert:
    """The command line as a command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"] and given[1:2] and not given[1].startswith("-"):
        return Train(Path(given[1]), tuple(given[2:]))  # its options depend on the config
    if given[:1] == ["cache"] and given[1:2] and not given[1].startswith("-"):
        return _parse_cache(Path(given[1]), given[2:])
    return terminal.parse(
        Sample | Train | Cache | Data | Info | Convert,
        args=given,
        prog="jaxgen",
        description="Controllable, personalised Stable Diffusion in JAX.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _parse_cache(config: Path, given: list[str]) -> Cache:
    """`--out` is the command's own; the other options are the config's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out", type=Path, default=Cache.out)
    try:
        found, options = parser.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see jaxgen cache --help") from None
    return Cache(config, tuple(options), found.out)

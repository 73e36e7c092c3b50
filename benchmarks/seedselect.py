"""What an iteration of SeedSelect costs, at the size of Stable Diffusion 1.5: counted and compiled.

    python benchmarks/seedselect.py                  # float32; half an hour on two cores
    python benchmarks/seedselect.py --parts flops    # counted from programs, without compiling
    python benchmarks/seedselect.py --parts step --runs 3

An iteration is the whole run under guidance from a seed to an image, three decoded latents, a CLIP
ViT-L/14, and the gradient back to the seed. Memory is the compiler's temporary memory, beside the
weights, in float32 on a CPU. Operations are counted from the program with trip counts, as it runs
on a CPU and with every product done, in forward passes of the UNet. The step is timed against the
same loss in PyTorch diffusers, which checkpoints each call of the UNet as the released SeedSelect
does, and decoded images too, or not, which is less work; at reduced size (see --side).
Needs the `test` extra. Prints Markdown for benchmarks/README.md.
"""

import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from controlnet import AS_RUN, PRODUCTS, rule

from jaxgen.refs import EMBEDDED_CLIP
from sample import describe_machine, load_torch, make_folder

PARTS = ("flops", "memory", "step", "batch")
STEPS = 5  # of the sampler, for time
# Memory is settled before machine code is written, whose optimisation takes most of a compilation.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
VIT_L: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "projection_dim": 768, "image_size": 224, "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    steps: tuple[int, ...] = (5, 20, 50)
    """Steps of the sampler, for memory."""
    batches: tuple[int, ...] = (1, 4)
    """Seeds at once, for memory."""
    remat: tuple[bool, ...] = (False, True)
    """Whether blocks are computed again, for memory and operations."""
    side: int = 16
    """Side of the latents, for time; memory and operations are of 64."""
    runs: int = 3
    """Rounds of an iteration of each side, for time."""
    parts: tuple[str, ...] = PARTS
    """Which of: flops memory step batch."""


def main(bench: Bench) -> None:
    print(describe_machine(), flush=True)
    if "flops" in bench.parts:
        operations(bench)
    if "memory" in bench.parts:
        memory(bench)
    if "step" in bench.parts:
        step(bench)
    if "batch" in bench.parts:
        together(bench)


def shapes_of(side: int, steps: int, batch: int, remat: bool) -> Any:
    """A search's program, and parameters and arguments as shapes."""
    import jax
    import jax.numpy as jnp

    from jaxgen import denoiser, trees
    from jaxgen.conditioning import Guidance
    from jaxgen.diffusion import grids
    from jaxgen.diffusion.schedule import Schedule
    from jaxgen.load import open_model
    from jaxgen.models.clip_config import VisionConfig
    from jaxgen.models.clip_vision import VisionEncoder
    from jaxgen.seedselect import search
    from jaxgen.seedselect.objective import ClipDistance, Given, Objective, Targets, Weights
    from jaxgen.seedselect.search import Program, Rule, Run, Search
    from jaxgen.types import Inputs

    model, _ = open_model("fresh:sd15")
    network, vae = model.network, model.vae
    vision = VisionEncoder(VisionConfig(**VIT_L), remat=remat)
    if remat:
        network = replace(network, unet=replace(network.unet, remat=True))
        vae = replace(vae, remat=True)
    program = Program(network, vae, "ddim", Objective(ClipDistance(vision)))
    params = {"unet": trees.shapes(model.unet.init), "vae": trees.shapes(model.vae.init)}
    points = grids.grid(Schedule.read(model.scheduler, "ddim", ""), steps).points
    width = model.unet.config.cross_attention_dim

    def arguments(params: Any) -> tuple[Any, Any]:
        seeds = jnp.zeros((batch, side, side, 4))
        text = jnp.zeros((2 * batch, 77, width))
        cache = denoiser.prepare(network, params, Inputs(text))
        centroid = jnp.zeros((batch, VIT_L["projection_dim"]))
        rows = Targets(centroid, centroid[:, None][:, :0])
        given = Given(vision.init(jax.random.key(0)), rows, seeds)
        guidance = Guidance(jnp.full((1,), 7.5), jnp.zeros(()), jnp.zeros(()), jnp.ones(()))
        how, grid = Search(), jax.tree.map(jnp.asarray, points)
        weights = Weights(how.weight, how.prior)
        run = Run(cache, grid, 1.0, guidance, weights, given, Rule.of(how))
        return run, search.begin(seeds)

    return program, params, *jax.eval_shape(arguments, params)


def operations(bench: Bench) -> None:
    """Of an iteration, in forward passes of the UNet for one branch of guidance."""
    import jax
    import jax.numpy as jnp

    from jaxgen import denoiser
    from jaxgen.diffusion import losses
    from jaxgen.flops import count
    from jaxgen.seedselect import search

    steps = 20
    print(f"\n| an iteration of {steps} steps, 64x64 latents | in all | decode and CLIP | ", end="")
    print("forward passes of the UNet a step and branch |\n|---|---|---|---|")
    for how, remat in itertools.product((AS_RUN, PRODUCTS), bench.remat):
        with rule(how):
            program, params, run, state = shapes_of(64, steps, 1, remat)

            def whole(params: Any, run: Any, seeds: Any, program: Any = program) -> Any:
                return search.gradient(params, run, seeds, program=program)

            def end(params: Any, run: Any, tail: Any, program: Any = program) -> Any:
                def loss(tail: Any) -> Any:
                    decode, decoder = program.vae.decode, params["vae"]
                    given = decode, decoder, run.weights, run.given
                    return program.objective(tail[-1], tail, *given).loss.sum()

                return jax.value_and_grad(loss)(tail)

            def forward(params: Any, run: Any, x: Any, program: Any = program) -> Any:
                denoise = denoiser.bind(program.network, params, run.cache)
                return denoise(x, losses.point(jnp.ones(1)))

            shape: Any = lambda *sides: jax.ShapeDtypeStruct(sides, np.float32)  # noqa: E731
            total = count(whole, params, run, state.seeds)
            tail = count(end, params, run, shape(3, 1, 64, 64, 4))
            once = count(forward, params, run, state.seeds)
        passes = (total - tail) / (steps * once)
        name = how + ", blocks computed again" * remat
        print(f"| {name} | {total / 1e12:.1f} TFLOP | {tail / 1e12:.1f} TFLOP ", end="")
        print(f"| {passes:.2f} |", flush=True)


def memory(bench: Bench) -> None:
    """Temporary memory of an iteration, as compiled."""
    import jax

    from jaxgen.seedselect import search

    _, params, run, _ = shapes_of(64, 1, 1, False)
    model, judge = (
        4e-9 * sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, run.given)
    )
    print(f"\nUNet and VAE: {model:.2f} GB, in bf16 half of it; CLIP, always float32: {judge:.2f}.")
    print("\n| an iteration, 64x64 latents | steps | temporary memory |\n|---|---|---|", flush=True)
    for remat, batch, steps in itertools.product(bench.remat, bench.batches, bench.steps):
        program, params, run, state = shapes_of(64, steps, batch, remat)
        lowered = search.compiled().lower(params, run, state, np.int32(1), program=program)
        found = lowered.compile(compiler_options=QUICKLY).memory_analysis()
        seeds = "1 seed" if batch == 1 else f"{batch} seeds"
        name = seeds + ", blocks computed again" * remat
        print(f"| {name} | {steps} | {found.temp_size_in_bytes / 1e9:.2f} GB |", flush=True)
        del lowered, found
        gc.collect()


def step(bench: Bench) -> None:
    """An iteration in turns with PyTorch's, of the same weights and the same loss; medians."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, clip = make_folder(Path(scratch) / "sd15"), make_clip(Path(scratch) / "clip")
        unclipped(folder / "scheduler" / "scheduler_config.json")
        little, kept = their_iterations(bench, folder, clip)
        sides = little, kept, our_iteration(bench, str(folder), clip, 1)
        values = [iteration() for iteration in sides]
        assert np.ptp(values) < 1e-3 * abs(values[0]), f"the losses are {values}"
        seconds = [[clocked(iteration) for iteration in sides] for _ in range(bench.runs)]
    *theirs, own = np.median(seconds, 0)
    side = 8 * bench.side
    print(f"\n| an iteration, {STEPS} steps, {side}x{side} pixels | PyTorch | jaxgen | ratio |")
    print("|---|---|---|---|")
    names = "PyTorch checkpoints decoded images", "PyTorch keeps them"
    for name, one in zip(names, theirs, strict=True):
        print(f"| {name} | {one:.2f} s | {own:.2f} s | {own / one:.2f} |", flush=True)


def together(bench: Bench) -> None:
    """Eight seeds at once against one, of the embedded model."""
    mini = replace(bench, side=16)
    one, eight = (our_iteration(mini, None, EMBEDDED_CLIP, n) for n in (1, 8))
    one(), eight()
    seconds = [(clocked(one), clocked(eight)) for _ in range(max(5, bench.runs))]
    a, b = (statistics.median(side) for side in zip(*seconds, strict=True))
    print("\n| an iteration of the embedded model | 1 seed | 8 seeds | ratio |\n|---|---|---|---|")
    print(f"| {STEPS} steps | {a:.2f} s | {b:.2f} s | {b / a:.2f} |", flush=True)


def clocked(iteration: Callable[[], float]) -> float:
    """Seconds."""
    start = time.perf_counter()
    iteration()
    return time.perf_counter() - start


def noise(side: int, batch: int) -> np.ndarray:
    """Seeds, and what else must be the same on both sides: [batch, side, side, 4]."""
    return np.random.default_rng(0).standard_normal((batch, side, side, 4), np.float32)


def unclipped(path: Path) -> None:
    """As released checkpoints have it: DDIM's own default clips latents, and most gradients."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))


def make_clip(folder: Path) -> Path:
    """The image encoder of a CLIP ViT-L/14 with random parameters, as transformers writes it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_L)).save_pretrained(folder)
    return folder


def our_iteration(bench: Bench, ref: str | None, clip: Path, batch: int) -> Callable[[], float]:
    """An iteration of `batch` seeds by the library, on references of noise; its loss."""
    import jax.numpy as jnp

    import jaxgen
    from jaxgen.evaluation.clip import open_vision
    from jaxgen.plan import plan
    from jaxgen.request import Request
    from jaxgen.seedselect import Judge, Search, select
    from jaxgen.seedselect.references import References

    model, params = jaxgen.load(ref)
    side = bench.side * model.factor
    judge = Judge(*open_vision(clip))
    asked = Request(
        prompts=["a fox"], steps=STEPS, sampler="ddim", size=(side, side), count=batch,
        batch=batch, latents=noise(bench.side, batch),
    )  # fmt: skip
    width = judge.vision.config.projection_dim
    one = np.ones((1, width), np.float32) / np.sqrt(width)
    known = References(jnp.zeros((1, bench.side, bench.side, 4)), jnp.asarray(one))
    checked = plan(model, asked)
    mesh = jaxgen.sharding.data_mesh(1)

    def iteration() -> float:
        how = Search(iterations=1)
        found = select(model, params, checked, [known], how, judge=judge, mesh=mesh)
        return next(iter(found)).loss

    return iteration


def their_iterations(bench: Bench, folder: Path, clip: Path) -> list[Callable[[], float]]:
    """The same in PyTorch: each call of the UNet is checkpointed, decoded images or not."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDIMScheduler
    from torch.utils.checkpoint import checkpoint
    from transformers import CLIPVisionModelWithProjection

    from jaxgen.tasks.contrastive import MEAN, STD

    pipe, _ = load_torch(folder)
    judge = CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, judge):
        module.requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        text = torch.cat(pipe.encode_prompt("a fox", "cpu", 1, True)[::-1])
    seed = torch.tensor(noise(bench.side, 1)).permute(0, 3, 1, 2).contiguous().requires_grad_()
    optimizer = torch.optim.AdamW([seed], lr=0.0)  # every iteration is the first
    mean, std = (torch.tensor(n)[:, None, None] for n in (MEAN, STD))

    def prediction(x: Any, t: Any) -> Any:
        negative, positive = pipe.unet(torch.cat([x, x]), t, text).sample.chunk(2)
        return negative + 7.5 * (positive - negative)

    def meaning(x: Any) -> Any:
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
        image = F.interpolate(image, (224, 224), mode="bicubic", antialias=True)
        seen = judge((((image / 2 + 0.5).clamp(0, 1)) - mean) / std).image_embeds
        return 1 - F.normalize(seen).mean() * seen.shape[-1] ** 0.5

    def iteration(scored: Callable[[Any], Any]) -> float:
        x, tail = seed, []
        for t in scheduler.timesteps:
            noise = checkpoint(prediction, x, t, use_reentrant=False)
            x = scheduler.step(noise, t, x).prev_sample
            tail.append(x)
        scores = [scored(latents) for latents in tail[-3:]]
        loss = sum(w * score for w, score in zip((0.05, 0.25, 0.70), scores, strict=True))
        loss = 10 / 11 * loss + 1 / 11 * x.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    again = partial(checkpoint, meaning, use_reentrant=False)
    return [partial(iteration, again), partial(iteration, meaning)]


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

"""What a ControlNet costs, at the size of Stable Diffusion 1.5: counted, compiled and timed.

    python benchmarks/controlnet.py                  # float32, batch 1; half an hour on two cores
    python benchmarks/controlnet.py --parts flops    # counted from programs, without compiling
    python benchmarks/controlnet.py --size small --runs 1

Operations are counted from the programs with trip counts, as they run on a CPU (where 3x3
convolutions are Winograd's) and with every product done. Memory is the compiler's: what a program
is given, makes and holds at once, in float32 on a CPU. The step is timed against PyTorch diffusers'
ControlNet, each side in a process of its own, in turn. Needs the `test` and `train` extras and 20
GB of memory. Prints Markdown for benchmarks/README.md.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from sample import ROOT, describe_machine, make_folder
from train import RATE, SIDE, TINY, TOKENS, cached_rows, row, timed

PARTS = ("flops", "memory", "step")
AS_RUN, PRODUCTS = "as run here", "every product done"
STEPS = 30  # of a sampling run


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    runs: int = 3
    """Steps of a process, after one to warm up."""
    rounds: int = 2
    """Processes of each side."""
    batch: int = 1
    """Examples of a step."""
    size: Literal["full", "small"] = "full"
    """Stable Diffusion 1.5, or a tiny UNet."""
    parts: tuple[str, ...] = PARTS
    """Which of: flops memory step."""

    @property
    def model(self) -> str:
        return str(TINY) if self.size == "small" else "fresh:sd15"


def main(bench: Bench) -> None:
    print(describe_machine(), flush=True)
    if "flops" in bench.parts:
        training_operations(bench)
        sampling_operations(bench)
    if "memory" in bench.parts:
        memory(bench)
    if "step" in bench.parts:
        with tempfile.TemporaryDirectory() as scratch:
            steps(bench, Path(scratch))


def recipe_of(bench: Bench, control: bool) -> Any:
    """A ControlNet's run, or that of the whole UNet, on the same examples."""
    from jaxgen.training.recipe import AdamW, ControlNet, Images, TextToImage, Train

    task = ControlNet(model=bench.model) if control else TextToImage(model=bench.model)
    return Train(task, Images(), AdamW(RATE), batch_size=bench.batch)


def rows_of(task: Any, batch: int, pictures: bool = False) -> dict[str, np.ndarray]:
    """Examples and their hints; pictures and tokens, or what was computed of them before."""
    side = SIDE * task.model.factor
    hint = np.random.default_rng(1).integers(0, 256, (batch, side, side, 3), np.uint8)
    rows = cached_rows(batch, task.model.unet.config)
    if pictures:
        rows = {"place": rows["place"], "image": hint, "ids": np.zeros((batch, TOKENS), np.int32)}
    return rows | {"hint": hint}


def shapes_of(bench: Bench, control: bool) -> tuple[Any, Any, Any, Any, Any]:
    """Recipe, task, what learns and what is frozen as shapes, and the optimizer."""
    import jax

    from jaxgen import trees
    from jaxgen.load import open_model
    from jaxgen.training import optim

    recipe = recipe_of(bench, control)
    model, _ = open_model(bench.model)
    task = recipe.task.build(model)
    parts = ("unet", "vae", "text_encoder")
    given = {name: trees.shapes(getattr(model, name).init) for name in parts}
    params = jax.eval_shape(task.init, jax.random.key(0), given)
    learned, frozen = trees.split(params, task.learns)
    return recipe, task, learned, frozen, optim.build(recipe.optimizer, learned, recipe.steps)


def step_of(bench: Bench, control: bool, pictures: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """The training step as the loop has it, and its arguments as shapes."""
    import jax
    import jax.numpy as jnp

    from jaxgen.training import step as steps

    _, task, learned, frozen, transform = shapes_of(bench, control)
    if not pictures:  # what is not read is not there
        frozen = {part: tree for part, tree in frozen.items() if part == "unet"}
    state = jax.eval_shape(lambda p: steps.start(p, transform, None), learned)
    step = steps.make(task, transform, None, 0, jnp.float32)
    rows = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype)
        for k, v in rows_of(task, bench.batch, pictures).items()
    }
    return step, (state, frozen, rows)


@contextlib.contextmanager
def rule(name: str) -> Iterator[None]:
    """Convolutions as they run here, or with every product done."""
    from jaxgen.models import winograd

    pays = winograd.pays
    if name == PRODUCTS:
        winograd.pays = lambda *args, **kwargs: False
    try:
        yield
    finally:
        winograd.pays = pays


def training_operations(bench: Bench) -> None:
    """Of a step that learns all of the UNet, and one that learns a ControlNet."""
    from jaxgen.flops import count

    what = f"operations of a training step, {bench.size} size, batch {bench.batch}"
    print(f"\n| {what} | all of the UNet | ControlNet | ratio |\n|---|---|---|---|")
    for how, pictures in itertools.product((AS_RUN, PRODUCTS), (False, True)):
        with rule(how):
            whole, control = (
                count(*_flat(step_of(bench, which, pictures))) for which in (False, True)
            )
        given = "from pictures and texts" if pictures else "latents and embeddings given"
        print(f"| {how}, {given} | {whole / 1e12:.2f} TFLOP | {control / 1e12:.2f} TFLOP ", end="")
        print(f"| {control / whole:.3f} |", flush=True)


def _flat(made: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    return made[0], *made[1]


def sampling_operations(bench: Bench) -> None:
    """Of a guided run: what is prepared once, and the steps."""
    import jax
    import jax.numpy as jnp

    from jaxgen import denoiser, trees
    from jaxgen.diffusion import losses
    from jaxgen.flops import count
    from jaxgen.load import open_model
    from jaxgen.types import Control, Inputs

    model, _ = open_model(bench.model)
    task = recipe_of(bench, True).task.build(model)
    side, unet = SIDE * model.factor, model.unet.config
    shape: Any = lambda *sides: jax.ShapeDtypeStruct(sides, np.float32)  # noqa: E731
    text, x = shape(2, TOKENS, unet.cross_attention_dim), shape(1, SIDE, SIDE, unet.in_channels)
    (net,) = task.model.controls
    hint = Control(shape(1, side, side, 3), shape(net.config.residuals))
    params = {"unet": trees.shapes(model.unet.init), "controlnet": trees.shapes(net.init)}

    def total(network: Any, inputs: Any) -> tuple[int, int]:
        prepare = lambda p, inputs: denoiser.prepare(network, p, inputs)  # noqa: E731
        point = losses.point(jnp.ones(1))
        step = lambda p, c, x: denoiser.bind(network, p, c)(x, point)  # noqa: E731
        cache = jax.eval_shape(prepare, params, inputs)
        return count(prepare, params, inputs), count(step, params, cache, x)

    print(f"\n| operations of sampling, {STEPS} guided steps | plain | one ControlNet | ratio |")
    print("|---|---|---|---|")
    for how in (AS_RUN, PRODUCTS):
        with rule(how):
            plain = total(model.network, Inputs(text))
            one = total(task.model.network, Inputs(text, controls=(hint,)))
        for what, a, b in (
            ("prepared once", plain[0], one[0]),
            ("a step", plain[1], one[1]),
            ("the run", plain[0] + STEPS * plain[1], one[0] + STEPS * one[1]),
        ):
            print(f"| {what}, {how} | {a / 1e12:.3f} TFLOP | {b / 1e12:.3f} TFLOP ", end="")
            print(f"| {b / a:.3f} |", flush=True)


def memory(bench: Bench) -> None:
    """What the compiled step holds at its peak: arguments, results that are new, and the inside."""
    import jax

    found = []
    for control in (False, True):
        step, arguments = step_of(bench, control)
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        found.append(compiled.memory_analysis())
    print(f"\n| memory of a training step, {bench.size} size, float32 | all of the UNet ", end="")
    print("| ControlNet | ratio |\n|---|---|---|---|")
    kinds = {
        "parameters, moments, batch": lambda m: m.argument_size_in_bytes,
        "inside the step": lambda m: m.temp_size_in_bytes,
        "peak": lambda m: (
            m.argument_size_in_bytes
            + m.temp_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes
        ),
    }
    for what, size in kinds.items():
        a, b = map(size, found)
        print(f"| {what} | {a / 1e9:.2f} GB | {b / 1e9:.2f} GB | {b / a:.2f} |", flush=True)


def steps(bench: Bench, scratch: Path) -> None:
    """Seconds and peak memory of PyTorch's step and ours."""
    folder = TINY if bench.size == "small" else make_folder(scratch / "sd15")
    found: dict[str, list[dict]] = {"theirs": [], "ours": []}
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled")}
    for _ in range(bench.rounds):
        for side, results in found.items():
            fields = dataclasses.asdict(bench)
            code = f"import controlnet as c; c.{side}({str(folder)!r}, c.Bench(**{fields!r}))"
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT / "benchmarks",
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {results[-1]}", file=sys.stderr, flush=True)
    print(f"\n| ControlNet's training step, {bench.size} size, batch {bench.batch} ", end="")
    print("| PyTorch | jaxgen | ratio |\n|---|---|---|---|")
    sides = found.values()
    pooled = ([s for result in results for s in result["seconds"]] for results in sides)
    row("time", "s", *map(statistics.median, pooled))
    for kind in ("resident", "anonymous"):  # the second is without mapped files
        row(f"peak {kind} memory", "GB", *(max(r[kind] for r in results) for results in sides))


def theirs(folder: str, bench: Bench) -> None:
    """PyTorch: as in diffusers' train_controlnet.py, latents and text computed before."""
    import torch
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    widths = (16, 32, 96, 256) if bench.size == "full" else (16, 32, 96)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths).train()
    noises = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-2)
    latents = torch.randn(bench.batch, 4, SIDE, SIDE)
    text = torch.randn(bench.batch, TOKENS, unet.config.cross_attention_dim)
    side = SIDE * 2 ** (len(widths) - 1)
    hint = torch.rand(bench.batch, 3, side, side)

    def step() -> float:
        noise = torch.randn_like(latents)
        times = torch.randint(0, noises.config.num_train_timesteps, (bench.batch,))
        noisy = noises.add_noise(latents, noise, times)
        skips, middle = net(noisy, times, text, hint, return_dict=False)
        prediction = unet(
            noisy,
            times,
            text,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        ).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    timed(step, bench.runs)


def ours(folder: str, bench: Bench) -> None:
    """jaxgen: the step of the training loop, with its defaults."""
    import jax

    from jaxgen import sharding
    from jaxgen.generate import trim
    from jaxgen.load import open_model, read_params
    from jaxgen.training import placement

    recipe = recipe_of(bench, True)
    recipe = dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, model=folder))
    mesh = sharding.training_mesh(*recipe.mesh.sizes)
    model, tensors = open_model(folder)
    task = recipe.task.build(model)
    given = read_params({"unet": tensors["unet"]}, "f32", sharding.layout(mesh))
    params = task.init(jax.random.key(0), given)
    state, frozen, transform = placement.begin(recipe, task, params, mesh)
    del given, params
    rows = sharding.place_batch(rows_of(task, bench.batch), mesh)
    with jax.set_mesh(mesh):
        program = placement.compiled_once(recipe, task, transform, state, mesh)
        program.lower(state, frozen, rows).compile()
        trim()

        def step() -> float:
            nonlocal state
            state, metrics = program(state, frozen, rows)
            return float(jax.block_until_ready((state, metrics))[1]["loss"])

        timed(step, bench.runs)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

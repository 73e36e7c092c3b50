"""Training against PyTorch diffusers: same weights, same machine, same run, as ratios.

    python benchmarks/train.py                          # full-size SD 1.5, float32, batch 1
    python benchmarks/train.py --size small --runs 1    # a tiny UNet, to try it out
    python benchmarks/train.py --parts data

A step is noise, the UNet, its gradient, clipping and AdamW, on latents 64x64 and text 77x768. Each
side is a process of its own, in turn: PyTorch as diffusers' training script has it, PyTorch tuned
(its fused optimizer, channels last), and jaxgen, so that memory is one side's alone; the
steps of all its processes are pooled. The data part reads one folder of pictures with both
libraries' loaders, in turn. Needs the `test` and `train` extras, 20 GB of free memory and 5 GB of
disk. Prints Markdown for benchmarks/README.md.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from sample import ROOT, describe_machine, make_folder

TINY = ROOT / "tests" / "assets" / "tiny"
PARTS = ("flops", "step", "data")
SIDE, TOKENS, RATE = 64, 77, 1e-4
PICTURES, PIXELS, SHAPE = 200, 512, (800, 600)  # how many, at what size to train, as stored
BATCH, WORKERS, PAIRS = 8, 2, 7


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
    """Which of: flops step data."""
    folder: Path | None = None
    """A Stable Diffusion 1.5 in the diffusers layout; made with random weights by default."""


def main(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        print(describe_machine(), flush=True)
        if "flops" in bench.parts:
            operations(bench)
        if "step" in bench.parts:
            steps(bench, Path(scratch))
        if "data" in bench.parts:
            data(Path(scratch))


def steps(bench: Bench, scratch: Path) -> None:
    """Seconds and peak memory of PyTorch as its script has it, as fast as it can be, and ours."""
    folder = TINY if bench.size == "small" else bench.folder or make_folder(scratch / "sd15")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    found: dict[str, list[dict]] = {"theirs": [], "tuned": [], "ours": []}
    for _ in range(bench.rounds):
        for side, results in found.items():
            code = f"import train; train.{side}({str(folder)!r}, {bench.batch}, {bench.runs})"
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
    what = f"training step, {bench.size} size, batch {bench.batch}"
    print(f"\n| {what} | PyTorch | tuned | jaxgen | ratio | to tuned |\n|---|---|---|---|---|---|")
    sides = found.values()
    for what, key in (("time", "seconds"), ("processor time, both cores", "processor")):
        pooled = ([s for result in results for s in result[key]] for results in sides)
        row(what, "s", *map(statistics.median, pooled))
    for kind in ("resident", "anonymous"):
        row(f"peak {kind} memory", "GB", *(max(r[kind] for r in results) for results in sides))


def row(what: str, unit: str, *sides: float) -> None:
    """A row of the table: the sides, ours last, and its ratio to each of the others."""
    cells = [f"{value:.2f} {unit}" for value in sides]
    cells += [f"{sides[-1] / other:.2f}" for other in sides[:-1]]
    print(f"| {what} | {' | '.join(cells)} |", flush=True)


class Peak:
    """Peak memory of this process in GB, watched by a thread."""

    def __init__(self) -> None:
        self.resident = self.anonymous = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with open("/proc/self/status") as file:
                rows = dict(line.split(":", 1) for line in file)
            self.resident = max(self.resident, int(rows["VmRSS"].split()[0]) / 1e6)
            self.anonymous = max(self.anonymous, int(rows["RssAnon"].split()[0]) / 1e6)
            time.sleep(0.01)


def timed(step: Callable[[], float], runs: int) -> None:
    """Warms up, times so many steps, and prints what was found as JSON."""
    peak, clocks = Peak(), (time.perf_counter, time.process_time)
    taken = []
    for _ in range(runs + 1):
        start = [clock() for clock in clocks]
        loss = step()
        taken.append([clock() - begun for clock, begun in zip(clocks, start)])
    wall, processor = zip(*taken[1:])
    found = {"seconds": wall, "processor": processor, "loss": loss, "first": taken[0]}
    print(json.dumps(found | {"resident": peak.resident, "anonymous": peak.anonymous}))


def theirs(folder: str, batch: int, runs: int, tuned: bool = False) -> None:
    """PyTorch: diffusers' UNet under torch.optim.AdamW, as in diffusers' train_text_to_image.py."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    noises = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if tuned:
        unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=RATE, weight_decay=1e-2, fused=tuned or None
    )
    latents = torch.randn(batch, unet.config.in_channels, SIDE, SIDE)
    text = torch.randn(batch, TOKENS, unet.config.cross_attention_dim)

    def step() -> float:
        noise = torch.randn_like(latents)
        times = torch.randint(0, noises.config.num_train_timesteps, (batch,))
        prediction = unet(noises.add_noise(latents, noise, times), times, text).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    timed(step, runs)


def tuned(folder: str, batch: int, runs: int) -> None:
    """The same with what the script leaves out: the fused optimizer, and channels last."""
    theirs(folder, batch, runs, tuned=True)


def ours(folder: str, batch: int, runs: int) -> None:
    """jaxgen: the step of the training loop, with its defaults."""
    import jax

    from jaxgen import sharding
    from jaxgen.generate import trim
    from jaxgen.load import read_params
    from jaxgen.training import placement

    recipe = recipe_of(folder, batch)
    task, mesh, tensors = task_of(recipe)
    params = read_params({"unet": tensors}, "f32", sharding.layout(mesh))
    state, frozen, transform = placement.begin(recipe, task, params, mesh)
    del params
    rows = sharding.place_batch(cached_rows(batch, task.model.unet.config), mesh)

    with jax.set_mesh(mesh):
        program = placement.compiled_once(recipe, task, transform, state, mesh)
        program.lower(state, frozen, rows).compile()
        trim()

        def step() -> float:
            nonlocal state
            state, metrics = program(state, frozen, rows)
            return float(jax.block_until_ready((state, metrics))[1]["loss"])

        timed(step, runs)


def recipe_of(model: str, batch: int) -> Any:
    from jaxgen.training.recipe import AdamW, Images, TextToImage, Train

    return Train(TextToImage(model=model), Images(), AdamW(RATE), batch_size=batch)


def task_of(recipe: Any) -> tuple[Any, Any, Any]:
    """The task, the mesh, and the UNet's tensors: latents and text are given, as if cached."""
    from jaxgen import sharding
    from jaxgen.load import open_model

    mesh = sharding.training_mesh(*recipe.mesh.sizes)
    model, tensors = open_model(recipe.task.model)
    return recipe.task.build(model), mesh, tensors["unet"]


def cached_rows(batch: int, config: Any) -> dict[str, np.ndarray]:
    """Examples whose latents and text were computed before."""
    random = np.random.default_rng(0)
    latents = (batch, SIDE, SIDE, config.in_channels)
    return {
        "mean": random.standard_normal(latents, np.float32),
        "std": np.zeros(latents, np.float32),
        "embeddings": random.standard_normal(
            (batch, TOKENS, config.cross_attention_dim), np.float32
        ),
        "place": np.arange(batch, dtype=np.uint32),
    }


def operations(bench: Bench) -> None:
    """Operations of a loss and of its gradient, counted from their programs with trip counts."""
    import jax

    from jaxgen import trees
    from jaxgen.flops import count
    from jaxgen.models import winograd

    task, _, _ = task_of(
        recipe_of(str(TINY) if bench.size == "small" else "fresh:sd15", bench.batch)
    )
    unet = task.model.unet
    rows = cached_rows(bench.batch, unet.config)

    print("\n| operations | forward | with gradient | over three forwards |\n|---|---|---|---|")
    pays = winograd.pays
    for how, rule in (("as run here", pays), ("every product done", lambda *_, **__: False)):
        winograd.pays = rule

        def loss(params: Any) -> Any:  # a new one each time: programs are remembered by it
            return task.loss({"unet": params}, rows, jax.random.key(0))[0]

        params = trees.shapes(unet.init)
        forward, both = count(loss, params), count(jax.value_and_grad(loss), params)
        print(f"| {how} | {forward / 1e12:.2f} TFLOP | {both / 1e12:.2f} TFLOP ", end="")
        print(f"| {both / forward / 3:.3f} |", flush=True)
    winograd.pays = pays


class Pictures:
    """What PyTorch's loader reads: a picture scaled and cropped as jaxgen's `Images` does."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return 2 * len(self.files)  # twice over, so that no epoch ends while the clock runs

    def __getitem__(self, i: int) -> Any:
        import torch
        from PIL import Image

        with Image.open(self.files[i % len(self.files)]) as file:
            picture = file.convert("RGB")
        scale = PIXELS / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - PIXELS) // 2, (height - PIXELS) // 2
        picture = picture.crop((left, top, left + PIXELS, top + PIXELS))
        return torch.from_numpy(np.array(picture))


def data(scratch: Path) -> None:
    """Pictures a second of both loaders over one folder, in turn."""
    folder = scratch / "pictures"
    files = make_pictures(folder)
    pairs = []
    for _ in range(PAIRS):
        pairs.append((pace(their_batches(files)), pace(our_batches(folder))))
    theirs, ours = (statistics.median(rates) for rates in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    cores = min(os.cpu_count() or 1, WORKERS)
    print("\n| loading pictures | PyTorch | jaxgen | ratio |\n|---|---|---|---|")
    what = f"{SHAPE[0]}x{SHAPE[1]} to {PIXELS}x{PIXELS}, {WORKERS} workers, a second and core"
    print(f"| {what} | {theirs / cores:.1f} | {ours / cores:.1f} | {ratio:.2f} |", flush=True)


def make_pictures(folder: Path) -> list[Path]:
    """Noise of all sizes, as much detail as in photographs; one picture in four is a PNG."""
    from PIL import Image

    folder.mkdir()
    random, files = np.random.default_rng(0), []
    for i in range(PICTURES):
        pixels = np.full((SHAPE[1], SHAPE[0], 3), 128.0)
        for octave in range(8):
            small = random.normal(0, 128 / 2**octave, (3 * 2**octave, 4 * 2**octave, 3))
            small = np.clip(small + 128, 0, 255).astype(np.uint8)
            pixels += np.asarray(Image.fromarray(small).resize(SHAPE, Image.Resampling.BICUBIC))
            pixels -= 128
        files.append(folder / f"{i:03}.{'png' if i % 4 == 3 else 'jpg'}")
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(files[-1], quality=92)
    lines = [json.dumps({"file_name": file.name, "text": "noise"}) for file in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return files


def pace(batches: Iterator[Any]) -> float:
    """Pictures a second, once the workers are at work."""
    for _ in range(2 * WORKERS):
        next(batches)
    start = time.perf_counter()
    for _ in range(PICTURES // BATCH):
        next(batches)
    return PICTURES // BATCH * BATCH / (time.perf_counter() - start)


def their_batches(files: list[Path]) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    loader = DataLoader(Pictures(files), BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)
    yield from loader


def our_batches(folder: Path) -> Iterator[Any]:
    from jaxgen.data.pipeline import Images, Loader

    pictures = Images(str(folder), size=PIXELS, caption_dropout=0, workers=WORKERS, threads=1)
    loader = Loader(pictures, only_image, BATCH, seed=0)
    try:
        yield from loader
    finally:
        loader.close()


def only_image(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {"image": example["image"]}


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

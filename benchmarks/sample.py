"""Sampling against PyTorch diffusers: same weights, same machine, same run, as ratios.

    python benchmarks/sample.py                # full-size SD 1.5 with random weights, 512x512
    python benchmarks/sample.py --runs 3 --parts unet vae

UNet, VAE and image are measured in pairs (PyTorch, then jaxgen, in turn) whose medians count, so
that a busy machine slows both; memory and whole commands are one process each. Needs the `test`
extra, 16 GB of memory and 5 GB of disk. On a GPU both sides run in bfloat16, PyTorch under
torch.compile. Prints Markdown for benchmarks/README.md.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
CLIP = ROOT / "jaxgen" / "assets" / "clip_tokenizer"
PROMPT, STEPS, SIDE = "a photograph of a fox in the snow", 4, 512
PARTS = ("unet", "vae", "image", "memory", "command")


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    runs: int = 5
    """Pairs of runs for each figure, after one to warm up."""
    parts: tuple[str, ...] = PARTS
    """Which of: unet vae image memory command."""
    folder: Path | None = None
    """A Stable Diffusion 1.5 in the diffusers layout; made with random weights by default."""


def main(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.folder or make_folder(Path(scratch) / "sd15")
        print(describe_machine(), flush=True)
        print("\n| what | PyTorch | jaxgen | ratio |\n|---|---|---|---|", flush=True)
        if {"unet", "vae", "image"} & set(bench.parts):
            in_process(folder, bench)
        if "memory" in bench.parts:
            for what, theirs, ours in memory(folder):
                print(
                    f"| {what} | {theirs:.2f} GB | {ours:.2f} GB | {ours / theirs:.2f} |",
                    flush=True,
                )
        if "command" in bench.parts:
            commands(folder, Path(scratch))


def make_folder(folder: Path) -> Path:
    """Stable Diffusion 1.5 at full size, every parameter random, as diffusers writes it."""
    import torch
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(
            str(CLIP / "vocab.json"), str(CLIP / "merges.txt"), model_max_length=77
        ),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def in_process(folder: Path, bench: Bench) -> None:
    """Times the UNet call, the VAE and a whole image, both libraries in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    import jaxgen
    from jaxgen import generate
    from jaxgen.types import Inputs, Point

    pipe, device = load_torch(folder)
    dtype = "bf16" if device == "cuda" else "f32"
    model, params = jaxgen.load(folder, dtype=dtype)
    random = np.random.default_rng(0)
    x = random.standard_normal((1, SIDE // 8, SIDE // 8, 4), dtype=np.float32)
    text = random.standard_normal((2, 77, 768), dtype=np.float32)
    move = {"device": device, "dtype": pipe.unet.dtype}
    torch_x, torch_text = (
        torch.tensor(x.transpose(0, 3, 1, 2)).repeat(2, 1, 1, 1).to(**move),
        torch.tensor(text).to(**move),
    )

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def torch_unet() -> None:
        pipe.unet(torch_x, 500, torch_text)
        synchronise()

    @torch.no_grad()
    def torch_vae() -> None:
        pipe.vae.decode(torch_x[:1] / 0.18215)
        synchronise()

    cache = generate.prepare(params, Inputs(jnp.asarray(text)), network=model.network)
    point = Point(*[None] * len(Point._fields))._replace(time=jnp.float32(500))  # type: ignore[arg-type]
    call = jax.jit(lambda p, x, c: model.unet.apply(p, x, point, c))
    device_x = jnp.asarray(x)

    def ours_unet() -> None:
        call(params["unet"], device_x, cache["unet"]).block_until_ready()

    def ours_vae() -> None:
        generate.decode(params["vae"], device_x, vae=model.vae).block_until_ready()

    cases: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
        "unet": ("guided UNet call, 64x64 latents, two prompts", torch_unet, ours_unet),
        "vae": ("VAE decode, 512x512", torch_vae, ours_vae),
        "image": (
            f"image, 512x512, {STEPS} steps",
            lambda: pipe(PROMPT, num_inference_steps=STEPS, height=SIDE, width=SIDE),
            lambda: jaxgen.sample(model, params, PROMPT, steps=STEPS, size=(SIDE, SIDE)),
        ),
    }
    for part, (what, theirs, ours) in cases.items():
        if part in bench.parts:
            a, b = pairs(theirs, ours, bench.runs)
            print(f"| {what} | {a:.2f} s | {b:.2f} s | {b / a:.2f} |", flush=True)


def load_torch(folder: Path):
    """The diffusers pipeline, compiled where a GPU is at hand, and its device."""
    import torch
    from diffusers import StableDiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=dtype)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if device == "cuda":
        pipe.unet = torch.compile(pipe.unet.to(memory_format=torch.channels_last))
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return pipe, device


def pairs(
    theirs: Callable[[], object], ours: Callable[[], object], runs: int
) -> tuple[float, float]:
    """Median seconds of each, run in turn after one run to warm up (and compile)."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(runs + 1):
        for kept, run in zip(seconds, (theirs, ours)):
            start = time.perf_counter()
            run()
            if i:
                kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


TORCH_IMAGE = f"""
import sys; sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
import sample
pipe, _ = sample.load_torch(Path(sys.argv[1]))
picture = pipe({PROMPT!r}, num_inference_steps={STEPS}, height={SIDE}, width={SIDE}).images[0]
picture.save(sys.argv[2])
def device():
    import torch
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
"""
OURS_IMAGE = f"""
import sys, jax, jaxgen
from PIL import Image
dtype = "f32" if jax.default_backend() == "cpu" else "bf16"
model, params = jaxgen.load(sys.argv[1], dtype=dtype)
picture = jaxgen.sample(model, params, {PROMPT!r}, steps={STEPS}, size=({SIDE}, {SIDE}))[0]
Image.fromarray(picture).save(sys.argv[2])
def device():
    return (jax.local_devices()[0].memory_stats() or {{}}).get("peak_bytes_in_use", 0) / 1e9
"""
WATCHED = """
import threading, time, runpy, sys
def status():
    with open("/proc/self/status") as f:
        rows = dict(line.split(":", 1) for line in f)
    return [int(rows[k].split()[0]) / 1e6 for k in ("RssAnon", "VmRSS")]
peak = [0.0, 0.0]
def watch():
    while True:
        peak[:] = map(max, peak, status()); time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
print("PEAK", *peak, device())
"""


def memory(folder: Path) -> list[tuple[str, float, float]]:
    """Peak memory of a process that loads and makes one image, of the host and of a GPU."""
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        watcher = Path(scratch) / "watch.py"
        watcher.write_text(WATCHED)
        for name, code in (("theirs.py", TORCH_IMAGE), ("ours.py", OURS_IMAGE)):
            script = Path(scratch) / name
            script.write_text(code)
            command = [
                sys.executable,
                str(watcher),
                str(script),
                str(folder),
                f"{scratch}/picture.png",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append([float(x) for x in done.stdout.split("PEAK")[1].split()])
    kinds = ("anonymous", "resident", "device")
    names = [f"peak {kind} memory, load and image" for kind in kinds]
    return [(name, a, b) for name, a, b in zip(names, *peaks) if a and b]


def commands(folder: Path, scratch: Path) -> None:
    """Wall time of whole processes: load, 4 steps, picture written."""
    import torch  # asked for the GPU, since JAX would keep most of its memory

    script = scratch / "torch_image.py"
    script.write_text(TORCH_IMAGE)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled")}
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    ours = [sys.executable, "-m", "jaxgen", "sample", PROMPT, "--model", str(folder)]
    ours += ["--steps", str(STEPS), "--size", f"{SIDE}x{SIDE}", "--out", str(scratch / "out")]
    ours += ["--dtype", "bf16"] if torch.cuda.is_available() else []
    theirs = [sys.executable, str(script), str(folder), str(scratch / "picture.png")]

    def wall(command: list[str]) -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return time.perf_counter() - start

    torch_seconds = wall(theirs)
    for what in ("cold, compiling", "warm compile cache"):
        seconds = wall(ours)
        ratio = seconds / torch_seconds
        print(f"| whole command, {what} | {torch_seconds:.1f} s | {seconds:.1f} s | {ratio:.2f} |")


def describe_machine() -> str:
    """Hardware and versions, without which no figure is quoted."""
    import jax

    names = ("jax", "flax", "torch", "diffusers")
    chip = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        chip = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), chip)
    device = jax.devices()[0]
    where = device.device_kind if device.platform != "cpu" else f"{chip}, {os.cpu_count()} cores"
    return f"{where}; Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in names
    )


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

"""Bytes per device of a training step of the SD 1.5 UNet on virtual meshes: compiled, not run.

    python benchmarks/sharding.py                   # the table of benchmarks/README.md
    python benchmarks/sharding.py --mesh 1,8,1      # one mesh: data, fsdp, tensor
    python benchmarks/sharding.py --mesh 1,8,1 --tpu v5e:2x4 --remat --dtype bf16

Each mesh is compiled in a process of its own, on as many virtual CPU devices, with cached latents
and one example for each device of data and fsdp. State is what a step reads and gives back
(parameters, both moments of AdamW, the average) and what is frozen (text encoder, VAE). Temp is
what the compiler takes beside it: on a CPU all gathered weights and whole gradients, since its
scheduler keeps them. With `--tpu` it is the TPU's compiler, which needs `pip install 'jax[tpu]'`
and no TPU.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen import sharding, trees
from jaxgen.load import DTYPES, open_model
from jaxgen.tasks.denoising import TextToImage
from jaxgen.training import optim
from jaxgen.training import step as steps
from jaxgen.training.ema import EMA

MESHES = ("1,1,1", "1,8,1", "1,64,1", "1,64,4")
REPLICATED = 2**12  # numbers of a leaf that is worth a line of its own


def abstract(tree: Any, where: Any) -> Any:
    """Shapes that say where they live."""
    return jax.tree.map(
        lambda x, w: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=w), tree, where
    )


def parameters(tensors: Any, mesh: Mesh) -> Any:
    layout = sharding.layout(mesh)
    found = {}
    for part, flat in tensors.items():
        for path, t in flat.items():
            name = f"{part}/{path}"
            where = layout(name, t.shape)
            found[name] = jax.ShapeDtypeStruct(t.shape, jnp.float32, sharding=where)
    return trees.unflatten(found)


def pretend_tpu(topology: str) -> None:
    """From here on the devices are those of a TPU slice, which can be compiled for and not run."""
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1"}  # there is no machine in a cloud to ask about itself
    devices = topologies.get_topology_desc(topology, "tpu").devices
    jax.devices = lambda *_: list(devices)
    jax.default_backend = lambda: "tpu"


def measure(shape: tuple[int, ...], options: argparse.Namespace) -> str:
    """A row of the table."""
    model, tensors = open_model(options.model)
    if options.remat:
        unet = dataclasses.replace(model.unet, remat=True)
        model = dataclasses.replace(model, unet=unet)
    task = TextToImage().build(model)
    mesh = sharding.training_mesh(*shape)
    params = parameters(tensors, mesh)
    learned, frozen = trees.split(params, task.learns)
    dtype = DTYPES[options.dtype]
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), frozen
    )
    transform = optim.build(optim.AdamW(), learned, 1000)
    state = jax.eval_shape(partial(steps.start, optimizer=transform, average=EMA()), learned)
    whole, layout = NamedSharding(mesh, PartitionSpec()), sharding.layout(mesh)
    kept = jax.tree.map(lambda x: x.sharding, learned)
    moments = optim.shardings(state.optimizer, learned, layout, whole)
    where = steps.State(whole, kept, moments, kept)  # type: ignore[arg-type]
    state = abstract(state, where)

    rows, side, width = shape[0] * shape[1], model.unet.config.sample_size, 4
    fields: dict[str, tuple] = {"mean": (side, side, width), "std": (side, side, width)}
    fields |= {"embeddings": (77, model.unet.config.cross_attention_dim)}
    shapes = {n: jax.ShapeDtypeStruct((rows, *s), jnp.float32) for n, s in fields.items()}
    shapes["place"] = jax.ShapeDtypeStruct((rows,), jnp.uint32)
    batch = abstract(shapes, {n: NamedSharding(mesh, sharding.BATCH) for n in shapes})

    step = steps.make(task, transform, EMA(), 0, dtype, mesh=mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        memory: Any = jitted.lower(state, frozen, batch).compile().memory_analysis()
    seconds = time.perf_counter() - start
    bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, frozen)))
    held = sum(held_by_one(x) for x in jax.tree.leaves((state, frozen)))
    copies = [
        path
        for path, x in trees.flatten(params).items()
        if mesh.size > 1 and x.size >= REPLICATED and held_by_one(x) == x.size * 4
    ]
    print(f"mesh {shape}: whole on every device: {', '.join(copies) or 'nothing'}", file=sys.stderr)
    name = " x ".join(map(str, shape))
    return (
        f"| {name} | {held / 1e6:,.1f} MB | {held / (bytes_ / mesh.size):.3f} | "
        f"{memory.temp_size_in_bytes / 1e6:,.0f} MB | {seconds:.0f} s |"
    )


def held_by_one(x: Any) -> int:
    """Bytes of a leaf on one device."""
    size = 1
    for n in x.sharding.shard_shape(x.shape):
        size *= n
    return size * x.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mesh", help="data,fsdp,tensor; by default all of the table")
    parser.add_argument("--model", default="fresh:sd15")
    parser.add_argument("--dtype", default="f32", choices=DTYPES, help="of products")
    parser.add_argument("--remat", action="store_true", help="keep nothing from inside of blocks")
    parser.add_argument("--tpu", help="a slice to compile for instead, as in v5e:2x4")
    options = parser.parse_args()
    if options.mesh:
        shape = tuple(int(n) for n in options.mesh.split(","))
        if options.tpu:
            pretend_tpu(options.tpu)
        else:
            jax.config.update("jax_num_cpu_devices", shape[0] * shape[1] * shape[2])
        print(measure(shape, options), flush=True)
        return
    print("| data x fsdp x tensor | state of a device | over 1/N | temp | compiled in |")
    print("|---|---|---|---|---|", flush=True)
    for mesh in MESHES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--mesh", mesh], check=True)


if __name__ == "__main__":
    main()

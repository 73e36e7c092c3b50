"""The same training on one device and on any mesh of eight."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import sharding, trees
from jaxgen.data.pipeline import Images
from jaxgen.load import open_model, read_params
from jaxgen.tasks.denoising import TextToImage
from jaxgen.training import optim, setup
from jaxgen.training import step as steps
from jaxgen.training.recipe import Mesh, Train
from jaxgen.types import UserError
from tests.torch_oracle import error, quick_jit

TINY = "tests/assets/tiny"
MESHES = [(2, 2, 2)]  # it has all three ways
MORE = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 8, 1), (2, 1, 4))]


def batch():
    rng = np.random.default_rng(0)
    return {
        "place": np.arange(8, dtype=np.uint32),
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "ids": rng.integers(0, 590, (8, 77), np.int32),
    }


KEEPS = optax.GradientTransformation(  # the gradient as its state, and no step
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def gradients(shape):
    """Loss and gradients of one step on a mesh."""
    mesh = sharding.training_mesh(*shape)
    model, tensors = open_model(TINY)
    task = TextToImage(model=TINY).build(model)
    params = read_params(tensors, "f32", sharding.layout(mesh))
    learned, frozen = trees.split(params, task.learns)
    state = steps.start(learned, KEEPS, None)
    step = steps.make(task, KEEPS, None, 0, jnp.float32, mesh=mesh)
    with jax.set_mesh(mesh):
        after, metrics = quick_jit(step)(state, frozen, sharding.place_batch(batch(), mesh))
    return float(metrics["loss"]), trees.flatten(jax.tree.map(np.asarray, after.optimizer))


@pytest.fixture(scope="module")
def alone():
    return gradients((1, 1, 1))


@pytest.mark.parametrize("shape", [*MESHES, *MORE], ids=str)
def test_loss_and_gradients_are_those_of_one_device(alone, shape):
    loss, found = gradients(shape)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    for path, expected in alone[1].items():
        assert error(found[path], expected) < 1e-5, path


def test_state_is_split_and_what_cannot_be_is_small():
    mesh = sharding.training_mesh(1, 4, 2)
    where = sharding.layout(mesh)
    assert where("unet/conv_in/kernel", (3, 3, 4, 320)).spec == PartitionSpec(
        None, None, "fsdp", "tensor"
    )
    assert where("a/to_q/kernel", (320, 320)).spec == PartitionSpec("fsdp", "tensor")
    assert where("a/to_out.0/kernel", (320, 640)).spec == PartitionSpec("tensor", "fsdp")
    assert where("a/token_embedding/embedding", (49408, 768)).spec == PartitionSpec("fsdp", None)
    assert where("a/bias", (320,)).spec == PartitionSpec()
    assert where("odd/kernel", (3, 7)).spec == PartitionSpec(None, None)


def test_a_rule_comes_before_the_rest():
    mesh = sharding.training_mesh(1, 8, 1)
    where = sharding.layout(mesh, ((r"conv_in/", PartitionSpec()),))
    assert where("unet/conv_in/kernel", (3, 3, 4, 320)).spec == PartitionSpec()
    assert where("unet/conv_out/kernel", (3, 3, 320, 4)).spec == PartitionSpec(
        None, None, "fsdp", None
    )


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adafactor, optim.Lion])
def test_moments_live_with_their_parameters(kind):
    mesh = sharding.training_mesh(1, 8, 1)
    layout = sharding.layout(mesh)
    learned = {"unet": {"conv": {"kernel": jnp.zeros((3, 3, 16, 32)), "bias": jnp.zeros(32)}}}
    transform = optim.build(kind(), learned, 10)
    state = jax.eval_shape(transform.init, learned)
    whole = NamedSharding(mesh, PartitionSpec())
    placed = optim.shardings(state, learned, layout, whole)
    kernels = [
        s for s, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(state)) if leaf.ndim == 4
    ]
    assert all(s.spec == PartitionSpec(None, None, None, "fsdp") for s in kernels)
    assert len(kernels) == {optim.AdamW: 2, optim.Adafactor: 1, optim.Lion: 1}[kind]


@pytest.mark.parametrize("sizes", [(3, -1, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 1), (8, 1, 2)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.training_mesh(*sizes)


def test_rows_of_a_batch_are_where_the_mesh_says():
    mesh = sharding.training_mesh(2, 2, 2)
    placed = sharding.place_batch(batch(), mesh)
    assert error(placed["image"], batch()["image"]) == 0
    assert {s.data.shape[0] for s in placed["image"].addressable_shards} == {2}
    assert sharding.batch_rows(mesh, 8) == list(range(8))


def slice_of(kind, sides, number=0):
    """The devices of a TPU slice in jax's order: process by process, each with 2x2 of a plane."""
    corners = [(x, y, z) for z in range(sides[2]) for y in (0, 2) for x in (0, 2)]
    corners = [(x, y, z) for x, y, z in corners if x < sides[0] and y < sides[1]]
    within = [(0, 0), (1, 0), (0, 1), (1, 1)]
    places = [(p, (x + i, y + j, z)) for p, (x, y, z) in enumerate(corners) for i, j in within]
    return [
        SimpleNamespace(
            id=n,
            process_index=p,
            coords=place,
            device_kind=kind,
            platform="tpu",
            core_on_chip=0,
            slice_index=number,
        )
        for n, (p, place) in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("kind", "sides", "shape"),
    [
        ("TPU v4", (2, 2, 2), (8, 1, 1)),
        ("TPU v4", (2, 2, 4), (2, 4, 2)),
        ("TPU v5p", (2, 2, 4), (1, 16, 1)),
        ("TPU v6 lite", (4, 4, 1), (16, 1, 1)),
        ("TPU v6 lite", (4, 4, 1), (4, 4, 1)),
        ("TPU v4", (2, 2, 4), (1, 8, 2)),
        ("TPU v6 lite", (4, 4, 1), (2, 8, 1)),
    ],
    ids=str,
)
def test_processes_read_every_row_however_the_mesh_orders_devices(monkeypatch, kind, sides, shape):
    devices = slice_of(kind, sides)
    ordered = sharding.arrange(shape, devices)
    mesh = SimpleNamespace(devices=ordered, shape=dict(zip(sharding.AXES, shape)))
    size = 3 * shape[0] * shape[1]
    part = {device.id: i for i, row in enumerate(ordered.reshape(-1, shape[2])) for device in row}
    owned = {p: set() for p in range(len(devices) // 4)}
    for device in devices:
        owned[device.process_index] |= {3 * part[device.id] + row for row in range(3)}
    for process, expected in owned.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.batch_rows(mesh, size) == sorted(expected)
    assert set().union(*owned.values()) == set(range(size))


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        ("TPU v4", (2, 2, 1)),
        ("TPU v4", (4, 4, 4)),
        ("TPU v5", (4, 4, 4)),  # a v5p
        ("TPU v5 lite", (4, 4, 1)),
        ("TPU v6 lite", (4, 4, 1)),
    ],
    ids=str,
)
def test_every_mesh_of_a_slice_is_found(kind, sides):
    devices = slice_of(kind, sides)
    powers = [2**i for i in range(7)]
    for fsdp, tensor in ((f, t) for f in powers for t in powers[:4]):
        if len(devices) % (fsdp * tensor) == 0:
            shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
            ordered = sharding.arrange(shape, devices)
            assert ordered.shape == shape
            assert sorted(device.id for device in ordered.flat) == [*range(len(devices))]


def slices_of(count):
    return [device for n in range(count) for device in slice_of("TPU v6 lite", (4, 4, 1), n)]


def nodes_of(count, gpus=8):
    """GPUs, whose nodes jax calls slices."""
    return [
        SimpleNamespace(id=i, slice_index=i // gpus, platform="gpu", device_kind="NVIDIA H100")
        for i in range(count * gpus)
    ]


@pytest.mark.parametrize(
    ("devices", "shape", "within"),
    [
        (slices_of(2), (2, 16, 1), (1, 16, 1)),
        (slices_of(4), (8, 4, 2), (2, 4, 2)),
        (slices_of(4), (2, 16, 2), (1, 8, 2)),
        (nodes_of(4), (32, 1, 1), (8, 1, 1)),
        (nodes_of(4), (1, 8, 4), (1, 2, 4)),
        (nodes_of(2), (1, 1, 16), (1, 1, 8)),
    ],
    ids=["data", "more data", "data and fsdp", "nodes by data", "by fsdp", "by tensor"],
)
def test_slices_are_apart_where_least_is_said(devices, shape, within):
    ordered = sharding.arrange(shape, devices)
    assert ordered.shape == shape
    assert len({device.id + 1000 * device.slice_index for device in ordered.flat}) == len(devices)
    for start in np.ndindex(*(size // part for size, part in zip(shape, within))):
        block = ordered[tuple(slice(i * n, i * n + n) for i, n in zip(start, within))]
        assert len({device.slice_index for device in block.flat}) == 1


@pytest.mark.parametrize(
    "devices",
    [slices_of(2)[:24], slice_of("TPU v4", (4, 4, 2))[:24:2] + slice_of("TPU v4", (4, 4, 2))[-12:]],
    ids=["slices of unequal size", "holes"],
)
def test_what_cannot_be_wired_is_refused_in_one_line(devices):
    with pytest.raises(UserError, match=r"jax finds no mesh \(data 1, fsdp 24, tensor 1\)"):
        sharding.arrange((1, 24, 1), devices)


RULES = (("attn.*/kernel$", "fsdp tensor"), ("conv_in/", "."))


def test_rules_of_a_recipe_decide_where_parameters_live():
    mesh = Mesh(fsdp=4, tensor=2, data=1, rules=RULES)
    where = sharding.layout(sharding.training_mesh(*mesh.sizes), mesh.specs)
    assert where("unet/attn1/to_out.0/kernel", (64, 64)).spec == PartitionSpec("fsdp", "tensor")
    assert where("unet/conv_in/kernel", (3, 3, 4, 64)).spec == PartitionSpec(None)
    assert where("unet/conv_out/kernel", (3, 3, 64, 4)).spec == PartitionSpec(
        None, None, "fsdp", "tensor"
    )
    assert sharding.spec(". tensor+fsdp") == PartitionSpec(None, ("tensor", "fsdp"))
    with pytest.raises(UserError, match=r"splits 2 dimensions, but a/attn/kernel is \[64\]"):
        where("a/attn/kernel", (64,))
    with pytest.raises(UserError, match=r"splits 7 of a/attn/kernel.* in 2 \(tensor\)"):
        where("a/attn/kernel", (8, 7))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ((("kernel$", "data"),), "does not say what splits"),
        ((("kernel$", "fsdp fsdp"),), "no axis twice"),
        ((("kernel$", "fsdp+"),), "does not say what splits"),
        ((("(", "fsdp"),), "not a regular expression"),
        (("kernel$", "fsdp"), "is not of pairs"),
        ((("kernel$", ("fsdp",)),), "is not of pairs"),
    ],
)
def test_rules_that_say_nothing_are_refused(rules, said):
    with pytest.raises(UserError, match=said):
        Mesh(rules=rules)


def test_rules_that_fit_nothing_are_refused():
    recipe = Train(TextToImage(model=TINY), Images(source="x", size=32))
    setup.open_task(replace(recipe, mesh=Mesh(rules=RULES)))
    for rules in (((r"atn\d/", "fsdp"),), (("attn", "."), ("attn1", "fsdp"))):
        with pytest.raises(UserError, match=r"mesh.rules: 'at.*' fits no parameter"):
            setup.open_task(replace(recipe, mesh=Mesh(rules=rules)))


def test_products_read_whole_what_rules_split():
    mesh = sharding.training_mesh(1, 4, 2)
    rules = (("a/kernel$", sharding.spec("fsdp tensor")), ("b/", sharding.spec("tensor+fsdp")))
    where = sharding.layout(mesh, rules)
    values = {name: {"kernel": np.arange(128.0).reshape(8, 16)} for name in "ab"}
    params = trees.map_with_path(lambda path, x: jax.device_put(x, where(path, x.shape)), values)

    def loss(params):
        whole = sharding.gather(mesh, params, rules)
        return sum((x**2).sum() for x in jax.tree.leaves(whole)), whole

    grads, whole = jax.jit(jax.grad(loss, has_aux=True))(params)
    for name, spec in (("a", PartitionSpec(None, "tensor")), ("b", PartitionSpec("tensor"))):
        kernel = whole[name]["kernel"]
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        grad = grads[name]["kernel"]
        assert grad.sharding.is_equivalent_to(params[name]["kernel"].sharding, 2)
        np.testing.assert_array_equal(grad, 2 * values[name]["kernel"])


TWO = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxgen import sharding
for order, shape in (([0, 4, 1, 5, 2, 6, 3, 7], (4, 2, 1)), ([0, 1, 4, 2, 5, 6, 3, 7], (2, 2, 2))):
    devices = np.array(sorted(jax.devices(), key=lambda d: d.id))[order].reshape(shape)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    rows = np.array(sharding.batch_rows(mesh, 16))
    placed = sharding.place_batch({"x": rows[:, None] * np.ones(3)}, mesh)["x"]
    assert placed.shape == (16, 3)
    for shard in placed.addressable_shards:
        assert shard.data[:, 0].tolist() == np.arange(16)[shard.index[0]].tolist()
"""


def test_two_processes_place_the_rows_that_they_read():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO, f"localhost:{port}"]
    root = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen([*command, str(p)], env=root, stderr=subprocess.PIPE, text=True)
        for p in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said

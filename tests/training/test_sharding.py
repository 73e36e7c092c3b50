"""The same training on one device and on any mesh of eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen import sharding, trees
from jaxgen.load import open_model, read_params
from jaxgen.tasks.denoising import TextToImage
from jaxgen.training import optim
from jaxgen.training import step as steps
from jaxgen.types import UserError
from tests.torch_oracle import error, quick_jit

TINY = "tests/assets/tiny"
MESHES = [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)]


def batch():
    rng = np.random.default_rng(0)
    return {
        "place": np.arange(8, dtype=np.uint32),
        "image": rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "ids": rng.integers(0, 590, (8, 77), np.int32),
    }


def gradients(shape):
    """Loss and gradients of one step on a mesh, which adds the bare gradient to what learns."""
    mesh = sharding.training_mesh(*shape)
    model, tensors = open_model(TINY)
    task = TextToImage(model=TINY).build(model)
    params = read_params(tensors, "f32", sharding.layout(mesh))
    learned, frozen = trees.split(params, task.learns)
    state = steps.start(learned, optax.identity(), None)
    step = steps.make(task, optax.identity(), None, 0, jnp.float32, mesh=mesh)
    with jax.set_mesh(mesh):
        after, metrics = quick_jit(step)(state, frozen, sharding.place_batch(batch(), mesh))
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after.learned, learned)
    return float(metrics["loss"]), trees.flatten(moved)


@pytest.fixture(scope="module")
def alone():
    return gradients((1, 1, 1))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(alone, shape):
    loss, moved = gradients(shape)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    # Over the largest gradient: differences of parameters hold no more digits than these.
    largest = max(np.abs(g).max() for g in alone[1].values())
    for path, expected in alone[1].items():
        assert np.abs(moved[path] - expected).max() < 1e-5 * largest, path


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
    assert sharding.batch_share(mesh) == (0, 1)

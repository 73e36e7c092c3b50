"""Every task in bfloat16, with blocks computed again, and with a part that learns."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.ad_checkpoint import saved_residuals
from safetensors.numpy import load_file

from jaxgen import trees
from jaxgen.load import open_model, read_params
from jaxgen.parts import PARTS
from jaxgen.tasks.autoencoder import Autoencoder
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.tasks.denoising import Editing, Inpainting, TextToImage
from jaxgen.training import loop, setup
from jaxgen.training import step as steps
from jaxgen.training.recipe import Images, Mesh, Samples, Train
from jaxgen.weights.files import Tensor
from tests.torch_oracle import error, quick_jit
from tests.training.pictures import write_folder

TINY = "tests/assets/tiny"
RNG = np.random.default_rng(0)
TASKS = {  # and a part of what learns
    "text to image": (TextToImage(model=TINY), ("unet/up_blocks",)),
    "inpainting": (Inpainting(model=TINY), ("unet/conv_in", "unet/mid_block")),
    "editing": (Editing(model=TINY), ("unet/.*attentions",)),
    "autoencoder": (Autoencoder(model=TINY, adversarial=0.5), ("vae/decoder/mid_block",)),
    "CLIP": (Contrastive(model=TINY, image_size=32), ("clip/vision_model",)),
}
BATCH = {
    "place": np.arange(2, dtype=np.uint32),
    "image": RNG.integers(0, 256, (2, 32, 32, 3), np.uint8),
    "original": RNG.integers(0, 256, (2, 32, 32, 3), np.uint8),
    "seen": np.ones(2, np.float32),
    "mask": np.kron(RNG.random((2, 4, 4)) < 0.5, np.ones((1, 8, 8), bool)),
    "ids": RNG.integers(0, 590, (2, 77), np.int32),
}


def opened(recipe, remat=False):
    """The task as a run opens it, and the shapes of its parameters."""
    task, tensors = setup.open_task(Train(recipe, Images("data", size=32), remat=remat))
    given = {name: trees.unflatten(tensors[name]) for name in PARTS}
    given = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(t.shape, jnp.float32), given, is_leaf=is_tensor
    )
    return task, jax.eval_shape(task.init, jax.random.key(0), given)


def is_tensor(node):
    return isinstance(node, Tensor)


@pytest.mark.parametrize(
    ("part", "remat"), [(False, False), (True, True)], ids=["whole, kept", "part, again"]
)
@pytest.mark.parametrize("name", TASKS)
def test_a_step_in_bf16_is_one_and_what_learns_stays_float32(name, part, remat):
    recipe, few = TASKS[name]
    task, params = opened(replace(recipe, learn=few) if part else recipe, remat)
    learned, frozen = trees.split(params, task.learns)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    optimizer = optax.adam(1e-3)
    step = steps.make(task, optimizer, None, 0, jnp.bfloat16)
    state = jax.eval_shape(lambda learned: steps.start(learned, optimizer, None), learned)
    after, metrics = jax.eval_shape(step, state, frozen, BATCH)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32


def test_the_loss_in_bf16_is_near_that_in_float32():
    task, _ = opened(TASKS["autoencoder"][0])
    params = task.init(jax.random.key(0), read_params(open_model(TINY)[1]))
    params = {name: params[name] for name in ("vae", "critic")}
    loss = quick_jit(lambda p: task.loss(p, BATCH, jax.random.key(0))[0])
    assert error(loss(steps.cast(params, jnp.bfloat16)), loss(params)) < 0.02


@pytest.mark.parametrize("name", TASKS)
def test_a_run_that_computes_blocks_again_keeps_less(name):
    kept = []
    for remat in (False, True):
        task, params = opened(TASKS[name][0], remat)
        learned, frozen = trees.split(params, task.learns)

        def loss(learned, frozen, task=task):
            return task.loss(trees.combine(learned, frozen), BATCH, jax.random.key(0))[0]

        residuals = saved_residuals(loss, learned, frozen)
        kept.append(sum(a.size * a.dtype.itemsize for a, why in residuals if "argument" not in why))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("name", TASKS)
def test_no_product_of_float32_is_left_to_an_accelerators_default(name):
    task, params = opened(TASKS[name][0])
    loss = jax.make_jaxpr(lambda p: task.loss(p, BATCH, jax.random.key(0)))(params)
    products = [
        e
        for e in equations(loss.jaxpr)
        if e.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert products
    for product in products:
        assert product.params["precision"] is not None, product


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            [*equation.params.values()], is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.slow
def test_a_run_in_bf16_samples_and_leaves_what_did_not_learn_as_it_was(tmp_path):
    recipe = Train(
        TextToImage(model=TINY, learn=("unet/up_blocks",)),
        Images(source=str(write_folder(tmp_path / "data", 4)), size=32),
        dtype="bf16",
        batch_size=2,
        steps=1,
        samples=Samples(prompts=("a red picture",), steps=1),
        mesh=Mesh(data=1),
        out=tmp_path / "run",
    )
    folder = loop.train(recipe, progress=False)
    assert (tmp_path / "run" / "samples").is_dir()
    changed = set()
    for part in PARTS:
        (file,) = (folder / part).glob("*.safetensors")
        saved, given = load_file(file), load_file(Path(TINY) / part / file.name)
        for key, value in saved.items():
            assert value.dtype == np.float32, key
            if not np.array_equal(value, given[key]):
                changed.add(f"{part}/{key.split('.')[0]}")
    assert changed == {"unet/up_blocks"}

"""The gradient of a search, seed to loss: against finite differences, and PyTorch's own."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import jaxgen
from jaxgen import denoiser
from jaxgen.conditioning import Guidance
from jaxgen.diffusion import grids, samplers
from jaxgen.diffusion.schedule import Schedule
from jaxgen.models.clip_config import VisionConfig
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.seedselect import objective, search
from jaxgen.seedselect.objective import ClipDistance, Given, Objective, Targets, Weights
from jaxgen.seedselect.search import Program, Rule, Run, Search
from jaxgen.tasks.contrastive import MEAN, STD
from jaxgen.types import Inputs
from tests.test_gradients import waves, widen
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TINY = Path(__file__).parent.parent / "assets" / "tiny"
STEPS, SCALE, LAMBDA, PRIOR = 5, 3.0, 0.7, 1e-3
RNG = np.random.default_rng(0)
SEED = RNG.normal(size=(1, 8, 6, 4))  # pictures of 32x24, of which CLIP sees the middle
TEXT = RNG.normal(size=(2, 77, 32))
APPEARANCE = RNG.normal(size=SEED.shape)
CENTROID = RNG.normal(size=(1, 12))
OTHERS = RNG.normal(size=(1, 2, 12))
SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 12, "image_size": 16, "patch_size": 8,
}  # fmt: skip


def oracle():
    config = transformers.CLIPVisionConfig(**SHAPE)
    return randomise(transformers.CLIPVisionModelWithProjection(config), 3)


@pytest.fixture(scope="module")
def tiny():
    model, params = jaxgen.load(TINY)
    return model, {**params, "judge": params_of(oracle())}


@pytest.fixture(scope="module")
def compiled(tiny):
    """compiled(wide, sampler, distance, contrast, steps, **search) -> seed -> (loss, gradient)."""
    model, held = tiny

    @cache
    def make(wide=True, sampler="ddim", distance="cosine", contrast=0.0, steps=STEPS, **options):
        how = Search(distance=distance, contrast=contrast, **options)
        meaning = ClipDistance(VisionEncoder(VisionConfig(**SHAPE)), distance, contrast)
        network, vae = model.network, model.vae
        if how.remat:
            network = replace(network, unet=replace(network.unet, remat=True))
            vae = replace(vae, remat=True)
            meaning = replace(meaning, vision=replace(meaning.vision, remat=True))
        program = Program(network, vae, sampler, Objective(meaning, distance), how.truncate)
        points = grids.grid(Schedule.read(model.scheduler, sampler, ""), steps).points
        centroid = CENTROID / np.linalg.norm(CENTROID) if distance == "cosine" else CENTROID
        given = Given((), Targets(centroid, OTHERS), APPEARANCE)
        low = (np.float64(0), np.float64(1))
        asked = points, Guidance(np.array([SCALE]), np.float64(0), *low), given
        floats = widen if wide else lambda leaf: leaf.astype(np.float32)
        numbers = jax.tree.map(lambda x: floats(np.asarray(x)), (held, asked, SEED, TEXT))

        def value(params, asked, seed, text):
            points, scales, given = asked
            cache = denoiser.prepare(program.network, params, Inputs(text))
            given = given._replace(params=params["judge"])
            weights, rule = Weights(LAMBDA, PRIOR), Rule.of(how)
            run = Run(cache, points, 1.0, scales, weights, given, rule)
            slopes, (look, _) = search.gradient(params, run, seed, program=program)
            return look.loss[0], slopes

        with jax.enable_x64(wide):
            params, asked, _, text = numbers
            run = quick_jit(value).lower(*numbers).compile()

        def at(seed):
            with jax.enable_x64(wide):
                loss, slopes = run(params, asked, floats(seed), text)
                return float(loss), np.asarray(slopes)

        at.compiled = run
        return at

    return make


@cache
def from_torch(sampler, distance, contrast):
    """The same loss and gradient by diffusers, transformers and autograd, float64."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY)
    unet, vae, clip = pipe.unet.double(), pipe.vae.double(), oracle().double()
    unet.time_proj.forward = partial(waves, unet.time_proj)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    alphas = torch.cumprod((1 - scheduler.betas).double(), 0)  # a product diffusers rounds
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas, alphas[0]

    def eps(x, t):
        negative, positive = unet(torch.cat([x, x]), t, torch.from_numpy(TEXT)).sample.chunk(2)
        return negative + SCALE * (positive - negative)

    seed = torch.from_numpy(SEED).permute(0, 3, 1, 2).requires_grad_()
    x, y, tail = seed, seed, []
    for t in scheduler.timesteps:
        if sampler == "ddim":
            x = scheduler.step(eps(x, t), t, x).prev_sample
        else:  # Wallace et al. 2023, eq. 14, the two in turns
            now, then = (alphas[i] for i in (t, t - 1000 // STEPS)) if t >= 200 else (
                alphas[t], alphas[0])  # fmt: skip
            here = (then / now).sqrt()
            there = (1 - then).sqrt() - here * (1 - now).sqrt()
            x = here * x + there * eps(y, t)
            y = here * y + there * eps(x, t)
            x = 0.93 * x + 0.07 * y
            y = 0.93 * y + 0.07 * x
            x, y = y, x
        tail.append(x)

    meaning = 0.0
    for weight, latents in zip((0.05, 0.25, 0.70), tail[-3:], strict=True):
        image = vae.decode(latents / vae.config.scaling_factor).sample
        square = image[:, :, 4:-4]
        square = F.interpolate(square, (16, 16), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(n, dtype=torch.float64)[:, None, None] for n in (MEAN, STD))
        seen = clip(((square / 2 + 0.5).clamp(0, 1) - mean) / std).image_embeds
        own, others = torch.from_numpy(CENTROID), torch.from_numpy(OTHERS)
        if distance == "cosine":
            own, seen = F.normalize(own), F.normalize(seen)
            near, far = 1 - (seen * own).sum(-1), 1 - (seen[:, None] * others).sum(-1)
        else:
            near, far = (seen - own).norm(dim=-1), (seen[:, None] - others).norm(dim=-1)
            near, far = (x / seen.shape[-1] ** 0.5 for x in (near, far))
        if contrast:
            scores = -torch.cat([near[:, None], far], -1) / 0.1
            near = near - contrast * torch.log_softmax(scores, -1)[:, 0]
        meaning = meaning + weight * near[0]
    off = tail[-1] - torch.from_numpy(APPEARANCE).permute(0, 3, 1, 2)
    look = off.square().mean() if distance == "cosine" else off.norm() / SEED.size**0.5
    d, r = SEED.size, seed.norm()
    prior = (d - 1) * r.log() - r**2 / 2 - (d / 2 - 1) * np.log(2) - torch.lgamma(
        torch.tensor(d / 2, dtype=torch.float64))  # fmt: skip
    loss = LAMBDA * meaning + (1 - LAMBDA) * look - PRIOR * prior
    loss.backward()
    return loss.item(), nhwc(seed.grad)


FORMS = [("ddim", "cosine", 0.0), ("edict", "euclidean", 0.3)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loss_and_gradient_are_those_of_autograd(compiled, form):
    loss, gradient = compiled(True, *form)(SEED)
    expected, slopes = from_torch(*form)
    assert abs(loss / expected - 1) <= 1e-6
    assert error(gradient, slopes) <= 1e-6


@pytest.mark.parametrize(
    ("form", "bound"),
    [(FORMS[0], 1e-3), pytest.param(FORMS[1], 1e-2, marks=pytest.mark.slow)],
    ids=str,
)
def test_float32_is_near(compiled, form, bound):
    loss, gradient = compiled(False, *form)(SEED)
    expected, slopes = from_torch(*form)
    assert abs(loss / expected - 1) <= 1e-3
    assert error(gradient, slopes) <= bound


def test_gradient_matches_central_differences(compiled):
    run = compiled(True, *FORMS[0])
    _, gradient = run(SEED)
    for _ in range(3):
        step = 1e-5 * RNG.normal(size=SEED.shape)
        rise = run(SEED + step)[0] - run(SEED - step)[0]
        expected = 2 * (gradient * step).sum()
        assert abs(rise - expected) <= 1e-6 * abs(expected)


def test_what_saves_memory_changes_no_gradient(compiled):
    """Blocks computed again, and a gradient that is cut after as many steps as there are."""
    loss, gradient = compiled(True, *FORMS[0], remat=True, truncate=STEPS)(SEED)
    expected, slopes = compiled(True, *FORMS[0])(SEED)
    assert abs(loss / expected - 1) <= 1e-12
    assert error(gradient, slopes) <= 1e-10


@pytest.mark.slow
def test_plain_is_the_same(compiled, monkeypatch):
    """Steps one after the other in Python, and nothing that is computed again."""

    def trail(step, denoise, state, points, keys):
        xs = []
        for i in range(STEPS):
            state = step(denoise, state, jax.tree.map(lambda f: f[i], points), keys)  # noqa: B023
            xs.append(state.x)
        return state, jnp.stack(xs)

    expected, slopes = compiled(True, *FORMS[0])(SEED)
    monkeypatch.setattr(samplers, "trail", trail)
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    monkeypatch.setattr(objective, "with_slopes", lambda score: score)
    loss, gradient = compiled.__wrapped__(True, *FORMS[0])(SEED)  # compiled anew
    assert abs(loss / expected - 1) <= 1e-12
    assert error(gradient, slopes) <= 1e-10


def toy(x, point):
    return jnp.tanh(x[..., ::-1] * point.scale) + 0.1 * x + 1e-3 * point.time


@pytest.mark.parametrize("steps", [1, 7])
def test_edict_reversed_equals_autodiff_through_edict(steps):
    from jaxgen.diffusion import edict

    points = grids.grid(Schedule(sampler="edict"), steps).points
    with jax.enable_x64(True):
        points, seed = jax.tree.map(widen, (points, SEED))
        aim = RNG.normal(size=(1, *SEED.shape))

        def reversed_(seed):
            state, xs = edict.unroll(toy, samplers.State(seed, (seed,)), points, 1)
            return jnp.sum((xs - aim) ** 2) + jnp.sum(state.memory[0] ** 3)

        def plain(seed):
            state = samplers.State(seed, (seed,))
            for i in range(steps):
                row = jax.tree.map(lambda f: f[i], points)  # noqa: B023
                state = samplers.edict(toy, state, row, None)
            return jnp.sum((state.x[None] - aim) ** 2) + jnp.sum(state.memory[0] ** 3)

        one, two = (jax.value_and_grad(f)(seed) for f in (reversed_, plain))
        assert abs(float(one[0]) / float(two[0]) - 1) < 1e-12
        assert error(one[1], two[1]) <= 1e-6


@pytest.mark.slow
def test_memory_of_a_gradient_through_edict_does_not_grow_with_the_steps(compiled):
    runs = compiled(False, *FORMS[1]), compiled(False, *FORMS[1], steps=4 * STEPS)
    few, many = (run.compiled.memory_analysis().temp_size_in_bytes for run in runs)
    assert abs(many - few) < 2 * np.float32(SEED).nbytes  # not a latent pair for 15 steps


def test_edict_is_undone_exactly():
    from jaxgen.diffusion import edict

    points = grids.grid(Schedule(sampler="edict"), 20).points
    with jax.enable_x64(True):
        points, seed = jax.tree.map(widen, (points, SEED))
        state = begin = samplers.State(jnp.asarray(seed), (jnp.asarray(seed[..., ::-1]),))
        rows = [jax.tree.map(lambda f: f[i], points) for i in range(20)]  # noqa: B023
        for row in rows:
            state = samplers.edict(toy, state, row, None)
        for row in reversed(rows):
            state = edict.undo(toy, state, row)
        assert error(state.x, begin.x) < 1e-9
        assert error(state.memory[0], begin.memory[0]) < 1e-9

"""Strokes drawn by score distillation: what is rendered, and where a teacher that knows one picture takes them."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddistill.net import Net
from ddistill.process import edm

FILE = Path(__file__).parents[1] / "experiments" / "sds_scene.py"


@pytest.fixture(scope="module")
def scene():
    spec = importlib.util.spec_from_file_location("sds_scene", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def horizontal(light, height=0.5625):
    """A stroke along the fifth row of eight, between the centres of the second and the last but one pixel."""
    return {
        "ends": jnp.asarray([[[0.1875, height], [0.8125, height]]]),
        "width": jnp.log(jnp.asarray([0.125])),
        "light": jnp.asarray([light]),
    }


def test_a_stroke_is_a_gaussian_of_the_distance_and_strokes_cover_each_other(scene):
    picture = np.asarray(scene.render(horizontal(0.0)))
    away = np.arange(8)[:, None] - 4.0, np.asarray([1.0, 0, 0, 0, 0, 0, 0, 1.0])
    cover = 0.5 * np.exp(-(away[0] ** 2 + away[1] ** 2) / 2)  # widths are one pixel, brightness sigmoid(0)
    np.testing.assert_allclose(picture, 1 - 2 * (1 - cover), atol=1e-5)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), horizontal(0.0))
    np.testing.assert_allclose(scene.render(twice), 1 - 2 * (1 - cover) ** 2, atol=1e-5)


def test_scenes_go_where_the_teacher_has_them(scene, one_device):
    goal = scene.render(horizontal(2.0))
    teacher = Net({}, {}, lambda p, r, x, t, c, **k: jnp.broadcast_to(goal, x.shape))
    start = jax.tree.map(lambda a: a[None].repeat(2, 0), horizontal(0.0, 0.45))
    moved = scene.draw(
        teacher, edm(), start, [0, 1], w=2.0, steps=40, rate=0.03, variational=False, key=jax.random.key(0)
    )
    before, after = (np.abs(np.asarray(jax.vmap(scene.render)(s)) - goal).mean((1, 2)) for s in (start, moved))
    assert np.all(after < 0.5 * before)

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddistill import process as P
from ddistill.integrators.exact import flow_map
from ddistill.mixture import BUNDLED, Mixture, as_teacher
from ddistill.net import guided

PROCESSES = {
    "vp": P.vp(),
    "sub_vp": P.sub_vp(),
    "vp_cosine": P.vp_cosine(),
    "zero_snr": P.discrete_vp(P.zero_terminal_snr(P.scaled_linear_betas(100, 0.0085, 0.12))),
    "ve": P.ve(),
    "edm": P.edm(),
    "flow": P.flow(),
    "trig": P.trig(),
}
every_process = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)


def small_arrays(k=3, d=3, seed=0):
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((k, d, d)) * 0.3
    weights = np.arange(1.0, k + 1)
    return weights / weights.sum(), rng.standard_normal((k, d)), roots @ roots.swapaxes(1, 2) + 0.02 * np.eye(d)


def small(labels=None, **kwargs):
    return Mixture.from_covariances(*small_arrays(**kwargs), labels=labels)


def gaussian(mean, covariance):
    return Mixture.from_covariances([1.0], np.asarray(mean)[None], np.asarray(covariance)[None])


def points(p, t, n=6, d=3, seed=1):
    rng = np.random.default_rng(seed)
    return p.diffuse(jnp.asarray(rng.standard_normal((n, d))), jnp.asarray(rng.standard_normal((n, d))), t)


def denoiser(mixture, p, cond=None):
    return lambda x, t: mixture.denoise(p, x, t, cond)


def close(a, b, tol=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


@every_process
def test_score_is_the_gradient_of_the_log_density(p, x64):
    mixture = small(labels=[0, 1, 1])
    cond = jnp.asarray([0, 1, 2, -1, 1, 0])
    for t in (0.0, 0.05 * p.t_max, 0.6 * p.t_max, p.t_max):
        x = points(p, t)
        for c in (None, cond):
            gradient = jax.grad(lambda x: mixture.log_density(p, x, t, c).sum())(x)
            close(mixture.score(p, x, t, c), gradient, 1e-9)


@every_process
def test_denoiser_is_tweedies(p, x64):
    """α E[x0|x] = x + σ² ∇ log p_t(x), at every time up to α = 0, where only E[x0] is left."""
    mixture = small()
    for t in (0.0, 0.05 * p.t_max, 0.6 * p.t_max, p.t_max):
        x = points(p, t)
        estimate = mixture.denoise(p, x, t)
        close(p.alpha(t) * estimate, x + p.sigma(t) ** 2 * mixture.score(p, x, t), 1e-9)
        # σ' of a VP process is 0 at t = 0 by convention; the mixture follows its process.
        close(mixture.velocity(p, x, t), p.velocity(estimate, x, t), 1e-7)
    if p.alpha(p.t_max) == 0:
        mean = np.asarray(mixture.weights) @ np.asarray(mixture.means)
        close(estimate, np.broadcast_to(mean, (6, 3)))
    if p.sigma(0.0) == 0:
        close(mixture.denoise(p, x, 0.0), x, 1e-12)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_denoiser_by_quadrature(name, x64):
    """E[x0|x] = ∫ x0 p(x0) N(x; α x0, σ²) dx0 / ∫ p(x0) N(x; α x0, σ²) dx0 in one dimension."""
    p = PROCESSES[name]
    weights, means, stds = [0.3, 0.7], [-1.0, 0.8], [0.2, 0.4]
    mixture = Mixture.from_covariances(weights, np.reshape(means, (2, 1)), np.reshape(stds, (2, 1, 1)) ** 2)
    t = float(p.time_of(-math.log(0.5)))
    alpha, sigma = float(p.alpha(t)), float(p.sigma(t))
    for x in (-1.3, -0.1, 0.4):

        def joint(x0, x=x):
            prior = sum(w * stats.norm.pdf(x0, m, s) for w, m, s in zip(weights, means, stds, strict=True))
            return prior * stats.norm.pdf(x, alpha * x0, sigma)

        mass = integrate.quad(joint, -4, 4, epsabs=1e-13, limit=200)[0]
        mean = integrate.quad(lambda x0, joint=joint: x0 * joint(x0), -4, 4, epsabs=1e-13, limit=200)[0] / mass
        close(mixture.denoise(p, jnp.asarray([[x]]), t), [[mean]], 1e-9)
        close(mixture.log_density(p, jnp.asarray([[x]]), t), [math.log(mass)], 1e-9)


@every_process
def test_log_density_is_scipys(p, x64):
    weights, means, covariances = small_arrays()
    mixture = Mixture.from_covariances(weights, means, covariances)
    for t in (0.0, 0.3 * p.t_max, p.t_max):
        x, alpha, sigma = points(p, t), float(p.alpha(t)), float(p.sigma(t))
        parts = np.stack(
            [
                np.log(w) + stats.multivariate_normal(alpha * m, alpha**2 * c + sigma**2 * np.eye(3)).logpdf(x)
                for w, m, c in zip(weights, means, covariances, strict=True)
            ],
            -1,
        )
        close(mixture.log_density(p, x, t), special.logsumexp(parts, -1), 1e-9)
        close(mixture.responsibilities(p, x, t), special.softmax(parts, -1), 1e-9)


@pytest.mark.parametrize(
    "name, p", [("grid25", p) for p in PROCESSES.values()] + [("digits", PROCESSES[n]) for n in ("edm", "flow")]
)
def test_single_precision_is_safe(name, p):
    """From no noise to no signal, σ = .002 and 80 included: finite, and equal to double precision."""
    mixture = Mixture.load(name)
    x0 = np.asarray(mixture.sample(jax.random.key(0), 8), np.float64)
    noise = np.random.default_rng(0).standard_normal(x0.shape)

    @jax.jit
    def evaluate(x, t):
        scale = jnp.sqrt(p.alpha(t) ** 2 + p.sigma(t) ** 2)
        mean_log_density = mixture.log_density(p, x, t) / mixture.d
        return (
            mixture.denoise(p, x, t),
            mixture.responsibilities(p, x, t),
            mean_log_density,
            scale * mixture.score(p, x, t),
        )

    for t in (0.0, p.t_min, 0.4 * p.t_max, p.t_max):
        t = np.float32(t)
        x = np.asarray(p.alpha(t) * x0 + p.sigma(t) * noise, np.float32)
        got = evaluate(x, t)
        with jax.enable_x64(True):
            want = evaluate(jnp.asarray(x, jnp.float64), jnp.asarray(t, jnp.float64))
        for g, w, tol in zip(got, want, (1e-5, 1e-3, 1e-4, 5e-4), strict=True):
            assert g.dtype == jnp.float32 and w.dtype == jnp.float64
            np.testing.assert_allclose(g, w, rtol=1e-3, atol=tol * max(1, np.abs(w).max()))


def test_times_and_shapes(x64):
    p, mixture = P.edm(), small(d=4)
    x = points(p, 1.0, d=4)
    t = jnp.asarray([0.0, 0.01, 0.3, 2.0, 80.0, 1.0])
    for method in (mixture.denoise, mixture.velocity, mixture.log_density):
        method = jax.jit(functools.partial(method, p))
        close(method(x, t), jnp.stack([method(x[i : i + 1], t[i])[0] for i in range(6)]))
    images = mixture.denoise(p, x.reshape(6, 2, 2), t)
    close(images.reshape(6, 4), mixture.denoise(p, x, t), 1e-12)
    assert mixture.denoise(p, x.reshape(6, 2, 1, 2), 1.0).shape == (6, 2, 1, 2)
    assert mixture.log_density(p, x, 1.0).shape == (6,) and mixture.responsibilities(p, x, 1.0).shape == (6, 3)
    assert mixture.denoise(p, x.astype(jnp.bfloat16), 1.0).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"x of shape \[B, \.\.\.\] with 4 numbers a sample; given \[6, 3\]"):
        mixture.denoise(p, x[:, :3], 1.0)
    with pytest.raises(ValueError, match="floating"):
        mixture.denoise(p, jnp.ones((2, 4), complex), 1.0)


def test_a_mixture_passes_through_jit(x64):
    p, mixture = P.flow(), small(labels=[0, 1, 1])
    x = points(p, 0.5)
    jitted = jax.jit(lambda mixture, x, t, cond: mixture.denoise(p, x, t, cond))
    cond = jnp.asarray([0, 1, 2, -1, 1, 0])
    close(jitted(mixture, x, 0.5, cond), mixture.denoise(p, x, 0.5, cond), 1e-12)
    assert np.isnan(jitted(mixture, x, 0.5, cond + 2)[1:3]).all()  # a traced label out of range is loud
    assert (mixture.K, mixture.d, mixture.num_classes) == (3, 3, 2)


@every_process
def test_a_class_is_the_mixture_of_its_components(p, x64):
    weights, means, covariances = small_arrays(k=4)
    labels = np.asarray([0, 1, 1, 0])
    mixture = Mixture.from_covariances(weights, means, covariances, labels)
    t = 0.4 * p.t_max
    x = points(p, t)
    for c in (0, 1):
        own = labels == c
        alone = Mixture.from_covariances(weights[own] / weights[own].sum(), means[own], covariances[own])
        for method in ("denoise", "score", "velocity", "log_density"):
            close(getattr(mixture, method)(p, x, t, c), getattr(alone, method)(p, x, t), 1e-9)
    for null in (2, -1, jnp.full((6,), 2)):
        close(mixture.denoise(p, x, t, null), mixture.denoise(p, x, t), 1e-12)
    # Bayes: D_∅ = Σ_c p(c|x) D_c.
    prior = [weights[labels == c].sum() for c in (0, 1)]
    log_joint = jnp.stack([math.log(prior[c]) + mixture.log_density(p, x, t, c) for c in (0, 1)])
    posterior = jax.nn.softmax(log_joint, 0)[..., None]
    close(
        posterior[0] * mixture.denoise(p, x, t, 0) + posterior[1] * mixture.denoise(p, x, t, 1),
        mixture.denoise(p, x, t),
        1e-9,
    )


def test_guidance_is_linear_in_its_weight(x64):
    p, mixture = P.edm(), small(labels=[0, 1, 1])
    teacher = as_teacher(mixture, p)
    x, cond = points(p, 0.7), jnp.asarray([0, 1, 1, 0, 1, 0])
    field = [guided(teacher, w, mixture.num_classes)(x, 0.7, cond) for w in (0.0, 1.0, 3.5)]
    close(field[0], mixture.denoise(p, x, 0.7))
    close(field[1], mixture.denoise(p, x, 0.7, cond))
    close(field[2], field[0] + 3.5 * (field[1] - field[0]))
    assert np.abs(field[1] - field[0]).max() > 0.05


def test_teacher_is_a_net_without_parameters(x64):
    p, mixture = P.edm(), small(labels=[0, 1, 1])
    teacher = as_teacher(mixture, p)
    x = points(p, 0.7)
    cond = jnp.asarray([0, 1, 2, -1, 1, 0])
    close(teacher(x, 0.7, cond), mixture.denoise(p, x, 0.7, cond))
    close(teacher(x, 0.7, cond, s=jnp.asarray(0.1)), mixture.denoise(p, x, 0.7, cond))
    assert jax.tree.leaves(teacher.params) == []
    assert teacher.apply == as_teacher(mixture, p).apply
    assert hash(teacher.apply) == hash(as_teacher(mixture, p).apply)
    assert teacher.apply != as_teacher(mixture, P.flow()).apply


def test_samples_have_the_moments_of_the_mixture(x64):
    weights, means, covariances = small_arrays()
    mixture = Mixture.from_covariances(weights, means, covariances, [0, 1, 1])
    n = 20_000
    x, modes = mixture.sample_with_modes(jax.random.key(3), n, dtype=jnp.float64)
    x, modes = np.asarray(x), np.asarray(modes)
    counts = np.bincount(modes, minlength=3)
    assert stats.chisquare(counts, n * weights).pvalue > 1e-3
    for k in range(3):
        own = x[modes == k] - means[k]
        white = np.linalg.solve(np.linalg.cholesky(covariances[k]), own.T)
        assert np.abs(white.mean(1)).max() < 4 / math.sqrt(counts[k])
        assert np.abs(np.cov(white) - np.eye(3)).max() < 4 * math.sqrt(2 / counts[k])
        assert stats.kstest(white[0], "norm").pvalue > 1e-3
    np.testing.assert_array_equal(mixture.sample(jax.random.key(3), n, dtype=jnp.float64), x)


def test_samples_of_a_class():
    mixture = small(labels=[0, 1, 1])
    x, modes = mixture.sample_with_modes(jax.random.key(0), 500, 1)
    assert x.shape == (500, 3) and x.dtype == jnp.float32 and set(np.unique(modes)) == {1, 2}
    cond = jnp.arange(600) % 3
    modes = mixture.sample_with_modes(jax.random.key(0), 600, cond)[1]
    assert set(np.asarray(modes[cond == 0])) == {0}
    assert set(np.asarray(modes[cond == 1])) == {1, 2}
    assert set(np.asarray(modes[cond == 2])) == {0, 1, 2}


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "flow", "zero_snr"])
def test_flow_map_of_a_gaussian_in_closed_form(name, x64):
    """x_s = α_s m + U diag √((α_s²c² + σ_s²)/(α_t²c² + σ_t²)) Uᵀ (x_t − α_t m), down to the data and up again."""
    p = PROCESSES[name]
    _, (mean, *_), (covariance, *_) = small_arrays(seed=2)
    c2, basis = np.linalg.eigh(covariance)
    field = denoiser(gaussian(mean, covariance), p)
    # One compilation serves all times: they are per sample.
    t = p.t_max * jnp.asarray([1.0, 1.0, 0.9, 0.3, 0.0, 0.02])
    s = p.t_max * jnp.asarray([0.0, 0.2, 0.01, 0.9, 1.0, 0.02])
    x = points(p, t[:, None])

    def spread(time):
        return np.sqrt(p.alpha(time)[:, None] ** 2 * c2 + p.sigma(time)[:, None] ** 2)

    local = (x - p.alpha(t)[:, None] * mean) @ basis
    expected = p.alpha(s)[:, None] * mean + (spread(s) / spread(t) * local) @ basis.T
    got = flow_map(field, p, x, t, s, rtol=1e-12, atol=1e-12)
    close(got / np.sqrt(p.sigma(s)[:, None] ** 2 + 1), expected / np.sqrt(p.sigma(s)[:, None] ** 2 + 1), 1e-9)


def test_flow_map_inverts_and_composes(x64):
    p, mixture = P.flow(), Mixture.load("ring8")
    field = denoiser(mixture, p)
    x = points(p, 1.0, d=2)

    def move(x, t, s):
        return flow_map(field, p, x, t, s)

    data = move(x, 1.0, 0.0)
    close(move(data, 0.0, 1.0), x, 1e-6)
    close(move(move(x, 1.0, 0.4), 0.4, 0.0), data, 1e-6)
    close(move(x, 0.4, 0.4), x, 1e-12)
    width = np.sqrt(mixture.scales.max())
    distance = np.linalg.norm(data[:, None] - mixture.means, axis=-1).min(1)
    assert distance.max() < 5 * width < 0.25  # on the narrow modes


def test_flow_map_changes_the_density_as_a_map_must(x64):
    """log p_s(Φ(x)) = log p_t(x) − log |det ∂Φ/∂x|."""
    p, mixture = P.edm(), small(d=2)
    t, s = 3.0, 0.0
    x = 2 * points(p, 1.0, n=3, d=2)
    field = denoiser(mixture, p)
    landed, pull = jax.vjp(lambda x: flow_map(field, p, x, t, s), x)
    rows = [pull(jnp.zeros_like(x).at[:, i].set(1.0))[0] for i in range(2)]
    log_det = jnp.linalg.slogdet(jnp.stack(rows, 1))[1]
    close(mixture.log_density(p, landed, s), mixture.log_density(p, x, t) - log_det, 1e-6)


def test_flow_map_of_a_point_mass(x64):
    """Data at one point: the flow is x_s = α_s m + (σ_s/σ_t)(x − α_t m), and every path ends at the point."""
    p, mean = P.edm(), np.asarray([0.3, -0.7])
    field = denoiser(gaussian(mean, np.zeros((2, 2))), p)
    x = points(p, 2.0, d=2)
    close(flow_map(field, p, x, 2.0, 0.5), mean + 0.25 * (x - mean), 1e-9)
    close(flow_map(field, p, x, 2.0, 0.0), np.broadcast_to(mean, (6, 2)), 2e-5)


def test_the_stretch_next_to_the_data_is_closed_to_fourth_order(x64):
    """For a Gaussian of width c the closing's relative error is ⅛ (ρ_e/c)⁴ downwards and −⅜ (ρ_e/c)⁴ upwards."""
    p, c = P.edm(), 0.5
    field = denoiser(gaussian([0.0, 0.0], c**2 * np.eye(2)), p)
    x = points(p, 1.0, d=2)
    exact = x * c / math.sqrt(c**2 + 1)
    for rho_min in (0.1, 0.05):
        u2 = (rho_min / c) ** 4
        down = flow_map(field, p, x, 1.0, 0.0, rho_min=rho_min)
        np.testing.assert_allclose(down / exact - 1, u2 / 8, rtol=0.1)
        up = flow_map(field, p, exact, 0.0, 1.0, rho_min=rho_min)
        np.testing.assert_allclose(up / x - 1, -3 * u2 / 8, rtol=0.1)
    part = flow_map(field, p, x, 1.0, 0.03, rho_min=0.05)
    close(part, x * math.sqrt((c**2 + 0.03**2) / (c**2 + 1)), (0.05 / c) ** 4)


def test_flow_map_in_single_precision_and_under_jit():
    p, mixture = P.edm(), Mixture.load("grid25")
    x = p.prior(jax.random.key(0), (256, 2))
    data = flow_map(denoiser(mixture, p), p, x.reshape(256, 1, 2), 80.0, 0.0).reshape(256, 2)
    net = as_teacher(mixture, p)
    with jax.enable_x64(True):
        exact = flow_map(denoiser(mixture, p), p, jnp.asarray(np.asarray(x), jnp.float64), 80.0, 0.0)
    error = np.abs(np.asarray(data) - np.asarray(exact))
    assert np.median(error) < 1e-5 and np.sqrt(np.mean(error**2)) < 5e-3  # a boundary between modes magnifies
    assert data.dtype == jnp.float32
    jitted = jax.jit(lambda net, x: flow_map(net.bind(), p, x, 80.0, 0.0))(net, x)
    assert np.median(np.abs(jitted - data)) < 1e-5


def test_flow_map_says_why_it_cannot():
    p, field = P.edm(), denoiser(small(), P.edm())
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"flow map from time 90.* is outside this process"):
        flow_map(field, p, x, 90.0, 0.0)
    with pytest.raises(ValueError, match="flow map to time -1"):
        flow_map(field, p, x, 80.0, -1.0)
    with pytest.raises(ValueError, match="floating dtype; given int32"):
        flow_map(field, p, jnp.ones((2, 3), jnp.int32), 80.0, 0.0)
    with pytest.raises(RuntimeError, match=r"flow_map failed: .*max_steps=2"):
        flow_map(field, p, x, 80.0, 0.0, max_steps=2)
    with pytest.raises(RuntimeError, match="check that x and what denoise answers are finite"):
        flow_map(field, p, x.at[1, 0].set(jnp.nan), 80.0, 0.0)
    assert np.isnan(jax.jit(lambda x: flow_map(field, p, x, 80.0, 0.0, max_steps=2))(x)).all()


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_mixtures_are_centred_and_scaled(name):
    mixture = Mixture.load(name)
    d, classes = {"ring8": (2, 2), "grid25": (2, 5), "digits": (64, 10)}[name]
    assert (mixture.d, mixture.num_classes) == (d, classes)
    assert abs(mixture.weights.sum() - 1) < 1e-12
    assert np.abs(mixture.weights @ mixture.means).max() < 1e-6
    second = mixture.weights @ (np.sum(mixture.means**2, 1) + mixture.scales.sum(1))
    assert abs(np.sqrt(second / d) - 0.5) < 1e-6
    identity = mixture.bases.swapaxes(1, 2) @ mixture.bases
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(d), identity.shape), atol=1e-12)


def test_load_reads_a_file(tmp_path):
    weights, means, covariances = small_arrays()
    np.savez(tmp_path / "own.npz", weights=weights, means=means, covariances=covariances)
    mixture = Mixture.load(tmp_path / "own.npz")
    rebuilt = np.einsum("kij,kj,klj->kil", mixture.bases, mixture.scales, mixture.bases)
    np.testing.assert_allclose(rebuilt, covariances, atol=1e-14)
    assert mixture.num_classes == 1 and Mixture.load(str(tmp_path / "own.npz")).K == 3

    with pytest.raises(FileNotFoundError, match=r"no mixture 'ring9'; give one of ring8, grid25, digits, or an \.npz"):
        Mixture.load("ring9")
    np.savez(tmp_path / "part.npz", weights=weights, mean=means)
    with pytest.raises(ValueError, match=r"part\.npz lacks means, covariances and has weights, mean; give"):
        Mixture.load(tmp_path / "part.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz is not an \.npz file"):
        Mixture.load(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", weights=weights, means=means.astype(object), covariances=covariances)
    with pytest.raises(ValueError, match=r"objects\.npz: means holds objects: save it as an array of numbers"):
        Mixture.load(tmp_path / "objects.npz")
    np.savez(tmp_path / "bad.npz", weights=2 * weights, means=means, covariances=covariances)
    with pytest.raises(ValueError, match=r"bad\.npz: weights must sum to 1"):
        Mixture.load(tmp_path / "bad.npz")


WEIGHTS, MEANS, COVARIANCES = small_arrays()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": WEIGHTS[:2]}, r"weights must have shape \[K\] and means \[K, d\]; given \[2\] and \[3, 3\]"),
        ({"means": MEANS[0]}, r"given \[3\] and \[3\]"),
        ({"covariances": COVARIANCES[:, :2]}, r"covariances must have shape \[3, 3, 3\].*given \[3, 2, 3\]"),
        ({"weights": [0.5, 0.7, -0.2]}, "weights must be positive; component 2 has -0.2"),
        ({"weights": 3 * WEIGHTS}, "weights must sum to 1; given weights sum to 3"),
        ({"means": MEANS * np.nan}, "means must be finite; 9 of 9 values"),
        ({"means": [["a"]]}, "means must be an array of numbers"),
        ({"covariances": COVARIANCES + np.triu(np.ones((3, 3)), 1)}, "must be symmetric; that of component 0"),
        (
            {"covariances": COVARIANCES - 3 * np.eye(3)},
            "positive semi-definite; that of component . has the eigenvalue -",
        ),
        ({"labels": [0, 1]}, r"labels must be 3 integers, one for each component; given int.* of shape \[2\]"),
        ({"labels": [0.0, 1.0, 1.0]}, "3 integers.*given float"),
        ({"labels": [0, -1, 1]}, "class numbers from 0 on.*; -1 is given"),
        ({"labels": [0, 2, 2]}, "class 1 has no component"),
    ],
)
def test_mixtures_that_are_none_are_met_with_words(change, message):
    arrays = {"weights": WEIGHTS, "means": MEANS, "covariances": COVARIANCES, **change}
    with pytest.raises(ValueError, match=message):
        Mixture.from_covariances(**arrays)


@pytest.mark.parametrize("cond, given", [(3, "3 to 3"), ([0, -2], "-2 to 0"), (0.5, "float64")])
def test_labels_out_of_range_are_met_with_words(cond, given):
    mixture = small(labels=[0, 1, 1])
    with pytest.raises(ValueError, match=f"integers from 0 to 1, or 2 or -1 for no class; given {given}"):
        mixture.denoise(P.edm(), jnp.ones((2, 3)), 1.0, cond)

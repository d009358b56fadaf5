"""The experiments on the slides' questions: the closed-form ones in full, cheap ones end to end, all of them listed."""

import ast
import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "questions"
SHARED = {"common", "drawing", "particle", "prompts"}
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in SHARED)

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def questions():
    """Load an experiment by name, as running it would."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_experiment_asks_runs_from_the_command_line_and_is_listed(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(mains) == 1 and mains[0].args.args[0].arg == "seeds"
    assert ast.literal_eval(mains[0].args.defaults[0]) >= 3
    assert len(ast.get_docstring(tree)) > 80
    assert f"({name}.py)" in (FOLDER / "README.md").read_text("utf-8")


def test_the_page_names_no_file_that_is_not_there():
    import re

    links = re.findall(r"\]\(([^)#]+)\)", (FOLDER / "README.md").read_text("utf-8"))
    assert links and [link for link in links if "://" not in link and not (FOLDER / link).exists()] == []


def test_a_boundary_value_travels_up_the_table_one_node_after_the_other(questions):
    module = questions("q09_consistency_front")
    errors, times = module.slopes()
    arrival = module.arrival(errors, 0.5)
    assert times[-1] == pytest.approx(80) and np.all(np.diff(times) > 0)
    assert np.all(np.diff(arrival) > 0)
    # Node n learns a chain of n first-order lags of rate r: the median of a negative binomial law, about (n − 1/3)/r.
    n = np.arange(1, len(arrival) + 1)
    np.testing.assert_allclose(arrival, (n - 1 / 3) / 0.1, atol=3)
    assert errors[-1].max() < 1e-3


def test_slopes_of_the_fixed_points_are_those_of_the_formulas(questions):
    module = questions("q10_score_approximation")
    exact = module.exact_slope()
    euler = [module.euler_slope(n) / exact for n in module.NODES]
    heun = [module.heun_slope(n) / exact for n in module.NODES]
    np.testing.assert_allclose(euler, [0.8461, 0.9297, 0.9811, 0.9978], atol=6e-5)
    np.testing.assert_allclose(heun, [1.0553, 1.0098, 1.0006, 1.00001], atol=6e-5)
    for n in (18, 40):
        assert module.solver_slope(n, module.euler) == pytest.approx(module.euler_slope(n), rel=1e-6)
        assert module.solver_slope(n, module.heun) == pytest.approx(module.heun_slope(n), rel=1e-6)
    slope, noise = module.regressed(18, 200_000)
    assert slope / module.euler_slope(18) == pytest.approx(1, abs=0.01)
    assert noise == pytest.approx(1, abs=0.01)


def test_read_out_over_disperses_and_renoising_accumulates_errors(questions):
    module = questions("q11_deterministic_sampling")
    grids = [module.geometric(k) for k in module.STEPS]
    low = [np.append(np.geomspace(80.0, 0.05, k) if k > 1 else [80.0], 0.0) for k in module.STEPS]
    read = [module.read_out(times) for times in grids]
    assert np.all(np.diff(read) > 0)
    np.testing.assert_allclose([module.read_out(times) for times in low], [0.5, 0.547, 0.751, 0.857, 0.923], atol=6e-4)
    np.testing.assert_allclose([module.renoised(times) for times in grids], 0.5, rtol=1e-12)
    np.testing.assert_allclose([module.flow_map(times) for times in grids], 0.5, rtol=2e-5)
    drift = [0.5 - module.renoised(times, 0.02) for times in grids]
    np.testing.assert_allclose(drift, [0.010, 0.0113, 0.020, 0.034, 0.056], atol=5.1e-4)
    assert module.library(grids[2], destination=False, gamma=0.0) == pytest.approx(read[2], rel=1e-4)
    assert module.library(grids[2], destination=False, gamma=1.0) == pytest.approx(0.5, rel=0.01)
    assert module.library(grids[2], destination=True, gamma=0.0) == pytest.approx(0.5, rel=1e-4)


def test_the_slides_euler_step_is_of_second_order_and_the_librarys(questions, capsys):
    module = questions("claim_euler_sign")
    rows = module.main(1)
    assert "Conclusion:" in capsys.readouterr().out
    np.testing.assert_allclose(rows["slide"], rows["library"], rtol=1e-9)
    assert rows["other sign"][-1] > 50 * rows["slide"][-1]


def test_a_consistency_model_started_from_unit_noise_ends_at_the_mean(questions):
    module = questions("claim_cm_start")
    assert module.gaussian_std(np.hypot(0.5, 80), [], end=0.0) == pytest.approx(0.5)
    assert module.gaussian_std(1.0, [], end=0.0) == pytest.approx(0.5 / np.hypot(0.5, 80))
    assert module.gaussian_std(np.hypot(0.5, 80), [0.8] * 5, end=0.3) == pytest.approx(np.hypot(0.5, 0.3))
    assert module.gaussian_std(np.hypot(0.5, 80), [0.8] * 5, keep=False, end=0.3) > 1.05 * np.hypot(0.5, 0.3)


def test_a_training_is_one_loop_for_all_seeds_and_probes_on_the_way(questions):
    common = questions("common")
    mixture, process = common.gmm2d().standardised(0.5), common.edm()
    case = common.Case(mixture, process, common.as_teacher(mixture, process), None, None, None)
    training = common.fitting(case, steps=40)
    training.every, seen = 20, []
    nets = [
        training(
            common.network(case, seed, width=8, blocks=1), case.teacher, jax.random.key(seed),
            probe=lambda net, step: seen.append((step, net.params["outward.kernel"])),
        )
        for seed in range(2)
    ]  # fmt: skip
    assert [step for step, _ in seen] == [0, 20, 40] * 2
    assert not np.any(seen[0][1]) and np.any(seen[1][1])  # the last layer starts at zero
    assert not np.allclose(nets[0].params["outward.kernel"], nets[1].params["outward.kernel"])
    assert (
        training._compiled[1]._cache_size() <= 2
    )  # on several devices the first chunk's arrays are not on the mesh yet


def test_cells_give_mean_and_standard_deviation(questions):
    common = questions("common")
    assert common.cell(np.asarray([1.0, 2.0, 3.0])) == "2.00 ± 1.0"
    assert common.cell(0.01234) == "0.0123" and common.cell(1234.5) == "1234" and common.cell("–") == "–"
    assert common.cell(3e-9) == "3.00e-09" and common.cell(np.nan) == "nan"

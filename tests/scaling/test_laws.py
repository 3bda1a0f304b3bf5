import math

import numpy as np
import pytest
import torch

from bessemer.scaling.laws import huber
from bessemer.scaling.laws.fit import fit_law, read_fit, write_fit
from bessemer.scaling.laws.grid import fit_grid, non_negative_least_squares
from bessemer.scaling.laws.isoflop import budgets, fit_frontier, fit_loss_of_compute, isoflop_bias
from bessemer.scaling.laws.parametric import (
    BESIROGLU,
    HOFFMANN,
    DataConstrainedLaw,
    DegenerateError,
    ParametricLaw,
    Point,
    Points,
    TaskLaw,
    check_determined,
    fit_task_law,
    read_points,
)
from tests.cases import slow

SIZES, RATIOS = np.geomspace(1e7, 1e9, 6), np.geomspace(4, 120, 5)
#: nanochat's models, each the best of its compute: FLOPs, parameters (transformer and head), tokens, bits per byte.
NANOCHAT = Points(
    (
        Point(110.68e6, 1.2415e9, 0.8972, 1e18),
        Point(167.80e6, 1.7853e9, 0.8616, 2e18),
        Point(250.65e6, 2.6422e9, 0.8293, 5e18),
        Point(381.76e6, 3.8069e9, 0.7999, 1e19),
    )
)


def planted(law=BESIROGLU, noise=0.0, seed=0, sizes=SIZES, ratios=RATIOS) -> Points:
    random = np.random.default_rng(seed)
    pairs = [(n, n * ratio) for n in sizes for ratio in ratios]
    return Points(tuple(Point(n, d, float(law.predict(n, d)) * math.exp(noise * random.standard_normal())) for n, d in pairs))


def isoflop_points(law, reach=4.0, drift=1.0) -> Points:
    """Seven sizes a budget, to a factor of `reach` on both sides of its optimum; at the last budget of that times `drift`."""
    points = []
    for flops, shift in zip(np.geomspace(1e18, 1e21, 4), np.geomspace(1, drift, 4), strict=True):
        for size in law.optimal(flops)[0] * shift * np.geomspace(1 / reach, reach, 7):
            points.append(Point(size, flops / 6 / size, float(law.predict(size, flops / 6 / size))))
    return Points(tuple(points))


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["hoffmann", "besiroglu"])
@pytest.mark.parametrize("fit", [huber.fit_huber, fit_grid])
def test_published_numbers_come_back_from_the_losses_that_they_predict(fit, law):
    assert fit(planted(law)).numbers() == pytest.approx(law.numbers(), rel=1e-2)


QUANTITIES = {
    "E": lambda law: law.E,
    "alpha": lambda law: law.alpha,
    "beta": lambda law: law.beta,
    "parameters_exponent": lambda law: law.parameters_exponent,
    "loss at ten times the size": lambda law: float(law.predict(1e10, 2e11)),
}


def covered(method: str, repetitions: int, **options) -> dict[str, int]:
    """How often the 90 % interval of each quantity holds the planted law's."""
    hits = dict.fromkeys(QUANTITIES, 0)
    for repetition in range(repetitions):
        fit = fit_law(planted(noise=0.005, seed=1000 + repetition), method, seed=repetition, **options)
        for name, quantity in QUANTITIES.items():
            between = fit.interval(quantity, 0.9)
            hits[name] += between.low <= quantity(BESIROGLU) <= between.high
    return hits


@pytest.mark.parametrize("method", [slow("huber"), "grid"])
def test_noisy_points_give_the_planted_law_within_the_intervals(method):
    assert min(covered(method, 4, resamples=60).values()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["huber", "grid"])
def test_ninety_percent_intervals_hold_the_planted_law_in_85_of_100_repetitions(method):
    assert min(covered(method, 100).values()) >= 85


def test_an_interval_narrows_with_the_noise():
    widths = []
    for noise in (0.002, 0.02):
        between = fit_law(planted(noise=noise), "huber", resamples=60).interval(lambda law: law.alpha)
        widths.append(between.high - between.low)
    assert widths[1] > 4 * widths[0]


def test_a_further_run_lies_in_a_wider_interval_than_the_law():
    fit = fit_law(planted(noise=0.01), "huber", resamples=100)
    law = fit.interval(lambda law: float(law.predict(1e8, 2e9)))
    run = fit.new_run_interval(1e8, 2e9)
    assert run.high - run.low > 1.5 * (law.high - law.low)


def test_torch_s_lbfgs_finds_no_lower_huber_loss():
    points = planted(noise=0.01)
    n, d, target = (torch.tensor(np.log(values)) for values in (points.parameters, points.tokens, points.loss))

    def loss(x):
        terms = torch.stack([x[0].expand_as(n), x[1] - x[3] * n, x[2] - x[4] * d])
        return torch.nn.functional.huber_loss(torch.logsumexp(terms, 0), target, reduction="sum", delta=huber.DELTA)

    def numbers(law: ParametricLaw):
        return torch.tensor([math.log(law.E), math.log(law.A), math.log(law.B), law.alpha, law.beta], dtype=torch.float64)

    ours = float(loss(numbers(huber.fit_huber(points))))
    # from the true law, the best start there is
    x = numbers(BESIROGLU).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    assert ours <= float(loss(x.detach())) * (1 + 1e-6)


def test_huber_ignores_a_diverged_run_that_least_squares_follow():
    points = planted(noise=0.002)
    outlier = Points((Point(1e8, 2e9, 4 * float(BESIROGLU.predict(1e8, 2e9))), *points.points))
    errors = [abs(fit(outlier).alpha - BESIROGLU.alpha) for fit in (huber.fit_huber, fit_grid)]
    assert errors[0] < 0.01 < errors[1]


def test_non_negative_least_squares_satisfy_the_conditions_of_the_minimum():
    random = np.random.default_rng(0)
    columns, target = random.standard_normal((200, 12, 3)), random.standard_normal((200, 12))
    normal, right = columns.swapaxes(1, 2) @ columns, np.einsum("bij,bi->bj", columns, target)
    weights, reduction = non_negative_least_squares(normal, right)
    gradient = np.einsum("bij,bj->bi", normal, weights) - right
    assert (weights >= 0).all() and (weights == 0).any() and (weights > 0).any()
    assert np.abs(gradient[weights > 0]).max() < 1e-8 and gradient[weights == 0].min() > -1e-8
    residual = np.einsum("bij,bj->bi", columns, weights) - target
    assert reduction == pytest.approx((target**2).sum(1) - (residual**2).sum(1))


def test_the_optimum_of_a_budget_is_the_lowest_loss_on_it():
    size, tokens = BESIROGLU.optimal(1e20)
    assert 6 * size * tokens == pytest.approx(1e20)
    sizes = size * np.geomspace(0.5, 2, 401)
    assert sizes[np.argmin(BESIROGLU.predict(sizes, 1e20 / 6 / sizes))] == pytest.approx(size, rel=0.01)


def test_parabolas_find_the_optimum_where_both_exponents_are_alike():
    bias = isoflop_bias(isoflop_points(alike := ParametricLaw(1.8, 400, 400, 0.35, 0.35)), alike)
    assert bias.exponent == pytest.approx(0, abs=1e-6) and bias.size == pytest.approx(1, abs=1e-6)


def test_parabolas_miss_the_size_where_the_exponents_differ_and_the_exponent_where_the_sizes_drift_too():
    law = ParametricLaw(1.8, 400, 4000, 0.3, 0.45)
    around, drifting = isoflop_bias(isoflop_points(law, reach=8), law), isoflop_bias(isoflop_points(law, 8, drift=3), law)
    assert abs(around.size - 1) > 0.05 and around.exponent == pytest.approx(0, abs=1e-6)
    assert abs(drifting.exponent) > 0.01


def test_points_of_nearly_the_same_compute_are_one_budget():
    points = Points(tuple(Point(1e6 * size, 1e18 * noise / 6e6 / size, 3) for size in (1, 2, 3) for noise in (1, 1.05)))
    assert [len(group) for group in budgets(points)] == [6]


def test_nanochat_s_four_points_have_an_exponent_near_a_half_and_support_little_more():
    found = fit_frontier(NANOCHAT)
    assert found.parameters.exponent == pytest.approx(0.5, abs=0.05)
    assert found.parameters.low < 0.5 < found.parameters.high and found.parameters.high - found.parameters.low > 0.1
    assert found.loss is None
    with pytest.raises(DegenerateError, match="too few points"):
        fit_law(NANOCHAT)


def test_the_loss_of_compute_comes_back_from_the_losses_that_it_predicts():
    flops = np.geomspace(1e15, 1e19, 6)
    points = Points(tuple(Point(1e6, c / 6e6, 0.7 + 900 * c**-0.2, c) for c in flops))
    law = fit_loss_of_compute(points)
    assert (law.E, law.K, law.gamma) == pytest.approx((0.7, 900, 0.2), rel=1e-3)


def test_repeated_tokens_are_worth_ever_less():
    law = DataConstrainedLaw()
    unique = 1e9
    fresh = ParametricLaw(law.E, law.A, law.B, law.alpha, law.beta)
    # nothing repeated, and no more parameters than those tokens want
    assert law.predict(4e7, unique, unique) == pytest.approx(fresh.predict(4e7, unique))
    epochs = np.array([1, 2, 4, 16, 64, 1000])
    losses = law.predict(4e7, unique * epochs, unique)
    assert (np.diff(losses) < 0).all()
    # four epochs are worth what their tokens would be if they were new, nearly; forty are not (section 6 of the paper)
    assert losses[2] - fresh.predict(4e7, 4 * unique) < 0.02
    assert law.predict(4e7, 40 * unique, unique) - fresh.predict(4e7, 40 * unique) > 0.1
    # in the limit U (1 + R*)
    assert losses[-1] == pytest.approx(fresh.predict(4e7, unique * (1 + law.repeated_tokens)), rel=1e-6)
    with pytest.raises(ValueError):
        law.predict(1e7, 1e8, 1e9)


def test_a_task_s_accuracy_law_comes_back_from_the_accuracies_that_it_predicts():
    law = TaskLaw(-0.7, 8.0, 0.9, 0.95)
    losses = np.linspace(0.5, 1.5, 12)
    found = fit_task_law(losses, law.predict(losses))
    assert found.predict(losses) == pytest.approx(law.predict(losses), abs=1e-4)
    assert (found.a, found.k, found.loss_0, found.b) == pytest.approx((law.a, law.k, law.loss_0, law.b), rel=0.01)


def test_a_task_law_needs_losses_that_differ():
    with pytest.raises(DegenerateError, match="all the same"):
        fit_task_law([1.0] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def line(sizes=(1e7,), ratio=20.0) -> Points:
    return Points(tuple(Point(n, ratio * n, float(BESIROGLU.predict(n, ratio * n))) for n in sizes))


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (line(np.geomspace(1e7, 1e9, 6)), "too few points"),
        (line(np.geomspace(1e7, 1e9, 12)), "move together"),
        (planted(sizes=[1e8], ratios=np.geomspace(1, 100, 9)), "different parameters of the points: 1"),
        (Points(tuple(Point(n, 1e9, 3.0) for n in np.geomspace(1e7, 1e9, 9))), "different tokens of the points: 1"),
    ],
    ids=["six", "one ratio", "one size", "one length"],
)
def test_points_that_determine_no_law_are_refused_with_the_reason(points, reason):
    with pytest.raises(DegenerateError, match=reason):
        check_determined(points)


@pytest.mark.parametrize("method", ["huber", "grid"])
def test_losses_that_do_not_fall_give_no_exponent(method):
    flat = Points(tuple(Point(point.parameters, point.tokens, 3.0) for point in planted().points))
    with pytest.raises(DegenerateError, match="no exponent can be given"):
        fit_law(flat, method, resamples=20)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("place", ["parameters", "tokens", "loss", "flops"])
def test_a_number_that_is_not_finite_and_positive_is_refused(place, value):
    numbers = {"parameters": 1e7, "tokens": 1e9, "loss": 3.0, "flops": 1e17} | {place: value}
    with pytest.raises(DegenerateError, match=f"point 1: {place} is"):
        Points((Point(**numbers),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("parameters,token,loss\n1,2,3\n", "has no column 'tokens'; did you mean 'token'?"),
        ("parameters,tokens,loss\n1e6,many,3\n", r"points.csv:2: tokens is 'many', not a number"),
        ("parameters,tokens,loss\n1e6,1e7,3\n1e6,nan,3\n", r"points.csv:3: tokens is nan"),
    ],
)
def test_a_csv_s_mistake_is_named_by_line(tmp_path, text, message):
    (tmp_path / "points.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DegenerateError, match=message):
        read_points(tmp_path / "points.csv")


def test_a_law_s_file_gives_the_same_fit_back(tmp_path):
    fit = fit_law(planted(noise=0.01), "grid", resamples=20, count="non-embedding", metric="bits_per_byte", seed=3)
    write_fit(tmp_path / "law.json", fit)
    again = read_fit(tmp_path / "law.json")
    assert again == fit and again.new_run_interval(1e9, 1e10) == fit.new_run_interval(1e9, 1e10)

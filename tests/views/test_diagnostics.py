"""Training diagnostics, as the report shows them."""

import itertools
import math
import re

from bessemer.views.diagnostics import diagnostics, layers_map, losses_by_source


def records(steps=(100, 200), layers=2):
    """Lines of steps with diagnostics, and one without."""
    lines = [{"step": 1, "loss": 3.0, "mfu": 0.2}]
    for step in steps:
        line = {"step": step, "loss": 2.0, "mfu": 0.3, "peak_memory_bytes": 2_000_000_000, "loss/web": 2.5, "loss/code": 1.5}
        for layer in range(layers):
            line |= {f"gradient_norm/layers.{layer}/attention": 3.0, f"gradient_norm/layers.{layer}/norms": 4.0 * step}
            line |= {f"update_ratio/layers.{layer}/attention": 0.5, f"weight_norm/layers.{layer}/attention": 3.0}
            line |= {f"update_ratio/layers.{layer}/norms": 1.0, f"weight_norm/layers.{layer}/norms": 4.0}
            line |= {f"activation_outlier/layers.{layer}": 7.0 + layer}
        lines.append(line | {"gradient_norm/embedding": 1.0, "gradient_norm/final_norm": 0.0})
    return lines


def norm_at(step):
    """The norm of a layer at a step, over the smallest that is drawn."""
    return math.hypot(3.0, 4.0 * step)


def cells(page):
    return dict(re.findall(r"<title>([^<:]*): ([^<]*)</title>", page))


def test_the_roles_of_a_layer_are_one_norm():
    found = cells(layers_map(records()[1:], "gradient_norm", title="t", shown=str))
    assert found["layer 1, step 200"] == str(math.hypot(3.0, 800.0))
    assert found["embedding, step 100"] == "1.0" and "final norm, step 100" in found


def test_ratios_of_roles_are_joined_by_the_weights_that_they_are_of():
    page = layers_map(records()[1:], "update_ratio", title="t", shown=str, weights="weight_norm")
    assert cells(page)["layer 0, step 100"] == str(math.hypot(0.5 * 3, 1.0 * 4) / 5)


def test_shades_follow_the_logarithm_and_zero_has_none():
    page = layers_map(records()[1:], "gradient_norm", title="t", shown=str)
    shades = {name: float(shade) for shade, name in re.findall(r'fill-opacity:([\d.]+)"><title>([^<:]*)', page)}
    assert shades["layer 0, step 200"] == 1 and shades["final norm, step 200"] == 0
    share = math.log(norm_at(100)) / math.log(norm_at(200))
    assert math.isclose(shades["layer 0, step 100"], 0.08 + 0.92 * share, abs_tol=1e-3)


def test_a_long_run_is_thinned_to_columns_that_keep_the_first_and_the_last():
    page = layers_map(records(range(10, 1010, 10))[1:], "gradient_norm", title="t", shown=str)
    steps = {int(name.rpartition(" ")[2]) for name in cells(page)}
    assert len(steps) == 24 and {10, 1000} <= steps


def test_names_of_columns_do_not_touch():
    page = layers_map(records(range(10_000, 10_240, 10))[1:], "gradient_norm", title="t", shown=str)
    places = [int(place) for place in re.findall(r'<text x="(\d+)" y="\d+" text-anchor="middle">', page)]
    assert min(after - before for before, after in itertools.pairwise(places)) >= 5 * 5


def test_few_sources_are_curves_and_many_a_table():
    assert "<svg" in losses_by_source(records()[1:], name="a")
    many = [{"step": 1} | {f"loss/<{number}>": 2.0 + number for number in range(9)}, {"step": 2, "loss/<3>": 1.25}]
    page = losses_by_source(many, name="a")
    assert "<svg" not in page and "&lt;3&gt;" in page and "1.250" in page and "5.000" in page
    assert losses_by_source([{"step": 1, "loss/only": 2.0}], name="a") == ""


def test_the_section_shows_all_diagnostics():
    page = diagnostics(records(), name="pretraining")
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "Loss by source, nats per token", "Share of the peak (MFU), %", "Most memory so far, GB",
        "Norm of the gradient, before clipping", "Update over weights, ‖Δw‖ / ‖w‖",
        "Largest activation over the root mean square",
    ]  # fmt: skip


def test_a_run_without_diagnostics_has_no_such_part():
    assert diagnostics([{"step": 1, "loss": 3.0}], name="a") == ""
    assert diagnostics([], name="a") == ""

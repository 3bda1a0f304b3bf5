"""Merging of models and adapters, beside mergekit's and peft's results, and cases worked by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.progress import Silent
from bessemer.core.store import read_json, write_json
from bessemer.model.adapters import Adapter, Update
from bessemer.model.adapters.folder import read_adapter, write_adapter
from bessemer.model.merging.adapters import AdapterOptions, merge_updates
from bessemer.model.merging.config import MergeConfig, from_mergekit, value_at
from bessemer.model.merging.methods import DeltaOptions, drop, merge_deltas, slerp, trim
from bessemer.model.merging.models import ModelPlace, merge_stage, merged_folder, tokenizer_difference
from bessemer.model.storage.folder import load_model, save_model
from tests.cases import slow
from tests.model.random_adapters import random_adapter
from tests.model.randomised import SHAPES, random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

CONFIG = SHAPES["grouped"].with_changes(vocab_size=VOCAB_SIZE)
PLAIN = DeltaOptions((1.0, 1.0), False, "none", 1.0, lambda index: torch.Generator().manual_seed(index))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three models of one shape and tokenizer: base, a, b."""
    folder = tmp_path_factory.mktemp("merging")
    tokenizer = write_small_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(("base", "a", "b")):
        save_model(random_decoder(CONFIG, seed), folder / name, tokenizer=tokenizer)
    return folder


def places(folder, *names):
    return [ModelPlace(name, folder / name) for name in names]


def merge(folder, out, base=None, **settings):
    """The merged tensors of the models a and b, or of those that the settings name."""
    config = MergeConfig.parse({"models": ["a", "b"], "base": base} | settings)
    sources = places(folder, *(one.model for one in config.models))
    merged_folder(config, sources, None if base is None else ModelPlace(base, folder / base), out, seed=7, progress=Silent())
    return load_file(out / "model.safetensors")


# ------------------------------------------------------------------------------------------------------ by hand


def test_ties_keeps_the_largest_entries_and_the_sign_of_their_sum():
    """Yadav et al. 2023, figure 1: trim, elect, merge."""
    first, second = torch.tensor([4.0, 0.1, -2.0, 3.0]), torch.tensor([-1.0, 5.0, -4.0, 0.2])
    options = PLAIN._replace(densities=(0.75, 0.75), normalize=True)
    # of first 0.1 is trimmed, of second 0.2; signs: +, +, -, +; where one agrees its value, where both do their mean
    assert merge_deltas("ties", [first, second], [1.0, 1.0], options).tolist() == [4.0, 5.0, -3.0, 3.0]


def test_slerp_goes_along_the_circle_between_perpendicular_vectors():
    first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    half = slerp(first, second, 0.5)
    torch.testing.assert_close(half, torch.full((1, 2), math.sqrt(2.0)))
    assert torch.equal(slerp(first, first * 3, 0.5), first * 2), "parallel tensors are interpolated linearly"


def test_dropped_differences_keep_their_mean_and_are_the_same_for_a_seed():
    delta = torch.ones(100_000)
    dropped = drop(delta, 0.3, torch.Generator().manual_seed(3))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(dropped, drop(delta, 0.3, torch.Generator().manual_seed(3)))


def test_values_run_over_the_layers_and_the_first_filter_that_matches_counts():
    filtered = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp.*_proj*", "value": 3}, {"value": 0.5}]
    config = MergeConfig.parse({"method": "slerp", "models": ["a", "b"], "t": filtered})
    assert [value_at(config.t, ["model.layers.1.self_attn.q_proj.weight"], depth, "t") for depth in (0, 0.25, 1)] == [
        0,
        0.25,
        1,
    ]
    assert value_at(config.t, ["x", "mlp.up_proj.weight"], 0.25, "t") == 3
    assert value_at(config.t, ["model.norm.weight"], 0.25, "t") == 0.5
    assert value_at([1.0, 3.0, 0.0], ["x"], 0.75, "t") == 1.5
    with pytest.raises(ConfigError, match="t: no filter matches the tensor 'x'; end the list with a value without a filter"):
        value_at(config.t[:2], ["x"], 0, "t")


# -------------------------------------------------------------------------------------------------------- folders


def test_a_linear_merge_is_the_mean_of_all_weights_and_a_whole_model(place, tmp_path):
    merged = merge(place, tmp_path / "out", models=[{"model": "a", "weight": 3}, {"model": "b", "weight": 1}])
    first, second = (load_file(place / name / "model.safetensors") for name in ("a", "b"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])
    assert load_model(tmp_path / "out").config == load_model(place / "a").config
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (place / "a" / "tokenizer.json").read_bytes()
    assert read_json(tmp_path / "out" / "merge.json")["settings"]["method"] == "linear"


def test_weights_by_layer_take_the_first_layers_of_one_model_and_the_last_of_another(place, tmp_path):
    layers = CONFIG.num_hidden_layers
    merged = merge(place, tmp_path / "out", method="slerp", t=[{"filter": "layers.", "value": [0, 1]}, {"value": 0}])
    first, second = (load_file(place / name / "model.safetensors") for name in ("a", "b"))
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(merged[name.format(0)], first[name.format(0)])
    torch.testing.assert_close(merged[name.format(layers - 1)], second[name.format(layers - 1)])
    torch.testing.assert_close(merged["model.norm.weight"], first["model.norm.weight"])


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_the_same_for_a_seed_and_another_for_another(place, tmp_path, method):
    given = {"method": method, "density": 0.4}
    merged = [merge(place, tmp_path / str(seed), "base", seed=seed % 2, **given) for seed in range(3)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[0][name], merged[2][name]) and not torch.equal(merged[0][name], merged[1][name])


def test_a_model_merged_with_itself_is_itself(place, tmp_path):
    own = load_file(place / "a" / "model.safetensors")
    for method, base in (("linear", None), ("slerp", None), ("ties", "base")):
        merged = merge(place, tmp_path / method, base, method=method, models=["a", "a"])
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, own[name], msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_is_left_of_a_merge_that_fails(place, tmp_path):
    with pytest.raises(ConfigError, match="weight: the weights add up to 0 for the tensor"):
        merge(place, tmp_path / "out", models=[{"model": "a", "weight": 1}, {"model": "b", "weight": -1}])
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_in_the_weights_that_are_read(place, tmp_path):
    model = load_model(place / "base")
    adapters = [random_adapter(model, seed) for seed in (1, 2)]
    sources = []
    for number, adapter in enumerate(adapters):
        write_adapter(adapter, model, tmp_path / str(number))
        sources.append(ModelPlace(str(number), place / "base", tmp_path / str(number)))
    config = MergeConfig.parse({"method": "task_arithmetic", "models": ["0", {"model": "1", "weight": -0.5}], "base": "base"})
    merged_folder(config, sources, ModelPlace("base", place / "base"), tmp_path / "out", seed=0, progress=Silent())
    name = "layers.0.self_attn.q_proj"
    deltas = [adapter.updates[name].scale * adapter.updates[name].up_NR @ adapter.updates[name].down_RK for adapter in adapters]
    expected = model.get_submodule(name).weight + deltas[0] - 0.5 * deltas[1]
    torch.testing.assert_close(load_model(tmp_path / "out").get_submodule(name).weight, expected, rtol=1e-5, atol=1e-5)


def test_the_stage_merges_stages_by_name_and_folders_by_path(place, tmp_path):
    config = MergeConfig.parse(["sft", "./b"])
    metrics = merge_stage(config, {"sft": place / "a"}, place, tmp_path, seed=0, progress=Silent())
    assert (metrics["merge"], metrics["models"]) == ("linear of sft, ./b", 2)
    with pytest.raises(ConfigError, match="the stages above trained 1 model; name models"):
        merge_stage(MergeConfig(), {"sft": place / "a"}, place, tmp_path / "two", seed=0, progress=Silent())


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "ties", "models": ["a", "b"]}, "ties merges differences: name in base"),
        ({"method": "slerp", "models": ["a", "b", "c"]}, "slerp merges two models, and 3 are named"),
        ({"models": ["a"]}, "one model alone"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig.parse(values, "merge")


def changed_copy(place, target, **changes):
    """A copy of the model a whose tokenizer.json has another content."""
    save_model(load_model(place / "a"), target, tokenizer=place / "a")
    content = read_json(target / "tokenizer.json")
    write_json(target / "tokenizer.json", content | changes)
    return target


def test_models_that_do_not_fit_are_refused_in_one_line(place, tmp_path):
    vocabulary = dict(read_json(place / "a" / "tokenizer.json")["model"]["vocab"])
    names = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    model = read_json(place / "a" / "tokenizer.json")["model"]
    changed_copy(place, tmp_path / "swapped", model=model | {"vocab": vocabulary})
    assert tokenizer_difference(place / "a", place / "b") is None
    assert "id " in tokenizer_difference(place / "a", tmp_path / "swapped")
    narrow = CONFIG.with_changes(intermediate_size=CONFIG.intermediate_size // 2)
    save_model(random_decoder(narrow), tmp_path / "narrow", tokenizer=place / "tokenizer")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for name in ("one", "two"):
        changed_copy(place, tmp_path / name)
        settings = read_json(tmp_path / name / "tokenizer_config.json")
        write_json(tmp_path / name / "tokenizer_config.json", settings | {"chat_template": template + name})
    for other, first, message in (
        ("swapped", place / "a", "another tokenizer than a's .id .* so a row of its embedding means another token"),
        ("narrow", place / "a", f"intermediate_size is {narrow.intermediate_size}, and {CONFIG.intermediate_size} of a"),
        ("two", tmp_path / "one", "another chat template than one's, so the merged model"),
    ):
        with pytest.raises(ArtefactError, match=message) as refused:
            sources = [ModelPlace(first.name, first), ModelPlace(other, tmp_path / other)]
            merged_folder(MergeConfig.parse(["a", "b"]), sources, None, tmp_path / "out", seed=0, progress=Silent())
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- peft


def peft_model(place, adapters):
    """The base with adapters in peft, which reads their folders."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="0")
    model.load_adapter(str(adapters[1]), adapter_name="1")
    return model


@pytest.fixture(scope="module")
def adapters(place):
    """Two adapters of the base with ranks 3 and 3."""
    model, folders = load_model(place / "base"), []
    for seed in (1, 2):
        write_adapter(random_adapter(model, seed), model, place / f"adapter{seed}")
        folders.append(place / f"adapter{seed}")
    return folders


@pytest.mark.parametrize(
    ("theirs", "ours", "rank", "density"),
    [
        slow("cat", "task_arithmetic", None, None),
        slow("svd", "task_arithmetic", 4, None),
        ("linear", "factors", None, None),
        ("ties_svd", "ties", 3, 0.4),
        ("dare_linear_svd", "dare_linear", 3, 0.4),
    ],
)
def test_merged_adapters_are_those_of_peft(place, adapters, monkeypatch, theirs, ours, rank, density):
    weights = [1.0, 1.0] if ours == "ties" else [0.7, -0.4]
    model = peft_model(place, adapters)
    base = load_model(place / "base")
    opened = [read_adapter(folder, base) for folder in adapters]
    name = "layers.1.mlp.up_proj"
    if density is not None and ours != "ties":
        # our numbers for theirs, which are drawn one adapter after the other, layer after layer
        drawn = iter([0, 1] * 10_000)
        generators = {index: torch.Generator() for index in (0, 1)}

        def bernoulli(tensor):
            index = next(drawn)
            return real(tensor, generator=generators[index].manual_seed(index))

        real = torch.bernoulli
        monkeypatch.setattr("peft.utils.merge_utils.torch.bernoulli", bernoulli)
    model.add_weighted_adapter(["0", "1"], weights, "merged", theirs, svd_rank=rank, density=density)
    layer = model.base_model.model.get_submodule(f"model.{name}")
    expected = layer.get_delta_weight("merged")
    monkeypatch.undo()
    options = PLAIN._replace(
        densities=(density or 1.0,) * 2, normalize=ours == "ties", rescale="density" if ours.startswith("dare") else "none"
    )
    updates = [(adapter.updates[name], weight) for adapter, weight in zip(opened, weights, strict=True)]
    merged = merge_updates(updates, AdapterOptions(ours, rank, lambda _: options))
    torch.testing.assert_close(merged.scale * merged.up_NR @ merged.down_RK, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_sum_has_the_sum_of_the_ranks_and_an_svd_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    updates = [
        Update(torch.randn(rank, 20, generator=generator), torch.randn(16, rank, generator=generator), 0.5) for rank in (2, 3)
    ]
    weighted = [(updates[0], 1.0), (updates[1], 2.0)]
    exact = merge_updates(weighted, AdapterOptions("task_arithmetic", None, lambda _: PLAIN))
    whole = 0.5 * updates[0].up_NR @ updates[0].down_RK + updates[1].up_NR @ updates[1].down_RK
    assert exact.down_RK.shape == (5, 20)
    torch.testing.assert_close(exact.up_NR @ exact.down_RK, whole)
    best = merge_updates(weighted, AdapterOptions("task_arithmetic", 2, lambda _: PLAIN))
    left = torch.linalg.svdvals(whole)[2:]
    error = torch.linalg.matrix_norm(whole - best.up_NR @ best.down_RK)
    assert best.down_RK.shape == (2, 20) and float(error) == pytest.approx(float(left.norm()), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ mergekit


@pytest.mark.peer(name="mergekit")
@pytest.mark.parametrize(
    ("method", "own", "density", "shared"),
    [
        ("task_arithmetic", [0.3, -0.8], None, {"lambda": 0.5}),
        ("ties", [0.3, 1.2], [0.4, 0.9], {"normalize": True, "lambda": 1.5}),
        ("dare_linear", [0.3, 1.2], [0.4, 0.6], {"rescale": True}),
        ("dare_ties", [0.3, 1.2], [0.4, 0.6], {"normalize": True}),
    ],
)
def test_merged_tensors_are_those_of_mergekit(monkeypatch, method, own, density, shared):
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    group_of = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
    generator = torch.Generator().manual_seed(5)
    base, *models = (torch.randn(30, 40, generator=generator) for _ in range(3))
    seeds = iter([0, 1])
    real = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda tensor: real(tensor, generator=torch.Generator().manual_seed(next(seeds))))
    given = {"normalize": False, "rescale": False, "int8_mask": False, "lambda": 1.0} | shared
    given |= {"weight": dict(enumerate(own, 1)), "density": dict(enumerate(density or [1.0, 1.0], 1))}
    group = group_of([base, *models], ids=[0, 1, 2], base_index=0)
    expected = registry.get(method).merge_group(group, **given)
    monkeypatch.undo()
    rescale = "l1" if given["rescale"] else "none"
    options = DeltaOptions(density or (1.0, 1.0), given["normalize"], rescale, given["lambda"], PLAIN.generator)
    ours = base + merge_deltas(method, [model - base for model in models], own, options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


RANGE = [0, CONFIG.num_hidden_layers]
MERGEKIT_FILES = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.3}},
            {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.4}]}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [{"sources": [{"model": "a", "layer_range": RANGE}, {"model": "b", "layer_range": RANGE}]}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "base"},
            {"model": "a", "parameters": {"weight": 0.5, "density": 0.5}},
            {"model": "b", "parameters": {"weight": [0, 1], "density": 0.3}},
        ],
        "parameters": {"normalize": True, "int8_mask": True},
    },
}


def with_folders(values, place):
    """The same with the models' folders in place of their names."""
    if isinstance(values, dict):
        return {
            name: str(place / value) if name in ("model", "base_model") else with_folders(value, place)
            for name, value in values.items()
        }
    return [with_folders(value, place) for value in values] if isinstance(values, list) else values


@pytest.mark.peer(name="mergekit")
@pytest.mark.parametrize("values", MERGEKIT_FILES.values(), ids=MERGEKIT_FILES)
def test_a_file_of_mergekit_gives_the_model_that_mergekit_makes_of_it(place, tmp_path, values):
    merge_module = pytest.importorskip("mergekit.merge")
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    config = from_mergekit(values, "merge.yaml")
    base = None if config.base is None else ModelPlace(config.base, place / config.base)
    merged_folder(
        config, places(place, *(one.model for one in config.models)), base, tmp_path / "ours", seed=0, progress=Silent()
    )
    theirs = MergeConfiguration.model_validate(with_folders(values, place) | {"dtype": "float32"})
    merge_module.run_merge(theirs, str(tmp_path / "theirs"), MergeOptions(quiet=True, copy_tokenizer=False))
    ours, expected = load_file(tmp_path / "ours" / "model.safetensors"), {}
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        expected |= load_file(path)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"merge_method": "passthrough"}, "merge_method: there is no 'passthrough'"),
        ({"merge_method": "linear", "models": [{"model": "a"}]}, "a: parameters: weight is missing"),
        ({"merge_method": "linear", "tokenizer_source": "union"}, "tokenizer_source: has no equal here"),
        ({"merge_method": "linear", "slices": [{}, {}]}, "slices: only one slice with the same layers"),
    ],
)
def test_what_a_file_of_mergekit_asks_for_in_vain_is_one_line(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mergekit(values, "merge.yaml")


def test_merged_adapters_are_a_folder_that_knows_its_base(place, adapters, tmp_path):
    from bessemer.model.merging.adapters import merged_adapter_folder

    config = MergeConfig.parse({"method": "task_arithmetic", "models": ["1", {"model": "2", "weight": 0.5}], "base": "base"})
    merged_adapter_folder(
        place / "base", adapters, config, "task_arithmetic", tmp_path / "out", rank=None, seed=0, progress=Silent()
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 6
    model = load_model(place / "base")
    merged, parts = read_adapter(tmp_path / "out", model), [read_adapter(folder, model) for folder in adapters]
    assert isinstance(merged, Adapter) and merged.updates.keys() == parts[0].updates.keys()
    weight = torch.zeros(model.get_submodule("layers.0.mlp.down_proj").weight.shape)
    expected = parts[0].updates["layers.0.mlp.down_proj"].on(weight) + 0.5 * parts[1].updates["layers.0.mlp.down_proj"].on(
        weight
    )
    torch.testing.assert_close(merged.updates["layers.0.mlp.down_proj"].on(weight), expected)
    with pytest.raises(ArtefactError, match="was trained on a model with other weights"):
        read_adapter(tmp_path / "out", load_model(place / "a"))


def test_trimmed_entries_are_the_smallest():
    assert trim(torch.tensor([3.0, -1.0, 2.0, 0.5]), 0.5).tolist() == [3.0, 0.0, 2.0, 0.0]
    assert trim(torch.tensor([3.0, -1.0, 2.0, 0.5]), 0.5, "l1").tolist() == pytest.approx([3.9, 0.0, 2.6, 0.0])
    assert derive_seed(0, "merge", 0, "x") != derive_seed(0, "merge", 1, "x")

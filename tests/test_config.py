"""Config: strict in, complete out."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.errors import ConfigError
from gradientspace.strict import differences

EXAMPLES = Path(__file__).parent.parent / "examples"
MINIMAL = {"model": {"model_name_or_path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_a_valid_config(path: Path) -> None:
    assert load_config(path).validate().name == path.stem


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = GradientSpaceConfig.from_dict({**MINIMAL, "name": "n", "seed": 3})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown config key 'modle'; did you mean 'model'?"),
        ({"training": {"learning_rat": 1}}, "key 'training.learning_rat'; did you mean 'learning_rate'?"),
        ({"data": {"train": [{"zzz": "x"}]}}, "unknown config key 'data.train[0].zzz'; known here: path"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast'; it must be a number"),
        ({"clustering": {"n_clusters": "many"}}, "it must be a whole number or one of auto"),
        ({"clustering": {"target": "routabel"}}, "it must be one of plain, routable"),
        ({"data": {"train": {"path": "x"}}}, "it must be a list"),
        ({"model": None}, "model must be a mapping of options, not None"),
        ({"seed": True}, "seed is True; it must be a whole number"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GradientSpaceConfig.from_dict({**MINIMAL, **values})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {}}, "model.model_name_or_path is missing"),
        ({"data": {}}, "data.train is empty"),
        ({"data": {"train": [{}]}}, "has no path"),
        ({"lora": {"lora_r": 0}}, "lora.lora_r is 0; it must be between 1 and 4096"),
        ({"clustering": {"k_min": 9, "k_max": 2}}, "clustering.k_min is 9, above clustering.k_max (2)"),
        ({"clustering": {"method": "embedding"}}, "give a number with clustering.method=embedding"),
        (
            {"router": {"head": "ridge"}, "clustering": {"target": "plain"}},
            "needs clustering.target=routable",
        ),
    ],
)
def test_ranges_and_combinations(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GradientSpaceConfig.from_dict({**MINIMAL, **values}).validate()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or not a mapping"),
        ("- a\n- b\n", "is empty or not a mapping"),
        ("model: [", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML at line 1"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config("nowhere.yaml")


def test_overrides_are_typed_and_strict() -> None:
    path = EXAMPLES / "real-mix.yaml"
    config = load_config(path, ["--clustering.n_clusters", "auto", "--training.learning-rate=1e-4", "--seed", "7"])
    assert (config.clustering.n_clusters, config.training.learning_rate, config.seed) == ("auto", 1e-4, 7)
    with pytest.raises(ConfigError, match="did you mean 'n_clusters'"):
        load_config(path, ["--clustering.n_cluster", "4"])
    with pytest.raises(ConfigError, match="options are pairs"):
        load_config(path, ["--seed"])
    with pytest.raises(ConfigError, match="is not a section"):
        load_config(path, ["--seed", "1", "--seed.x", "1"])


def test_yaml_numbers_with_exponent_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {learning_rate: 1e-3}\n")
    assert load_config(tmp_path / "c.yaml").training.learning_rate == 1e-3


def test_differences_name_every_leaf() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]

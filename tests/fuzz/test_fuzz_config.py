"""Config files and command-line words that nobody meant: a config, or one line."""

from __future__ import annotations

import itertools
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import case, search
from hypothesis import given
from hypothesis import strategies as st

from gradientspace import cli, pipeline
from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.run_folder import Run

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("in_tmp_path")]

ODD_TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "",
            " ",
            "a\nb",
            "\x1b[31mred",
            "../../x",
            "/etc/passwd",
            "x" * 3000,
            "\u202egnp",
            "a\0b",
            "0x" + "f" * 6000,
            "9" * 5000,
            "1e400",
            "1_0",
            ".inf",
            ".nan",
            "1:60:60",
            "2020-13-45",
            "2020-01-01",
            "~",
            "yes",
            "null",
            "NaN",
        ]
    ),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**310),
    st.floats(),
    ODD_TEXT,
    st.integers(-3, 12),
    st.floats(0, 1),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT | st.integers(), inner, max_size=3)
)
YAML_VALUES = st.sampled_from(
    [
        "!!python/object/apply:os.system ['touch owned']",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!int abc",
        "!!timestamp abc",
        "!!bool perhaps",
        "!!binary '%%%'",
        "!!set {a, b}",
        "2020-13-45",
        "&a [*a]",
        "9" * 5000,
        "0x" + "f" * 6000,
        "[" * 3000,
        "{a: " * 1500,
        "- - - -",
        "? ?",
        "*b",
        "&a {<<: *a}",
        "!",
        "'",
        '"',
        "|",
        "<<: 3",
        "a: b: c",
        "\t- x",
        "@",
        "`",
        "%YAML 9.9",
        "---\n---",
        "...",
        "1.0e999",
        "-.inf",
        "0o99",
        "=",
        "!!float x",
        "!!null x",
        "!!omap [1]",
        "!!pairs [1]",
        "!!merge x",
    ]
)
_NUMBERS = itertools.count()


def at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def hint(path: tuple[str, ...]) -> Any:
    """The declared type of an option."""
    cls: Any = GradientSpaceConfig
    for key in path:
        cls = typing.get_type_hints(cls)[key]
    return cls


def plausible(path: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Values of the option's own type, so that what the checks let through is reached too."""
    choices = typing.get_args(hint(path))
    if choices and all(isinstance(choice, str) for choice in choices):
        return st.sampled_from(choices)
    default = at(GradientSpaceConfig().to_dict(), path)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-1, 5) | st.sampled_from([8, 64, 4096, 2**31, 2**32, 2**63, 2**64])
    if isinstance(default, float):
        return st.floats(0, 1) | st.floats() | st.integers(-1, 3)
    return ODD_TEXT | st.sampled_from(["auto", "none", "base", "random", "dev_b", "all-linear", "mean"])


def options() -> list[tuple[str, ...]]:
    """Where every option is, as a path of keys."""
    found: list[tuple[str, ...]] = []
    for section, values in GradientSpaceConfig().to_dict().items():
        found += [(section, key) for key in values] if isinstance(values, dict) and values else [(section,)]
    return found


def valid() -> dict[str, Any]:
    return {
        "model": {"model_name_or_path": "model"},
        "data": {"train": [{"path": "train.jsonl", "fields": {"prompt": "q"}}], "n_validation": 32},
        "clustering": {"n_clusters": 2},
        "evaluation": {"baselines": ["random"], "scorers": {"a": "exact"}},
    }


@st.composite
def changed_values(draw: st.DrawFn) -> dict[str, Any]:
    values = valid()
    for _ in range(draw(st.integers(1, 3))):
        *sections, key = draw(st.sampled_from([*options(), ("data", "train", "x"), ("x",), ("model", "lora_r")]))
        place: Any = values
        for section in sections:
            if not isinstance(place, dict):
                break
            place = place.setdefault(section, {})
        value = draw(VALUES)
        if (*sections, key) in options():
            value = draw(st.one_of(st.just(value), *[plausible((*sections, key))] * 7))
        if isinstance(place, list):
            place.append(draw(st.dictionaries(st.sampled_from(["path", "weight", "limit", "fields", "name"]), VALUES)))
        elif isinstance(place, dict):
            place[draw(st.sampled_from([key] * 20 + ["", "a\nb", key + "s", key.upper()]))] = value
    return values


@st.composite
def config_texts(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([0, 1, 2, 3, 4, 4, 5, 5, 5, 5]))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return draw(st.text(max_size=200)).encode("utf-8", "surrogatepass")
    if kind == 2:  # one line's value is YAML of an odd kind
        lines = yaml.safe_dump(valid()).splitlines()
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = lines[place].partition(":")[0] + ": " + draw(YAML_VALUES)
        return "\n".join(lines).encode()
    if kind == 3:  # damaged text
        data = bytearray(yaml.safe_dump(valid()).encode())
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    values = draw(changed_values())
    # JSON is YAML, and holds what PyYAML's own writer would not write again.
    return (
        json.dumps(values).encode()
        if kind == 4
        else yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "replace")
    )


@search("config-yaml")
@given(text=config_texts())
def test_a_config_file_is_a_config_or_one_line(tmp_path: Path, text: bytes) -> None:
    folder = tmp_path / str(next(_NUMBERS))
    folder.mkdir()
    path = folder / "mix.yaml"
    path.write_bytes(text)
    with case("config-yaml", folder):
        config = load_config(path).validate()
        again = yaml.safe_load(config.to_yaml())
        assert GradientSpaceConfig.from_dict(again).to_yaml() == config.to_yaml()
        # What would be the first to fail on a name or number that the checks let pass: the folder itself.
        config.output_dir = str(folder / "runs")
        assert Run.open(Run.create(config).path).manifest()["stages"] == {}
    assert not (tmp_path / "owned").exists()


WORD = st.one_of(
    st.sampled_from([f"--{'.'.join(path)}" for path in options()]),
    st.sampled_from(["--", "-", "--x", "--model", "--model.", "--.", "--..", "--model.lora_r", "--data.train.x", "-h"]),
    ODD_TEXT,
)

WORDS = st.one_of(
    st.tuples(WORD, YAML_VALUES | SCALARS.map(repr) | ODD_TEXT),
    st.sampled_from(options()).flatmap(lambda p: st.tuples(st.just(f"--{'.'.join(p)}"), plausible(p).map(str))),
)


@search("config-command-line")
@given(words=st.lists(WORDS, max_size=3), odd=st.sampled_from([False] * 4 + [True]))
def test_command_line_words_are_a_config_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: Any, odd: bool
) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(valid()))
    flat = [part for pair in words for part in pair][: -1 if odd else None]
    # Parsing and checking are ours to test; the run itself would need a model.
    monkeypatch.setattr(pipeline, "run", lambda config: pipeline.Job(Run(tmp_path, config.validate())).run)
    monkeypatch.setattr(cli, "_print_summary", lambda path: None)
    with case("config-command-line", tmp_path / "nothing") as outcome:
        try:
            code = cli.main(["run", str(path), *flat])
        except SystemExit as end:  # argparse's own way
            code = end.code
        captured = capsys.readouterr()
        assert code in (0, 2), captured.err
        if code == 2:
            assert captured.err.endswith("\n")
            outcome.refuse(captured.err[:-1])

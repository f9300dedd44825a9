"""What docs/security.md promises, each promise with a test; the fuzz tests below tests/fuzz search for more."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import micro_values
from safetensors.torch import load_file, save_file

from gradientspace import sandbox, scoring
from gradientspace.config import GradientSpaceConfig, ModelConfig
from gradientspace.data import Sample
from gradientspace.errors import ConfigError, ModelError, RunFolderError
from gradientspace.run_folder import Run

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


# ------------------------------------------------------------------- nothing that runs what it reads

FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "cPickle.load",
    "dill.load",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "np.save",
    "numpy.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "os.system",
    "os.popen",
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
STARTS_PROGRAMS = {"subprocess", "multiprocessing", "pty", "concurrent.futures.process"}


def findings(text: str) -> list[str]:
    """What a source does that could run what it reads: `LINE: what`."""
    return [f"{node.lineno}: {what}" for node in ast.walk(ast.parse(text)) for what in _finding(node)]


def _finding(node: Any) -> Iterator[str]:
    yield from (name for name in _imported(node) if name.split(".")[0] in MODULES)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in FORBIDDEN or name.endswith((".read_pickle", ".to_pickle")):
            yield name
        for keyword in node.keywords:
            if keyword.arg in ("shell", "allow_pickle") and not _is_false(keyword.value):
                yield f"{keyword.arg} in {name}"
            if keyword.arg in ("trust_remote_code",) and ast.unparse(keyword.value) not in (
                "False",
                "config.trust_remote_code",
            ):
                yield f"trust_remote_code in {name}"
            if keyword.arg == "use_safetensors" and ast.unparse(keyword.value) != "True":
                yield f"use_safetensors in {name}"
        if name in ("np.load", "numpy.load"):
            yield name


def _imported(node: Any) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_no_source_loads_pickles_or_runs_text() -> None:
    found = {(str(p.relative_to(ROOT)), what.split(": ")[1]) for p in SOURCES for what in findings(p.read_text())}
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(p)",
        "eval(x)",
        "yaml.load(x)",
        "np.load(p, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "f(trust_remote_code=True)",
        "os.system(x)",
        "pd.read_pickle(p)",
        "exec(x)",
    ],
)
def test_the_check_sees_what_it_looks_for(text: str) -> None:
    assert findings(text)


def test_models_are_loaded_with_safetensors_and_without_code_of_theirs() -> None:
    assert ModelConfig().trust_remote_code is False
    calls = [
        ast.unparse(node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("SentenceTransformer")
    ]
    assert calls
    assert all("trust_remote_code=False" in call and "'use_safetensors': True" in call for call in calls)


def test_only_the_sandbox_starts_programs() -> None:
    found = {
        str(path.relative_to(ROOT / "src/gradientspace"))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node)
        if name in STARTS_PROGRAMS
    }
    assert found == {"sandbox.py"}


def test_code_in_a_model_folder_does_not_run(micro_model: Path, tmp_path: Path) -> None:
    from gradientspace.models import load_base

    folder = tmp_path / "model"
    shutil.copytree(micro_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {k: f"evil.{k}" for k in ("AutoConfig", "AutoModelForCausalLM")}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(ModelError) as error:
        load_base(ModelConfig(model_name_or_path=str(folder)))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "owned").exists()


def test_pickled_weights_are_refused(micro_model: Path, tmp_path: Path) -> None:
    from gradientspace.models import load_base

    folder = tmp_path / "model"
    shutil.copytree(micro_model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_base(ModelConfig(model_name_or_path=str(folder)))


# ------------------------------------------------------------------- adapters are data


@pytest.fixture
def adapter(micro_model: Path, tmp_path: Path) -> Path:
    """A small LoRA adapter of the micro model."""
    from gradientspace.config import LoraConfig
    from gradientspace.models import load_base, lora, save_adapter

    base = load_base(ModelConfig(model_name_or_path=str(micro_model)))
    with lora(base, LoraConfig(lora_r=2), start=None, seed=0) as model:
        save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(adapter: Path, micro_model: Path) -> None:
    from gradientspace.models import load_adapters, load_base

    load_adapters(load_base(ModelConfig(model_name_or_path=str(micro_model))), {"a": adapter})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "only LoRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"r": 10**9}, "rank"),
        ({"r": "8"}, "rank"),
        ({"target_modules": "(a+)+$"}, "repeats a group"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_an_adapter_that_would_do_more_than_add_weights_is_refused(
    adapter: Path, micro_model: Path, values: dict[str, Any], reason: str
) -> None:
    change(adapter, **values)
    with pytest.raises(ModelError, match=reason):
        load(adapter, micro_model)
    assert "antigravity" not in sys.modules


def test_pickled_adapters_are_never_read(adapter: Path, micro_model: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="pickled weights are never read"):
        load(adapter, micro_model)


def test_an_adapter_that_lacks_weights_is_refused(adapter: Path, micro_model: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="lacks weights"):
        load(adapter, micro_model)


def test_a_layer_name_never_reaches_a_shell_script(adapter: Path) -> None:
    from gradientspace.export import copy_adapter

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors["base_model.model.x; touch owned #.lora_A.weight"] = tensors.pop(name)
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="a layer's name"):
        copy_adapter(adapter, adapter.parent / "copy", 8)


# ------------------------------------------------------------------- a run folder is data


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    """What is remade is removed first: a stage named ../../x must not remove that."""
    values = {
        "name": "mix",
        "output_dir": str(tmp_path / "runs"),
        "model": {"model_name_or_path": "m"},
        "data": {"train": [{"path": "x.jsonl"}]},
    }
    run = Run.create(GradientSpaceConfig.from_dict(values))
    keep = tmp_path / "keep"
    keep.mkdir()
    for stages in (
        {"a": {"inputs": {}, "files": {}}, "../../keep": {"inputs": {"a": "x"}, "files": {}}},
        {str(keep): {"inputs": {}, "files": {}}},
        {"a": {"inputs": {}, "files": {"../../../secret": "x"}}},
    ):
        (run.path / "manifest.json").write_text(json.dumps({"schema": 1, "stages": stages}))
        with pytest.raises(RunFolderError, match="outside the run folder"):
            run.discard_made_from("a")
    assert keep.is_dir()


@pytest.mark.parametrize("value", ["NaN", '"\\ud800"', "1e999", "[" * 5000, '"cut'])
def test_bookkeeping_that_could_not_be_written_again_is_refused(tmp_path: Path, value: str) -> None:
    values = {"name": "mix", "output_dir": str(tmp_path), "model": {"model_name_or_path": "m"},
              "data": {"train": [{"path": "x.jsonl"}]}}  # fmt: skip
    run = Run.create(GradientSpaceConfig.from_dict(values))
    (run.path / "stages.json").write_text(f'{{"a": {{"seconds": {value}}}}}')
    assert run.costs() == {}
    (run.path / "manifest.json").write_text(f'{{"schema": 1, "stages": {{}}, "more": {value}}}')
    with pytest.raises(RunFolderError, match="damaged"):
        run.manifest()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    values = {
        "name": "mix",
        "output_dir": str(tmp_path),
        "model": {"model_name_or_path": "m"},
        "data": {"train": [{"path": "x.jsonl"}]},
    }
    run = Run.create(GradientSpaceConfig.from_dict(values))
    (tmp_path / "precious").write_text("kept")
    (run.path / ".lock").unlink(missing_ok=True)
    (run.path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunFolderError, match="link"), run.lock():
        pass
    assert (tmp_path / "precious").read_text() == "kept"


# ------------------------------------------------------------------- generated code


def sample(prompt: str) -> Sample:
    return Sample("a", prompt, [1, 2], [-100, 2], "x", None, "code", 1, [])


def test_generated_code_runs_only_when_asked(micro_model: Path, micro_mix: Path, tmp_path: Path) -> None:
    values = micro_values(micro_model, micro_mix, tmp_path)
    assert GradientSpaceConfig().evaluation.run_code is False
    values["evaluation"] |= {"scorers": {"train": "code"}}
    with pytest.raises(ConfigError, match="run_code"):
        GradientSpaceConfig.from_dict(values).validate()
    values["evaluation"]["run_code"] = True
    GradientSpaceConfig.from_dict(values).validate()


def test_no_other_scorer_runs_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> bool:
        raise AssertionError("an answer was run")

    monkeypatch.setattr(scoring, "passes", never)
    answer = f"open({str(tmp_path / 'owned')!r}, 'w')"
    for name in ("exact", "number", "answer"):
        scoring.score([answer], [sample("assert f(1) == 2")], {"code": name})
    assert scoring.score([answer], [sample("assert f(1) == 2")], {}) == [0.0]
    with pytest.raises(AssertionError, match="was run"):
        scoring.score([answer], [sample("assert f(1) == 2")], {"code": "code"})
    assert not (tmp_path / "owned").exists()


def test_generated_code_runs_in_the_sandbox_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is not compiled here, sees no environment of ours, and leaves nothing behind."""
    seen: list[str] = []
    monkeypatch.setattr(scoring, "passes", lambda program, values=None: seen.append(program) is None)
    assert scoring.code("def f(x):\n    return 2", sample("assert f(1) == 2")) == 1.0
    assert seen == ["def f(x):\n    return 2\nassert f(1) == 2"]
    monkeypatch.setenv("GRADIENTSPACE_SECRET", "x")
    assert sandbox.passes("import os\nassert 'GRADIENTSPACE_SECRET' not in os.environ")
    assert sandbox.passes("import os\nassert os.getcwd() == os.environ['HOME'] and os.listdir() == ['program.py']")
    assert not sandbox.passes("open('big', 'w').write('x' * 2**21)")


# ------------------------------------------------------------------- the page


def test_the_committed_search_is_a_whole_one() -> None:
    """What the page says of it is compared with the file in test_pages.py."""
    found = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text())
    assert found["cases"] == sum(s["cases"] for s in found["surfaces"].values()) >= 10_000


def test_every_error_is_one_line_that_a_terminal_does_not_obey() -> None:
    error = ConfigError("name is 'a\nb\r\x1b[2J\u2028\u202e" + "x" * 10_000 + "': choose another")
    assert len(str(error)) < 1_100
    assert len(str(error).splitlines()) == 1
    assert not set("\x1b\u202e") & set(str(error))
    assert str(error).startswith("name is 'a b [U+001B]")
    assert str(error).endswith("choose another")

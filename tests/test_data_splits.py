"""Splits come from ids and seed alone; near-duplicate prompts stay together."""

from __future__ import annotations

import random
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradientspace.config import DataConfig
from gradientspace.data.neardup import near_duplicate_groups
from gradientspace.data.splits import Split, halve, sample_share, split_rows
from gradientspace.errors import DataError

PARTS = ("fit", "dev_a", "dev_b", "test")


def random_prompts(n: int, seed: int = 0, words: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(words)) for _ in range(n)]


def split_of(ids, prompts, strata=None, *, seed=0, hold_out_test=True, hold_out_dev=True, **options) -> Split:
    strata = strata or [None] * len(ids)
    held_out = {"hold_out_test": hold_out_test, "hold_out_dev": hold_out_dev}
    return split_rows(ids, prompts, strata, DataConfig(**options), seed, **held_out)


def test_parts_have_the_shares_asked_for_and_share_no_row():
    ids = [f"id{i}" for i in range(1000)]
    split = split_of(ids, random_prompts(1000), n_validation=100)
    sizes = {name: len(getattr(split, name)) for name in (*PARTS, "warmup", "validation")}
    # test 10 % of 1000; dev 10 % of the other 900, halved; warm-up 5 % of the 810 left
    assert sizes == {"fit": 810, "dev_a": 45, "dev_b": 45, "test": 100, "warmup": 40, "validation": 100}
    assert sorted(i for name in PARTS for i in getattr(split, name)) == list(range(1000))
    assert not set(split.warmup) & set(split.validation)
    assert set(split.warmup) | set(split.validation) <= set(split.fit)
    for part in (*PARTS, "warmup", "validation"):
        assert getattr(split, part) == sorted(getattr(split, part))


def test_test_is_empty_where_test_rows_come_from_elsewhere():
    split = split_of([f"id{i}" for i in range(100)], random_prompts(100), hold_out_test=False)
    assert not split.test
    assert len(split.fit) == 90


def test_all_rows_are_fitted_where_dev_and_test_rows_come_from_elsewhere():
    split = split_of([f"id{i}" for i in range(100)], random_prompts(100), hold_out_test=False, hold_out_dev=False)
    assert split.fit == list(range(100))
    assert not [*split.dev_a, *split.dev_b, *split.test]


def test_dev_rows_are_halved_whatever_their_order_and_near_duplicates_share_a_half():
    ids = [f"id{i}" for i in range(41)]
    prompts = [f"{prompt} {'again' if i == 7 else ''}" for i, prompt in enumerate([*random_prompts(40), "x"])]
    prompts[30] = prompts[7].replace("again", "anew")
    halves = halve(ids, prompts, 0)
    assert [len(half) for half in halves] == [21, 20]
    assert sorted([*halves[0], *halves[1]]) == list(range(41))
    assert any({7, 30} <= set(half) for half in halves)
    backwards = halve(ids[::-1], prompts[::-1], 0)
    assert [{ids[::-1][i] for i in half} for half in backwards] == [{ids[i] for i in half} for half in halves]
    assert halve(ids, prompts, 1) != halves
    with pytest.raises(DataError, match=r"the 3 usable rows of data.dev, in 1 groups of different prompts, do not"):
        halve(ids[:3], ["the same prompt here"] * 3, 0)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(60)), seed=st.integers(0, 3))
def test_the_order_of_the_rows_changes_nothing(order, seed):
    ids = [f"id{i}" for i in range(60)]
    prompts = [
        prompt if i % 5 else "the same prompt for a few of the rows" for i, prompt in enumerate(random_prompts(60))
    ]
    strata = ["a" if i % 3 else "b" for i in range(60)]
    straight = split_of(ids, prompts, strata, seed=seed, n_validation=10)
    shuffled = split_of(
        [ids[i] for i in order],
        [prompts[i] for i in order],
        [strata[i] for i in order],
        seed=seed,
        n_validation=10,
    )
    for part in (*PARTS, "warmup", "validation"):
        assert {ids[order[i]] for i in getattr(shuffled, part)} == {ids[i] for i in getattr(straight, part)}


def test_another_seed_gives_another_split():
    ids, prompts = [f"id{i}" for i in range(200)], random_prompts(200)
    assert split_of(ids, prompts, seed=0).test != split_of(ids, prompts, seed=1).test
    assert split_of(ids, prompts, seed=0) == split_of(ids, prompts, seed=0)


def test_near_duplicates_share_a_part():
    base = random_prompts(300, words=30)
    prompts = [*base, *(prompt + " please" for prompt in base), *(prompt.upper() for prompt in base)]
    split = split_of([f"id{i}" for i in range(900)], prompts)
    part = {i: name for name in PARTS for i in getattr(split, name)}
    together = sum(part[i] == part[i + 300] == part[i + 600] for i in range(300))
    assert together == 300
    assert split.near_duplicates == {"similarity": 0.7, "groups": 300, "rows": 900, "rows_of_templates": 0}


def test_prompts_of_one_template_are_spread_but_exact_repetitions_stay_together():
    template = " ".join(random_prompts(1, words=60)) + " number {}"
    prompts = [template.format(i // 2) for i in range(200)]
    split = split_of([f"id{i}" for i in range(200)], prompts)
    assert split.near_duplicates["rows_of_templates"] == 200
    assert len(split.dev_a) == len(split.dev_b) == 8  # 9 rows are asked for, and these come in pairs
    part = {i: name for name in PARTS for i in getattr(split, name)}
    assert all(part[i] == part[i + 1] for i in range(0, 200, 2))


def test_warmup_takes_the_same_share_of_every_named_source():
    strata = ["large"] * 800 + ["small"] * 200
    split = split_of([f"id{i}" for i in range(1000)], random_prompts(1000), strata, warmup_fraction=0.1)
    share = np.mean([strata[i] == "small" for i in split.fit])
    n_small = sum(strata[i] == "small" for i in split.warmup)
    assert abs(n_small - share * len(split.warmup)) < 1


def test_too_few_rows_are_refused():
    for n in (0, 1, 4):
        with pytest.raises(DataError, match=r"usable rows in .* groups .* leave .* without a row: give more rows"):
            split_of([f"id{i}" for i in range(n)], random_prompts(n))
    split = split_of([f"id{i}" for i in range(5)], random_prompts(5))
    assert [len(getattr(split, part)) for part in (*PARTS, "warmup", "validation")] == [2, 1, 1, 1, 1, 1]
    with pytest.raises(DataError, match="leave dev_a"):
        split_of([f"id{i}" for i in range(9)], ["always the same prompt"] * 9)


def test_sample_share_is_drawn_by_id():
    ids = [f"id{i}" for i in range(100)]
    chosen = {ids[i] for i in sample_share(ids, 0.3, 0)}
    assert len(chosen) == 30
    backwards = ids[::-1]
    assert {backwards[i] for i in sample_share(backwards, 0.3, 0)} == chosen


def words_of(prompt: str) -> set[tuple[str, ...]]:
    words = [*prompt.split(), "", ""]
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def jaccard(a: str, b: str) -> float:
    return len(words_of(a) & words_of(b)) / len(words_of(a) | words_of(b))


def test_groups_agree_with_exact_similarity_away_from_the_threshold():
    rng = random.Random(5)
    prompts = []
    for base in random_prompts(60, seed=2, words=40):
        words = base.split()
        for changes in (0, 1, 3, 8):
            changed = list(words)
            for position in rng.sample(range(40), changes):
                changed[position] = f"new{rng.random()}"
            prompts.append(" ".join(changed))
    groups = near_duplicate_groups(prompts)
    for start in range(0, len(prompts), 4):
        for i in range(start + 1, start + 4):
            similarity = jaccard(prompts[start], prompts[i])
            if similarity > 0.9:
                assert groups[i] == groups[start]
            if similarity < 0.5:
                assert groups[i] != groups[start]
    assert all(group // 4 == i // 4 for i, group in enumerate(groups.tolist()))


def test_short_wordless_and_unspaced_prompts():
    prompts = [
        "",
        "?!",
        "?!",
        "…",
        "hi",
        "HI",
        " hi ",
        "hi there",
        "请把这句话翻译成英文谢谢你",
        "请把这句话翻译成英文谢谢您",
    ]
    groups = near_duplicate_groups(prompts).tolist()
    assert groups[1] == groups[2]
    assert groups[4] == groups[5] == groups[6]
    assert len({groups[i] for i in (0, 1, 3, 4, 7, 8)}) == 6
    assert near_duplicate_groups([]).tolist() == []


def test_grouping_is_fast():
    import time

    prompts = random_prompts(4000, words=100)
    start = time.process_time()
    near_duplicate_groups(prompts)
    assert time.process_time() - start < 4  # 100,000 prompts in well under two minutes, on any machine

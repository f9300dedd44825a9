"""From config to data set: every row accounted for, labels carried, limits and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_fixtures import CHATML, alpaca_rows, byte_tokenizer, config_of, ids_of, word_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradientspace.data
from gradientspace.config import DataConfig, SourceConfig
from gradientspace.data import IGNORE_INDEX, Dataset, accounting_table, load, pad_batch
from gradientspace.errors import ConfigError, DataError

PARTS = ("fit", "dev_a", "dev_b", "test")


def rows_of(data: Dataset) -> list[int]:
    return sorted(sample.row for part in PARTS for sample in getattr(data, part))


def check_sums(accounting: dict) -> None:
    for entry in accounting["files"]:
        assert entry["rows"] == entry["kept"] + sum(lost["count"] for lost in entry["lost"].values())
        for lost in [*entry["lost"].values(), entry["truncated"]]:
            assert lost["count"] == sum(last - first + 1 for first, last in lost["rows"])
            assert all(1 <= first <= last <= entry["rows"] for first, last in lost["rows"])
    for split, counts in accounting["totals"].items():
        files = [entry for entry in accounting["files"] if entry["split"] == split]
        for key in ("rows", "kept"):
            assert counts[key] == sum(entry[key] for entry in files)
        assert counts["rows"] == counts["kept"] + sum(counts["lost"].values())
    json.dumps(accounting, allow_nan=False)


def test_every_row_is_kept_or_lost_for_a_named_reason(tmp_path):
    rows = alpaca_rows(30)
    rows[2]["output"] = "  "
    rows[3]["instruction"] = ""
    rows[5] = rows[4] | {"id": "r9999"}
    rows[7]["output"] = "long " * 200
    lines = [json.dumps(row) for row in rows]
    lines.insert(10, "")
    path = tmp_path / "mix.jsonl"
    path.write_text("\n".join(lines) + "\n")
    data = load(config_of(path, max_length=128), byte_tokenizer(), 0)
    entry = data.accounting["files"][0]
    assert entry["rows"] == 31
    assert entry["kept"] == 26
    assert entry["lost"] == {
        "empty": {"count": 3, "rows": [[3, 4], [11, 11]]},
        "duplicate": {"count": 1, "rows": [[6, 6]]},
        "too_long": {"count": 1, "rows": [[8, 8]]},
    }
    assert rows_of(data) == [i for i in range(1, 32) if i not in (3, 4, 6, 8, 11)]
    assert sum(data.accounting["splits"][part] for part in PARTS) == 26
    check_sums(data.accounting)


def test_samples_carry_labels_ids_and_the_last_answer(tmp_path):
    rows = alpaca_rows(12, domain="maths", source="gsm8k")
    del rows[0]["id"], rows[1]["source"], rows[2]["domain"]
    rows[3]["id"] = 7
    path = write_jsonl(tmp_path / "mix.jsonl", rows)
    data = load(config_of(path), word_tokenizer(), 0)
    by_row = {sample.row: sample for part in PARTS for sample in getattr(data, part)}
    assert len(by_row[1].id) == 16
    assert (by_row[2].source, by_row[2].domain) == ("mix", "maths")
    assert (by_row[3].source, by_row[3].domain) == ("gsm8k", None)
    assert by_row[4].id == "7"
    assert by_row[5].reference == "answer 4"
    assert by_row[5].prompt == "q4 w28 v52"
    assert by_row[5].messages == [
        {"role": "user", "content": "q4 w28 v52"},
        {"role": "assistant", "content": "answer 4"},
    ]
    again = load(config_of(path), word_tokenizer(), 0)
    assert again == data


def test_fields_map_columns_and_the_mapping_is_reported(tmp_path):
    rows = [{"q": f"q{i} w{i}", "a": f"a{i}", "text": "no", "topic": "t", "key": i} for i in range(12)]
    fields = {"instruction": "q", "output": "a", "domain": "topic", "id": "key"}
    source = SourceConfig(path=str(write_jsonl(tmp_path / "x.jsonl", rows)), name="named", fields=fields)
    data = load(DataConfig(train=[source]), word_tokenizer(), 0)
    sample = min((sample for part in PARTS for sample in getattr(data, part)), key=lambda sample: sample.row)
    assert (sample.id, sample.prompt, sample.reference) == ("0", "q0 w0", "a0")
    assert (sample.domain, sample.source) == ("t", "named")
    assert data.accounting["files"][0]["mapping"] == {
        "shape": "prompt-completion",
        "columns": {"prompt": "q", "completion": "a", "domain": "topic", "id": "key"},
    }
    assert "read as prompt-completion (prompt <- q, completion <- a" in accounting_table(data.accounting)


def test_one_named_field_is_enough_where_the_rest_can_be_detected(tmp_path):
    rows = [{"q": f"q{i} w{i}", "answer": f"a{i}", "key": f"k{i}"} for i in range(12)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    data = load(DataConfig(train=[SourceConfig(path=str(path), fields={"prompt": "q"})]), word_tokenizer(), 0)
    assert data.accounting["totals"]["train"]["kept"] == 12
    source = SourceConfig(path=str(path), fields={"prompt": "key", "completion": "q"})
    assert load(DataConfig(train=[source]), word_tokenizer(), 0).fit[0].prompt.startswith("k")


def test_ids_that_several_rows_share_get_a_suffix(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [row | {"id": i} for i, row in enumerate(alpaca_rows(10))])
    rows = [{"id": i, "prompt": f"p{i}", "completion": "c"} for i in range(10)]
    two = write_jsonl(tmp_path / "two.jsonl", rows)
    data = load(config_of(one, two), word_tokenizer(), 0)
    ids = [sample.id for part in PARTS for sample in getattr(data, part)]
    assert len(set(ids)) == 20
    assert all("#" in id for id in ids)
    assert data.accounting["renamed_ids"] == 20
    test = SourceConfig(path=str(two))
    data = load(DataConfig(train=[SourceConfig(path=str(one))], test=[test]), word_tokenizer(), 0)
    assert "#" not in "".join(sample.id for sample in data.fit)
    assert all("#" in sample.id for sample in data.test)


def test_limit_and_weight_leave_rows_out_without_counting_as_losses(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", alpaca_rows(100)))
    source = SourceConfig(path=path, limit=40, weight=0.5)
    data = load(DataConfig(train=[source], max_loss_fraction=0.0), word_tokenizer(), 0)
    lost = data.accounting["files"][0]["lost"]
    assert lost["limit"] == {"count": 60, "rows": [[41, 100]]}
    assert lost["weight"]["count"] == 20
    assert data.accounting["totals"]["train"]["kept"] == 20
    check_sums(data.accounting)
    for wrong in ({"weight": 1.5}, {"weight": -0.1}, {"limit": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load(DataConfig(train=[SourceConfig(path=path, **wrong)]), word_tokenizer(), 0)


def test_overlong_rows_are_dropped_truncated_or_refused(tmp_path):
    rows = alpaca_rows(20)
    rows[4]["output"] = "hello " * 100
    rows[6]["instruction"] = "hello " * 100
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    dropped = load(config_of(path, max_length=40), word_tokenizer(), 0)
    assert dropped.accounting["files"][0]["lost"] == {"too_long": {"count": 2, "rows": [[5, 5], [7, 7]]}}
    cut = load(config_of(path, max_length=40, overlong="truncate"), word_tokenizer(), 0)
    assert cut.accounting["files"][0]["truncated"] == {"count": 1, "rows": [[5, 5]]}
    assert cut.accounting["files"][0]["lost"] == {"no_supervised_tokens": {"count": 1, "rows": [[7, 7]]}}
    assert max(len(s.input_ids) for part in PARTS for s in getattr(cut, part)) == 40
    check_sums(cut.accounting)
    with pytest.raises(DataError, match=r"a.jsonl, row 5 has 2\d\d tokens, more than data.max_length \(40\)"):
        load(config_of(path, max_length=40, overlong="error"), word_tokenizer(), 0)


def test_losing_too_much_stops_with_the_reasons(tmp_path):
    rows = alpaca_rows(30)
    for row in rows[:20]:
        row["output"] = ""
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load(config_of(path), word_tokenizer(), 0).accounting["totals"]["train"]["kept"] == 10
    message = r"20 of 30 train rows are lost \(20 empty\), more than data.max_loss_fraction \(0.5\)"
    with pytest.raises(DataError, match=message):
        load(config_of(path, max_loss_fraction=0.5), word_tokenizer(), 0)
    with pytest.raises(DataError, match=r"no usable train row is left of 30 \(.*20 empty.*\)"):
        load(config_of(path, max_length=8), word_tokenizer(), 0)


def test_test_rows_with_a_training_prompt_are_counted(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", alpaca_rows(40))
    rows = [row | {"id": f"t{i}", "output": "other"} for i, row in enumerate(alpaca_rows(3))]
    test = write_jsonl(tmp_path / "test.jsonl", [*rows, {"id": "new", "instruction": "new", "output": "new"}])
    data = load(
        DataConfig(train=[SourceConfig(path=str(train))], test=[SourceConfig(path=str(test))]),
        word_tokenizer(),
        0,
    )
    assert data.accounting["leaks"] == {"exact_prompts": 3, "ids": ["t0", "t1", "t2"]}
    assert [sample.id for sample in data.test] == ["t0", "t1", "t2", "new"]
    assert len(data.fit) + len(data.dev_a) + len(data.dev_b) == 40
    assert "3 of 4 test rows have the exact prompt of a training row" in accounting_table(data.accounting)
    check_sums(data.accounting)


def test_dev_rows_of_their_own_leave_every_training_row_to_fit(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", alpaca_rows(40))
    own = [row | {"id": f"d{i}", "instruction": f"held out {i}"} for i, row in enumerate(alpaca_rows(9))]
    again = [row | {"output": "other"} for row in alpaca_rows(2)]  # ids and prompts of training rows
    dev = write_jsonl(tmp_path / "dev.jsonl", [*own, *again])
    test = write_jsonl(tmp_path / "test.jsonl", [own[0] | {"output": "another"}])
    sources = {
        name: [SourceConfig(path=str(path))] for name, path in {"train": train, "dev": dev, "test": test}.items()
    }
    for streaming in (False, True):
        data = load(DataConfig(**sources, streaming=streaming), word_tokenizer(), 0)
        assert len(data.fit) == 40
        assert sorted([len(data.dev_a), len(data.dev_b)]) == [5, 6]
        ids = {sample.id for part in (data.dev_a, data.dev_b) for sample in part}
        assert {f"d{i}" for i in range(9)} < ids
        assert sum("#" in id for id in ids) == 2
        assert data.accounting["dev_leaks"]["exact_prompts"] == 2
        assert data.accounting["leaks"]["exact_prompts"] == 1
        assert "2 of 11 dev rows have the exact prompt of a row that is trained on" in accounting_table(data.accounting)
        assert data.accounting["totals"]["dev"]["kept"] == 11
        check_sums(data.accounting)


def test_a_folder_with_test_files_trains_on_none_of_them_and_says_so(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", alpaca_rows(20))
    write_jsonl(tmp_path / "test.jsonl", alpaca_rows(5))
    data = load(config_of(tmp_path), word_tokenizer(), 0)
    assert data.accounting["skipped_files"] == [str(tmp_path / "test.jsonl")]
    assert data.accounting["totals"]["train"]["rows"] == 20


def test_warmup_is_stratified_by_named_sources_only(tmp_path):
    rows = alpaca_rows(100)
    paths = [write_jsonl(tmp_path / "a.jsonl", rows[:80]), write_jsonl(tmp_path / "b.jsonl", rows[80:])]
    named = [SourceConfig(path=str(path), name=path.stem) for path in paths]
    data = load(DataConfig(train=named, warmup_fraction=0.25), word_tokenizer(), 0)
    n_fit = sum(sample.source == "b" for sample in data.fit)
    n_warmup = sum(sample.source == "b" for sample in data.warmup)
    assert abs(n_warmup - n_fit / 4) < 1


WRONG_ROWS = {
    "no output": ({"instruction": "x", "input": ""}, r"row 5 has no output: it lacks the column 'output'"),
    "null output": ({"instruction": "x", "output": None}, r"row 5 has no output: column 'output' is null"),
    "NaN output": ({"instruction": "x", "output": float("nan")}, r"row 5 has no output"),
    "no prompt": ({"output": "x"}, r"row 5 has no prompt"),
    "wrong type": ({"instruction": ["x"], "output": {"a": 1}}, r"row 5.* must"),
    "output object": ({"instruction": "x", "output": {"a": 1}}, r"row 5: output must be text, not an object"),
    "another shape": ({"messages": []}, r"row 5 has no prompt: .*its columns are messages"),
    "surrogate": ({"instruction": "\ud83d", "output": "x"}, r"row 5: instruction holds half of a surrogate"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named(tmp_path, name):
    row, message = WRONG_ROWS[name]
    path = tmp_path / "mix.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [*alpaca_rows(4), row, *alpaca_rows(9)[4:]]))
    with pytest.raises(DataError, match=message) as error:
        load(config_of(path), word_tokenizer(), 0)
    assert "\n" not in str(error.value)


WRONG_CHATS = {
    "role": (
        [{"role": "tool", "content": "x"}],
        r"turn 1 has the role 'tool': expected system, user or assistant",
    ),
    "turn": (["hello"], r"turn 1 must have a role and a content, but is text"),
    "image": ([{"role": "user", "content": [{"type": "image"}]}], r"a part that is not text"),
    "null": ([{"role": "user", "content": None}], r"turn 1 has no content"),
    "no answer": (
        [{"role": "user", "content": "x"}],
        r"no output: no turn of the assistant among its 1 messages",
    ),
    "list": ("hello", r"messages must be a list of turns, not text"),
}


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_a_wrong_turn_is_named(tmp_path, name):
    messages, message = WRONG_CHATS[name]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=r"chat.jsonl, row 1.*" + message):
        load(config_of(path), byte_tokenizer(CHATML), 0)


def test_turns_in_parts_and_after_the_last_answer(tmp_path):
    part = {"type": "text", "text": "a"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": f"b{i} c{i}"}]},
                {"role": "assistant", "content": f"answer {i}"},
                {"role": "user", "content": "thanks"},
            ]
        }
        for i in range(8)
    ]
    data = load(config_of(write_jsonl(tmp_path / "a.jsonl", rows)), byte_tokenizer(CHATML), 0)
    assert data.fit[0].messages[0]["content"].startswith("a\nb")
    assert data.fit[0].messages[-1]["role"] == "assistant"


def test_unknown_shapes_and_fields_are_explained(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3))
    with pytest.raises(DataError, match=r"row 1 has no output: none of output, .* columns prompt, chosen, rejected"):
        load(config_of(path), word_tokenizer(), 0)
    other = write_jsonl(tmp_path / "b.jsonl", [{"foo\n\u202e": "a"}])
    with pytest.raises(DataError, match=r"row 1 has no shape we know .* its columns are 'foo.n.u202e';"):
        load(config_of(other), word_tokenizer(), 0)
    for fields, kind, message in (
        ({"promt": "a"}, ConfigError, "unknown field 'promt' in `fields`; did you mean 'prompt'"),
        ({"prompt": "q"}, DataError, "row 1 has no column 'q'"),
        ({"prompt": "prompt", "instruction": "chosen"}, ConfigError, "names prompt twice"),
        ({"completion": "prompt"}, ConfigError, "`fields` must name prompt too"),
    ):
        with pytest.raises(kind, match=message):
            load(DataConfig(train=[SourceConfig(path=path, fields=fields)]), word_tokenizer(), 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(40)))
def test_shuffling_the_file_moves_no_sample_to_another_split(tmp_path, order):
    rows = alpaca_rows(36)
    rows += [row | {"id": f"copy{i}"} for i, row in enumerate(rows[:4])]
    straight = load(config_of(write_jsonl(tmp_path / "a.jsonl", rows), n_validation=8), word_tokenizer(), 1)
    path = write_jsonl(tmp_path / "b.jsonl", [rows[i] for i in order])
    shuffled = load(config_of(path, n_validation=8), word_tokenizer(), 1)
    for part in (*PARTS, "warmup", "validation"):
        assert {s.id for s in getattr(shuffled, part)} == {s.id for s in getattr(straight, part)}


def test_pad_batch_pads_on_the_right():
    class Item:
        def __init__(self, ids, labels):
            self.input_ids, self.labels = ids, labels

    batch = pad_batch([Item([5, 6, 7], [-100, 6, 7]), Item([8], [8])], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("width", "longest", "padded"),
    [(7, 999, 7), (31, 999, 31), (33, 999, 34), (301, 999, 304), (993, 999, 999), (1000, 1024, 1024)],
)
def test_widths_of_many_batches_repeat_and_never_pass_the_longest_sample(width, longest, padded):
    class Item:
        input_ids, labels = [3] * width, [3] * width

    assert pad_batch([Item()], 0, longest=longest)["input_ids"].shape == (1, padded)
    assert pad_batch([Item()], 0)["input_ids"].shape == (1, width)


def test_public_names_are_all_there_and_importing_them_is_light():
    import subprocess
    import sys

    assert all(hasattr(gradientspace.data, name) for name in gradientspace.data.__all__)
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow'}"
    code = f"import sys, gradientspace.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_real_mix_is_read_whole():
    folder = Path(__file__).parents[2] / "shared" / "data" / "mix"
    if not folder.is_dir():
        pytest.skip("needs the instruction mix beside the project")
    train, test = (SourceConfig(path=str(folder / f"{name}.jsonl"), limit=600) for name in ("train", "test"))
    data = load(DataConfig(train=[train], test=[test], n_validation=64), byte_tokenizer(), 0)
    check_sums(data.accounting)
    assert data.accounting["totals"]["train"]["rows"] == 5097
    assert data.accounting["totals"]["test"]["rows"] == 943
    assert data.accounting["leaks"]["exact_prompts"] == 0
    assert {sample.domain for sample in data.test} == {"math", "code", "finance", "creative"}


def _another(value, i: int):
    """The same row with other words: `i` behind every text but the names of roles."""
    if isinstance(value, dict):
        return {key: v if key in ("role", "from") else _another(v, i) for key, v in value.items()}
    if isinstance(value, list):
        return [_another(v, i) for v in value]
    return f"{value} {i}" if isinstance(value, str) and value else value


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("chat", [None, CHATML], ids=["plain", "chat"])
def test_every_shape_in_every_file_gives_the_tokens_and_mask_written_by_hand(tmp_path, suffix, chat):
    """The expectations of the template tests, through a file, detection, splits and all."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from test_data_templates import CHAT_CASES, PLAIN_CASES, masked

    for name, (row, tokens, mask) in (CHAT_CASES if chat else PLAIN_CASES).items():
        rows = [row, *(_another(row, i) for i in range(12))]
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".csv":
            if any(not isinstance(value, str | int) for value in row.values()):
                continue  # a csv file has no lists
            lines = [",".join(row), *(",".join(f'"{value}"' for value in r.values()) for r in rows)]
            path.write_text("\n".join(lines))
        elif suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
        data = load(config_of(path), word_tokenizer(chat), 0)
        first = next(s for part in PARTS for s in getattr(data, part) if s.row == 1)
        assert first.input_ids == ids_of(tokens), name
        assert first.labels == masked(ids_of(tokens), mask), name
        assert data.accounting["totals"]["train"]["kept"] == 13

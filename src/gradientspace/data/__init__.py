"""Instruction data of any common form -> tokenised samples, split and accounted for.

data = load(config.data, tokenizer, seed=0)      # data.fit, dev_a, dev_b, test, warmup, validation
print(accounting_table(data.accounting))
print(render_sample(data.fit[0], tokenizer))
"""

from gradientspace.data.accounting import accounting_table, render_sample
from gradientspace.data.collate import TokenisedSample, pad_batch
from gradientspace.data.loading import load
from gradientspace.data.reading import Row, read_rows
from gradientspace.data.sample import IGNORE_INDEX, Dataset, Sample
from gradientspace.data.store import take
from gradientspace.data.templates import Template

__all__ = [
    "IGNORE_INDEX",
    "Dataset",
    "Row",
    "Sample",
    "Template",
    "TokenisedSample",
    "accounting_table",
    "load",
    "pad_batch",
    "read_rows",
    "render_sample",
    "take",
]

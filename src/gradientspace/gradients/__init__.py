"""Exact per-sample LoRA gradients from batched backward passes, at full dimension.

engine.py    PerSampleGradients: attaches to a PEFT model, computes, streams
layers.py    how one LoRA layer forms per-sample dA and dB; which layers can do it, and how
head.py      the loss: lm_head on supervised positions only, in chunks
batching.py  batches of similar length under a token budget, in shuffled order
"""

from gradientspace.gradients.batching import GradientBatch
from gradientspace.gradients.engine import PerSampleGradients
from gradientspace.gradients.layers import Block

__all__ = ["Block", "GradientBatch", "PerSampleGradients"]

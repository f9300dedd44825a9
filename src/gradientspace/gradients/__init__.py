"""Exact per-sample LoRA gradients from batched backward passes, at full dimension.

engine.py: `PerSampleGradients`, which attaches to a PEFT model, computes and streams.
survey.py: which layers an adapter has, in which order its weights lie, what is refused.
layers.py: how one LoRA layer forms dA and dB for each sample; rows.py: which tokens are whose.
head.py: the loss, with lm_head on supervised positions only. packing.py: samples without padding.
batching.py: batches of similar length, in shuffled order. store.py: gradients kept in a file.
attach.py: what is changed on the model meanwhile. check.py: plain autograd, to compare with.
"""

from gradientspace.gradients.batching import ExcludedSample, GradientBatch
from gradientspace.gradients.engine import PerSampleGradients
from gradientspace.gradients.layers import Block
from gradientspace.gradients.store import GradientStore

__all__ = ["Block", "ExcludedSample", "GradientBatch", "GradientStore", "PerSampleGradients"]

"""GradientSpace: cluster an instruction mix by gradient, train one LoRA expert a cluster, route every prompt."""

__version__ = "0.1.0"

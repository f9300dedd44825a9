"""The embedded default: skills crossed with topics, and a tiny Llama pretrained on the spot."""

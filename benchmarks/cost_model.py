"""What the method costs, from shapes alone: FLOPs, bytes moved, memory, network. `scaling_page.py` prints it.

The counts are those of the formulas in the docstrings; nothing is fitted. A time needs a speed as well, that of a
measured point or a data sheet's times an assumed share.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradientspace.clustering.memory import MemoryPlan, plan_memory

ENCODER_PARAMETERS = 10_700_000
"""Of the default encoder, MiniLM: 6 layers of hidden size 384, its embeddings aside."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder. `tied`: lm_head shares the embedding's weights."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tied: bool = True
    head_dim: int | None = None

    @property
    def attention_width(self) -> int:
        """Of all queries of a token together."""
        return self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the adapted linears of one layer."""
        d, q = self.hidden_size, self.attention_width
        kv = q * self.num_key_value_heads // self.num_attention_heads
        return [(d, q), (d, kv), (d, kv), (q, d), (d, self.intermediate_size), (d, self.intermediate_size),
                (self.intermediate_size, d)]  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        return self.num_hidden_layers * sum(i * o for i, o in self.linears)

    @property
    def parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.linear_parameters + embeddings + (2 * self.num_hidden_layers + 1) * self.hidden_size

    def lora_dimension(self, rank: int) -> int:
        """D of an adapter on all linears."""
        return rank * self.num_hidden_layers * sum(i + o for i, o in self.linears)


# From the models' public config.json files.
SHAPES = {
    "0.1B": Shape(576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936),  # Qwen2.5-0.5B
    "3B": Shape(3072, 8192, 28, 24, 8, 128256),  # Llama-3.2-3B
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, tied=False),  # Llama-3.1-8B
    "32B": Shape(5120, 27648, 64, 40, 8, 152064, tied=False),  # Qwen2.5-32B
    "70B": Shape(8192, 28672, 80, 64, 8, 128256, tied=False),  # Llama-3.1-70B
}


def gradient_flops(shape: Shape, rank: int, tokens: float, length: float, supervised: float) -> float:
    """Of per-sample gradients over `tokens` tokens in samples of `length`, of which a share `supervised` carries loss.

    Forward and activations' backward 2 + 2 a token and weight; lm_head the same where a token is supervised; attention
    2 x 2 x length x width a token and layer, half of it masked away, three times (forward and twice that backward);
    the adapter 2 D forward, 2 D backward, 2 D for the gradients, and no sum over samples.
    """
    linears = 4 * shape.linear_parameters
    head = 4 * shape.vocab_size * shape.hidden_size * supervised
    attention = 3 * 2 * length * shape.attention_width * shape.num_hidden_layers
    return tokens * (linears + head + attention + 6 * shape.lora_dimension(rank))


def clustering_flops(dim: int, n_clusters: int, n_components: int = 64, cache_size: int = 32) -> float:
    """Of one row's way through the clusterer: (K + q + 1) inner products, its share of its cache's Gram matrix and of
    the direction made of it, and norms, scaling and centring."""
    return 2.0 * dim * (n_clusters + n_components + 1 + cache_size + 1 + 4)


def clustering_bytes(dim: int, n_clusters: int, batch: int, n_components: int = 64) -> float:
    """Moved by one float32 row: read for its norm and its products, copied by cluster, scaled, centred (each read and
    written), put into the cache and read there twice; centroids and basis are read once a batch."""
    passes = 1 + 1 + 2 + 2 + 2 + 2 + 2 + 2
    return 4.0 * dim * (passes + (n_clusters + n_components + 1) / batch)


def activation_bytes(shape: Shape, rank: int, number: int) -> float:
    """Kept for the backward pass by the engine, a token, with numbers of `number` bytes: the inputs of the linears,
    queries, keys, values and attention's output, both factors and the product of the gated MLP, the residual stream and
    the normed rows of both norms, and the rank-r products of the adapters in float32."""
    d, q, m = shape.hidden_size, shape.attention_width, shape.intermediate_size
    kv = q * shape.num_key_value_heads // shape.num_attention_heads
    norms = 2 * (2 * number + 4) * d  # input, normed row, and the float32 row in between
    return shape.num_hidden_layers * (norms + number * (2 * q + 2 * kv + 4 * m) + 4 * rank * len(shape.linears))


def gradient_memory(shape: Shape, rank: int, tokens: int, samples: int, number: int, head_bytes: int) -> float:
    """Bytes beyond the weights for one batch: activations, the (samples, D) gradients, and logits of one chunk with
    their float32 copy's companions (three at once)."""
    gradients = 4 * samples * shape.lora_dimension(rank)
    return activation_bytes(shape, rank, number) * tokens + gradients + 3 * head_bytes


def clustering_plan(shape: Shape, rank: int, n_clusters: int, budget: int | None = None) -> MemoryPlan:
    """The package's own plan, for a batch as large as the engine makes it."""
    dim = shape.lora_dimension(rank)
    batch = max(1, min(256, 2**30 // (4 * dim)))
    return plan_memory(dim, n_clusters, batch_size=batch, n_draws=0, budget=budget)


@dataclass(frozen=True)
class Mix:
    """Training rows: tokens of a mean one, share of them supervised, epochs in all after the warm-up."""

    samples: float
    length: float = 300.0
    supervised: float = 0.5
    epochs: float = 2.0
    warmup: float = 0.05
    held_out: float = 0.2
    """Rows of dev and test as a share of `samples`; they pass the gradient engine too."""

    @property
    def tokens(self) -> float:
        return self.samples * self.length


def stage_flops(shape: Shape, rank: int, mix: Mix, n_clusters: int) -> dict[str, float]:
    """FLOPs of the stages of one run without baselines. Training costs what gradients cost, token by token."""
    one = gradient_flops(shape, rank, 1.0, mix.length, mix.supervised)
    rows = mix.samples * (1 + mix.held_out)
    return {
        "warmup": one * mix.tokens * mix.warmup * mix.epochs,
        "gradients": one * mix.tokens * (1 + mix.held_out),
        "clustering": clustering_flops(shape.lora_dimension(rank), n_clusters) * rows,
        "training": one * mix.tokens * mix.epochs,
        "encoder": 2.0 * ENCODER_PARAMETERS * rows * mix.length * (1 - mix.supervised),
    }


def table_bytes(samples: float, n_components: int = 64, routable: bool = True) -> float:
    """Of the assignments of one pass, in memory and, uncompressed, on disk: two labels of 8 bytes, cosine, margin,
    norm, loss and support of 4, the coordinates, and for routable clusters the predicted ones and the prompt's 384
    embedding numbers."""
    return samples * (2 * 8 + 5 * 4 + 4 * n_components + (4 * n_components + 4 * 384 if routable else 0))


def sync_bytes(dim: int, n_clusters: int, every: int, update: str = "svd") -> float:
    """That one sample costs on the network where centroids are brought together every `every` samples: the rows that
    fill the caches for `svd`, the sums of each cluster (there and back) for `mean` and `running`."""
    return 4.0 * dim if update == "svd" else 4.0 * 2 * n_clusters * dim / every

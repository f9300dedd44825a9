"""Clustering of streams of very high-dimensional vectors by direction; knows nothing of language models.

clusterer.py: `OnlineSVDClusterer`; parameters.py: its limits; assignment.py: what it says of a batch;
centroids.py: the centroids and the caches that move them; memory.py: how much that takes; snapshot.py: on disk.
svd.py: the dominant subspace of a validation sample; rank.py: how many clusters its spectrum shows;
running_svd.py: the subspace of a whole stream. kmeans.py: spherical k-means.
settle.py: labels after the pass; stability.py: how far they depend on chance. unit_rows.py: rows as unit vectors.
"""

from gradientspace.clustering.assignment import Assignment
from gradientspace.clustering.clusterer import OnlineSVDClusterer
from gradientspace.clustering.kmeans import spherical_kmeans
from gradientspace.clustering.memory import MemoryPlan, plan_memory
from gradientspace.clustering.unit_rows import RowSource

__all__ = ["Assignment", "MemoryPlan", "OnlineSVDClusterer", "RowSource", "plan_memory", "spherical_kmeans"]

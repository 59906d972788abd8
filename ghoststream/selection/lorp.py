"""LoRP's choice (Yun et al., arXiv 2605.27786): the most redundant layers of clusters of similar layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from ghoststream.costs import Cost, Need, SelectionShape
from ghoststream.selection.evidence import Evidence
from ghoststream.selection.registry import Choice, Criterion, register_criterion, require_count
from ghoststream.spans import Span
from ghoststream.statistics import AllPairsReducer

Array = npt.NDArray[np.float64]
Clusters = tuple[tuple[int, ...], ...]

_ALONE = -1.0
_STARTS = 20
_ITERATIONS = 50


@register_criterion("lorp")
class LoRP(Criterion):
    """One layer of every cluster, then the rest where the redundancy that is left is largest.

    With ``S_ij`` the mean cosine of the inputs ``h[i]`` and ``h[j]`` of layers ``i`` and ``j`` (eq. 3 and 4):

    1. Representation locality ``RLS = -log2(mean of S_ij, i < j)`` (eq. 5 and 6); 2 clusters if it is at
       least 1, 3 if at least 0.7, else 4.
    2. Spectral clusters of the affinity ``(S + 1) / 2`` (eq. 7), numbered by depth.
    3. The redundancy of a layer is its mean ``S`` with the others of its cluster (eq. 8; -1 for a layer
       alone). The most redundant layer of each cluster goes, as far as there are layers to remove.
    4. Again and again, the next most redundant layer of the cluster whose remaining layers have the largest
       mean ``S`` among themselves (eq. 10 and 11).

    The first and the last layer are kept. Cost: one read of the store; all hidden states of one sequence in
    float32 at a time, ``4 L T C`` bytes. Ties go to the shallower cluster and the lowest layer. Clusters are
    those of normalised spectral clustering (as scikit-learn's: eigenvectors of the normalised Laplacian over
    the root of the degree), by k-means from 20 seeded starts.
    """

    meaning = "mean cosine with the other layers of its cluster; the highest are removed, from every cluster"

    def check(self, n_layers: int, remove: int) -> None:
        """Check the request.

        Raises:
            RequestError: If more layers than those between the first and the last are to go.
        """
        require_count(remove, n_layers - 2, n_layers, "lorp keeps the first and the last layer")

    def choose(self, evidence: Evidence, remove: int) -> Choice:
        """Cluster the layers and choose.

        Raises:
            NumericsError: If no token counts.
        """
        reducer = AllPairsReducer(tuple(range(evidence.n_layers)))
        similarity = reducer.tables(evidence.reduce(reducer)).cosine
        locality = representation_locality(similarity)
        clusters = depth_clusters(similarity, n_clusters(locality))
        removed = allocate(similarity, clusters, remove)
        redundancy = {
            layer: _redundancy(similarity, layer, members) for members in clusters for layer in members
        }
        # No bound on similarity can be infinite in a file: None says that the mean cosine is not positive.
        details = {
            "representation_locality": locality if math.isfinite(locality) else None,
            "clusters": [list(members) for members in clusters],
        }
        return Choice(
            tuple((Span(layer, layer + 1), redundancy[layer]) for layer in sorted(redundancy)),
            tuple(Span(layer, layer + 1) for layer in removed),
            details,
        )

    def cost(self, shape: SelectionShape) -> Cost:
        """Return one read of the store, for all pairs of hidden states of a sequence."""
        layers, c = shape.n_layers, shape.hidden
        return Cost(
            Need(4 * layers * shape.length * c, "4 L T C for one worker"),
            read_bytes=shape.store_bytes,
            flops=2.0 * layers**2 * c * shape.n_tokens,
        )


def representation_locality(similarity: Array) -> float:
    """Return ``-log2`` of the mean of ``S_ij`` over ``i < j``; infinite if the mean is not positive.

    Args:
        similarity: ``S``, ``(N, N)``, ``N >= 2``.
    """
    mean = float(similarity[np.triu_indices(len(similarity), k=1)].mean())
    return -math.log2(mean) if mean > 0 else math.inf


def n_clusters(locality: float) -> int:
    """Return how many clusters a representation locality asks for (section 5.1)."""
    if locality >= 1.0:
        return 2
    return 3 if locality >= 0.7 else 4


def depth_clusters(similarity: Array, count: int) -> Clusters:
    """Divide layers by spectral clustering of ``(S + 1) / 2``; clusters are numbered by their first layer.

    Args:
        similarity: ``S``, ``(N, N)``.
        count: Clusters, at most ``N``; fewer come out where layers cannot be told apart.
    """
    from scipy.sparse.csgraph import laplacian

    size = len(similarity)
    count = min(count, size)
    normalised, roots = laplacian((similarity + 1.0) / 2.0, normed=True, return_diag=True)
    _, vectors = scipy.linalg.eigh(np.asarray(normalised, np.float64), subset_by_index=[0, count - 1])
    labels = _k_means(np.asarray(vectors / roots[:, None], np.float64), count)
    first_seen = list(dict.fromkeys(labels))
    return tuple(tuple(np.flatnonzero(labels == label).tolist()) for label in first_seen)


def allocate(similarity: Array, clusters: Clusters, remove: int) -> tuple[int, ...]:
    """Return the layers that go, ascending: first the most redundant of each cluster, then by what is left.

    Args:
        similarity: ``S``, ``(N, N)``.
        clusters: The layers of each cluster.
        remove: At most ``N - 2``, as the first and the last layer are kept.
    """
    waiting = [_by_redundancy(similarity, members) for members in clusters]
    removed = [candidates.pop(0) for candidates in waiting if candidates][:remove]
    while len(removed) < remove:
        left = [
            _mean_similarity(similarity, [layer for layer in members if layer not in removed])
            for members in clusters
        ]
        best = max((number for number, some in enumerate(waiting) if some), key=lambda number: left[number])
        removed.append(waiting[best].pop(0))
    return tuple(sorted(removed))


def _by_redundancy(similarity: Array, members: Sequence[int]) -> list[int]:
    kept = (0, len(similarity) - 1)
    order = sorted(
        (-_redundancy(similarity, layer, members), layer) for layer in members if layer not in kept
    )
    return [layer for _, layer in order]


def _redundancy(similarity: Array, layer: int, members: Sequence[int]) -> float:
    others = [other for other in members if other != layer]
    return float(similarity[layer, others].mean()) if others else _ALONE


def _mean_similarity(similarity: Array, layers: Sequence[int]) -> float:
    values = [float(similarity[pair]) for pair in combinations(layers, 2)]
    return sum(values) / len(values) if values else -math.inf


def _k_means(points: Array, count: int) -> npt.NDArray[np.int64]:
    from scipy.cluster.vq import kmeans2

    rng = np.random.default_rng(0)
    best, least = np.zeros(len(points), dtype=np.int64), math.inf
    for _ in range(_STARTS):
        start = points[rng.choice(len(points), size=count, replace=False)]
        with warnings.catch_warnings():
            # A cluster that stays empty is left out.
            warnings.simplefilter("ignore", UserWarning)
            centres, labels = kmeans2(points, start, iter=_ITERATIONS, minit="matrix")
        spread = float(np.square(points - centres[labels]).sum())
        if spread < least:
            best, least = labels.astype(np.int64), spread
    return best

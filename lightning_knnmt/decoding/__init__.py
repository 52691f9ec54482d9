"""Decoder states become hypotheses: the next-token distribution, and the search that follows it.

Neither knows what makes the states, nor whether a datastore has a say in the distribution.
"""

from lightning_knnmt.decoding.beam_search import (
    DecoderCache,
    Hypothesis,
    IncrementalDecoder,
    beam_search,
)
from lightning_knnmt.decoding.distribution import (
    NextTokenDistribution,
    Session,
    SoftmaxDistribution,
    Stateless,
)
from lightning_knnmt.decoding.search import BeamSearch, translate_batches

__all__ = [
    "BeamSearch",
    "DecoderCache",
    "Hypothesis",
    "IncrementalDecoder",
    "NextTokenDistribution",
    "Session",
    "SoftmaxDistribution",
    "Stateless",
    "beam_search",
    "translate_batches",
]

"""The abilities file and the samples it names: rows of data sets, tokenised, with their answer tokens marked."""

from mergekit_act.abilities.samples import AbilitySamples, Sample, Tokenizers, collect_samples
from mergekit_act.data.schema import AbilitiesFile, Ability, Evaluation, load_abilities

__all__ = [
    "AbilitiesFile",
    "Ability",
    "AbilitySamples",
    "Evaluation",
    "Sample",
    "Tokenizers",
    "collect_samples",
    "load_abilities",
]

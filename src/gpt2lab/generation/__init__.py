"""Text from a model."""

from gpt2lab.generation.decode import Sample, decode, generate
from gpt2lab.generation.sampling import Sampler

__all__ = ["Sample", "Sampler", "decode", "generate"]

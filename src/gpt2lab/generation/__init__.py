"""Text from a model."""

from gpt2lab.generation.engine import Engine
from gpt2lab.generation.samples import Sample, generate
from gpt2lab.generation.sampling import Sampler
from gpt2lab.generation.texts import Request

__all__ = ["Engine", "Request", "Sample", "Sampler", "generate"]

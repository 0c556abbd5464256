"""Sampling answers to prompts."""

from prefix_sharing.sampling.choose import SamplingOptions, choose
from prefix_sharing.sampling.in_process import in_batches, sample_answers
from prefix_sharing.sampling.sampler import Answer, Prompt, Sampler

__all__ = ["Answer", "Prompt", "Sampler", "SamplingOptions", "choose", "in_batches", "sample_answers"]

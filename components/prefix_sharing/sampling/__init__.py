"""Sampling answers to prompts."""

from prefix_sharing.sampling.choose import SamplingOptions, choose
from prefix_sharing.sampling.in_process import in_process_sampler, sample_answers
from prefix_sharing.sampling.sampler import Answer, Policy, Prompt, Sampler
from prefix_sharing.sampling.server import ServedSampler, served_sampler
from prefix_sharing.sampling.vllm import vllm_sampler

__all__ = [
    "Answer",
    "Policy",
    "Prompt",
    "Sampler",
    "SamplingOptions",
    "ServedSampler",
    "choose",
    "in_process_sampler",
    "sample_answers",
    "served_sampler",
    "vllm_sampler",
]

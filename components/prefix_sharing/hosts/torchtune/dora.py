"""DoRA of layers with a bias, such as Qwen 2's attention has.

DoRA gives the rows of a weight another length. torchtune 0.6.1 scales the bias along as it trains, but not as it
merges, and PEFT never does.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules.peft import DoRALinear
from typing_extensions import override


class BiasedDoRALinear(DoRALinear):
    """torchtune's layer, with its bias left as it is."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disabled:
            return super().forward(x)
        weight = self.weight.to(x.dtype)  # of QLoRA's, the numbers it stands for
        product = F.linear(x, weight)
        x = self.dropout(x)
        # By calls of the layers, as FSDP needs them, not by their weights.
        unit = torch.eye(self.in_dim, device=x.device, dtype=x.dtype)
        update = self.lora_b(self.lora_a(unit)).T
        length = self._get_weight_norm(weight, update.detach()).detach()
        return (self.magnitude / length) * (product + self.scaling * self.lora_b(self.lora_a(x))) + self.bias


def leave_biases_alone(model: nn.Module) -> None:
    """Has every layer with DoRA and a bias compute what PEFT computes.

    Args:
        model (nn.Module): as torchtune's builders return it; changed in place.
    """
    for module in model.modules():
        if type(module) is DoRALinear and module.bias is not None:
            module.__class__ = BiasedDoRALinear

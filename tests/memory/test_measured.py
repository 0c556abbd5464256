import torch

from prefix_sharing.memory import memory_by_part, peak_memory


def test_memory_by_part_counts_every_tensor():
    model = torch.nn.Linear(256, 1024, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    parts = memory_by_part(model, optimizer)
    megabyte = 1 / 1024
    assert parts["memory_parameters"] == parts["memory_gradients"] == megabyte
    # two numbers a parameter, and the number of steps
    assert parts["memory_optimizer_state"] == 2 * megabyte + 4 / 1024**3


def test_peak_memory_of_the_process():
    (value,) = peak_memory(torch.device("cpu")).values()
    assert 0.05 < value < 100

"""Other people's Neural Turing Machines in training, each run from a checkout that the reader made.

    git clone https://github.com/loudinthecloud/pytorch-ntm
    git clone https://github.com/vlgiitr/ntm-pytorch

`training_speed.py` runs this file in a process of its own, since both packages are called `ntm`, as is one of this
project's: `python -P benchmarks/peers/trainers.py NAME CHECKOUT BATCH_SIZE LENGTH SECONDS` prints updates a second. An
update is the peer's own: its network, its loss, its clipping, torch's RMSprop; the copy task of `LENGTH` vectors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import nn, optim

Update = Callable[[], object]


def pytorch_ntm(batch_size: int, length: int) -> Update:
    """loudinthecloud/pytorch-ntm, whose default is a batch of 1."""
    from ntm.aio import EncapsulatedNTM  # type: ignore[import-not-found]

    net = EncapsulatedNTM(9, 8, 100, 1, 1, 128, 20)
    optimizer = _rmsprop(net)
    heard, vectors = _sequences(batch_size, length)

    def update() -> None:
        optimizer.zero_grad()
        net.init_sequence(batch_size)
        for step in heard:
            net(step)
        said = torch.stack([net()[0] for _ in vectors])
        nn.functional.binary_cross_entropy(said, vectors).backward()  # type: ignore[no-untyped-call]
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.grad.data.clamp_(-10, 10)
        optimizer.step()

    return update


def ntm_pytorch(batch_size: int, length: int) -> Update:
    """vlgiitr/ntm-pytorch, which trains on one sequence at a time."""
    from ntm import NTM  # type: ignore[attr-defined]

    assert batch_size == 1
    net = NTM(9, 8, controller_size=100, memory_units=128, memory_unit_size=20, num_heads=1)
    optimizer = _rmsprop(net)
    heard, vectors = _sequences(1, length)
    silence = torch.zeros(1, 9)

    def update() -> None:
        optimizer.zero_grad()
        net.reset()
        for step in heard:
            net(step)
        said = torch.stack([net(silence) for _ in vectors])
        nn.functional.binary_cross_entropy(said.view_as(vectors), vectors).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_value_(net.parameters(), 10)
        optimizer.step()

    return update


def _rmsprop(net: nn.Module) -> optim.Optimizer:
    return optim.RMSprop(net.parameters(), lr=1e-4, alpha=0.95, momentum=0.9)


def _sequences(batch_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is heard [T + 1, B, 9], with the delimiter, and the vectors [T, B, 8]."""
    vectors = torch.randint(0, 2, (length, batch_size, 8)).float()
    heard = torch.zeros(length + 1, batch_size, 9)
    heard[:-1, :, :8] = vectors
    heard[-1, :, 8] = 1
    return heard, vectors


PEERS: dict[str, Callable[[int, int], Update]] = {"pytorch-ntm": pytorch_ntm, "ntm-pytorch": ntm_pytorch}


def updates_per_s(update: Update, duration_s: float) -> float:
    """After one to warm up; by processor time, so that what else runs on the machine counts for little."""
    update()
    count, started = 0, time.process_time()
    while (passed := time.process_time() - started) < duration_s or count < 3:
        update()
        count += 1
    return count / passed


if __name__ == "__main__":
    name, checkout, batch, vectors_in_a_sequence, seconds = sys.argv[1:]
    sys.path.insert(0, checkout)
    torch.set_num_threads(1)
    print(updates_per_s(PEERS[name](int(batch), int(vectors_in_a_sequence)), float(seconds)))

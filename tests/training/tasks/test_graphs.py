"""Graph tasks: what is due follows from what was said, by a slow walk."""

from __future__ import annotations

import itertools

import pytest
import torch

from training.errors import TaskError
from training.tasks.graphs import GraphTraversalTask, ShortestPathTask


@pytest.mark.parametrize("size", [(3, 1), (6, 4), (12, 9)])
def test_each_answer_is_the_node_that_the_label_leads_to(size):
    task = GraphTraversalTask(num_labels=3)
    inputs, targets, _ = task.check(task.draw(8, size, torch.Generator().manual_seed(1)), 8)
    nodes, steps = size

    for row in range(8):
        sequence = inputs[:, row]
        begins, labels, ends, query = sequence.split([12, 3, 12, 1], dim=-1)
        num_edges = int(query.argmax())
        leads = {
            (int(begins[i].argmax()), int(labels[i].argmax())): int(ends[i].argmax())
            for i in range(num_edges)
        }
        assert num_edges == len(leads) == 2 * nodes
        assert len({name for name, _ in leads}) == nodes
        assert query.sum() == 1
        assert (begins.sum(-1)[num_edges + 1 :] == 0).all()
        node = int(begins[num_edges].argmax())
        for step in range(steps):
            node = leads[node, int(labels[num_edges + step].argmax())]
            assert targets[step, row] == node
        assert len(sequence) == num_edges + steps


@pytest.mark.parametrize("size", [(3, 1), (4, 2), (6, 2), (9, 4)])
def test_the_answer_is_the_only_shortest_path(size):
    task = ShortestPathTask(max_steps=4)
    inputs, targets, _ = task.check(task.draw(8, size, torch.Generator().manual_seed(1)), 8)
    nodes, steps = size

    for row in range(8):
        one, other, query, answer = inputs[:, row].split([12, 12, 1, 1], dim=-1)
        num_edges = int(query.argmax())
        beside = {
            pair
            for i in range(num_edges)
            for pair in itertools.permutations([int(one[i].argmax()), int(other[i].argmax())])
        }
        names = {name for name, _ in beside}
        first, last = int(one[num_edges].argmax()), int(other[num_edges].argmax())

        def paths(length, beside=beside, names=names, first=first, last=last):
            between = itertools.product(names, repeat=length - 1)
            return [
                path
                for path in ((first, *middle, last) for middle in between)
                if all(pair in beside for pair in itertools.pairwise(path))
            ]

        assert len(names) == nodes
        assert first != last
        assert not any(paths(shorter) for shorter in range(1, steps))
        assert paths(steps) == [(first, *targets[:, row].tolist())]
        assert answer.squeeze(-1).tolist() == [0] * (len(inputs) - steps) + [1] * steps
        assert len(inputs) == num_edges + 1 + task.thinking + steps


def test_a_path_that_no_graph_has_is_refused():
    with pytest.raises(TaskError, match="a graph of 3 nodes has no shortest path of 2 steps: ask for fewer"):
        ShortestPathTask().draw(1, (3, 2), torch.Generator())

"""Graphs: hear the edges of a random graph, then follow a path in it, or find the shortest (Graves et al. 2016).

The layout of a sequence: one step for each edge, in random order: where it begins and where it leads, one-hot among the
nodes' names, and its label, one-hot among the labels. Every sequence has a graph of its own, of nodes that are drawn
from all names. Then

- **traversal**: a step with the query marker, the first node and the first label, then a step for each further label,
  alone. At each of these steps the node that the label leads to is due.
- **shortest path**: a step with the query marker, the first node and the last, then `thinking` steps of zeros, then a
  step with the answer marker for each edge of the one shortest path between them, at which the next node is due. Edges
  lead both ways here and have no labels.

An answer is one of the names, by softmax.

Shapes: V nodes of a graph, D edges that begin at each, E edges, S steps of the path, B batch, X names, L labels.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from training.errors import TaskError
from training.losses import LOSSES, Loss
from training.tasks.task import Goal, Sequences, Size, Task, in_order


class _GraphTask(Task):
    num_names: int = Field(default=12, ge=2)
    """Names that nodes can have."""
    min_nodes: int = Field(default=3, ge=3)
    """Nodes in the smallest graph of training."""
    max_nodes: int = Field(default=6, ge=3)
    """Nodes in the largest graph of training."""
    min_steps: int = Field(default=1, ge=1)
    """Edges in the shortest path of training."""
    max_steps: int = Field(default=4, ge=1)
    """Edges in the longest path of training."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> _GraphTask:
        in_order("min_nodes", self.min_nodes, "max_nodes", self.max_nodes)
        in_order("min_steps", self.min_steps, "max_steps", self.max_steps)
        in_order("max_nodes", self.max_nodes, "num_names", self.num_names)
        return self

    @property
    def output_size(self) -> int:
        """The names."""
        return self.num_names

    @property
    def loss(self) -> Loss:
        """An answer is a name."""
        return LOSSES["cross-entropy"]

    @property
    def goal(self) -> Goal:
        """Fewer than one answer in twenty is wrong."""
        return Goal("error_rate", 0.05)

    @property
    def output_description(self) -> str:
        """For people who call the served model."""
        return f"the probability of each of {self.num_names} nodes' names"

    def draw(self, batch_size: int, size: Size, generator: torch.Generator) -> Sequences:
        """Random sequences of a size."""
        source = random.Random(int(torch.randint(2**62, (), generator=generator)))  # noqa: S311  # nosec B311  # no secret: made again by its seed
        drawn = [self._draw_one(size, source) for _ in range(batch_size)]
        inputs = torch.stack([steps for steps, _ in drawn], dim=1)
        return Sequences(inputs, torch.tensor([answers for _, answers in drawn]).T)

    @abstractmethod
    def _draw_one(self, size: Size, source: random.Random) -> tuple[torch.Tensor, list[int]]:
        """[T, I] and the names that are due at the last steps."""


class GraphTraversalTask(_GraphTask):
    """Settings of graph traversal, and its sequences."""

    size_names: ClassVar = ("nodes", "steps")

    name: Literal["graph-traversal"] = "graph-traversal"
    """The task."""
    num_labels: int = Field(default=4, ge=2)
    """Labels that edges can have; those that begin at one node have different ones."""
    num_edges: int = Field(default=2, ge=1)
    """Edges that begin at each node, D."""

    @model_validator(mode="after")
    def _edges_can_be_told_apart(self) -> GraphTraversalTask:
        in_order("num_edges", self.num_edges, "num_labels", self.num_labels)
        return self

    @property
    def input_size(self) -> int:
        """Where an edge begins, its label, where it leads, and the query marker."""
        return 2 * self.num_names + self.num_labels + 1

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        names, labels = self.num_names, self.num_labels
        return (
            f"one-hot: {names} names of where an edge begins, {labels} labels, {names} names of where it leads; the "
            "query marker, which goes with a node to begin at and a label; after that labels alone"
        )

    def sizes(self) -> list[Size]:
        """Every number of nodes with every number of steps."""
        return [
            (nodes, steps)
            for nodes in range(self.min_nodes, self.max_nodes + 1)
            for steps in range(self.min_steps, self.max_steps + 1)
        ]

    def _draw_one(self, size: Size, source: random.Random) -> tuple[torch.Tensor, list[int]]:
        """Inputs [V D + S, 2 X + L + 1], and the S nodes on the path."""
        num_nodes, num_steps = size
        names = source.sample(range(self.num_names), num_nodes)
        leads = {
            (name, label): source.choice(names)
            for name in names
            for label in source.sample(range(self.num_labels), self.num_edges)
        }
        listed = source.sample(sorted(leads), len(leads))
        at_label, at_end = self.num_names, self.num_names + self.num_labels
        inputs = torch.zeros(len(listed) + num_steps, self.input_size)
        for step, (name, label) in enumerate(listed):
            inputs[step, [name, at_label + label, at_end + leads[name, label]]] = 1
        node = source.choice(names)
        inputs[len(listed), [node, -1]] = 1
        answers = []
        for step in range(len(listed), len(inputs)):
            label = source.choice([label for name, label in leads if name == node])
            inputs[step, at_label + label] = 1
            node = leads[node, label]
            answers.append(node)
        return inputs, answers


class ShortestPathTask(_GraphTask):
    """Settings of shortest path, and its sequences."""

    size_names: ClassVar = ("nodes", "steps")

    name: Literal["shortest-path"] = "shortest-path"
    """The task."""
    max_steps: int = Field(default=2, ge=1)
    """Edges in the longest path of training."""
    thinking: int = Field(default=6, ge=0)
    """Steps between the question and the answer."""

    @property
    def input_size(self) -> int:
        """The two ends of an edge, the query marker and the answer marker."""
        return 2 * self.num_names + 2

    @property
    def input_description(self) -> str:
        """For people who call the served model."""
        names = self.num_names
        return (
            f"one-hot: {names} names of one end of an edge, {names} of the other; the query marker, which goes with "
            f"the first node and the last; {self.thinking} steps of zeros; then the answer marker at each step"
        )

    def sizes(self) -> list[Size]:
        """Every number of nodes with every length of the path that it has room for."""
        return [
            (nodes, steps)
            for nodes in range(self.min_nodes, self.max_nodes + 1)
            for steps in range(self.min_steps, min(self.max_steps, nodes - 2) + 1)
        ]

    def _draw_one(self, size: Size, source: random.Random) -> tuple[torch.Tensor, list[int]]:
        """Inputs [V + 1 + thinking + S, 2 X + 2], and the S nodes on the path after the first."""
        num_nodes, num_steps = size
        if num_steps > num_nodes - 2:
            raise TaskError(
                f"a graph of {num_nodes} nodes has no shortest path of {num_steps} steps: ask for fewer"
            )
        path: list[int] = []
        while not path:
            names = source.sample(range(self.num_names), num_nodes)
            edges = _connected(names, source)
            path = _only_shortest_path(names, edges, num_steps, source)
        source.shuffle(edges)
        inputs = torch.zeros(len(edges) + 1 + self.thinking + num_steps, self.input_size)
        for step, (one, other) in enumerate(edges):
            inputs[step, [one, self.num_names + other]] = 1
        inputs[len(edges), [path[0], self.num_names + path[-1], -2]] = 1
        inputs[-num_steps:, -1] = 1
        return inputs, path[1:]


def _connected(names: list[int], source: random.Random) -> list[tuple[int, int]]:
    """As many edges as nodes: a random tree, and one edge more. Which end of an edge goes first is random, too."""
    edges = [(names[i], names[source.randrange(i)]) for i in range(1, len(names))]
    missing = [
        (one, other)
        for i, one in enumerate(names)
        for other in names[:i]
        if (one, other) not in edges and (other, one) not in edges
    ]
    edges.append(source.choice(missing))
    return [edge if source.random() < 0.5 else edge[::-1] for edge in edges]


def _only_shortest_path(
    names: list[int], edges: list[tuple[int, int]], num_steps: int, source: random.Random
) -> list[int]:
    """A path of so many steps that alone is the shortest between its ends; empty if there is none."""
    beside = {
        name: {*(b for a, b in edges if a == name), *(a for a, b in edges if b == name)} for name in names
    }
    first = source.choice(names)
    reached = {first}
    paths = [[first]]
    for _ in range(num_steps):
        paths = [[*path, node] for path in paths for node in sorted(beside[path[-1]] - reached)]
        reached |= {path[-1] for path in paths}
    ends = [path[-1] for path in paths]
    alone = [path for path in paths if ends.count(path[-1]) == 1]
    return source.choice(alone) if alone else []

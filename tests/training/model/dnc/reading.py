"""A slow reading of the DNC's equations, in loops over single numbers, in double precision.

Graves et al. (2016), methods, one sequence and one write head; and Csordás and Schmidhuber (2019), section 3. Vectors
and matrices are lists; the papers' letters are the names.
"""
# ruff: noqa: N803, N806

from __future__ import annotations

import math
from collections.abc import Sequence

from training.model.dnc.access import LEAST_USAGE, USAGE_LEVELS
from training.model.dnc.heads import Improvements


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def oneplus(x):
    return 1 + math.log(1 + math.exp(x))


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def cosine(u, v):
    inner = sum(a * b for a, b in zip(u, v, strict=True))
    return inner / (math.sqrt(sum(a * a for a in u)) * max(math.sqrt(sum(b * b for b in v)), 1e-4))


def content(M, k, m, beta):
    """C and, with a mask, D of the improvements."""
    return softmax(
        [
            beta
            * cosine([a * b for a, b in zip(k, m, strict=True)], [a * b for a, b in zip(row, m, strict=True)])
            for row in M
        ]
    )


def sharpened(d, s):
    powers = [max(value, 1e-16) ** s for value in d]
    return [power / sum(powers) for power in powers]


class Machine:
    """The memory of one sequence."""

    def __init__(self, N: int, W: int, R: int, improvements: Improvements) -> None:
        self.N, self.W, self.R, self.improvements = N, W, R, improvements
        self.M = [[0.0] * W for _ in range(N)]
        self.u = [0.0] * N
        self.p = [0.0] * N
        self.L = [[0.0] * N for _ in range(N)]
        self.w_w = [0.0] * N
        self.w_r = [[0.0] * N for _ in range(R)]

    def step(self, requested: Sequence[float]) -> list[list[float]]:
        """From all numbers that the heads ask for to the read vectors; the state is changed in its place."""
        N, W, R = self.N, self.W, self.R
        numbers = iter(requested)

        def take(count):
            return [next(numbers) for _ in range(count)]

        masked, dealloc, sharp = self.improvements
        heads = []
        for _ in range(R):
            k = take(W)
            m = [sigmoid(x) for x in take(W)] if masked else [1.0] * W
            beta = oneplus(take(1)[0])
            s_b, s_f = [oneplus(x) for x in take(2)] if sharp else (None, None)
            pi = softmax(take(3))
            f = sigmoid(take(1)[0])
            heads.append((k, m, beta, s_b, s_f, pi, f))
        k_w = take(W)
        m_w = [sigmoid(x) for x in take(W)] if masked else [1.0] * W
        beta_w = oneplus(take(1)[0])
        e = [sigmoid(x) for x in take(W)]
        v = take(W)
        g_a, g_w = sigmoid(take(1)[0]), sigmoid(take(1)[0])
        assert next(numbers, None) is None

        psi = [math.prod(1 - heads[r][6] * self.w_r[r][i] for r in range(R)) for i in range(N)]
        u = [(self.u[i] + self.w_w[i] - self.u[i] * self.w_w[i]) * psi[i] for i in range(N)]
        # The free list: the least used first, of those on a level the first.
        phi = sorted(range(N), key=lambda i: (round(u[i] * USAGE_LEVELS), i))
        a = [0.0] * N
        at_least = [LEAST_USAGE + (1 - LEAST_USAGE) * usage for usage in u]
        for j in range(N):
            a[phi[j]] = (1 - at_least[phi[j]]) * math.prod(at_least[phi[i]] for i in range(j))
        c_w = content(self.M, k_w, m_w, beta_w)
        w_w = [g_w * (g_a * a[i] + (1 - g_a) * c_w[i]) for i in range(N)]
        M = [
            [
                self.M[i][j] * (psi[i] if dealloc else 1.0) * (1 - w_w[i] * e[j]) + w_w[i] * v[j]
                for j in range(W)
            ]
            for i in range(N)
        ]
        L = [
            [0.0 if i == j else (1 - w_w[i] - w_w[j]) * self.L[i][j] + w_w[i] * self.p[j] for j in range(N)]
            for i in range(N)
        ]
        p = [(1 - sum(w_w)) * self.p[i] + w_w[i] for i in range(N)]
        w_r = []
        for r, (k, m, beta, s_b, s_f, pi, _) in enumerate(heads):
            f = [sum(L[i][j] * self.w_r[r][j] for j in range(N)) for i in range(N)]
            b = [sum(L[j][i] * self.w_r[r][j] for j in range(N)) for i in range(N)]
            if sharp:
                f, b = sharpened(f, s_f), sharpened(b, s_b)
            c = content(M, k, m, beta)
            w_r.append([pi[0] * b[i] + pi[1] * c[i] + pi[2] * f[i] for i in range(N)])
        self.M, self.u, self.p, self.L, self.w_w, self.w_r = M, u, p, L, w_w, w_r
        return [[sum(M[i][j] * w_r[r][i] for i in range(N)) for j in range(W)] for r in range(R)]

"""What a sample says about what it was drawn from, with a probability of being wrong."""

import math

import numpy as np


def mean_error(samples: np.ndarray, confidence: float) -> np.ndarray:
    """Return how far the means of samples in [0, 1] may be from their expectations, all of them at once.

    The tighter of two bounds for each mean, with the chance of being wrong shared by all means, bounds and sides:

    - Hoeffding 1963, Theorem 2: sqrt(ln(1 / d) / 2N)
    - Maurer and Pontil 2009, Theorem 4 (empirical Bernstein): sqrt(2 V ln(2 / d) / N) + 7 ln(2 / d) / 3(N - 1), with V
      the sample variance; tighter where samples vary little

    Args:
        samples: N independent samples of each of several numbers, (N, ...).
        confidence: Probability that none of the means is further off.

    Returns:
        One error for each mean, (...).
    """
    N = len(samples)
    d = (1 - confidence) / (4 * samples[0].size)
    V = samples.var(axis=0, ddof=1)
    hoeffding = math.sqrt(-math.log(d) / (2 * N))
    bernstein = np.sqrt(2 * V * math.log(2 / d) / N) + 7 * math.log(2 / d) / (3 * (N - 1))
    error: np.ndarray = np.minimum(hoeffding, bernstein)
    return error


def binomial_lower(successes: int, count: int, confidence: float) -> float:
    """Return the one-sided lower bound of a rate (Clopper and Pearson 1934).

    It is the rate at which `successes` or more would be seen with a probability of 1 - confidence.
    """
    if successes == 0:
        return 0.0
    k = np.arange(successes, count + 1)
    log_ways = math.lgamma(count + 1) - np.array([math.lgamma(i + 1) + math.lgamma(count - i + 1) for i in k])
    low, high = 0.0, 1.0
    while (rate := 0.5 * (low + high)) not in (low, high):
        tail = np.exp(log_ways + k * math.log(rate) + (count - k) * math.log1p(-rate)).sum()
        if tail < 1 - confidence:
            low = rate
        else:
            high = rate
    return low

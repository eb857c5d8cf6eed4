"""Group-relative advantages: how much better a rollout did than its siblings on the same question."""

from __future__ import annotations

import numpy as np

EPS = 1e-6  # the reference's; keeps a nearly-equal group finite

NORMALISERS = ("std", "mean")


def group_advantages(rewards_r: np.ndarray, trainable_r: np.ndarray, *, normalise: str = "std") -> np.ndarray:
    """float32 [r]: (reward - mean) / (std + 1e-6) over the trainable rollouts of one question; 0 for all others.

    `normalise='mean'` leaves out the division (Dr. GRPO, arXiv 2503.20783). A group whose rewards are all equal, or
    with fewer than two trainable rollouts, gives exact zeros: it says nothing about the policy.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; the unbiased (n - 1) std is the DeepResearcher reference's.
    """
    advantage_r = np.zeros(len(rewards_r), np.float32)
    rewards = np.asarray(rewards_r, np.float64)[trainable_r]
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return advantage_r
    centred = rewards - rewards.mean()
    scale = rewards.std(ddof=1) + EPS if normalise == "std" else 1.0
    advantage_r[trainable_r] = (centred / scale).astype(np.float32)
    return advantage_r

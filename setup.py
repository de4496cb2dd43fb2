"""Packages, dependencies and the command. Tool settings live in pyproject.toml, exact pins in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
DEEPSPEED = "deepspeed>=0.18"
TEST = [
    *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scipy", "setuptools", "wheel"),
    *("transformers>=5", "tensorboard", "wandb", "matplotlib>=3.9", DEEPSPEED),
]

setup(
    name="megalite",
    version="0.1.0",
    description="Pretraining of language models with every form of parallelism, small enough to read.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["megalite", "megalite.*"]),
        "megalite.configs",
        *find_packages("kernels"),
    ],
    package_dir={
        "megalite": "megalite",
        "megalite.configs": "configs",
        "megalite_kernels": "kernels/megalite_kernels",
    },
    package_data={
        "megalite": ["py.typed"],
        "megalite.configs": ["*.yaml", "*/*.yaml"],
        "megalite_kernels": ["**/*.c", "**/*.cpp", "**/*.h", "**/*.json", "py.typed"],
    },
    install_requires=[
        "torch>=2.13",
        "hydra-core>=1.3.8,<1.4",
        "numpy>=1.26",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "rich>=13",
        "pyarrow>=15",
        "zstandard>=0.22",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "deepspeed": [DEEPSPEED],
        "flash-attn": ["flash-attn>=2.8"],
        "wandb": ["wandb>=0.20"],
        "tensorboard": ["tensorboard>=2.15"],
        "hf": ["transformers>=5"],
        "torchao": ["torchao>=0.18"],
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy", "import-linter"],
        "bench": ["transformers>=5", "lightning-fabric", "datasets", "psutil", "matplotlib>=3.9"],
    },
    entry_points={"console_scripts": ["megalite=megalite.cli:command"]},
)

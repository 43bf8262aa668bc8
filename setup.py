"""Packaging. Imports no torch, so that it also runs where build tools are all there is."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
CONFIGS = HERE / "configs"

version = re.search(r'^__version__ = "(.+)"$', (HERE / "sge_det/__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="sge_det",
    version=version.group(1),
    description="Spatial Group-wise Enhance (SGE) for Detectron2's detectors",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    # configs/ of the checkout is sge_det/configs/ of the installed package
    packages=[*find_packages(include=["sge_det", "sge_det.*"]), "sge_det.configs"],
    package_dir={"sge_det.configs": "configs"},
    package_data={
        "sge_det.configs": sorted(
            p.relative_to(CONFIGS).as_posix() for end in ("yaml", "py") for p in CONFIGS.rglob(f"*.{end}")
        )
    },
    # Not torch, torchvision, numpy or Detectron2: they are the user's, in the builds the user chose. Detectron2 also
    # has no one name under which all its users have it. What is listed accepts the numpy that is there.
    install_requires=[
        "filelock",
        "fvcore>=0.1.5",
        "hotcoco>=1.3",
        "matplotlib>=3.6",
        "pycocotools>=2.0.2",
        "safetensors",
        "scipy",
        "tabulate",
        "tqdm",
    ],
    # timm requires torch and torchvision by name, hence not above
    extras_require={
        "rivals": ["timm"],
        "cluster": ["submitit"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "trackio": ["trackio"],
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "hub": ["huggingface_hub"],
        "evaluators": ["cityscapesscripts", "lvis"],
        "dev": ["hypothesis", "pytest", "pytest-cov", "ruff"],
    },
)

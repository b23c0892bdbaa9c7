"""Packaging of ds-optim: what it needs, at which versions, and the two entry points that make it work unnamed.

Tool settings (ruff, mypy, pytest) live in pyproject.toml; the exact versions that continuous integration runs live in
constraints.txt. `launcher/install.sh` reads the requirements below without installing anything, hence the guard below.
"""

# The ranges of torch, deepspeed, transformers and accelerate are those of ds_optim.releases: from the oldest release
# that works (docs/results/versions.md) up to the next major one. What is read of a newer one is checked before it is
# used. The other lower bounds are the interfaces that we use; how new a tokenizers may be, transformers knows.
REQUIREMENTS = [
    "torch>=2.8,<3",
    "deepspeed>=0.18.6,<1",
    "transformers>=4.55,<6",
    "tokenizers>=0.21",
    "safetensors>=0.4.3",
    "packaging>=20",
    "numpy>=1.26",
    "psutil>=5.9",
    "pydantic>=2.10",
    "jinja2>=3.1",
    "wrapt>=1.16",
    "typer>=0.15",
    "rich>=13.9",
    "filelock>=3.16",
    "ninja>=1.11",
]

# transformers' Trainer drives DeepSpeed through accelerate.
TRAINER = ["accelerate>=1.10,<2"]

# Drawing: `ds-optim batch-size measure`, and benchmarks.
PLOT = ["matplotlib>=3.9"]

EXTRAS = {
    "trainer": TRAINER,
    "plot": PLOT,
    # Other people's optimizers, for benchmarks/step_time.py.
    "bench": ["pytorch-optimizer==4.1.0", "adan-pytorch==0.1.0", "lion-pytorch==0.2.5", "adam-mini==1.1.1"],
    "test": [
        *TRAINER,
        *PLOT,
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.115",
        "allpairspy>=2.5",
        "peft>=0.17",
        "uv>=0.9",  # benchmarks/versions.py
        "triton>=3.4; platform_system == 'Linux'",  # whose interpreter runs our programs; torch for CPUs brings none
        "ruff>=0.17,<0.18",
        "mypy>=2.4,<2.5",
        "build>=1.3",  # .ci/wheel
    ],
}

if __name__ == "__main__":
    import re
    from pathlib import Path

    from setuptools import find_packages, setup

    here = Path(__file__).parent
    readme = here / "README.md"
    # The version is written once, in the package, which cannot be imported before its requirements are there.
    version = re.search(
        r'^__version__ = "(.+)"$', (here / "ds_optim" / "__init__.py").read_text(encoding="utf-8"), re.M
    )
    assert version, "ds_optim/__init__.py states no __version__"
    setup(
        name="ds-optim",
        version=version[1],
        description="Adam-mini, Shampoo, SWAN, Adan, Lion and AdamW under DeepSpeed ZeRO, with a memory accountant",
        long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
        long_description_content_type="text/markdown",
        classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.10",
        packages=find_packages(include=["ds_optim", "ds_optim.*"]),
        py_modules=["ds_optim_autoload", "ds_optim_command"],
        package_data={"ds_optim": ["py.typed", "kernels/*.cpp", "kernels/*.h", "memory/templates/*.j2"]},
        install_requires=REQUIREMENTS,
        extras_require=EXTRAS,
        entry_points={
            "console_scripts": ["ds-optim = ds_optim_command:main"],
            # Called at the end of `import torch`, so that a script needs no import of ds_optim.
            "torch.backends": ["ds_optim = ds_optim_autoload:autoload"],
        },
    )

"""The package as others install it: from a source archive, as a wheel, into an environment with its own Detectron2."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import detectron2
import pytest

import sge_det

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
NAME = "COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml"
LAZY = "lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.py"
THE_USERS = {"torch", "torchvision", "numpy", "detectron2", "sal-detectron2"}  # in the builds the user chose


def run(*command, cwd, code=0):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged: building leaves files behind."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    folder.mkdir()
    for name in ("sge_det", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    """Built from the source archive, so that nothing is in the wheel that is not in the archive."""
    out = source.parent / "out"
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out, cwd=source)
    (archive,) = out.glob("*.tar.gz")
    build = ("--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "wheel", *build, "--wheel-dir", out, archive, cwd=out)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_config_and_nothing_else_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.*") if p.suffix in (".yaml", ".py")}
    assert {f"configs/{NAME}", f"configs/{LAZY}"} <= configs
    assert {n.removeprefix("sge_det/") for n in names if n.startswith("sge_det/configs/")} == configs
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"sge_det"}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sge_det").rglob("*.py")}
    assert {n for n in names if n.endswith(".py") and not n.startswith("sge_det/configs/")} == modules


def test_requirements_leave_torch_and_detectron2_to_the_user(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == sge_det.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert needed
    assert not {re.match(r"[\w.-]+", r).group().lower() for r in needed} & THE_USERS
    assert not [r for r in needed if re.search(r"==|<|~", r)], "only lower bounds: others' versions stay theirs"


def test_setup_runs_without_torch_and_detectron2(source):
    blocked = "import runpy, sys; sys.modules.update(torch=None, detectron2=None, numpy=None, sge_det=None); "
    script = "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py', run_name='__main__')"
    done = run(sys.executable, "-W", "ignore", "-c", blocked + script, cwd=source)
    assert done.stdout.split()[-1] == sge_det.__version__


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)

    # This environment lends torch, Detectron2 and the rest. Plain folders in a .pth: they come after the new
    # environment's own, and the .pth files in them, such as sge_det's editable installation, are not read.
    lent = [p for p in sys.path if p.endswith("-packages")] + [str(Path(detectron2.__path__[0]).parent)]
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text("\n".join(lent) + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = f"""
import json, sge_det
cfg = sge_det.get_config({NAME!r})
print(json.dumps([sge_det.__file__, sge_det.get_config_file({NAME!r}), cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SGE.ENABLED,
                  sge_det.get_config({LAZY!r}).model.backbone.bottom_up.stages.groups]))
"""
    done = run(python, "-I", "-W", "ignore", "-c", script, cwd=elsewhere)
    module, config, backbone, enabled, groups = json.loads(done.stdout.splitlines()[-1])
    assert Path(module).is_relative_to(site)
    assert Path(config).is_relative_to(site / "sge_det" / "configs")
    assert backbone == "build_sge_resnet_fpn_backbone"
    assert enabled is True
    assert groups == 64


def locked(name):
    """{name: its lines} of a lock file, for each name all versions together."""
    packages = {}
    for line in (REQUIREMENTS / name).read_text().splitlines():
        if match := re.match(r"([\w.-]+)==", line):
            package = packages.setdefault(match[1], [])
        if not line.startswith("#"):
            package.append(line)
    return packages


@pytest.mark.parametrize("name", ["lock.txt", "build.txt", "detectron2.txt", "evaluators.txt"])
def test_every_locked_package_has_hashes(name):
    packages = locked(name)
    assert packages
    for package, lines in packages.items():
        assert any("--hash=sha256:" in line for line in lines), package
    assert "://" not in (REQUIREMENTS / name).read_text()


def test_locks_follow_their_inputs():
    for source, lock in (("base.in", "lock.txt"), ("build.in", "build.txt")):
        lines = (REQUIREMENTS / source).read_text().splitlines()
        assert {re.match(r"[\w.-]+", x)[0] for x in lines if x and x[0] != "#"} <= set(locked(lock)), source
    # else the second installation would replace what the first one put in
    assert locked("build.txt")["setuptools"][0] == locked("lock.txt")["setuptools"][0]


def test_missing_keeps_what_is_there_and_torch(tmp_path):
    lock = tmp_path / "lock.txt"
    entries = ("pytest", "torch", "nvidia-cublas", "opencv-python-headless", "no-such-package")
    lock.write_text("".join(f"{name}==0.1 \\\n    --hash=sha256:{name}\n    # via x\n" for name in entries))
    done = run(sys.executable, REQUIREMENTS / "missing.py", lock, cwd=tmp_path)
    assert done.stdout == "no-such-package==0.1 \\\n    --hash=sha256:no-such-package\n    # via x\n"


@pytest.mark.parametrize("version", ["3.9", "3.15", None])
def test_install_refuses_other_pythons_in_one_sentence(version, tmp_path):
    python = tmp_path / "python"
    if version:
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
    done = run("sh", REQUIREMENTS / "install.sh", python, tmp_path / "venv", cwd=tmp_path, code=2)
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"install: '{python}' ")
    assert (version or "does not run") in message
    assert "3.10" in message and "PYTHON=" in message
    assert not (tmp_path / "venv").exists()

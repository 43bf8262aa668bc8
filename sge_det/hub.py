"""Models that travel: a folder, or a repository of the Hugging Face hub, that builds a detector and runs no code.

A folder holds ``config.yaml`` (the whole config), ``model.safetensors``, ``sge_det.json`` (what it was made with, its
categories, checksums) and ``README.md`` (the model card). Nothing else in it is looked at.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from .checkpoint.checkpointer import Checkpointer
from .checkpoint.checksums import sha256
from .checkpoint.convert import build_meta_model
from .checkpoint.safe_load import write_weights
from .checkpoint.sources import Recipe
from .config import compose_config, load_config, sge_options
from .engine.doctor import tell
from .engine.doctor.values import unusable_values
from .errors import UserError
from .files import make_folder, write_file, write_json
from .markdown import escape

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, ABOUT, CARD = "config.yaml", "model.safetensors", "sge_det.json", "README.md"
_SCHEMA = 1
_LARGEST_ABOUT = 1 << 20


def save_pretrained(
    cfg: CfgNode,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    classes: Sequence[str] | None = None,
    figures: Mapping[str, float] | None = None,
    report: str | Path | None = None,
    license: str = "",
) -> Path:
    """Writes a detector into a folder that :func:`from_pretrained` reads.

    Args:
        cfg: the config that it was trained with; ``MODEL.WEIGHTS`` names its weights unless ``model`` is given.
        folder: is made, or its four files are replaced.
        model: the detector itself.
        classes: names of the categories; by default those that the first of ``DATASETS.TEST`` is registered with.
        figures: what was measured, for the card: {"box AP": 40.2}, in the units that you name.
        report: a ``report.json`` of measure_gain, whose verdict goes into the card.
        license: of the weights, for the card's head ("apache-2.0").

    Returns:
        the folder.

    Raises:
        UserError: the weights or the report cannot be read, or the folder cannot be written.
    """
    folder = Path(folder)
    verdict = _verdict(report) if report is not None else ""
    if model is None:
        if not cfg.MODEL.WEIGHTS:
            raise UserError("save_pretrained needs trained weights: name them in MODEL.WEIGHTS, or give the model")
        model = build_model(_on_cpu(cfg))
        Checkpointer(model, whole_model=True).load(cfg.MODEL.WEIGHTS)
    travelling = _travelling(cfg)
    if classes is None and cfg.DATASETS.TEST:
        classes = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes")
    make_folder(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_weights(folder / WEIGHTS, state, Recipe.of_config(cfg).metadata(), by_suffix=False)
    write_file(folder / CONFIG, travelling.dump())
    about = {
        "schema": _SCHEMA,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "classes": list(classes or []),
        "sha256": {WEIGHTS: sha256(folder / WEIGHTS), CONFIG: sha256(folder / CONFIG)},
        "versions": {"sge_det": _version(), "detectron2": detectron2.__version__, "torch": torch.__version__},
        "figures": dict(figures or {}),
    }
    write_json(folder / ABOUT, about)
    write_file(folder / CARD, _card(travelling, about, verdict, license))
    return folder


def from_pretrained(
    name_or_folder: str | Path, *, device: str | None = None, revision: str | None = None, token: str | None = None
) -> nn.Module:
    """The detector in a folder of :func:`save_pretrained`, or in a repository of the hub, in evaluation mode.

    Its config is ``model.cfg``, the names of its categories are ``model.classes``.

    Args:
        name_or_folder: a folder, or "user/name" on the hub.
        device: "cuda", "cpu"; by default CUDA where there is some.
        revision: of the repository: a branch, tag or commit.
        token: for private repositories; by default the one that ``hf auth login`` has kept.

    Raises:
        UserError: it is not there, is damaged, is none of ours, or asks to run code.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = _download(str(name_or_folder), revision, token)
    about = _checked(folder)
    cfg = _read_config(folder / CONFIG)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        _check_size(cfg, folder)
        model = build_model(cfg)
    except UserError:
        raise
    except Exception as error:  # what Detectron2's builders make of values that contradict each other
        raise UserError(f"{folder / CONFIG} builds no model here ({type(error).__name__}: {error})") from error
    Checkpointer(model, whole_model=True).load(str(folder / WEIGHTS))
    model.cfg, model.classes = cfg, about["classes"]
    return model.eval()


def push_to_hub(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a detector",
) -> str:
    """Uploads a folder of :func:`save_pretrained` to the hub; returns the commit's address.

    Args:
        folder: as it was written; only its four files are uploaded.
        name: "user/name"; is made where it does not exist.
        private: whether it is made for its owner alone.
        token: with write access; by default the one that ``hf auth login`` has kept.
        message: of the commit.

    Raises:
        UserError: the folder is none of ours, is damaged, holds links, or the hub refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: write it with sge_det.save_pretrained")
    _checked(folder)
    for file in (CONFIG, WEIGHTS, ABOUT, CARD):
        if (folder / file).is_symlink():  # somebody else's folder would upload a file of this machine's
            raise UserError(f"{folder / file} is a link: push_to_hub uploads files that save_pretrained wrote")
    hub = _hub()
    try:
        hub.create_repo(name, private=private, exist_ok=True, token=token)
        done = hub.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=[CONFIG, WEIGHTS, ABOUT, CARD],
            commit_message=message,
            token=token,
        )
    except (OSError, ValueError) as error:  # of HTTP, and of names that cannot be
        raise UserError(f"the hub does not take {name}: {_first_line(error)}") from error
    return str(done)


def _download(name: str, revision: str | None, token: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"there is no folder {name}, and a repository of the hub is named user/name")
    try:
        return Path(
            _hub().snapshot_download(
                name, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, ABOUT, CARD]
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no folder {name}, and the hub does not give a repository of that name: {_first_line(error)}"
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError("the hub needs huggingface_hub, which is missing: pip install huggingface_hub") from error
    return huggingface_hub


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder, a pipe or a device, so {folder} is no model of sge_det's")
    try:
        if path.stat().st_size > _LARGEST_ABOUT:
            raise ValueError("it is too long")
        about = json.loads(path.read_bytes())
        if about["schema"] != _SCHEMA:
            raise ValueError(f"its schema is {about['schema']!r}, and this version knows {_SCHEMA}")
        if not isinstance(about["sha256"], dict) or not all(isinstance(name, str) for name in about["classes"]):
            raise ValueError("its sha256 or classes are of another type")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {ABOUT}, so it is no model of sge_det's: see sge_det.save_pretrained"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
    return about


def _checked(folder: Path) -> dict[str, Any]:
    """What :data:`ABOUT` says, if the files are those that it was written with."""
    about = _about(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, so it is no model of sge_det's: see sge_det.save_pretrained")
        if about["sha256"].get(name) != sha256(folder / name):
            raise UserError(f"{folder / name} is not the file that {ABOUT} was written with: get it again")
    return about


def _check_size(cfg: CfgNode, folder: Path) -> None:
    """Keeps a config from taking memory that its weights, which have every tensor of the model, do not fill."""
    try:
        state = build_meta_model(cfg).state_dict()
    except Exception as error:
        if re.search(r"\bmeta\b", str(error)):  # some models need numbers to be built
            return
        raise
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    there = (folder / WEIGHTS).stat().st_size
    if size > there:
        raise UserError(f"{folder / CONFIG} describes a model of {size} bytes, and {WEIGHTS} has {there}")


def _read_config(path: Path) -> CfgNode:
    """The config of a stranger: one file, whose values name nothing that would be imported or read."""
    compose_config(str(path))
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not a config in YAML: {_first_line(error)}") from error
    if not isinstance(loaded, dict) or "_BASE_" in loaded:
        raise UserError(f"{path} is not a whole config: a model that travels names no _BASE_")
    attention = _value(loaded, "MODEL", "SGE", "ATTENTION")
    if ":" in str(attention):
        raise UserError(
            f"{path} names a class of its author's, MODEL.SGE.ATTENTION {attention}: importing it would run code; "
            "build that model yourself and load its weights"
        )
    weights = _value(loaded, "MODEL", "WEIGHTS")
    if weights:
        raise UserError(f"{path} names other weights, MODEL.WEIGHTS {weights}: a model that travels has its own")
    cfg = load_config(str(path))
    tell(unusable_values(cfg))
    return _travelling(cfg)


def _value(node: Any, *names: str) -> Any:
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _travelling(cfg: CfgNode) -> CfgNode:
    """The config without what is of the machine that it was trained on, or would be of another's that trains on."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.REPORT_TO = "", "./output", ""
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    return cfg


def _on_cpu(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _verdict(report: str | Path) -> str:
    try:
        text = json.loads(Path(report).read_bytes())["verdict"]
        if not isinstance(text, str):
            raise ValueError("its verdict is no text")
        return text
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"the report {report} cannot be read: {_first_line(error)}") from error


def _card(cfg: CfgNode, about: Mapping[str, Any], verdict: str, license: str) -> str:
    options = sge_options(cfg)
    attention = "none" if not options.enabled else f"{options.attention}, in {', '.join(options.stages)}"
    head = {"library_name": "detectron2", "pipeline_tag": "object-detection", "tags": ["detectron2", "sge_det"]}
    if license:
        head["license"] = license
    rows = [
        ("architecture", cfg.MODEL.META_ARCHITECTURE),
        ("backbone", f"{cfg.MODEL.BACKBONE.NAME}, depth {cfg.MODEL.RESNETS.DEPTH}"),
        ("attention", attention + (f", {options.groups} groups" if options.is_sge else "")),
        ("categories", ", ".join(about["classes"]) or "not named"),
        ("images", f"{cfg.INPUT.FORMAT}, shorter side {cfg.INPUT.MIN_SIZE_TEST} px"),
        ("made with", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
    ]
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", "# A detector of sge_det", ""]
    lines += [
        "```python",
        "import sge_det",
        "",
        'model = sge_det.from_pretrained("THIS_FOLDER_OR_REPOSITORY")',
        "```",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {escape(value)} |" for name, value in rows), ""]
    if about["figures"]:
        lines += ["| measured | |", "|---|---:|"]
        lines += [f"| {escape(name)} | {value:.2f} |" for name, value in about["figures"].items()] + [""]
    if verdict:
        lines += ["What `measure_gain` says of it:", "", *(f"> {escape(line)}" for line in verdict.splitlines()), ""]
    if not about["figures"] and not verdict:
        lines += ["Nothing was measured of it, or nothing was written here.", ""]
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _version() -> str:
    from . import __version__

    return __version__

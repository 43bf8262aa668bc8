"""What a run is made from: the config, the content of its files and the versions, and where two runs differ."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from .. import __version__
from ..config import add_sge_config, sge_options
from ..data.annotations import read_annotations
from ..errors import UserError
from ..files import read_json
from ..layers.attention import is_own_class

FINGERPRINT_FILE = "fingerprint.json"
_PARTS = ("config", "start", "content", "version", "source")
# They say where and how fast a run goes, not what comes out of it.
_FREE_KEYS = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD", "VIS_PERIOD"),
    *("MODEL.SGE.LOG_PERIOD", "DATALOADER.TIMEOUT", "REPORT_TO", "SOLVER.BEST_CHECKPOINTER.ENABLED"),
    "SOLVER.BEST_CHECKPOINTER.METRIC",
)
# Off as they are by default, they change nothing, and runs from before they were there can go on.
_OFF = {
    "INPUT.PIXEL_RANGE": lambda cfg: not cfg.INPUT.PIXEL_RANGE,
    "MODEL_EMA.": lambda cfg: not cfg.MODEL_EMA.ENABLED,
    "SOLVER.AMP.PRECISION": lambda cfg: not cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.AMP.PRECISION == "float16",
    "SOLVER.GRADIENT_ACCUMULATION_STEPS": lambda cfg: cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS == 1,
    "SOLVER.EARLY_STOPPING.": lambda cfg: not cfg.SOLVER.EARLY_STOPPING.PATIENCE,
}


def fingerprint(cfg: CfgNode, contents: "Contents", processes: int, imports: Sequence[str] = ()) -> dict:
    """What the outcome of a run of ``cfg`` depends on.

    Args:
        contents: reads the files that ``cfg`` names, each once however many runs use it.
        processes: the run's, on all machines.
        imports: modules of the user's own that the run imports.

    Returns:
        ``{"config": {key: value in Python's notation}, "content": {name: hash}, "version": {package: version},
        "source": {module: hash}, "processes"}``, for JSON.

    Raises:
        UserError: a file cannot be read.
    """
    return fingerprint_of(what_counts(cfg), contents.of(cfg), processes, [*imports, *_own_attention(cfg)])


def _own_attention(cfg: CfgNode) -> list[str]:
    options = sge_options(cfg)
    return [package_of(options.attention)] if options.enabled and is_own_class(options.attention) else []


def package_of(name: str) -> str:
    """The package, or the module without one, of a module or of a class in it ("package.module:Class")."""
    module = name.partition(":")[0]
    return module.rpartition(".")[0] or module


def fingerprint_of(
    config: dict[str, str], content: dict[str, str], processes: int, imports: Sequence[str] = ()
) -> dict:
    """:func:`fingerprint` of a run whose keys and files have been read already."""
    return {
        "config": config,
        "content": content,
        "version": {
            "sge_det": __version__,
            "Detectron2": detectron2.__version__,
            "torch": torch.__version__.split("+")[0],
        },
        "source": {name: source_hash(name) for name in ("sge_det", *imports)},
        "processes": processes,
    }


def source_hash(module: str) -> str:
    """Of the Python files of a module, or of all of its package: names and content; "" where it has none.

    A version says too little where code is edited.

    Raises:
        UserError: there is no such module.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"the module {module} cannot be imported: {error}") from error
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin)
    is_package = bool(spec.submodule_search_locations)
    files = sorted(origin.parent.rglob("*.py")) if is_package else [origin]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(f"{file.relative_to(origin.parent).as_posix()}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class Contents:
    """Content hashes of data sets and weights, each read once.

    Args:
        coco_only: data sets that are not files in COCO's format are refused; otherwise they go by their names alone.
    """

    def __init__(self, *, coco_only: bool = True):
        self.coco_only = coco_only
        self.known: dict[str, str] = {}

    def of(self, cfg: CfgNode) -> dict[str, str]:
        """The hashes of what ``cfg`` trains from, by name."""
        return self.of_names((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg.MODEL.WEIGHTS)

    def of_names(self, datasets: Sequence[str], weights: str) -> dict[str, str]:
        """The hashes of data sets and of a weights file, where that is one, by name."""
        hashes = {name: self._dataset(name) for name in datasets}
        if weights and Path(weights).is_file():
            hashes["MODEL.WEIGHTS"] = self._file(weights)
        return hashes

    def _dataset(self, name: str) -> str:
        """Of the annotations, and of the names and sizes of their images."""
        if name not in self.known:
            metadata = MetadataCatalog.get(name)
            is_coco = metadata.get("evaluator_type", "coco") == "coco"
            if not is_coco or metadata.get("json_file") is None or metadata.get("image_root") is None:
                if not self.coco_only:
                    return name
                raise UserError(
                    f"the data set {name} is not in COCO's format on disk: the gain cannot be measured on it"
                )
            digest = hashlib.sha256(self._file(metadata.json_file).encode())
            try:
                for image in read_annotations(metadata.json_file).content["images"]:
                    size = os.stat(os.path.join(metadata.image_root, image["file_name"])).st_size
                    digest.update(f"{image['file_name']} {size}\n".encode())
            except FileNotFoundError as error:
                raise UserError(f"data set {name}: the image {error.filename} is not there") from error
            self.known[name] = digest.hexdigest()
        return self.known[name]

    def _file(self, path: str) -> str:
        if path not in self.known:
            try:
                with open(path, "rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            self.known[path] = digest.hexdigest()
        return self.known[path]


def what_counts(cfg: CfgNode) -> dict[str, str]:
    """The keys that a run's outcome depends on: what tunes SGE does not touch a detector without it."""
    options, section = sge_options(cfg), "MODEL.SGE."
    if not options.enabled:
        own = {f"{section}ENABLED"}
    elif not options.is_sge:
        own = {f"{section}{key}" for key in ("ENABLED", "ATTENTION", "STAGES")}
    else:
        own = {f"{section}{key}" for key in cfg.MODEL.SGE}
    if options.ignore_padding:  # of the plain twin, too
        own |= {f"{section}IGNORE_PADDING"}
    return {
        key: value for key, value in _flat(cfg) if not is_free(key, cfg) and (key in own or not key.startswith(section))
    }


def is_free(key: str, cfg: CfgNode) -> bool:
    """Whether a run's outcome does not depend on the key's value, as the other keys of ``cfg`` are."""
    if key == "TEST.EVAL_PERIOD":
        return not cfg.SOLVER.EARLY_STOPPING.PATIENCE
    return key in _FREE_KEYS or any(key.startswith(prefix) and is_off(cfg) for prefix, is_off in _OFF.items())


def _flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, repr(value)


def read_fingerprint(folder: Path, remedy: str) -> dict | None:
    """The fingerprint in the folder of a run; None where there is none.

    Args:
        remedy: what to do where it cannot be read, the end of the sentence.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_json(folder / FINGERPRINT_FILE, remedy, _PARTS)
    except FileNotFoundError:
        return None


@functools.cache
def _defaults() -> dict[str, str]:
    cfg = get_cfg()
    add_sge_config(cfg)
    return dict(_flat(cfg))


def differences(found: dict, wanted: dict) -> Iterator[str]:
    """Where the fingerprint ``found`` differs from ``wanted``, a phrase for each, what counts most first."""
    for part in _PARTS:
        there, here = found.get(part, {}), wanted.get(part, {})
        for key in [*here, *(key for key in there if key not in here)]:
            if there.get(key) != here.get(key):
                is_new = part == "config" and (key in there) != (key in here)
                if is_new and _defaults().get(key) == there.get(key, here.get(key)):
                    continue  # a version that did not know the key did what its default does
                if part == "content":
                    yield f"another content of {key}"
                elif part == "source":
                    if key in there:  # older runs did not record it
                        yield f"other source code of {key}"
                elif part == "start":
                    yield f"weights of a run with {key} {there.get(key, 'absent')}, here {here.get(key, 'absent')}"
                else:
                    yield f"{key} {there.get(key, 'absent')}, this command has {here.get(key, 'absent')}"
    if found.get("processes") != wanted["processes"]:
        yield f"{_processes(found.get('processes'))}, this command has {wanted['processes']}"


def _processes(number: int | None) -> str:
    return "1 process" if number == 1 else f"{number} processes"

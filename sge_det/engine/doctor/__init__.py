"""The config doctor: faults of a config, its weights and its data that cost a run and raise no error themselves.

One file for each thing that it looks at: settings, weights, data, run.
"""

import functools
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ...config import load_config, sge_options
from ...data.datasets import register_sample, use_datasets
from ...errors import UserError
from .batch import examine_batch
from .build import examine_build
from .data import examine_dataset
from .finding import Finding, finding_of, tell
from .run import examine_output, examine_run
from .settings import duplicate_keys, examine_settings, examine_switches, missing_weights, unregistered, wrong_groups
from .values import unusable_values
from .weights import examine_weights

__all__ = [
    "Finding",
    "diagnose",
    "examine_batch",
    "examine_files",
    "examine_run",
    "examine_settings",
    "examine_switches",
    "tell",
]


def diagnose(
    config_file: str,
    overrides: Sequence[str] = (),
    datasets: Sequence[Sequence[str]] = (),
    *,
    processes: int = 1,
    resume: bool = False,
    eval_only: bool = False,
    every_image: bool = False,
) -> list[Finding]:
    """All that is wrong with a config and what it names; errors come first.

    Args:
        config_file, overrides, datasets, eval_only: as in :func:`.training.setup_config`.
        processes: how many it is to be trained in.
        resume: whether it is to go on from ``OUTPUT_DIR``.
        every_image: open each image of the data sets, not a sample.
    """
    register_sample()
    try:
        cfg = load_config(config_file, overrides)
    except UserError as error:
        return [*duplicate_keys(config_file), finding_of(error, "--config-file")]
    findings = examine_settings(cfg, config_file, eval_only=eval_only, own_data=bool(datasets))
    if not any(finding.key == "OUTPUT_DIR" for finding in findings):
        findings += examine_output(cfg.OUTPUT_DIR)
    try:
        use_datasets(cfg, datasets, overrides, eval_only=eval_only)
    except UserError as error:
        findings.append(finding_of(error, "DATASETS"))
    findings += examine_files(cfg, overrides, eval_only=eval_only, every_image=every_image)
    if not eval_only:
        findings += examine_run(cfg, processes=processes, resume=resume)
    if not any(finding.severity == "error" for finding in findings):
        findings += examine_batch(cfg, overrides, eval_only=eval_only)
    unique = list(dict.fromkeys(findings))
    return sorted(unique, key=lambda finding: finding.severity)


def examine_files(
    cfg: CfgNode, overrides: Sequence[str] = (), *, eval_only: bool = False, every_image: bool = False
) -> list[Finding]:
    """What is wrong with the weights and the data sets of ``cfg``, or with it in their light, and what it cannot build.

    Args:
        cfg: the config.
        overrides: KEY VALUE KEY VALUE ..., whose keys are suspected first where something cannot be built.
        eval_only, every_image: as in :func:`diagnose`.
    """
    if unusable_values(cfg):
        return []
    options = sge_options(cfg)
    names = dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST))
    known = [name for name in names if name in DatasetCatalog]
    look = functools.partial(examine_dataset, every_image=every_image, pixel_range=cfg.INPUT.get("PIXEL_RANGE", ()))
    findings = [finding for name in known for finding in look(name)]
    if not unregistered(cfg) and not wrong_groups(cfg, options):
        unbuilt = examine_build(cfg, overrides, eval_only=eval_only)
        findings += unbuilt or ([] if missing_weights(cfg) else examine_weights(cfg, options))
    return [f for f in findings if not (eval_only and f.key == "MODEL.BACKBONE.FREEZE_AT")]

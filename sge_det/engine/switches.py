"""The trainer's switches in lazy configs: keys of ``train`` that stand for those of YAML configs."""

from detectron2.config import CfgNode, get_cfg
from omegaconf import DictConfig, OmegaConf

from ..config import LAZY_KEYS, LAZY_SECTIONS, add_sge_config, merge_overrides
from ..errors import UserError

# What every lazy config has of that by which the switches are judged.
_AROUND = {
    "train.output_dir": "OUTPUT_DIR",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.device": "MODEL.DEVICE",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
}
YAML_KEYS = LAZY_KEYS | _AROUND


def switches_of(cfg: DictConfig) -> CfgNode:
    """A config of YAML's keys with what a lazy one says of the trainer; of all else it has the defaults.

    Raises:
        UserError: a key that there is not, or a value of another type.
    """
    for section, (_, names) in LAZY_SECTIONS.items():
        there = OmegaConf.select(cfg, section, default={})
        if not isinstance(there, DictConfig | dict):
            raise UserError(
                f"{section} holds keys ({', '.join(names)}) and has no value of its own, and {there} stands there"
            )
        # Detectron2's own section may hold what other trainers read
        unknown = [] if section == "train.amp" else [name for name in there if name not in names]
        if unknown:
            raise UserError(f"there is no config key {section}.{unknown[0]}: {section} has {', '.join(names)}")
    found = get_cfg()
    add_sge_config(found)
    for key, name in YAML_KEYS.items():
        value = OmegaConf.select(cfg, key)
        if value is not None:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            merge_overrides(found, [name, plain])
    images = OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if found.SOLVER.GRADIENT_ACCUMULATION_STEPS != 1 and images is None:
        raise UserError(
            "train.gradient_accumulation_steps needs dataloader.train.total_batch_size, the number of images of a step"
        )
    return found

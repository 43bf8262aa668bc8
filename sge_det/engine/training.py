"""One way to set up, train and evaluate a config: the tools, the gain measurement and the tests all take it."""

import argparse
import contextlib
import logging
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, default_argument_parser
from detectron2.engine.defaults import default_writers
from detectron2.engine.hooks import EvalHook, IterationTimer, PeriodicWriter
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter

from ..checkpoint.checkpointer import Checkpointer, last_checkpoint
from ..checkpoint.sources import Recipe
from ..config import ema_decay, find_config, load_config, sge_options, skip_nonfinite
from ..data.datasets import register_sample, use_datasets
from ..data.loader import EvaluationLoader, ReplayableLoader, build_test_loader, build_train_loader
from ..errors import Stopped, UserError, user_errors
from ..evaluation.coco import build_evaluator, check_packages
from ..files import drop_torn_line, write_file
from ..modeling.blocks import hold_gates_constant, start_sge
from ..modeling.gates import GateWriter, sge_layers
from ..modeling.padding import ignore_padding
from ..solver import build_lr_scheduler, build_optimizer
from . import doctor
from .averaging import AverageHook
from .claims import keeps_config
from .evaluations import EvaluationsHook, Settled, is_settled, watches_evaluations
from .faults import in_words
from .launching import TIMEOUT_SECONDS, check_launch, find_place, launch
from .logs import start_logs
from .loss_guard import LossGuard
from .periodic import LoggedEvaluation
from .reporting import ImagesPerSecond, build_report_writer
from .steps import build_steps
from .stopping import StopHook, waiting

logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """Takes the options that an advice adds to a command at its end too, behind the KEY VALUE pairs."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed = super().parse_args(args, namespace)
        for option in ("--resume", "--overwrite"):
            if option in parsed.opts:
                parsed.opts.remove(option)
                setattr(parsed, option.strip("-"), True)
        return parsed


def run_tool(
    argv: list[str] | None,
    epilog: str | None,
    check: Callable[[argparse.Namespace], Any],
    run: Callable[[argparse.Namespace], Any],
) -> None:
    """What a tool that trains does, from its arguments to its exit code.

    Args:
        argv: its arguments; those of the process by default.
        epilog: what its help ends with.
        check: is called with the arguments once, so that a mistake is told before any process is started.
        run: is called with them in each of the run's processes; a function of a module, which other processes find.
    """
    args = argument_parser(epilog=epilog).parse_args(argv)
    go_on = "give the same command with --resume to go on"
    if args.eval_only:
        go_on = "run the same command again"
    elif args.overwrite:
        go_on = "give the same command with --resume in place of --overwrite to go on"

    @user_errors(go_on=go_on)
    def start() -> None:
        if args.eval_only and args.overwrite:
            raise UserError("--overwrite is for training: --eval-only removes nothing")
        check_launch(args, find_place())
        args.config_file = find_config(args.config_file) if args.config_file else ""
        check(args)
        launch(run, args)

    start()


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's ``default_argument_parser`` with ``--dataset``, ``--overwrite`` and ``--timeout``."""
    parser = _Parser(
        parents=[default_argument_parser(epilog)],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    parser.set_defaults(dist_url=None)
    parser.add_argument("--overwrite", action="store_true", help="remove the run that OUTPUT_DIR holds, and start anew")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long a process waits for the others of its run (default {TIMEOUT_SECONDS})",
    )
    add_dataset_option(
        parser, "register a COCO-format data set (repeatable); NUM_CLASSES, DATASETS.TRAIN and DATASETS.TEST follow"
    )
    return parser


def add_dataset_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--dataset NAME JSON IMAGES``, which :func:`setup_config` takes; ``what`` is its help."""
    parser.add_argument(
        "--dataset", nargs=3, action="append", default=[], metavar=("NAME", "JSON", "IMAGES"), help=what
    )


def setup_config(
    config_file: str,
    overrides: list[str] | tuple[str, ...] = (),
    datasets: list[tuple[str, str, str]] | tuple = (),
    *,
    eval_only: bool = False,
    resume: bool = False,
) -> CfgNode:
    """Reads a config, takes the data sets into it and checks all that can be checked before a model is built.

    Args:
        config_file: a YAML file, or the name of one that comes with sge_det.
        overrides: KEY VALUE KEY VALUE ...
        datasets: (name, annotation JSON, image folder) triples to register.
        eval_only: nothing will be trained, so that the training set need not be there.
        resume: the weights are those of the last checkpoint in ``OUTPUT_DIR``, if there is one, so that
            ``MODEL.WEIGHTS`` need not be there.

    Returns:
        the config, not frozen; ``MODEL.DEVICE`` is "cpu" where there is no GPU.

    Raises:
        UserError: anything in it that cannot work, in one sentence.
    """
    if not config_file:
        raise UserError("give a config with --config-file, for instance configs/sample/faster_rcnn_SGE_R_50_FPN.yaml")
    register_sample()
    overrides = list(overrides)
    cfg = load_config(config_file, overrides)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    resumed = resume and last_checkpoint(cfg.OUTPUT_DIR) is not None
    doctor.tell(
        doctor.examine_settings(cfg, config_file, eval_only=eval_only, own_data=bool(datasets), resumed=resumed)
    )
    use_datasets(cfg, datasets, overrides, eval_only=eval_only)
    check_packages(cfg.DATASETS.TEST)
    if comm.is_main_process():
        doctor.tell(doctor.examine_files(cfg, overrides, eval_only=eval_only))
        doctor.tell(doctor.examine_batch(cfg, overrides, eval_only=eval_only))
    return cfg


def start_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Freezes ``cfg`` and makes ``OUTPUT_DIR`` with its config and logs, as Detectron2's ``default_setup`` does.

    The config of a run that was trained there stays when something is evaluated there.

    Raises:
        UserError: the folder cannot be written.
    """
    cfg.freeze()
    start_logs(cfg.OUTPUT_DIR, args, cfg.dump())
    if comm.is_main_process() and not (args.eval_only and keeps_config(cfg.OUTPUT_DIR)):
        write_file(Path(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def plain_twin(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg`` with ``MODEL.SGE.ENABLED`` off."""
    twin = cfg.clone()
    twin.defrost()
    twin.MODEL.SGE.ENABLED = False
    return twin


def build_seeded_model(cfg: CfgNode) -> torch.nn.Module:
    """Builds the model of ``cfg``, all whose parameters that its plain twin shares start at the twin's values.

    The values depend on ``cfg.SEED`` alone (drawn anew where it is negative), whatever attention the model has.

    Raises:
        UserError: the config does not describe a model that can be built.
    """
    seed = cfg.SEED if cfg.SEED >= 0 else torch.seed() % 2**31

    def build(config: CfgNode) -> torch.nn.Module:
        torch.manual_seed(seed)
        try:
            return build_model(config)
        except (AssertionError, KeyError) as error:
            raise UserError(f"Detectron2 cannot build the model of this config: {error}") from error

    model = build(cfg)
    options = sge_options(cfg)
    if options.enabled and not options.is_sge:
        # SGE draws nothing from the generator, its rivals do
        model.load_state_dict(build(plain_twin(cfg)).state_dict(), strict=False)
    if options.ignore_padding:
        ignore_padding(model)
    return model


class Trainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` with runs that can be repeated and resumed.

    Data order, augmentations, start values and the sampling in the heads follow from ``cfg.SEED`` and the iteration's
    number, so that a run that was interrupted and resumed ends like one that was not. Honours ``MODEL.SGE.LR_FACTOR``;
    trains on CPUs in several processes too.

    Attributes:
        last_results: those of the last evaluation, in the main process.
    """

    _watch: EvaluationsHook | None = None
    _average: AverageHook | None = None

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        self.switches = cfg
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed() % 2**31
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = build_train_loader(cfg, self.seed)
        self._set_up(model, data_loader, optimizer, broadcast_buffers=False)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.cfg = cfg
        self._set_up_saving(metadata=Recipe.of_config(cfg).metadata())

    def _set_up(self, model: torch.nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, **ddp: Any) -> None:
        """Makes what steps, as ``switches`` say; ``ddp`` are of Detectron2's ``create_ddp_model``."""
        self._plain_model = model
        decay = ema_decay(self.switches)
        if decay is not None:
            self._average = AverageHook(model, decay)
        # DDP takes device ids for GPUs only
        devices = {} if self.switches.MODEL.DEVICE != "cpu" else {"device_ids": None}
        model = create_ddp_model(model, **ddp, **devices)
        self._guard = LossGuard(model, skip_nonfinite(self.switches))
        self._trainer = build_steps(self.switches, model, data_loader, optimizer)

    def _set_up_saving(self, metadata: dict | None = None) -> None:
        # whoever loads a checkpoint gets the weights that were evaluated; a run goes on from those in training as well
        trained = {"trained": self._plain_model} if self._average else {}
        self.checkpointer = Checkpointer(
            self.evaluated_model, self.switches.OUTPUT_DIR, metadata=metadata, trainer=weakref.proxy(self), **trained
        )
        self.start_iter, self.max_iter = 0, self.switches.SOLVER.MAX_ITER
        self.device = self.switches.MODEL.DEVICE
        self._is_seed_drawn = self.switches.SEED < 0
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The model that is evaluated and saved: the average of the weights where there is one."""
        return self.model if self._average is None else self._average.model

    @property
    def last_results(self) -> OrderedDict:
        return getattr(self, "_last_eval_results", OrderedDict())

    def train(self) -> None:
        try:
            super().train()
        except Settled:
            self.checkpointer.save("model_final", iteration=self.iter)
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self.last_results)

    def run(self) -> OrderedDict:
        """Trains to the end, or tells that nothing is left to train, and gives the results of the last evaluation."""
        rule, folder, done = self.switches.SOLVER.EARLY_STOPPING, self.switches.OUTPUT_DIR, self.start_iter
        if done >= self.max_iter:
            self.warn(
                f"{folder} is already trained to iteration {done}: raise SOLVER.MAX_ITER ({self.max_iter}) to train "
                "on. Evaluating it."
            )
            return self.finish()
        self.evaluate_if_cut_off()
        if done > 0 and is_settled(self.switches, done):
            self.warn(
                f"{folder} has ended early at iteration {done}: raise SOLVER.EARLY_STOPPING.PATIENCE ({rule.PATIENCE}) "
                "to train on. Evaluating it."
            )
            return self.finish()
        with waiting():
            self.train()
        return self.last_results

    def warn(self, text: str) -> None:
        logger.warning(text)

    def resume_or_load(self, resume: bool = True) -> None:
        drawn = self.seed
        super().resume_or_load(resume)
        if self.seed != drawn:
            self._trainer.reset_data_loader(lambda: build_train_loader(self.cfg, self.seed))
        self.data_loader.start = self.start_iter
        self._begin()

    def _begin(self) -> None:
        """Starts what goes by the weights that were loaded, and by how many iterations they have behind them."""
        if self.start_iter == 0 and self._average is not None:
            self._plain_model.load_state_dict(self._average.model.state_dict())
        self._start_weights()
        if self._average is not None:
            self._average.start(loaded=self.start_iter > 0)
        if self._watch is not None:
            self._watch.begin(self.start_iter)

    def _start_weights(self) -> None:
        options = sge_options(self.cfg)
        if self.start_iter == 0 and options.reset:
            start_sge(self.model, options.init)
        if options.constant:  # whatever MODEL.WEIGHTS holds
            hold_gates_constant(self.model)

    def run_step(self) -> None:
        self._guard.begin_step()
        torch.manual_seed((self.seed * 1_000_003 + self.iter) * comm.get_world_size() + comm.get_rank())
        try:
            super().run_step()
        except FloatingPointError as error:
            self._guard.handle(error, self.iter, self.device, self.checkpointer.last_good)

    def after_step(self) -> None:
        try:
            super().after_step()
        except Stopped:
            # the last step's is written already
            if self.iter + 1 < self.max_iter and comm.is_main_process():
                self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
            raise

    def after_train(self) -> None:
        if self.iter == self.max_iter:
            super().after_train()
            return
        # Stopped, or failed: no evaluation, which would begin if that was in the last step. What ended it is told, and
        # not what a writer, which may have been that, makes of it.
        self.storage.iter = self.iter
        for hook in self._hooks:
            if isinstance(hook, PeriodicWriter):
                with contextlib.suppress(Exception):
                    hook.after_train()

    def state_dict(self) -> dict:
        return super().state_dict() | {"passed_over": self._guard.passed_over, "seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._guard.passed_over = int(state_dict.get("passed_over", 0))
        if self._is_seed_drawn:  # when the run began
            self.seed = int(state_dict.get("seed", self.seed))

    def build_writers(self) -> list[EventWriter]:
        folder = self.checkpointer.save_dir
        drop_torn_line(Path(folder, "metrics.json"))
        own = self.build_report_writer()
        return [*default_writers(folder, self.max_iter), *([own] if own else [])]

    def build_report_writer(self) -> EventWriter | None:
        return build_report_writer(self.cfg)

    def build_hooks(self) -> list[HookBase]:
        return self._with_own(super().build_hooks())

    def _with_own(self, hooks: list[HookBase]) -> list[HookBase]:
        """``hooks`` with ours among them, in the places of Detectron2's or beside them."""
        switches = self.switches
        period = sge_options(switches).log_period
        if period > 0 and comm.is_main_process() and sge_layers(self.model):
            # before the evaluation, which would count as well, and before the writers, which come last
            hooks.insert(0, GateWriter(self.model, period))
        if self._average is not None:
            hooks.insert(0, self._average)
        hooks.insert(_place_of(IterationTimer, hooks) + 1, ImagesPerSecond(switches.SOLVER.IMS_PER_BATCH))
        place = _place_of(EvalHook, hooks)
        hooks[place : place + 1] = [StopHook(), LoggedEvaluation(switches.TEST.EVAL_PERIOD, self._evaluate)]
        if watches_evaluations(switches):
            self._watch = EvaluationsHook(switches, self.checkpointer)
            hooks.insert(place + 2, self._watch)
        return hooks

    def _evaluate(self) -> OrderedDict:
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        return self._last_eval_results

    def evaluate_if_cut_off(self) -> None:
        """Makes up for the evaluation after the last step, if the run ended between that step and its end."""
        hook = next(hook for hook in self._hooks if isinstance(hook, EvalHook))
        iteration = self.start_iter - 1
        if iteration < 0 or not hook._period or self.start_iter % hook._period:
            return
        is_lacking = comm.is_main_process() and (
            not _has_results(Path(self.checkpointer.save_dir), iteration)
            or (self._watch is not None and self._watch.lacks(self.start_iter))
        )
        if comm.all_gather(is_lacking)[0]:
            logger.info(f"the evaluation after iteration {iteration} was cut off: it is done now")
            results = hook._func()
            self.log_results(results, iteration)
            if self._watch is not None:
                self._watch.look(self.start_iter, results)

    def log_results(self, results: OrderedDict, iteration: int) -> None:
        """Writes the metrics of an evaluation where they would stand if it had not been cut off."""
        if results and comm.is_main_process():
            with EventStorage(iteration) as storage:
                storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
                self.write_metrics()

    def write_metrics(self) -> None:
        """Brings what was measured so far into ``metrics.json``, in the main process."""
        for hook in self._hooks:
            for writer in hook._writers if isinstance(hook, PeriodicWriter) else ():
                if isinstance(writer, JSONWriter):
                    writer.write()

    def finish_last_checkpoint(self) -> None:
        """Writes ``model_final.pth`` where the training was cut off after the last iteration and before that file."""
        last = self.checkpointer.resumed_from
        if self.start_iter <= self.max_iter and last is not None and last.name != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self.start_iter - 1)

    def finish(self) -> OrderedDict:
        """Does for a run that has been trained what may have been cut off at its end, and evaluates it."""
        self.finish_last_checkpoint()
        results = self.test(self.cfg, self.evaluated_model)
        self.log_results(results, self.start_iter)
        return results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        return build_seeded_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ReplayableLoader:
        return build_train_loader(cfg, max(cfg.SEED, 0))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> EvaluationLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> OrderedDict:
        # one process stops in the middle of an evaluation, several at its end, as they wait for each other in it
        with waiting(False) if comm.get_world_size() == 1 else contextlib.nullcontext():
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: torch.nn.Module) -> OrderedDict:
        """The results with test-time augmentation, as "bbox_TTA" and so on; the name is Detectron2's."""
        logger.info("evaluating with test-time augmentation")
        evaluators = [build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict({f"{key}_TTA": value for key, value in results.items()})


def _place_of(kind: type[HookBase], hooks: list[HookBase]) -> int:
    return next(place for place, hook in enumerate(hooks) if isinstance(hook, kind))


def train(cfg: CfgNode, *, resume: bool = False) -> OrderedDict:
    """Trains ``cfg`` to its end and evaluates it on ``DATASETS.TEST``.

    Args:
        cfg: from :func:`setup_config`.
        resume: go on from the last checkpoint in ``OUTPUT_DIR`` if there is one.

    Returns:
        Detectron2's results of the last evaluation, e.g. ``{"bbox": {"AP": 31.4, ...}}`` with AP in points (0-100);
        empty where there is no test set or this is not the main process.

    Raises:
        UserError: the loss is no longer finite, the weights do not match, or there is nothing left to train.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, or give one with --dataset NAME JSON IMAGES")
    doctor.tell(doctor.examine_run(cfg, processes=comm.get_world_size()))
    with faults_in_words(cfg.OUTPUT_DIR):
        _load_test_sets(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        results = trainer.run()
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, trainer.evaluated_model))
    return results


def _load_test_sets(cfg: CfgNode) -> None:
    """Loads and converts each test set once, so that what is wrong with one does not end a run at its end.

    Raises:
        UserError: one of them cannot be evaluated.
    """
    for name in cfg.DATASETS.TEST:
        try:
            build_test_loader(cfg, name)
            build_evaluator(cfg, name)
        except UserError:
            raise
        except Exception as error:  # whatever functions that make data sets return, and evaluators make of that
            if in_words(error, cfg.OUTPUT_DIR):
                raise
            text = " ".join(str(error).split())[:300]
            raise UserError(f"the test set {name} cannot be evaluated ({type(error).__name__}: {text})") from error


def _has_results(folder: Path, iteration: int) -> bool:
    path = folder / "metrics.json"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    # the one at the end of a run counts from the next iteration
    place = rb'"iteration": (%d|%d)[,}]' % (iteration, iteration + 1)
    return any(b"/AP" in line and re.search(place, line) for line in lines)


@contextlib.contextmanager
def faults_in_words(folder: str) -> Iterator[None]:
    """What ends as a sentence ends as one, without the traceback that Detectron2 logs of every error."""

    def has_no_sentence(record: logging.LogRecord) -> bool:
        return not (record.exc_info and in_words(record.exc_info[1], folder))

    def told_by_thread(args: threading.ExceptHookArgs) -> None:
        told = in_words(args.exc_value, folder) if args.exc_value else None
        if told is None:
            before(args)
        else:  # TensorBoard's writer has one, and tells its next caller, if there is one
            logger.warning(f"{told}; the curves for TensorBoard are not whole")

    log = logging.getLogger("detectron2.engine.train_loop")
    log.addFilter(has_no_sentence)
    before, threading.excepthook = threading.excepthook, told_by_thread
    try:
        yield
    except Exception as error:
        told = in_words(error, folder)
        if told is None or told is error:
            raise
        raise told from error
    finally:
        log.removeFilter(has_no_sentence)
        threading.excepthook = before


def evaluate(cfg: CfgNode, *, resume: bool = False) -> OrderedDict:
    """Evaluates ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint in ``OUTPUT_DIR``, on ``DATASETS.TEST``.

    Returns:
        as :func:`train`.

    Raises:
        UserError: there are no weights, or they do not fill the model.
    """
    with faults_in_words(cfg.OUTPUT_DIR):
        results = _test(cfg, load_model(cfg, resume=resume))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _test(cfg: CfgNode, model: torch.nn.Module) -> OrderedDict:
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    return results


def load_model(cfg: CfgNode, *, resume: bool = False) -> torch.nn.Module:
    """The model of ``cfg`` with ``MODEL.WEIGHTS``, or with ``resume`` with the last checkpoint in ``OUTPUT_DIR``.

    Raises:
        UserError: there are no weights, or they do not fill the model.
    """
    if not cfg.MODEL.WEIGHTS and not (resume and last_checkpoint(cfg.OUTPUT_DIR)):
        raise UserError("there are no weights to evaluate: name them with MODEL.WEIGHTS FILE")
    model = build_seeded_model(cfg)
    Checkpointer(model, cfg.OUTPUT_DIR, whole_model=True).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model

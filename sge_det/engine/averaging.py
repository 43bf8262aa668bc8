"""An exponential moving average of a model's weights (EMA), by torch's ``swa_utils``."""

from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class AverageHook(HookBase):
    """Keeps the average of a model in training; call :meth:`start` when its weights are there.

    After each step, average = decay * average + (1 - decay) * weight, of parameters and buffers alike; it starts at the
    weights that the model starts with.

    Attributes:
        model: a model like the one in training, with the averages for weights.
    """

    def __init__(self, trained: nn.Module, decay: float):
        self._trained = trained
        self._average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.model = self._average.module.eval().requires_grad_(False)

    def start(self, *, loaded: bool) -> None:
        """Begins with the trained model's weights, or goes on with those that were ``loaded`` into :attr:`model`."""
        if loaded:
            self._average.n_averaged.fill_(1)
        else:
            self._average.update_parameters(self._trained)  # the first copies

    def after_step(self) -> None:
        self._average.update_parameters(self._trained)

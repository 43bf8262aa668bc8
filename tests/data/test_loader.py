"""What becomes of the errors of loader workers."""

import os
import signal

import pytest
import torch
from torch.utils.data._utils import signal_handling


class _EndsItsMaker:
    """Kills the process that pickled it as soon as another one reads it."""

    def __reduce__(self):
        return os.kill, (os.getpid(), signal.SIGKILL)


class _OneImage(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return [_EndsItsMaker(), torch.zeros(3)]  # a tensor's memory is fetched from its maker


def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_the_loaders_error(monkeypatch):
    from sge_det.data.loader import with_plain_errors  # not above: the worker imports this module too

    loader = torch.utils.data.DataLoader(_OneImage(), num_workers=1, collate_fn=list, multiprocessing_context="spawn")
    batches = with_plain_errors(loader)
    # the loader's own handler may come too late
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", True)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
            next(batches)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _seeded(mapper):
    from sge_det.data.loader import seeded_loader

    dicts = [{"file_name": f"{number}.jpg", "number": number} for number in range(6)]
    order = (index for _ in iter(int, 1) for index in range(6))  # without end
    return seeded_loader(dicts, mapper, order, 7, 2, by_aspect=False)


def test_a_mapper_may_pass_images_over():
    """As Detectron2's loader lets it: another image comes in the place, the same one with the same seed."""

    def odd_ones(example):
        return example["number"] if example["number"] % 2 else None

    first, again = ([next(batches) for _ in range(6)] for batches in (iter(_seeded(odd_ones)), iter(_seeded(odd_ones))))
    assert first == again
    seen = [number for batch in first for number in batch]
    assert seen[1::2] == [1, 3, 5] * 2 and set(seen) == {1, 3, 5}


def test_a_mapper_that_passes_all_images_over_is_told():
    from sge_det import UserError

    with pytest.raises(UserError, match=r"the mapper gives nothing \(None\) for 1000 images"):
        next(iter(_seeded(lambda example: None)))

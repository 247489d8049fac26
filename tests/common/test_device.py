"""Where a model is trained its machine's owner chooses, and everything it reads goes there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.site import Site
from client.train import Trainer
from common.config import NoiseSource, TuningMethod, check
from common.device import CPU, device_of, gpus_of, prefer_gpu
from common.errors import ConfigError
from common.parameters import flatten
from common.tasks import TASKS, build_model
from tests.common.toy import TINY, toy_config

META = torch.device("meta")
"""A device without values: what meets it from another one fails, as on a GPU."""


@pytest.fixture
def gpus(monkeypatch):
    """As many GPUs as a test says, as far as torch's driver tells."""

    def there(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there


def test_auto_is_the_processor_where_there_is_no_gpu(gpus):
    gpus(0)
    assert (device_of("auto"), device_of("cpu"), gpus_of("auto")) == (CPU, CPU, 0)
    prefer_gpu(3)  # nothing to prefer


def test_auto_is_a_gpu_where_there_is_one_and_keeps_float32(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert [device_of(name).type for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        *("cuda", "cuda", "cuda", "cpu")
    ]
    assert device_of("cuda:1").index == 1
    assert not torch.backends.cudnn.allow_tf32
    assert [gpus_of(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [2, 2, 0, 0]


@pytest.mark.parametrize(
    ("name", "count", "remedy"),
    [("cuda", 0, "take cpu"), ("cuda:2", 2, "take cuda:0 to cuda:1, or cpu")],
)
def test_a_gpu_that_is_not_there_is_named_with_what_is(gpus, name, count, remedy):
    gpus(count)
    with pytest.raises(ConfigError, match=rf"^engine.device={name}: .*{remedy}$"):
        device_of(name)


def test_a_device_of_no_such_name_is_refused(tiny_config):
    with pytest.raises(
        ConfigError, match=r"^engine\.device=tpu: must be auto, cpu, cuda or cuda:N$"
    ):
        check(replace(tiny_config, engine=replace(tiny_config.engine, device="tpu")))


@pytest.mark.parametrize("task", [*TINY])
def test_what_a_model_reads_goes_where_it_is(task, tiny_config, tmp_path, monkeypatch):
    config = toy_config(task, tiny_config, tmp_path)
    config = replace(config, tuning=replace(config.tuning, method=TuningMethod.full))
    losses_of = Trainer(config, META)._made(3)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: False)  # models ask masks for values
    losses = losses_of(np.arange(3))
    assert (losses.device, losses.shape) == (META, (3,))


@pytest.mark.gpu
@pytest.mark.parametrize("method", [TuningMethod.full, TuningMethod.lora])
@pytest.mark.parametrize("task", [*TINY])
def test_a_round_on_a_gpu_is_that_of_the_processor(task, method, tiny_config, tmp_path):
    config = toy_config(task, tiny_config, tmp_path)
    config = replace(
        config,
        tuning=replace(config.tuning, method=method),
        privacy=replace(config.privacy, noise_multiplier=1.0, noise=NoiseSource.seeded),
    )
    site = Site("site-1", TASKS[task].toy_examples(40), (), None)
    start = flatten(build_model(config))
    here, there = Trainer(config), Trainer(config, device_of("cuda"))
    ways = [each.train(site, start, round_number=1)[0] - start for each in (here, there)]
    assert np.linalg.norm(ways[1] - ways[0]) < 1e-3 * np.linalg.norm(ways[0])
    assert abs(there.count_correct(site, start) - here.count_correct(site, start)) <= 1
